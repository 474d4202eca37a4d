"""Errors that are meant for users: what a user can mend, in a file or elsewhere, and what cannot be computed.

Any other exception, a bare ValueError included, is a bug: it ends in a traceback and never becomes a verdict, a reason
in a table or exit code 2. All are ValueErrors, so that ``except ValueError`` around a call into the library keeps
catching them.
"""

from __future__ import annotations


class UserError(ValueError):
    """An input does not fit: one line says what is wrong and what to do; exit code 2."""


class FileError(UserError):
    """A file or folder does not fit. The message already names it, so callers do not add its name."""


class NoEstimate(ValueError):
    """A statistic cannot be computed from these data; the message is the reason shown in its place."""
