"""Markdown and pictures of result files: `longreach bench report`."""
