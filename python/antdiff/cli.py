"""The ``antdiff`` command: train, compare, patch, sample, cluster, info. Each imports what it needs when it runs."""

# No postponed annotations here: tyro reads them from functions inside a function, where its own name is local.
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from antdiff.train.config import Companion, Method, TrainConfig, resumed

COMPARE_STEPS = 800
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
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ANTDIFF_DEBUG"):
            raise
        print(f"antdiff: error: {error}\n(ANTDIFF_DEBUG=1 shows where it came from)", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    import tyro

    app = tyro.extras.SubcommandApp()

    @app.command
    def train(
        config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008  (frozen)
        out: Path | None = None,
        resume: Path | None = None,
    ) -> int:
        """Train a small diffusion model on real images and measure it. No arguments are needed.

        Args:
            config: the settings.
            out: run folder; the default is the first free runs/<data>-<method>-<number>.
            resume: run folder to go on with, bit for bit; its own settings hold, only steps and device may change.
        """
        return _train(config, out, resume)

    @app.command
    def compare(
        config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig(steps=COMPARE_STEPS),  # noqa: B008  (frozen)
        methods: tuple[Method, ...] = ("vanilla", "sum", "uw", "pcgrad", "nash"),
        companions: tuple[Companion, ...] = (),
        seeds: tuple[int, ...] = (0, 1, 2),
        out: Path = Path("runs/compare"),
    ) -> int:
        """Train several methods over several seeds and show them side by side with their spread.

        The same command goes on where an interrupted one stopped.

        Args:
            config: the settings of every run; method and seed are replaced.
            methods: what to compare; vanilla (uniform t) and sum (stratified t) are always among them.
            companions: which of curriculum, routing and experts to add, each with vanilla.
            seeds: training seeds.
            out: folder of the comparison; one run folder a method and seed in it.
        """
        return _compare(config, methods, companions, seeds, out)

    @app.command
    def patch(
        run: tyro.conf.Positional[Path],
        steps: int = 400,
        lr: float = 1e-4,
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
        from antdiff.train.sample import sample as draw

        grid, archive = draw(run, n=n, steps=steps, seed=seed, device=device, out=out or run / f"samples-{n}")
        print(f"wrote {grid} and {archive}")
        return 0

    @app.command
    def cluster(
        run: Path | None = None,
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
    def info() -> int:
        """Show versions, how the extension was built, what will be used and what is missing."""
        from antdiff.info import report

        print(report())
        return 0

    # tyro gives a one-letter field two dashes; one is what people type
    args = [f"-{arg}" if arg in ("-k", "-n", "-T") else arg for arg in argv] or ["--help"]
    status: int = app.cli(prog="antdiff", args=args, description="Train diffusion models as multi-task learners.")
    return status


def _train(config: TrainConfig, out: Path | None, resume: Path | None) -> int:
    if resume is not None and out is not None:
        raise ValueError(
            f"out and resume exclude each other: a resumed run stays in its folder; got {out} and {resume}"
        )
    from antdiff.train.data import ImageData, load_data
    from antdiff.train.distributed import restarted, team
    from antdiff.train.run import closing_table, execute, extend_run, start_run

    data: ImageData | None = None

    def folder() -> tuple[TrainConfig, Path]:
        """The run's settings and its folder, made if it is new."""
        nonlocal data
        again = resume
        if restarted() and again is None:  # torchrun repeats the command: go on with what it began
            again = out if out is not None else _last_folder(config)
            again = again if again is not None and (again / "config.json").exists() else None
        if again is None:
            data = load_data(
                config.data, image_size=config.image_size
            )  # first: a mistyped name leaves no folder behind
            run = out or _free_folder(config)
            start_run(config, run)
            return config, run
        saved = TrainConfig.load(again / "config.json")
        settings = resumed(config, saved)
        data = load_data(settings.data, image_size=settings.image_size)
        extend_run(again, saved, settings.steps)
        return settings, again

    with team() as ranks:
        config, run = ranks.agree(folder)
        if ranks.leads:
            print(f"run folder {run}", flush=True)
        results = execute(config, run, data=data)
        if results is None:
            if ranks.leads:
                print(f"\nstopped; the checkpoint is whole. Go on with: antdiff train --resume {run}", file=sys.stderr)
            return 130
    if results:
        print(
            f"\n{closing_table(results, config.eval_seeds)}\n\n{run}/samples.png  {run}/curves.png  {run}/results.json"
        )
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
    start_patch(base, run, steps=steps, lr=lr, device=device)
    return _train(TrainConfig(), None, run)


def _compare(
    config: TrainConfig, methods: Sequence[Method], companions: Sequence[Companion], seeds: Sequence[int], out: Path
) -> int:
    from antdiff.train.compare import compare

    results = compare(config, methods, seeds, out, companions=companions)
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
        from antdiff.train.plots import figure

        sheet, (ax,) = figure(7, 3.2)
        clusters.plot(log_snr, ax=ax)
        sheet.savefig(plot)
        print(f"wrote {plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
