"""How commands declare their options to tyro, so that help and errors read well."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import tyro

from antdiff.train.config import TrainConfig

# tyro would show {None}|PATH and "(default: None)"; the help text states the default.
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True)
class Settings(TrainConfig):
    def __post_init__(self) -> None:
        """Check nothing: tyro would report an error under its internal name for `config`. `checked` raises it."""

    def checked(self) -> TrainConfig:
        """Return the settings. Raise ValueError if one of them is not allowed."""
        return TrainConfig(**asdict(self))


def unwrapped(command: Callable[..., int]) -> Callable[..., int]:
    """Join the lines of each argument in the docstring of `command`, since tyro keeps their line breaks in the help."""
    command.__doc__ = re.sub(r"\n {8}(?=\S)", " ", inspect.getdoc(command) or "")
    return command


def _attributes(config: type[Any]) -> str:
    """Return the docstrings of the fields of `config`, one line each, in the form that tyro reads first."""
    fields = docstring_parser.parse_from_object(config).params
    lines = (f"    {field.arg_name}: {' '.join((field.description or '').split())}" for field in fields)
    return "\n".join(["Settings of a run as typed, not checked yet.", "", "Attributes:", *lines])


Settings.__doc__ = _attributes(TrainConfig)
