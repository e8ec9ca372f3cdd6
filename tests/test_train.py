"""The training loop computes what it documents, and an interrupted run loses at most the steps since its checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from antdiff import BalancedBackward
from antdiff._devices import choose_device, sensible_threads
from antdiff._signals import stop_requests
from antdiff.analysis import Telemetry
from antdiff.cli import main
from antdiff.data import ImageData, load_data, to_uint8, to_unit
from antdiff.diffusion import log_snr
from antdiff.experiments import evaluate as run_module
from antdiff.experiments.evaluate import closing_table, execute
from antdiff.train.checkpoint import (
    CheckpointError,
    DivergenceError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from antdiff.train.config import METHODS, TrainConfig, resumed
from antdiff.train.data import Batches
from antdiff.train.ema import MovingAverage
from antdiff.train.generators import make_generators
from antdiff.train.log import read_csv
from antdiff.train.loop import train
from antdiff.train.models import build_model, draw_samples, noise_schedule
from antdiff.train.run import load_model, make_clusters, start_run

TINY = TrainConfig(
    steps=6, batch_size=9, log_every=2, checkpoint_every=3, device="cpu", eval_samples=12, eval_seeds=2, sample_steps=2
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def new_run(config: TrainConfig, folder: Path) -> Path:
    start_run(config, folder)
    return folder


def last_state(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal bit for bit. NaN, which means not measured, equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# ---- what a step computes ----------------------------------------------------------------------------------------


def test_vanilla_is_the_textbook_loop(digits: ImageData, tmp_path: Path) -> None:
    config = replace(TINY, method="vanilla", steps=4)
    run = new_run(config, tmp_path / "run")
    assert train(config, digits, run, progress=False)

    rng = make_generators(config.seed, torch.device("cpu"))
    schedule = noise_schedule()
    model = build_model("unet", 1, 8, generator_seed=rng["weights"].initial_seed())
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0)
    order = torch.randperm(len(digits.train), generator=rng["data"])
    losses = []
    for step in range(config.steps):
        x0 = to_unit(digits.train[order[step * 9 : step * 9 + 9]])
        t = torch.randint(1000, (9,), generator=rng["timesteps"])
        noise = torch.randn(x0.shape, generator=rng["noise"])
        loss = torch.nn.functional.mse_loss(model(schedule.add_noise(x0, noise, t), t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for a, p in zip(average, model.parameters(), strict=True):
                decay = min(config.ema, (1 + step) / (10 + step)) if step else 0
                a.copy_(decay * a + (1 - decay) * p)

    state = last_state(run)
    # The sums have another order, and Adam turns the sign of a gradient near zero into a full step of size lr. So the
    # distance between the two results is compared with the distance from the start. Four roundings per term leave it
    # far below 1e-3 of that.
    start = build_model("unet", 1, 8, generator_seed=rng["weights"].initial_seed())
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), start.parameters(), strict=True)).sqrt()
    off = sum((p - q).square().sum() for p, q in zip(model.parameters(), state["model"].values(), strict=True)).sqrt()
    assert off < 1e-3 * moved
    off = sum((p - q).square().sum() for p, q in zip(average, list(state["ema"].values())[1:], strict=True)).sqrt()
    assert off < 1e-3 * moved
    rows = read_csv(run / "metrics.csv")
    counted = [row["loss_0"] for row in rows]
    assert len(counted) == 2
    for row in rows:  # vanilla's weights are the shares of the clusters in the batch of 9 images
        weights = [row[f"weight_{i}"] for i in range(config.k)]
        assert sum(weights) == pytest.approx(1)
        assert weights != pytest.approx([1 / config.k] * config.k)
    # The row weights the clusters by their intervals, not by their samples: the means are close but not equal.
    assert rows[0]["loss"] == pytest.approx(np.mean(losses[:2]), rel=0.5)


@pytest.mark.parametrize("method", ["linear", "uw", "pcgrad", "nash"])
@pytest.mark.parametrize("timesteps", ["uniform", "stratified", "stratified-weighted"])
def test_methods_with_every_sampling_take_a_step(
    method: Any, timesteps: Any, digits: ImageData, tmp_path: Path
) -> None:
    config = replace(TINY, method=method, timesteps=timesteps, steps=2)
    run = new_run(config, tmp_path / "run")
    assert train(config, digits, run, progress=False)
    (row,) = read_csv(run / "metrics.csv")
    weights = [row[f"weight_{i}"] for i in range(config.k)]
    assert all(w > 0 for w in weights)
    if method in ("pcgrad", "nash"):
        assert 0 <= row["conflict_rate"] <= 1
    else:
        assert np.isnan(row["conflict_rate"])  # no cluster gradients were computed
    # An untrained network predicts about zero, so its error is the variance of the noise: 1.
    assert 0.5 < row["loss"] < 1.6


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes_bit_for_bit(method: str, digits: ImageData, tmp_path: Path) -> None:
    """An epoch has one step here, so that methods which average over an epoch do so within the run."""
    few = replace(digits, train=digits.train[:9])
    config = replace(TINY, method=method, k=3, steps=4)
    whole, broken = (new_run(config, tmp_path / name) for name in ("whole", "broken"))
    assert train(config, few, whole, progress=False)
    assert train(replace(config, steps=2), few, broken, progress=False)
    assert train(config, few, broken, progress=False)
    assert same(last_state(broken), last_state(whole))
    for row in read_csv(whole / "metrics.csv"):
        assert 0.3 < row["loss"] < 1.6
        assert np.isfinite([row[f"weight_{i}"] for i in range(3)]).all() == (method != "graddrop")
    trained = [p for p in last_state(whole)["optimizer"]["state"].values() if p["exp_avg_sq"].any()]
    assert len(trained) >= len(list(build_model("unet", 1, 8, generator_seed=0).parameters()))


class FixedDirection:
    """A method that chooses per parameter, whatever the gradients are."""

    needs = "rows"

    def direction(self, rows: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        assert [row is None for row in rows] == [False, True, False]
        return [torch.tensor([1.0, 2.0]), None, torch.full((3,), 0.25)]


def test_the_direction_of_a_method_without_weights_reaches_the_parameters() -> None:
    model = torch.nn.Module()
    model.a, model.frozen = (torch.nn.Parameter(torch.zeros(2), requires_grad=on) for on in (True, False))
    model.b = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    backward = BalancedBackward(model, FixedDirection(), 2, "split", dtype=torch.float32)
    result = backward(lambda x: x * (model.a.sum() + model.b.sum().float()), (torch.ones(4),), torch.arange(4) % 2)
    assert result.weights is None
    assert model.a.grad is not None
    assert model.b.grad is not None
    assert model.frozen.grad is None
    assert model.a.grad.tolist() == [1, 2]
    assert model.b.grad.tolist() == [0.25] * 3
    assert model.b.grad.dtype == torch.bfloat16


def test_without_conflict_pcgrad_is_the_plain_mean(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one cluster there is no conflict, so the gradient of the loss and the cluster gradient must agree."""
    states = []
    for method in ("linear", "pcgrad"):
        config = replace(TINY, method=method, k=1, steps=1, checkpoint_every=1)
        run = new_run(config, tmp_path / method)
        assert train(config, digits, run, progress=False)
        states.append(last_state(run)["optimizer"]["state"])
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-4, atol=1e-7)


def test_training_leaves_the_global_generators_alone(digits: ImageData, tmp_path: Path) -> None:
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for model in ("unet", "dit"):
        config = replace(TINY, model=model, steps=2)
        assert train(config, digits, new_run(config, tmp_path / model), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_np).all()


def test_the_average_of_the_weights_never_asks_the_device() -> None:
    """Meta tensors have no values, so that any read by the host fails. The textbook loop above tests the values."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to("meta")
    average = MovingAverage(model, 0.9)
    for _ in range(3):
        average.update_parameters(model)
    assert int(average.n_averaged) == 3
    with pytest.raises((NotImplementedError, RuntimeError)):  # the failure that a read causes
        next(model.parameters()).sum().item()


def test_batches_visit_every_image_once_an_epoch() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    batches = Batches(images, 4, torch.Generator().manual_seed(0))
    seen = torch.cat([batches.next(torch.device("cpu")) for _ in range(5)]).flatten()
    for epoch in seen.split(10):
        assert torch.equal(epoch.sort().values, to_unit(images).flatten())
    assert not torch.equal(seen[:10], seen[10:])


# ---- interruption ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "timesteps"), [("vanilla", "uniform"), ("uw", "stratified"), ("pcgrad", "auto"), ("nash", "auto")]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    method: Any, timesteps: Any, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, method=method, timesteps=timesteps, steps=7)  # 7: the last window is one step short
    whole = new_run(config, tmp_path / "whole")
    assert train(config, digits, whole, progress=False)

    broken = new_run(config, tmp_path / "broken")
    taken = 0
    original = Batches.next

    def interrupting(self: Batches, device: torch.device) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 5:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C during step 5, between rows and between checkpoints
        return original(self, device)

    monkeypatch.setattr(Batches, "next", interrupting)
    assert not train(config, digits, broken, progress=False)
    assert last_state(broken)["step"] == 5
    assert train(config, digits, broken, progress=False)
    assert taken == 7
    assert same(last_state(broken), last_state(whole))
    assert (broken / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = new_run(TINY, tmp_path / "whole")
    assert train(TINY, digits, whole, progress=False)
    broken = new_run(TINY, tmp_path / "broken")
    original = Telemetry.add

    def dying(self: Telemetry, *args: Any) -> None:
        original(self, *args)
        if len(read_csv(broken / "metrics.csv")) == 2:  # at step 4, one step after the checkpoint of step 3
            raise MemoryError

    monkeypatch.setattr(Telemetry, "add", dying)
    with pytest.raises(MemoryError):
        train(TINY, digits, broken, progress=False)
    monkeypatch.setattr(Telemetry, "add", original)
    assert last_state(broken)["step"] == 3
    assert train(TINY, digits, broken, progress=False)
    assert same(last_state(broken), last_state(whole))
    assert (broken / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_stop_requests_take_one_signal_kindly_and_the_next_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:  # noqa: PT012  (the second signal must raise)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere() -> None:
        with stop_requests() as stop:
            assert not stop.is_set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


def test_a_diverging_run_stops_and_keeps_good_checkpoints(digits: ImageData, tmp_path: Path) -> None:
    config = replace(TINY, method="vanilla", steps=3)
    run = new_run(config, tmp_path / "run")
    assert train(config, digits, run, progress=False)
    good = latest_checkpoint(run / "checkpoints")
    assert good is not None
    state = load_checkpoint(good)
    state["optimizer"]["param_groups"][0]["lr"] = 1e30
    save_checkpoint(run / "checkpoints", 3, state)
    with pytest.raises(DivergenceError, match=r"not finite at step \d; the last good checkpoint is .*step-00000003"):
        train(replace(config, steps=9), digits, run, progress=False)
    assert latest_checkpoint(run / "checkpoints") == good
    assert not np.isfinite(read_csv(run / "metrics.csv")[-1]["loss"])  # the row shows where it happened


def test_grids_over_time_disturb_nothing(digits: ImageData, tmp_path: Path) -> None:
    config = replace(TINY, grid_every=3, steps=7)
    with_grids, without = new_run(config, tmp_path / "with"), new_run(config, tmp_path / "without")
    assert train(config, digits, with_grids, progress=False)
    assert train(replace(config, grid_every=0), digits, without, progress=False)
    states = [last_state(run) for run in (with_grids, without)]
    assert [state.pop("origin")["settings"]["grid_every"] for state in states] == [3, 0]
    assert same(*states)
    grids = sorted((with_grids / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000003.png", "step-00000006.png", "step-00000007.png"]
    assert not (without / "samples").exists()
    # The last grid shows samples of the averaged network in the checkpoint, from noise with a fixed seed.
    model, _ = load_model(with_grids, config, digits.shape, torch.device("cpu"))
    images = draw_samples(
        model, noise_schedule(), 16, digits.shape, steps=2, generator=torch.Generator().manual_seed(0)
    )
    with Image.open(grids[-1]) as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (2 * 42 + 2, 8 * 42 + 2)
    assert np.array_equal(pixels[2:42:5, 2:42:5], to_uint8(images)[0, 0].numpy())


# ---- checkpoints -------------------------------------------------------------------------------------------------

STATE = {
    "weights": {"a.b": torch.arange(6.0).view(2, 3), "empty": torch.empty(0), "number": torch.tensor(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "groups": [{"betas": (0.9, 0.999), "foreach": None}]},
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "rng": torch.Generator().manual_seed(1).get_state(),
    "text": "a/b",
    "nothing": [],
    "tenth": 0.1,
}


def test_checkpoints_give_back_what_they_took(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, STATE)
    assert same(load_checkpoint(path), STATE)
    from safetensors.torch import load_file

    assert torch.equal(load_file(path)["weights/a.b"], STATE["weights"]["a.b"])  # type: ignore[index]
    for step in (10, 7, 100):
        save_checkpoint(tmp_path, step, STATE)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000010.safetensors", "step-00000100.safetensors"]
    with pytest.raises(TypeError, match=r"a checkpoint holds tensors.*got set at extra/0"):
        save_checkpoint(tmp_path, 200, {"extra": [{1}]})


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "garbage", "foreign"])
def test_a_corrupt_checkpoint_is_named_with_the_good_one_before_it(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    path = save_checkpoint(tmp_path, 2, STATE)
    raw = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        flipped = raw[:-1] + bytes([raw[-1] ^ 1])
        path.write_bytes({"cut": raw[:-3], "flipped": flipped, "empty": b"", "garbage": b"x" * 50}[damage])
    remedy = "is not an antdiff checkpoint" if damage == "foreign" else r"Delete it to resume from step-00000001"
    with pytest.raises(CheckpointError, match=remedy):
        load_checkpoint(path)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save_checkpoint(tmp_path, 1, STATE)
    before = good.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=r"No space left on device\); the last good one is .*step-00000001"):
            save_checkpoint(tmp_path, step, STATE)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert good.read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused(digits: ImageData, tmp_path: Path) -> None:
    run = new_run(TINY, tmp_path / "run")
    save_checkpoint(run / "checkpoints", 3, {**STATE, "step": 3, "model": {}})
    with pytest.raises(CheckpointError, match=r"does not fit the settings in .*config\.json"):
        train(TINY, digits, run, progress=False)


# ---- settings ----------------------------------------------------------------------------------------------------


def test_settings_survive_their_file_and_bad_ones_are_refused(tmp_path: Path) -> None:
    config = replace(TINY, lr=0.1 + 0.2, clusters="x.json")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert TrainConfig.load(path) == config
    path.write_text(json.dumps({"stepz": 3}))
    with pytest.raises(ValueError, match="does not know: stepz"):
        TrainConfig.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is not the config\.json of a run"):
        TrainConfig.load(path)
    with pytest.raises(ValueError, match="must be the folder of a run"):
        TrainConfig.load(tmp_path / "none" / "config.json")
    for bad, message in (
        ({"method": "pcgard"}, "method must be one of vanilla, pcgrad, nash, .*; got 'pcgard'"),
        ({"k": 0}, "k must be at least 1; got 0"),
        ({"k": 10}, "k must be at most batch_size, .* got k=10 with batch_size=9. Take fewer clusters"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"grid_every": -1}, "grid_every must be at least 0"),
        ({"lr": float("nan")}, "lr must be positive and finite"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"eval_samples": 5}, "eval_samples must be at least 10"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **bad)


def test_a_resumed_run_keeps_its_settings() -> None:
    saved = replace(TINY, method="uw")
    assert resumed(saved, saved) == saved
    assert resumed(replace(saved, steps=50, device="auto"), saved) == replace(saved, steps=50, device="auto")
    with pytest.raises(ValueError, match=r"only steps and device may change; got lr=0\.5 \(saved: 0\.001\)"):
        resumed(replace(saved, lr=0.5), saved)


def test_what_is_typed_at_a_resumption_counts_though_it_be_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_run(replace(TINY, lr=0.5), tmp_path / "r")
    asked: list[TrainConfig] = []
    monkeypatch.setattr(run_module, "execute", lambda config, run, **_: asked.append(config))
    default = TrainConfig()
    for steps in ([], ["--steps", str(default.steps)]):
        assert main(["train", "--resume", str(tmp_path / "r"), *steps]) == 130  # the status of a stopped run
    assert [config.steps for config in asked] == [TINY.steps, default.steps]
    assert main(["train", f"--resume={tmp_path / 'r'}", "--lr", str(default.lr)]) == 1
    assert "got lr=0.001 (saved: 0.5)" in capsys.readouterr().err


def test_clusters_and_devices_that_are_not_there(tmp_path: Path) -> None:
    curve = log_snr(noise_schedule())
    with pytest.raises(ValueError, match="clusters must be timestep, log-snr or a saved clusters JSON"):
        make_clusters("snr", 5, curve)
    saved = make_clusters("log-snr", 3, curve)
    saved.save(tmp_path / "three.json")
    name = str(tmp_path / "three.json")
    assert make_clusters(name, TINY.k, curve) == saved
    make_clusters("log-snr", 10, curve).save(tmp_path / "ten.json")
    with pytest.raises(ValueError, match="k must be at most batch_size"):
        start_run(replace(TINY, clusters=str(tmp_path / "ten.json")), tmp_path / "run")
    with pytest.raises(ValueError, match="k must agree with the clusters file or be left out; got k=4"):
        make_clusters(name, 4, curve)
    with pytest.raises(ValueError, match="cover the schedule's T=10"):
        make_clusters(name, 3, curve[:10])
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="torch sees"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="multiple of 4, for the UNet"):
        build_model("unet", 1, 18, generator_seed=0)


def test_threads_are_taken_back_and_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    cpu = torch.device("cpu")
    try:
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with sensible_threads(8, cpu):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with sensible_threads(28, cpu), sensible_threads(8, torch.device("cuda")):
            assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with sensible_threads(8, cpu):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- the whole way -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
def test_a_run_leaves_everything_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(TINY, tmp_path / "run")
    results = execute(TINY, run)
    assert results is not None
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "clusters.json", "environment.json", "metrics.csv", "samples", "tensorboard",
                     "checkpoints", "results.json", "samples.png", "curves.png", "model"}  # fmt: skip
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "results.json").read_text()) == json.loads(json.dumps(results))
    progress = capsys.readouterr().err
    assert "clusters" in progress
    table = closing_table(results, TINY.eval_seeds)
    assert "FD (digits-CNN)" in table
    assert "held-out images (floor)" in table
    assert "FID" not in table.replace("not an FID", "")
    # The exported network is the averaged one that was measured.
    from diffusers import UNet2DModel

    exported = UNet2DModel.from_pretrained(run / "model").state_dict()
    model, step = load_model(run, TINY, (1, 8, 8), torch.device("cpu"))
    assert step == TINY.steps
    assert same(exported, model.net.state_dict())
    with pytest.raises(ValueError, match="already holds a run"):
        start_run(TINY, run)
