"""Stages `prefill` and `decode`: the whole model."""
