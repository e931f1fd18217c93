"""Measurements of constraints: what compiling and masks cost."""
