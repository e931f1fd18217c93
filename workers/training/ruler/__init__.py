"""Training of a small checkpoint on RULER's tasks from exported samples: `python -m workers.training.ruler`."""
