"""Errors that are the user's to mend: one line with key, value, allowed range and the way out."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: configuration, checkpoint, document, options. Shown as one line, without a traceback."""


class LongreachError(Exception):
    """Base of every error of the clients; one line for the user."""


class InvalidRequest(LongreachError, UserError):
    """A request to the job service is wrong itself; sending it again will not help."""
