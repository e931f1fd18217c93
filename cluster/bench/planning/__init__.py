"""Predicted against measured: the planner, ETA, and stages of a simulated pipeline."""
