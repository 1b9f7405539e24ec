"""Publishing: from the folder of a run to the Hugging Face Hub, or into the package."""
