"""The errors that are answers: what a user can mend, in a file or elsewhere, and what cannot be computed.

Any other exception, a bare ValueError of this project or of a library among them, is a bug: it ends in a traceback and
never becomes a verdict, a reason in a table or exit code 2. Both are ValueErrors, so that ``except ValueError`` around
a call into the library keeps catching them.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something given from outside does not fit: one line says what is wrong and what to do; exit code 2."""


class FileError(UserError):
    """A file or folder does not fit; the message names it already, so nobody has to put its name in front again."""


class NoEstimate(ValueError):
    """A statistic cannot be computed from these data; the message is the reason that is shown in its place."""
