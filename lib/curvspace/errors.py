"""Errors that the user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Shown by the commands as one line, without a traceback: say what is wrong, where, and what to do."""
