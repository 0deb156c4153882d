"""Errors that a user can mend.

Everything a user can get wrong (a name, a number, a file) raises `InputError`, a `ValueError`
whose message says what was wrong, the value, and what would be right. The command-line programs
print it as one line and exit with status 2; any other exception is a defect and keeps its trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value given by the user cannot be used."""


class RunEnded(RuntimeError):
    """A run ended before it was finished, in a way that a user should read in one line.

    Attributes:
      status: exit status for the command-line programs.
    """

    def __init__(self, message: str, status: int = 3):
        super().__init__(message)
        self.status = status


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Returns the end of an error sentence: the nearest of `candidates`, then all of them.

    Of very many candidates only the nearest few are named, and their number.

    Example: `suggest("qproj", ["q_proj", "k_proj"])` gives
    `"did you mean 'q_proj'? Known: k_proj, q_proj"`.
    """
    known = sorted(candidates)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if len(known) > 40:
        some = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
        return f"{hint}Known: {', '.join(some)}, ... ({len(known)} in all)"
    return f"{hint}Known: {', '.join(known) if known else '(none)'}"
