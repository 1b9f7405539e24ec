"""Training with timm's recipe: `python -m train --config train/recipes/digits.yaml`."""
