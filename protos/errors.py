"""The error that is the user's to mend: one line with key, value, allowed range and the way out."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: configuration, checkpoint, document, options. Shown as one line, without a traceback."""
