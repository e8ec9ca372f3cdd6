"""What the command line prints: commands for the user to copy, warnings, and characters of any encoding."""

from __future__ import annotations

import codecs
import shlex
import shutil
import sys
import warnings
from functools import cache
from io import TextIOWrapper
from pathlib import Path

# Characters of messages and of the borders in help texts, for terminals that do not have them.
ASCII = {"\N{PLUS-MINUS SIGN}": "+-", "\N{EN DASH}": "-", "\N{LATIN SMALL LETTER E WITH ACUTE}": "e"}
ASCII |= dict.fromkeys("\N{BOX DRAWINGS LIGHT HORIZONTAL}\N{BOX DRAWINGS HEAVY HORIZONTAL}", "-")
ASCII |= dict.fromkeys("\N{BOX DRAWINGS LIGHT VERTICAL}\N{BOX DRAWINGS HEAVY VERTICAL}", "|")
ASCII |= dict.fromkeys("\u256d\u256e\u2570\u256f\u250c\u2510\u2514\u2518", "+")  # corners of boxes


def command(*args: object) -> str:
    """Return the shell command that runs ``antdiff`` with `args`, quoted, so that it works as printed.

    In an environment that is not activated, and in a source tree, the name ``antdiff`` would run nothing, or another
    installation. The command then starts with this interpreter: ``/path/to/python -m antdiff``.
    """
    return shlex.join([*_program(), *(_argument(arg) for arg in args)])


def speak_any_encoding() -> None:
    """Let standard output and error take every text, whatever the encoding of the terminal.

    A character that the encoding does not have is replaced. The bytes of a file name that is not text are written as
    they are, so that a printed command works.
    """
    codecs.register_error("antdiff", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="antdiff")


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # Python's stand-in for a byte that is not text
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return ASCII.get(character) or character.encode("ascii", "backslashreplace"), error.start + 1


def warn(message: str) -> None:
    """Warn the user in one line. The command line prints it after ``antdiff: warning:``."""
    warnings.warn(message, UserWarning, stacklevel=3)


def _argument(value: object) -> str:
    # A path that begins with a dash would be read as an option.
    return f"./{value}" if isinstance(value, Path) and str(value).startswith("-") else str(value)


@cache
def _program() -> tuple[str, ...]:
    found = shutil.which("antdiff")
    # The script is in the folder of its interpreter. A virtual environment's interpreter is a symbolic link: do not
    # resolve it.
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return ("antdiff",)
    return (sys.executable, "-m", "antdiff")
