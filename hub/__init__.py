"""From the folder of a model to the Hugging Face Hub."""
