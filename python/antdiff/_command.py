"""Commands that messages print for the user to copy."""

from __future__ import annotations

import shlex
import shutil
import sys
from functools import cache
from pathlib import Path


def command(*args: object) -> str:
    """Return the shell command that runs ``antdiff`` with `args`, quoted, so that it works as printed.

    In an environment that is not activated, and in a source tree, the name ``antdiff`` would run nothing, or another
    installation. The command then starts with this interpreter: ``/path/to/python -m antdiff``.
    """
    return shlex.join([*_program(), *map(str, args)])


@cache
def _program() -> tuple[str, ...]:
    found = shutil.which("antdiff")
    # The script is in the folder of its interpreter. A virtual environment's interpreter is a symbolic link: do not
    # resolve it.
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return ("antdiff",)
    return (sys.executable, "-m", "antdiff")
