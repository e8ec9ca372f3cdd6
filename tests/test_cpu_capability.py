"""ANTDIFF_CPU_CAPABILITY lowers the level of the CPU code, and every level gives the answers of the oracles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from antdiff import _C, info

TESTS = Path(__file__).resolve().parent
LEVELS = ["generic", "avx2", "avx512"]
SUPPORTED = LEVELS.index(_C.build_info()["supported_isa"])
# The families of loops that are compiled once per level (all users of csrc/cpu/isa.h), each against its oracle.
ORACLES = [
    "test_gram.py::test_matrix_matches_the_float64_twin",
    "test_combine.py::test_matrix_matches_the_float64_twin",
    "test_cluster_loss.py::test_matches_the_float64_twin",
    "test_interval.py::test_any_cost_gives_the_same_bits_on_every_level",
]


def python(*arguments: str, level: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ANTDIFF_CPU_CAPABILITY": level}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=TESTS, capture_output=True, text=True)


def test_every_file_with_levels_has_an_oracle_here() -> None:
    users = {path.stem for path in (TESTS.parent / "csrc" / "cpu").glob("*.cpp") if '"cpu/isa.h"' in path.read_text()}
    assert users == {oracle.partition(".py")[0].removeprefix("test_") for oracle in ORACLES}


@pytest.mark.parametrize("level", LEVELS[: SUPPORTED + 1])
def test_every_level_gives_the_answers_of_the_oracles(level: str) -> None:
    done = python("-m", "pytest", "-p", "no:cacheprovider", *ORACLES, level=level)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("asked", ["", *LEVELS])
def test_the_variable_only_lowers_the_level(asked: str) -> None:
    code = "from antdiff import _C, info; print(_C.build_info()['isa']); print(info.report())"
    done = python("-c", code, level=asked)
    assert done.returncode == 0, done.stderr
    used, report = done.stdout.split("\n", 1)
    assert used == LEVELS[min(LEVELS.index(asked) if asked else SUPPORTED, SUPPORTED)]
    lowered = f"({used}, lowered from {LEVELS[SUPPORTED]} by ANTDIFF_CPU_CAPABILITY, "
    assert lowered in report if used != LEVELS[SUPPORTED] else f"CPU kernels ({used}, " in report
    assert ("lowered from" in report) == (used != LEVELS[SUPPORTED])


@pytest.mark.parametrize("code", ["import antdiff.ops", "from antdiff import _C"])
def test_an_unknown_level_is_an_error_that_names_the_choices(code: str) -> None:
    done = python("-c", code, level="sse9")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ImportError: ANTDIFF_CPU_CAPABILITY must be generic, avx2 or avx512; got 'sse9'. Set one of these, or unset "
        "it to use the best instruction set of the processor."
    )


def test_info_names_the_choices_too() -> None:
    done = python("-m", "antdiff.info", level="sse9")
    assert "ANTDIFF_CPU_CAPABILITY must be generic, avx2 or avx512; got 'sse9'." in done.stdout
    assert info.COMMANDS["extension"] not in done.stdout  # another build would not help
