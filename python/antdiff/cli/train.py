"""``antdiff train`` and ``antdiff patch``."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import tyro

from antdiff._command import command
from antdiff._folders import holds_results, new_folder, owner
from antdiff.cli.options import OptionalPath, Settings
from antdiff.train.config import PATCH_LR, TrainConfig, resumed


def make_train(argv: Sequence[str]) -> Callable[..., int]:
    """Return the command ``antdiff train``. Its defaults depend on the arguments: --resume takes those of the run."""

    def train(
        config: tyro.conf.OmitArgPrefixes[Settings] = _defaults(argv),  # noqa: B008
        out: OptionalPath = None,
        resume: OptionalPath = None,
        accept_changed_data: bool = False,
        wandb: str | None = None,
    ) -> int:
        """Train a small diffusion model on real images and measure it. No arguments are needed.

        Args:
            config: settings of the run.
            out: run folder to create; the default is the first unused runs/<data>-<method>-<number>.
            resume: run folder to resume, bit for bit. It keeps its settings; only steps and device may change.
            accept_changed_data: with --resume, go on although the images of the run have changed. Images that were held
                out stay held out.
            wandb: Weights & Biases project to which the rows of metrics.csv are also logged.
        """
        return _train(config.checked(), out, resume, wandb, accept_changed_data)

    return train


def patch(
    run: tyro.conf.Positional[Path],
    steps: int = 400,
    lr: float = PATCH_LR,
    device: str = "auto",
    out: OptionalPath = None,
) -> int:
    """Add a mixture of prompts (DMP) to the trained DiT of a run and train it on the same data. The DiT stays frozen.

    To resume an interrupted patch, use antdiff train --resume.

    Args:
        run: run folder made by antdiff train --model dit.
        steps: optimizer steps.
        lr: learning rate of the prompts. The gate uses ten times this value.
        device: auto, cpu, cuda, cuda:1, ...
        out: run folder to create for the patch; the default is the first unused RUN-patch-<number>.
    """
    from antdiff.experiments.patch import start_patch

    named = run if run.name else run.resolve()  # "." has no name
    folder = out or partial(new_folder, named.with_name(f"{named.name}-patch"))
    config, made = start_patch(run, folder, steps=steps, lr=lr, device=device)
    return _train(config, None, made)


def _defaults(argv: Sequence[str]) -> Settings:
    """Return the values of options that are not given: those of the resumed run, or the defaults of a new one.

    With --resume, an explicit option is thus compared with the run's value, even if it is the default of a new run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", type=Path)
    run = parser.parse_known_args(argv)[0].resume if argv[:1] == ["train"] else None
    # _train refuses a folder that is not a run, after tyro has reported mistyped options.
    saved = _settings(run) if run and run.is_dir() and holds_results(run) else TrainConfig()
    return Settings(**asdict(saved))


def _settings(run: Path) -> TrainConfig:
    """Return the settings of a run, from its last checkpoint if its config.json is damaged."""
    try:
        return TrainConfig.load(run / "config.json")  # needs no torch
    except ValueError:
        from antdiff.train.run import load_settings

        return load_settings(run)


def _train(config: TrainConfig, out: Path | None, resume: Path | None, wandb: str | None = None,
           accept_changed_data: bool = False) -> int:  # fmt: skip
    if accept_changed_data and resume is None:
        raise ValueError("accept_changed_data needs a run whose data have changed. Pass --resume RUN too")
    if resume is not None and out is not None:
        raise ValueError(
            f"out and resume are mutually exclusive, since a resumed run stays in its folder; got {out} and {resume}"
        )
    if resume is not None:
        resumed(config, _settings(resume))  # refuse forbidden changes before the slow imports
    from antdiff.data import ImageData
    from antdiff.distributed.launch import is_restart, torchrun_group
    from antdiff.experiments.evaluate import closing_table, execute
    from antdiff.train.checkpoint import latest_checkpoint, set_damaged_aside
    from antdiff.train.log import WandbLogger, import_wandb
    from antdiff.train.ranks import RunRanks
    from antdiff.train.run import load_run_data, locked_run, reopen_run, start_run

    data: ImageData | None = None

    def folder() -> tuple[TrainConfig, Path]:
        """Return the settings and the folder of the run, and lock it. Create the folder if the run is new."""
        nonlocal data
        # torchrun repeats the command after a failure: resume the run that its first start created.
        again = _run_of_this_launch(config, out) if is_restart() and resume is None else resume
        if again is None:
            # Load the data first, so that a mistyped name, a missing package or a wrong size leaves no folder behind.
            data = load_run_data(config)
        else:
            lock.enter_context(locked_run(again))
            set_damaged_aside(again)
            settings = resumed(config, _settings(again))
            data = load_run_data(settings, again, accept_changes=accept_changed_data)
        ranks.rows(config.batch_size)
        if wandb is not None:
            import_wandb()
        if again is not None:
            reopen_run(again, settings)
            return settings, again
        run = start_run(config, out or partial(new_folder, _stem(config)))
        lock.enter_context(locked_run(run))
        return config, run

    with torchrun_group(), ExitStack() as lock:
        ranks = RunRanks()
        config, run = ranks.from_first(folder)
        if ranks.is_first:
            print(f"run folder {run}", flush=True)
        loggers = [WandbLogger(wandb, run, asdict(config))] if wandb is not None and ranks.is_first else []
        try:
            results = execute(config, run, data=data, loggers=loggers)
        except KeyboardInterrupt:  # a second Ctrl-C, or the first one after the training
            results = None
    if results is None:
        if ranks.is_first:
            complete = latest_checkpoint(run / "checkpoints") is not None
            state = "the last checkpoint is complete" if complete else "there is no checkpoint yet, so it starts again"
            print(f"\nstopped; {state}. Resume with: {command('train', '--resume', run)}", file=sys.stderr)
        return 130
    if results:  # empty on ranks other than 0
        print(
            f"\n{closing_table(results, config.eval_seeds)}\n\n{run}/samples.png  {run}/curves.png  {run}/results.json"
        )
        print(f"to see everything on one page: {command('report', run)}")
    return 0


def _stem(config: TrainConfig) -> Path:
    return Path("runs") / "-".join([config.data_name, config.method, *config.companions])


def _run_of_this_launch(config: TrainConfig, out: Path | None) -> Path | None:
    """Return the run that an earlier start by the same torchrun created, or None if it failed before that."""
    from antdiff.distributed.launch import launch

    stem = _stem(config)
    places = [out] if out is not None else sorted(stem.parent.glob(f"{glob.escape(stem.name)}-*"))
    mine = (run for run in places if owner(run).get("launch") == launch() and (run / "config.json").exists())
    return next(mine, None)
