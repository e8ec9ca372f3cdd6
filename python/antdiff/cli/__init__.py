"""The ``antdiff`` command: train, compare, patch, sample, cluster, analyze, report, info. Each imports what it runs."""

# No postponed annotations here: tyro reads them from functions inside a function, where its own name is local.
import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from antdiff.train.config import METHODS, PATCH_LR, Companion, TrainConfig, resumed

COMPARE_STEPS = 800
Compared = Literal[(*METHODS, "all")]  # type: ignore[valid-type]
Schedule = Literal["linear", "cosine", "ldm", "sd", "flow"]  # antdiff.diffusion.SCHEDULES; a test holds them together


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status (0 done, 1 an error, 130 stopped by Ctrl-C)."""
    argv = list(sys.argv[1:] if args is None else args)
    if argv == ["info"]:  # has to work where everything else is missing
        from antdiff.info import report

        print(report())
        return 0
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and argv[:1] != ["train"]:
            raise ValueError(
                f"only antdiff train shares its work between ranks; run {' '.join(argv[:1])} without torchrun"
            )
        return _run(argv)
    except KeyboardInterrupt:
        print("\nantdiff: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if os.environ.get("ANTDIFF_DEBUG") or (error.name or "").startswith("antdiff"):
            raise
        print(f'antdiff: error: {error}; this command needs: pip install "antdiff[train]"', file=sys.stderr)
        return 1
    except BrokenPipeError:  # antdiff cluster ... | head: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer has nowhere to go
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ANTDIFF_DEBUG"):
            raise
        print(f"antdiff: error: {error}\n(ANTDIFF_DEBUG=1 shows where it came from)", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    import tyro

    app = tyro.extras.SubcommandApp()
    defaults = _defaults(argv)

    @app.command
    def train(
        config: tyro.conf.OmitArgPrefixes[TrainConfig] = defaults,
        out: Path | None = None,
        resume: Path | None = None,
        wandb: str | None = None,
    ) -> int:
        """Train a small diffusion model on real images and measure it. No arguments are needed.

        Args:
            config: the settings.
            out: run folder; the default is the first free runs/<data>-<method>-<number>.
            resume: run folder to go on with, bit for bit; its own settings hold, only steps and device may change.
            wandb: project of Weights & Biases that gets the rows of metrics.csv too.
        """
        return _train(config, out, resume, wandb)

    @app.command
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
        return _compare(config, METHODS if "all" in methods else methods, companions, seeds, out)

    @app.command
    def patch(
        run: tyro.conf.Positional[Path],
        steps: int = 400,
        lr: float = PATCH_LR,
        device: str = "auto",
        out: Path | None = None,
    ) -> int:
        """Patch the trained DiT of a run with a mixture of prompts (DMP), on the same data. The network stays as it is.

        antdiff train --resume goes on with an interrupted one.

        Args:
            run: run folder of antdiff train --model dit.
            steps: optimizer steps.
            lr: learning rate of the prompts; the gate's is ten times that.
            device: auto, cpu, cuda, cuda:1, ...
            out: run folder of the patch; the default is the first free RUN-patch-<number>.
        """
        return _patch(run, steps, lr, device, out)

    @app.command
    def sample(
        run: tyro.conf.Positional[Path],
        n: int = 100,
        steps: int | None = None,
        seed: int = 0,
        device: str = "auto",
        out: Path | None = None,
    ) -> int:
        """Draw images from a run: a PNG grid and an npz (arr_0, uint8 NHWC).

        Args:
            run: run folder.
            n: number of images.
            steps: DDIM steps; the default is the run's.
            seed: of the starting noise.
            device: auto, cpu, cuda, cuda:1, ...
            out: where to write: OUT.png and OUT.npz; the default is RUN/samples-<n>.
        """
        from antdiff.experiments.sample import sample as draw

        grid, archive = draw(run, n=n, steps=steps, seed=seed, device=device, out=out or run / f"samples-{n}")
        print(f"wrote {grid} and {archive}")
        return 0

    @app.command
    def cluster(
        run: tyro.conf.Positional[Path | None] = None,
        schedule: Schedule = "cosine",
        T: int = 1000,
        by: str = "log-snr",
        k: int = 5,
        save: Path | None = None,
        plot: Path | None = None,
    ) -> int:
        """Print, save and plot the timestep clusters of a noise schedule, or of a run.

        Args:
            run: run folder whose clusters to show; schedule, T, by and k are then the run's.
            schedule: noise schedule; antdiff train uses cosine with T = 1000.
            T: number of timesteps.
            by: timestep, log-snr, or a saved clusters JSON.
            k: number of clusters.
            save: JSON file to write; --clusters takes it.
            plot: picture to write (log-SNR with the intervals shaded).
        """
        return _cluster(run, schedule, T, by, k, save, plot)

    @app.command
    def report(run: tyro.conf.Positional[Path], out: Path | None = None) -> int:
        """Make one HTML file of a run, finished or not, or of a comparison. It opens from the disk, without a network.

        Args:
            run: run folder, or the folder of antdiff compare.
            out: file to write; the default is RUN/report.html.
        """
        from antdiff.experiments.report import write_report

        print(f"wrote {write_report(run, out)}")
        return 0

    @app.command
    def analyze() -> int:
        """Measure what the timesteps of a run do to each other: affinity, conflict, transfer (each has its --help)."""
        raise AssertionError("antdiff analyze has commands of its own")

    @app.command
    def info() -> int:
        """Show versions, how the extension was built, what will be used and what is missing."""
        from antdiff.info import report

        print(report())
        return 0

    prog, description = "antdiff", "Train diffusion models as multi-task learners."
    if argv[:1] == ["analyze"]:
        app, argv = _analyze_app(), argv[1:]
        prog, description = "antdiff analyze", "Measure what the timesteps of a run do to each other."
    # tyro gives a one-letter field two dashes; one is what people type
    args = [f"-{arg}" if arg in ("-k", "-n", "-T") else arg for arg in argv] or ["--help"]
    status: int = app.cli(prog=prog, args=args, description=description)
    return status


def _analyze_app() -> Any:
    """The commands of ``antdiff analyze``."""
    import tyro

    app = tyro.extras.SubcommandApp()

    @app.command
    def affinity(
        run: tyro.conf.Positional[Path],
        timesteps: int = 100,
        images: int = 256,
        sketch: int | Literal["auto"] | None = "auto",
        memory: int = 1024,
        k: int | None = None,
        seed: int = 0,
        device: str = "auto",
        out: Path | None = None,
    ) -> int:
        """Do the gradients of two timesteps point the same way? Cosines, averaged over the run's checkpoints.

        Leaves arrays, figures, and clusters.json: gradient clusters that antdiff train --clusters takes. The same
        command goes on where an interrupted one stopped. antdiff train --keep-checkpoints keeps more to average over.

        Args:
            run: run folder.
            timesteps: how many, evenly spaced; the rest is interpolated.
            images: at each timestep, the same ones at all, in two halves.
            sketch: numbers to which the gradient of each part of the network is projected; None: exact. auto: exact
                if that fits the memory.
            memory: MiB to stay within (the network and its activations not counted).
            k: clusters to make; the default is the run's number.
            seed: of images, noise and sketch.
            device: auto, cpu, cuda, cuda:1, ...
            out: folder of the results; the default is RUN/analysis/affinity.
        """
        from antdiff.experiments.analyze import affinity_table, analyze_affinity

        where = out or run / "analysis" / "affinity"
        summary = analyze_affinity(
            run, timesteps=timesteps, images=images, sketch=sketch, memory=memory * 2**20, k=k, seed=seed,
            device=device, out=where,
        )  # fmt: skip
        print(f"{affinity_table(summary)}\n{where}/summary.json  affinity.png  gaps.png  layers.png")
        print(f"train with these clusters: antdiff train --clusters {where}/clusters.json")
        return 0

    @app.command
    def conflict(
        run: tyro.conf.Positional[Path],
        batch_size: int | None = None,
        batches: int = 32,
        repeats: int = 5,
        clusters: Path | None = None,
        seed: int = 0,
        device: str = "auto",
        out: Path | None = None,
    ) -> int:
        """How often do the gradients of the clusters conflict, in batches and in expectation, at each checkpoint?

        Args:
            run: run folder.
            batch_size: images a batch; the default is the run's. The smaller, the more conflict is noise.
            batches: of a repetition.
            repeats: independent repetitions, whose spread gives the intervals.
            clusters: a saved clusters JSON; the default is the run's.
            seed: of images, noise and timesteps.
            device: auto, cpu, cuda, cuda:1, ...
            out: folder of the results; the default is RUN/analysis/conflict.
        """
        from antdiff.experiments.analyze import analyze_conflict, conflict_table

        where = out or run / "analysis" / "conflict"
        summary = analyze_conflict(
            run, batch_size=batch_size, batches=batches, repeats=repeats, clusters=clusters, seed=seed, device=device,
            out=where,
        )  # fmt: skip
        print(f"{conflict_table(summary)}\n{where}/summary.json  conflict.png")
        return 0

    @app.command
    def transfer(
        run: tyro.conf.Positional[Path],
        seeds: tuple[int, ...] = (0, 1, 2),
        steps: int | None = None,
        samples: int = 1000,
        device: str = "auto",
        out: Path | None = None,
    ) -> int:
        """Is an interval better off alone? Specialists of each cluster against a joint model (negative transfer gap).

        Trains, for each seed, a joint model with the run's settings and two specialists a cluster: with equal
        iterations and with equal samples. The same command goes on where an interrupted one stopped.

        Args:
            run: run folder; its settings and clusters are used.
            seeds: of training.
            steps: of the joint models; the default is the run's, at most 400. With the run's own steps and seed its
                network is the joint model, if its average of weights reaches back an eighth of the steps at most.
            samples: images for each FD.
            device: auto, cpu, cuda, cuda:1, ...
            out: folder of the results; the default is RUN/analysis/transfer.
        """
        from antdiff.experiments.transfer import analyze_transfer, transfer_table

        where = out or run / "analysis" / "transfer"
        summary = analyze_transfer(run, seeds=seeds, steps=steps, samples=samples, device=device, out=where)
        if summary is None:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            return 130
        print(f"{transfer_table(summary)}\n{where}/summary.json  transfer.png")
        return 0

    return app


def _defaults(argv: list[str]) -> TrainConfig:
    """What `antdiff train` does where nothing is said. With --resume that is what the run did: a setting that is typed
    then differs from the run's or changes nothing, even if it is the default of a new run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", type=Path)
    run = parser.parse_known_args(argv)[0].resume if argv[:1] == ["train"] else None
    # A folder that is no run is for _train to refuse, after mistakes that are easier to see.
    return TrainConfig.load(run / "config.json") if run and (run / "config.json").exists() else TrainConfig()


def _train(config: TrainConfig, out: Path | None, resume: Path | None, wandb: str | None = None) -> int:
    if resume is not None and out is not None:
        raise ValueError(
            f"out and resume exclude each other: a resumed run stays in its folder; got {out} and {resume}"
        )
    saved = TrainConfig.load(resume / "config.json") if resume is not None else None
    if saved is not None:
        resumed(config, saved)  # a setting that may not change is refused before anything heavy is imported
    from antdiff.experiments.evaluate import closing_table, execute
    from antdiff.train.data import ImageData, load_data
    from antdiff.train.distributed import restarted, team
    from antdiff.train.log import WandbLogger, import_wandb
    from antdiff.train.run import extend_run, start_run

    data: ImageData | None = None

    def folder() -> tuple[TrainConfig, Path]:
        """The run's settings and its folder, made if it is new."""
        nonlocal data
        again = resume
        if restarted() and again is None:  # torchrun repeats the command: go on with what it began
            again = out if out is not None else _last_folder(config)
            again = again if again is not None and (again / "config.json").exists() else None
        saved = None if again is None else TrainConfig.load(again / "config.json")
        settings = config if saved is None else resumed(config, saved)
        # A mistyped name of data, or a missing package, leaves no folder behind.
        data = load_data(settings.data, image_size=settings.image_size)
        if wandb is not None:
            import_wandb()
        if again is None or saved is None:
            run = out or _free_folder(config)
            start_run(config, run)
            return config, run
        extend_run(again, saved, settings.steps)
        return settings, again

    with team() as ranks:
        config, run = ranks.agree(folder)
        if ranks.leads:
            print(f"run folder {run}", flush=True)
        loggers = [WandbLogger(wandb, run, asdict(config))] if wandb is not None and ranks.leads else []
        try:
            results = execute(config, run, data=data, loggers=loggers)
        except KeyboardInterrupt:  # a second Ctrl-C, or the first one after the training
            results = None
    if results is None:
        if ranks.leads:
            print(f"\nstopped; the last checkpoint is whole. Go on with: antdiff train --resume {run}", file=sys.stderr)
        return 130
    if results:  # of several ranks, the first has them
        print(
            f"\n{closing_table(results, config.eval_seeds)}\n\n{run}/samples.png  {run}/curves.png  {run}/results.json"
        )
        print(f"all of it on one page: antdiff report {run}")
    return 0


def _free_folder(config: TrainConfig) -> Path:
    return _first_free(Path("runs") / "-".join([Path(config.data).name, config.method, *config.companions]))


def _last_folder(config: TrainConfig) -> Path | None:
    free = _free_folder(config)
    stem, _, number = free.name.rpartition("-")
    return free.with_name(f"{stem}-{int(number) - 1}") if int(number) else None


def _first_free(stem: Path) -> Path:
    return next(run for number in itertools.count() if not (run := stem.with_name(f"{stem.name}-{number}")).exists())


def _patch(base: Path, steps: int, lr: float, device: str, out: Path | None) -> int:
    from antdiff.train.run import start_patch

    run = out or _first_free(base.with_name(f"{base.name}-patch"))
    return _train(start_patch(base, run, steps=steps, lr=lr, device=device), None, run)


def _compare(
    config: TrainConfig, methods: Sequence[str], companions: Sequence[Companion], seeds: Sequence[int], out: Path
) -> int:
    from antdiff.experiments.compare import compare

    try:
        results = compare(config, methods, seeds, out, companions=companions)
    except KeyboardInterrupt:
        results = None
    if results is None:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{(out / 'table.txt').read_text()}\n{out}/table.txt  {out}/comparison.png")
    return 0


def _cluster(
    run: Path | None, schedule: Schedule, T: int, by: str, k: int, save: Path | None, plot: Path | None
) -> int:
    from antdiff import diffusion
    from antdiff.train.run import make_clusters

    if run is not None:
        schedule, T, by, k = "cosine", 1000, str(run / "clusters.json"), TrainConfig().k
    log_snr = diffusion.log_snr(schedule, T)  # [T]
    clusters = make_clusters(by, k, log_snr)
    print(f"{clusters.k} clusters of {clusters.T} timesteps, {schedule} schedule, {by}")
    print(f"{'cluster':>7} {'timesteps':>12} {'size':>6} {'log-SNR':>18}")
    for i, (start, stop) in enumerate(itertools.pairwise(clusters.bounds)):
        span = f"{float(log_snr[start]):.2f} .. {float(log_snr[stop - 1]):.2f}"
        print(f"{i:>7} {f'{start}..{stop - 1}':>12} {stop - start:>6} {span:>18}")
    if save is not None:
        clusters.save(save)
        print(f"wrote {save}")
    if plot is not None:
        from antdiff.plotting import new_figure, plot_clusters

        figure, (ax,) = new_figure(7, 3.2)
        plot_clusters(clusters, log_snr, ax=ax)
        figure.savefig(plot)
        print(f"wrote {plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
