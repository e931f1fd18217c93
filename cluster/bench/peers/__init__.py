"""Engines that `longreach bench compare` asks beside ours."""
