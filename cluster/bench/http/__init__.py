"""Measurements and trials of the HTTP server."""
