"""Tests of ``antdiff analyze``: on a run folder from end to end, and on a linear problem with a known transfer gap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from antdiff import TimestepClusters
from antdiff.analysis import TaskAffinity
from antdiff.analysis import affinity as streaming
from antdiff.cli import main
from antdiff.data import ImageData, load_data, to_uint8
from antdiff.diffusion import log_snr
from antdiff.experiments import transfer
from antdiff.experiments.quality import Quality
from antdiff.train import prepare, run
from antdiff.train.config import TrainConfig
from antdiff.train.log import read_csv
from antdiff.train.loop import train
from antdiff.train.models import noise_schedule

TINY = TrainConfig(steps=3, batch_size=8, device="cpu", sample_steps=2)
T = 1000


def trained(config: TrainConfig, folder: Path) -> None:
    run.start_run(config, folder)
    assert train(config, load_data(config.data), folder, progress=False)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


# ---- a run, from end to end ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
def test_affinity_and_conflict_of_a_run_and_training_with_its_gradient_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(replace(TINY, checkpoint_every=1, keep_checkpoints=3), Path("r"))
    assert len(list(Path("r/checkpoints").iterdir())) == 3
    command = ["analyze", "affinity", "r", "--timesteps", "6", "--images", "8", "--k", "3", "--device", "cpu"]
    for wrong, message in (
        ("7", "images must be even, for two halves; got 7. Take 8"),
        ("0", "k must be"),
    ):
        flag = "--images" if "images" in message else "--k"
        assert main([*command, flag, wrong]) == 1
        assert message in capsys.readouterr().err
    assert not Path("r/analysis").exists()

    compute, calls = streaming._Stream._gradients, [0]

    def interrupted(self: Any, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:  # two calls per checkpoint: this is in the middle of the second checkpoint
            raise KeyboardInterrupt
        compute(self, *args)

    monkeypatch.setattr(streaming._Stream, "_gradients", interrupted)
    assert main(command) == 130
    out = Path("r/analysis/affinity")
    assert (out / "state" / "checkpoint-0.npz").exists()
    assert main(command) == 0
    assert calls[0] == 4 + 4  # the first checkpoint was not repeated
    text = capsys.readouterr().out
    assert "Spearman of affinity with the gap in t:" in text
    assert not (out / "state").exists()

    found = TaskAffinity.load(out / "affinity.npz")
    assert found.checkpoints.shape == (3, 6, 6)
    assert found.layer_names[:2] == ("conv_in", "time_embedding")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == [1, 2, 3]
    assert summary["captions"].keys() == {path.name for path in out.glob("*.png")}
    assert summary["gradients"] == 3 * 6 * 8
    assert -1 <= summary["spearman"]["t"]["low"] <= summary["spearman"]["t"]["high"] <= 1
    for name in ("affinity.png", "gaps.png", "layers.png"):
        assert pixels(out / name).std() > 10

    # a run can train with the clusters, and it keeps them
    clusters = TimestepClusters.load(out / "clusters.json")
    assert clusters == found.clusters(3)
    assert summary["clusters"]["gradient affinity"]["starts"] == clusters.starts.tolist()
    trained(replace(TINY, clusters=str(out / "clusters.json")), Path("gradient"))
    assert TimestepClusters.load("gradient/clusters.json") == clusters
    (row,) = read_csv(Path("gradient/metrics.csv"))
    assert all(np.isfinite(row[f"loss_{i}"]) for i in range(3))
    assert "loss_3" not in row

    capsys.readouterr()
    assert main(["analyze", "conflict", "r", "--batch-size", "0"]) == 1  # 0 does not mean "not given"
    assert "batch_size must be at least" in capsys.readouterr().err
    assert main(["analyze", "conflict", "r", "--batches", "2", "--repeats", "2", "--batch-size", "10"]) == 0
    assert "conflicting pairs in a batch" in capsys.readouterr().out
    with np.load("r/analysis/conflict/conflict.npz") as archive:
        assert archive["steps"].tolist() == [1, 2, 3]
        assert archive["cosine"].shape == (3, 2, 5, 5)
        rate = archive["rate"]
        assert ((rate >= 0) & (rate <= 1)).all()
    conflict = json.loads(Path("r/analysis/conflict/summary.json").read_text())
    assert conflict["checkpoints"]["3"]["batch_share"]["mean"] == pytest.approx(rate[2].sum() / (2 * 5 * 4))
    assert pixels(Path("r/analysis/conflict/conflict.png")).std() > 10
    once = ["analyze", "conflict", "r", "--batches", "2", "--repeats", "1", "--batch-size", "10", "--out", "once"]
    assert main(once) == 0
    conflict = json.loads(Path("once/summary.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert conflict["checkpoints"]["3"]["batch_share"]["low"] is None


@pytest.mark.usefixtures("few_digits")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_transfer_of_a_run_goes_on_and_reuses_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(replace(TINY, ema=0.0, k=2), Path("r"))
    monkeypatch.setattr(transfer, "feature_net", lambda data: None)
    monkeypatch.setattr(transfer, "Judge", SecondMoment)
    folders: list[Path] = []
    train, allowed = transfer.train, [2]

    def counted(config: TrainConfig, data: ImageData, folder: Path, **options: Any) -> bool:
        if len(folders) == allowed[0]:
            return False  # as after a signal
        folders.append(folder)
        return train(config, data, folder, **options)

    monkeypatch.setattr(transfer, "train", counted)
    command = ["analyze", "transfer", "r", "--seeds", "0", "--samples", "12"]
    assert main(command) == 130
    assert "repeat the same command" in capsys.readouterr().err
    allowed[0] = 99
    assert main(command) == 0
    # the run itself is the joint model, since steps and seed are those of the run; two clusters, two budgets
    names = [str(folder.relative_to("r/analysis/transfer/seed0")) for folder in folders]
    assert names == ["cluster0-iterations", "cluster1-iterations", "cluster0-samples", "cluster1-samples"]
    assert "one seed: no statement possible" in capsys.readouterr().out
    summary = json.loads(Path("r/analysis/transfer/summary.json").read_text())
    assert summary["ntg_fd"]["samples"]["intervals"][0]["low"] is None
    with np.load("r/analysis/transfer/transfer.npz") as archive:
        assert archive["loss_samples"].shape == (1, 2)
    assert main(command) == 0  # nothing is left to train
    assert len(folders) == 4
    before = summary["ntg_loss"]
    longer = replace(TrainConfig.load(Path("r/config.json")), steps=4)
    Path("r/config.json").write_text(longer.to_json())
    assert train(longer, load_data("digits"), Path("r"), progress=False)
    for asked in ([], ["--steps", "2"]):  # neither measurements nor specialists of other steps are reused
        assert main([*command, *asked]) == 1
        assert "cluster0-iterations holds a run with other settings" in capsys.readouterr().err
    assert len(folders) == 4
    # The run has four steps, so a separate joint model is trained.
    assert main([*command, "--steps", "2", "--out", "two"]) == 0
    assert folders[4] == Path("two/seed0/joint")
    assert json.loads(Path("two/summary.json").read_text())["ntg_loss"] != before
    clusters = TimestepClusters.load("r/clusters.json")
    TimestepClusters(clusters.T, [0, 100]).save("r/clusters.json")
    assert main([*command, "--steps", "2", "--out", "two"]) == 1  # as if the run had other clusters
    assert "holds a run with other settings" in capsys.readouterr().err
    assert pixels(Path("r/analysis/transfer/transfer.png")).std() > 10


# ---- a known gap -----------------------------------------------------------------------------------------------------


class OneNumber(nn.Module):
    """A denoiser with one parameter c, whose noise estimate is c x."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.c * x

    def auxiliary_loss(self) -> float:
        return 0.0

    def save(self, folder: Path) -> None:
        pass


class SecondMoment:
    """Replaces Judge: a distance between pixel distributions that needs no features."""

    def __init__(self, data: ImageData, net: Any) -> None:
        pass

    def measure(self, images: Tensor) -> Quality:
        return Quality(float(images.double().std()), 0.0, 0.0)


def levels() -> tuple[Tensor, Tensor]:
    x = log_snr(noise_schedule())
    return x.sigmoid(), (-x).sigmoid()  # a_t^2 and s_t^2, [T]


def test_the_gap_of_linear_denoisers_is_that_of_their_optima(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specialists are better than the joint model by a known amount.

    For x_t = a x_0 + s e with E x_0^2 = m, the loss of c x_t is (1 - c s)^2 + c^2 a^2 m. The best c for a set of
    timesteps is therefore sum s / sum (s^2 + a^2 m).

    Training ends within |dc| < 0.02 of this optimum (steps of the averaged Adam at lr 0.02), which costs
    (s^2 + a^2 m) dc^2 < 4e-4. The losses are means over 8 x 400 x 16 errors with common noise, which leaves 2 % of the
    gap as error.
    """
    generator = torch.Generator().manual_seed(5)  # not 0, the seed of the noise with which losses are measured
    x0 = to_uint8(0.8 * torch.randn(400, 1, 4, 4, generator=generator).sign())
    data = ImageData("gaussian", x0, x0, None, None)
    for module in (prepare, run):
        monkeypatch.setattr(module, "make_model", OneNumber)
    monkeypatch.setattr(transfer, "load_run_data", lambda *_, **__: data)
    monkeypatch.setattr(transfer, "feature_net", lambda data: None)
    monkeypatch.setattr(transfer, "Judge", SecondMoment)
    clusters = TimestepClusters(T, [0, 300])
    clusters.save(tmp_path / "two.json")
    config = TrainConfig(
        method="vanilla", clusters=str(tmp_path / "two.json"), k=2, steps=360, batch_size=32, lr=0.02, device="cpu",
        sample_steps=4, log_every=360, checkpoint_every=360,
    )  # fmt: skip
    run.start_run(config, tmp_path / "r")

    summary = transfer.analyze_transfer(tmp_path / "r", seeds=(0, 1), steps=360, samples=10, progress=False)
    assert summary is not None
    a2, s2 = levels()
    m = float((x0.double() / 127.5 - 1).square().mean())

    def best(start: int, stop: int) -> float:
        return float(s2[start:stop].sqrt().sum() / (s2 + a2 * m)[start:stop].sum())

    def loss(c: float, start: int, stop: int) -> float:
        at = [start + (2 * probe + 1) * (stop - start) // 16 for probe in range(8)]  # the probes of held_out_losses
        return float(((1 - c * s2[at].sqrt()).square() + c * c * a2[at] * m).mean())

    for i, span in enumerate(((0, 300), (300, 1000))):
        want = loss(best(*span), *span) - loss(best(0, T), *span)
        assert want < -0.005
        for budget in ("iterations", "samples"):
            found = summary["ntg_loss"][budget]["intervals"][i]
            assert found["mean"] == pytest.approx(want, rel=0.05, abs=1e-3), (span, budget)
        assert summary["ntg_loss"]["samples"]["verdicts"][i] == "the specialist is better: negative transfer"
    assert summary["specialist_steps"] == {"iterations": [360, 360], "samples": [108, 252]}


def test_a_chain_changes_hands_at_the_edges_of_the_interval() -> None:
    from antdiff.train.models import draw_samples

    class Constant(OneNumber):
        def __init__(self, c: float) -> None:
            super().__init__()
            self.seen: list[int] = []
            nn.init.constant_(self.c, c)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen.append(int(t[0]))
            return super().forward(x, t)

    schedule = noise_schedule()

    def draw(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return draw_samples(model, schedule, 3, (1, 2, 2), steps=10, generator=generator)

    joint, special = Constant(0.3), Constant(0.9)
    assert torch.equal(draw(transfer.switched(joint, joint, (200, 500), T)), draw(joint))
    joint.seen.clear()
    for span in ((200, 500), (0, 200), (500, T)):
        hybrid = draw(transfer.switched(joint, special, span, T))
        assert all(span[0] <= t < span[1] for t in special.seen)
        assert not any(span[0] <= t < span[1] for t in joint.seen)
        assert len(special.seen) + len(joint.seen) == 10
        assert special.seen
        joint.seen.clear()
        special.seen.clear()
        assert not torch.equal(hybrid, draw(joint))
        joint.seen.clear()


def test_steps_and_averages_of_specialists() -> None:
    clusters = TimestepClusters(T, [0, 100, 400])
    config = TrainConfig(method="vanilla", steps=200)
    assert [transfer.specialist_steps(config, clusters, i, "samples") for i in range(3)] == [20, 60, 120]
    assert transfer.specialist_steps(config, clusters, 0, "iterations") == 200
    balanced = TrainConfig(method="pcgrad", steps=200)  # each cluster gets a third of the batch
    assert [transfer.specialist_steps(balanced, clusters, i, "samples") for i in range(3)] == [67, 67, 67]
    assert transfer.with_average(TrainConfig()) == TrainConfig()  # so the default run can be its own joint model
    assert transfer.with_average(replace(config, steps=80)).ema == pytest.approx(0.9)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_mistakes_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run.start_run(TrainConfig(), Path("new"))
    run.start_run(TrainConfig(curriculum=True), Path("companion"))
    for args, message in (
        (["affinity", "nowhere"], "nowhere must be the folder of a run"),
        (["affinity", "new"], "new has no checkpoint yet: train it first"),
        (["conflict", "new"], "new has no checkpoint yet: train it first"),
        (["transfer", "nowhere"], "nowhere must be the folder of a run"),
        (["transfer", "companion"], "run must have one plain network, trained on all timesteps; got curriculum"),
        (["transfer", "new", "--seeds", "1", "1"], "seeds must be distinct"),
        (["transfer", "new", "--samples", "2"], "samples must be at least 10"),
        (["transfer", "new", "--steps", "0"], "steps must be at least 1"),
    ):
        assert main(["analyze", *args]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="a specialist is trained with method vanilla"):
        TrainConfig(specialist=0)
    with pytest.raises(ValueError, match=r"specialist must be a cluster, one of 0 \.\. 4; got 5"):
        run.start_run(TrainConfig(method="vanilla", specialist=5), Path("five"))
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 2"):
        TrainConfig(keep_checkpoints=1)
