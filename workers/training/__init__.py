"""Training of the small needle checkpoint in `configs/needle` from its recipe: `python -m workers.training.needle`."""
