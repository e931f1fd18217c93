"""Measurements of constraints: what compiling and masks cost, and what they add to a token."""
