"""Errors that a user can mend.

Everything a user can get wrong (a name, a number, a file) raises `InputError`, a `ValueError`
whose message says what was wrong, the value, and what would be right. The command-line programs
print it as one line and exit with status 2; any other exception is a defect and keeps its trace.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator

# Characters of a message: names and values in it may come from a file and have any length.
MAX_MESSAGE = 1200


class InputError(ValueError):
    """A value given by the user cannot be used.

    The message becomes one line of printable characters: others, which a damaged file may bring
    into it, are written as escapes, and of a very long one the middle is left out.
    """

    def __init__(self, message: str):
        super().__init__(one_line(str(message)))


def one_line(message: str) -> str:
    """Returns the text with its middle left out if it is very long, and all of it printable."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE * 3 // 5]} [...] {message[-MAX_MESSAGE // 5 :]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


@contextlib.contextmanager
def naming(path: os.PathLike[str] | str) -> Iterator[None]:
    """Puts `path` before the message of an InputError from inside, unless it is already there."""
    try:
        yield
    except InputError as error:
        if os.fspath(path) in str(error):
            raise
        raise InputError(f"{os.fspath(path)}: {error}") from error


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
