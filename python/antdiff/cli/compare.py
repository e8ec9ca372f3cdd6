"""``antdiff compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from antdiff.train.config import METHODS, Companion, TrainConfig

COMPARE_STEPS = 800
_COMPARED = (*METHODS, "all")
Compared = Literal[_COMPARED]  # type: ignore[valid-type]


def compare(
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig(steps=COMPARE_STEPS),  # noqa: B008  (frozen)
    methods: tuple[Compared, ...] = ("vanilla", "linear", "uw", "pcgrad", "nash"),
    companions: tuple[Companion, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = Path("runs/compare"),
) -> int:
    """Train several methods over several seeds and show them side by side with their spread.

    The same command goes on where an interrupted one stopped.

    Args:
        config: the settings of every run; method and seed are replaced.
        methods: what to compare, or all; vanilla (uniform t) and linear (stratified t) are always among them.
        companions: which to add, each with vanilla; patch (a DiT's) with a quarter of the steps on top, beside a
            run that goes on as long without it.
        seeds: training seeds.
        out: folder of the comparison; one run folder a method and seed in it.
    """
    from antdiff.experiments import compare as comparison

    try:
        results = comparison.compare(
            config, METHODS if "all" in methods else methods, seeds, out, companions=companions
        )
    except KeyboardInterrupt:
        results = None
    if results is None:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{(out / 'table.txt').read_text()}\n{out}/table.txt  {out}/comparison.png")
    return 0
