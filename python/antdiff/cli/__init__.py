"""The ``antdiff`` command: train, compare, patch, sample, cluster, analyze, report, info.

Help and mistyped options do not import torch or anything else that is slow: each command imports what it runs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from antdiff._command import speak_any_encoding


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0 for success, 1 for an error, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if args is None else args)
    speak_any_encoding()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        return _main(argv)


def _main(argv: list[str]) -> int:
    if argv == ["info"]:  # must work even if every other package is missing
        from antdiff.info import report

        print(report())
        return 0
    if argv == ["--version"]:
        from antdiff import __version__

        print(f"antdiff {__version__}")
        return 0
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and argv[:1] != ["train"]:
            raise ValueError(
                f"only antdiff train can run on several ranks; got {' '.join(argv[:1])}. Run it without torchrun"
            )
        return _run(argv)
    except KeyboardInterrupt:
        print("\nantdiff: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if os.environ.get("ANTDIFF_DEBUG") or (error.name or "").startswith("antdiff"):
            raise
        from antdiff.info import train_extra_remedy

        print(f"antdiff: error: {error}. {train_extra_remedy()}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # antdiff cluster ... | head: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard the rest of the buffer
        return 0
    except Exception as error:
        if os.environ.get("ANTDIFF_DEBUG"):
            raise
        print(f"antdiff: error: {_one_line(error)}\n(set ANTDIFF_DEBUG=1 to see the traceback)", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    """Return the message of an error in one line. Of errors that antdiff does not raise itself, also their type."""
    text = " ".join(str(error).split())
    if text and isinstance(error, (ValueError, OSError, RuntimeError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    place = "" if category is UserWarning else f"{category.__name__} in {filename}: "
    print(f"antdiff: warning: {place}{' '.join(str(message).split())}", file=sys.stderr)


def _run(argv: list[str]) -> int:
    import tyro

    from antdiff.cli import analyze, cluster, compare, results, train
    from antdiff.cli.options import unwrapped

    prog, description = "antdiff", "Train diffusion models as multi-task learners."
    commands: list[Callable[..., int]] = [
        train.make_train(argv), compare.compare, train.patch, results.sample, cluster.cluster, results.report,
        analyze.analyze, info,
    ]  # fmt: skip
    if argv[:1] == ["analyze"]:
        prog, description = "antdiff analyze", "Measure how the timesteps of a run affect each other."
        commands, argv = [analyze.affinity, analyze.conflict, analyze.transfer], argv[1:]
    app = tyro.extras.SubcommandApp()
    for function in commands:
        app.command(unwrapped(function))
    # tyro gives a one-letter option two dashes, but people type one.
    args = [f"-{arg}" if arg in ("-k", "-n", "-T") else arg for arg in argv] or ["--help"]
    status: int = app.cli(prog=prog, args=args, description=description)
    return status


def info() -> int:
    """Show versions, how the extension was built, which kernels will be used, and what is missing."""
    from antdiff.info import report

    print(report())
    return 0
