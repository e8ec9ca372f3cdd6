"""``antdiff compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from antdiff.cli.options import Settings
from antdiff.train.config import METHODS, Companion

COMPARE_STEPS = 800
_COMPARED = (*METHODS, "all")
Compared = Literal[_COMPARED]  # type: ignore[valid-type]


def compare(
    config: tyro.conf.OmitArgPrefixes[Settings] = Settings(steps=COMPARE_STEPS),  # noqa: B008  (frozen)
    methods: tuple[Compared, ...] = ("vanilla", "linear", "uw", "pcgrad", "nash"),
    companions: tuple[Companion, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = Path("runs/compare"),
) -> int:
    """Train several methods with several seeds each, and show their results side by side with the spread.

    Repeat the same command to resume an interrupted comparison.

    Args:
        config: settings of every run; method and seed are overwritten.
        methods: methods to compare, or all. vanilla (uniform t) and linear (stratified t) are always included.
        companions: companions to compare, each combined with vanilla. patch (DiT only) trains a patch of the vanilla
            run for a quarter of the steps; a run that takes as many extra steps without the patch is added.
        seeds: training seeds of each method.
        out: folder of the comparison. It holds one run folder per method and seed.
    """
    from antdiff.experiments import compare as comparison

    try:
        results = comparison.compare(
            config.checked(), METHODS if "all" in methods else methods, seeds, out, companions=companions
        )
    except KeyboardInterrupt:
        results = None
    if results is None:
        print("\nstopped; repeat the same command to resume", file=sys.stderr)
        return 130
    print(f"\n{(out / 'table.txt').read_text(encoding='utf-8')}\n{out}/table.txt  {out}/comparison.png")
    return 0
