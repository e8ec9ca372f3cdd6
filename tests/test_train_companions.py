"""The companions as flags of the training job: a run with each one trains, resumes bit for bit, loads and samples."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from antdiff import TimestepClusters
from antdiff.cli import main
from antdiff.companions import ExpertBank, MixtureOfPrompts
from antdiff.companions.turns import ExpertTurns
from antdiff.data import ImageData, load_data
from antdiff.experiments.compare import compare
from antdiff.experiments.evaluate import execute
from antdiff.experiments.patch import start_patch
from antdiff.experiments.quality import FeatureNet, held_out_losses
from antdiff.train.checkpoint import latest_checkpoint, load_checkpoint
from antdiff.train.config import TrainConfig, resumed
from antdiff.train.generators import make_generators
from antdiff.train.log import read_csv
from antdiff.train.loop import train
from antdiff.train.prepare import make_model
from antdiff.train.run import load_model, start_run

TINY = TrainConfig(
    steps=6, batch_size=9, log_every=2, checkpoint_every=3, device="cpu", eval_samples=12, eval_seeds=1, sample_steps=2
)
CASES = {
    "curriculum": replace(TINY, curriculum=True),
    "curriculum, UW": replace(TINY, curriculum=True, method="uw"),
    "curriculum, vanilla": replace(TINY, curriculum=True, method="vanilla"),
    "routing": replace(TINY, routing=True),
    "both, DiT": replace(TINY, curriculum=True, routing=True, model="dit", method="nash"),
    "experts": replace(TINY, experts=2),
    "experts, DiT": replace(TINY, experts=2, model="dit"),
}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def state(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal bit for bit. NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return bool(a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def resumes(config: TrainConfig, whole: Path, halves: Path, digits: ImageData) -> None:
    assert train(config, digits, whole, progress=False)
    assert train(replace(config, steps=3), digits, halves, progress=False)
    assert train(config, digits, halves, progress=False)
    assert same(state(whole), state(halves))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case: str, tmp_path: Path, digits: ImageData) -> None:
    config = CASES[case]
    for name in ("whole", "halves"):
        start_run(config, tmp_path / name)
    resumes(config, tmp_path / "whole", tmp_path / "halves", digits)
    weights = state(tmp_path / "whole")["model"]
    start = make_model(config, digits.shape, tmp_path, seed=0).state_dict()
    assert weights.keys() == start.keys()
    model, step = load_model(tmp_path / "whole", config, digits.shape, torch.device("cpu"))
    assert step == 6
    assert bool(model(torch.zeros(4, 1, 8, 8), torch.tensor([0, 400, 700, 999])).isfinite().all())


def test_a_curriculum_starts_with_the_noisiest_cluster_and_logs_its_stage(tmp_path: Path, digits: ImageData) -> None:
    config = replace(TINY, curriculum=True, method="uw", patience=200)
    start_run(config, tmp_path / "run")
    train(config, digits, tmp_path / "run", progress=False)
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["stage"] for row in rows] == [1, 1, 1]
    assert all(row["loss_0"] != row["loss_0"] and row["loss_4"] > 0 for row in rows)  # NaN, since there was no sample
    saved = state(tmp_path / "run")
    assert saved["balancer"]["log_variance"].tolist()[:4] == [0, 0, 0, 0]
    assert int(saved["timesteps"]["curriculum"]["stage"]) == 1


def test_routing_is_in_the_averaged_network_too(tmp_path: Path, digits: ImageData) -> None:
    config = replace(TINY, routing=True)
    start_run(config, tmp_path / "run")
    train(config, digits, tmp_path / "run", progress=False)
    model, _ = load_model(tmp_path / "run", config, digits.shape, torch.device("cpu"))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 999])
    routed = model(x, t)
    model.net.channel_routing.remove()
    assert not torch.equal(model(x, t), routed)


def test_experts_take_turns_and_only_the_one_at_turn_is_trained(tmp_path: Path, digits: ImageData) -> None:
    config = replace(TINY, experts=4, steps=2)
    start_run(config, tmp_path / "run")
    train(config, digits, tmp_path / "run", progress=False)
    after = state(tmp_path / "run")["model"]
    seed = make_generators(0, torch.device("cpu"))["weights"].initial_seed()
    before = make_model(config, digits.shape, tmp_path, seed=seed).state_dict()
    changed = {key.split(".")[1] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"0", "1"}


def test_another_number_of_experts_spreads_the_published_probabilities() -> None:
    clusters = TimestepClusters.uniform(1000, 5)

    def soft(n: int) -> tuple[float, ...]:
        return ExpertTurns(clusters, ExpertBank([torch.nn.Identity() for _ in range(n)])).soft.p

    assert soft(4) == pytest.approx((0.8, 0.4, 0.2, 0.1))
    assert soft(2) == pytest.approx((0.8, 0.1))
    assert soft(7) == pytest.approx((0.8, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1))


def test_patience_is_the_published_share_of_the_run_and_survives_a_longer_one(tmp_path: Path) -> None:
    assert replace(TINY, curriculum=True, steps=400_000).patience == 200
    assert replace(TINY, curriculum=True).patience == 1
    start_run(replace(TINY, curriculum=True, steps=8000), tmp_path / "run")
    saved = TrainConfig.load(tmp_path / "run" / "config.json")
    assert resumed(replace(saved, steps=80_000), saved).patience == saved.patience == 4


# ---- patching ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Path:
    run = tmp_path_factory.mktemp("dit") / "run"
    config = replace(TINY, model="dit", routing=True, curriculum=True)
    start_run(config, run)
    train(config, digits, run, progress=False)
    return run


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
def test_patching_trains_the_patch_alone_and_resumes(
    method: Any, dit_run: Path, tmp_path: Path, digits: ImageData
) -> None:
    base = TrainConfig.load(dit_run / "config.json")
    (dit_run / "config.json").write_text(replace(base, method=method).to_json())
    for name in ("whole", "halves"):
        config, _ = start_patch(dit_run, tmp_path / name, steps=6, lr=1e-3, device="cpu")
    assert config.companions == ["routing", "patch"]
    assert TrainConfig.load(tmp_path / "whole" / "config.json") == config
    resumes(config, tmp_path / "whole", tmp_path / "halves", digits)
    trained = state(tmp_path / "whole")["model"]
    for key, value in state(dit_run)["ema"].items():
        if key.startswith("module."):
            assert torch.equal(trained[key.removeprefix("module.")], value)
    assert bool((trained["net.mixture_of_prompts.prompts"] != 0).any())


@pytest.mark.usefixtures("_quickly_measured")
def test_a_patched_run_leaves_its_patch(dit_run: Path, tmp_path: Path, digits: ImageData) -> None:
    from safetensors.torch import load_file

    config, _ = start_patch(dit_run, tmp_path / "run", steps=2, lr=1e-3, device="cpu")
    assert execute(config, tmp_path / "run", data=digits, progress=False) is not None
    patch = load_file(tmp_path / "run" / "model" / "patch.safetensors")
    MixtureOfPrompts(4, 16, 64).load_state_dict(patch)


def test_a_unet_cannot_be_patched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(TINY, tmp_path / "run")
    assert main(["patch", str(tmp_path / "run")]) == 1
    assert "run must hold a DiT to patch (train it with --model dit)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


# ---- the command line --------------------------------------------------------------------------------------------

SMALL = ["--steps", "2", "--batch-size", "5", "--eval-samples", "12", "--eval-seeds", "1", "--sample-steps", "2",
         "--device", "cpu"]  # fmt: skip


def few_of(whole: ImageData) -> ImageData:
    assert whole.train_labels is not None
    assert whole.held_out_labels is not None
    return replace(
        whole,
        train=whole.train[:90],
        held_out=whole.held_out[:30],
        train_labels=whole.train_labels[:90],
        held_out_labels=whole.held_out_labels[:30],
    )


@pytest.fixture
def _quickly_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the same evaluation on fewer images, with an untrained feature network."""
    few = few_of(load_data("digits"))
    monkeypatch.setattr("antdiff.train.run.load_data", lambda *_, **__: few)
    monkeypatch.setattr("antdiff.experiments.evaluate.feature_net", lambda data: FeatureNet(1, 10).eval())
    monkeypatch.setattr("antdiff.experiments.evaluate.held_out_losses", partial(held_out_losses, timesteps=1, images=4))


@pytest.mark.usefixtures("_quickly_measured")
def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--curriculum", "--routing", "--model", "dit", *SMALL]) == 0
    run = Path("runs/digits-pcgrad-curriculum-routing-0")
    assert TrainConfig.load(run / "config.json").companions == ["curriculum", "routing"]
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert main(["patch", str(run), "--steps", "2"]) == 0
    assert main(["train", "--resume", f"{run}-patch-0", "--steps", "3"]) == 0
    assert main(["sample", f"{run}-patch-0", "--n", "3", "--steps", "2"]) == 0
    assert main(["train", "--experts", "4", *SMALL]) == 0
    experts = Path("runs/digits-vanilla-experts-0")
    assert main(["train", "--resume", str(experts), "--steps", "5"]) == 0
    assert (experts / "model" / "experts.safetensors").exists()
    assert main(["sample", str(experts), "--n", "3", "--steps", "3"]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.usefixtures("_quickly_measured")
def test_compare_puts_companions_beside_vanilla(tmp_path: Path) -> None:
    tiny = replace(TINY, steps=1)
    found = compare(tiny, ["vanilla"], [0], tmp_path, companions=["curriculum", "routing", "experts"], progress=False)
    assert found is not None
    assert list(found) == ["vanilla", "linear", "curriculum", "routing", "experts"]
    assert [found[name][0]["companions"] for name in found] == [[], [], ["curriculum"], ["routing"], ["experts"]]
    assert (tmp_path / "table.txt").read_text().count("experts") == 1


@pytest.mark.usefixtures("_quickly_measured")
def test_compare_holds_a_patch_against_as_many_steps_without_one(tmp_path: Path, digits: ImageData) -> None:
    config = replace(TINY, model="dit", steps=8)
    found = compare(config, ["vanilla"], [1], tmp_path, companions=["patch"], progress=False)
    assert found is not None
    assert list(found) == ["vanilla", "linear", "longer", "patch"]
    assert [found[name][0]["step"] for name in found] == [8, 8, 10, 2]
    base, patched = (state(tmp_path / name) for name in ("vanilla-seed1", "patch-seed1"))
    prompts = TrainConfig.load(tmp_path / "patch-seed1" / "config.json")
    assert (prompts.patch, prompts.lr) == (str(tmp_path / "vanilla-seed1"), 1e-4)
    for key, value in base["ema"].items():
        if key.startswith("module."):
            assert torch.equal(patched["model"][key.removeprefix("module.")], value)
    # "longer" continues vanilla's checkpoint, and equals a run of that length from the start.
    straight = replace(config, method="vanilla", timesteps="uniform", steps=10, seed=1)
    start_run(straight, tmp_path / "straight")
    assert train(straight, few_of(digits), tmp_path / "straight", progress=False)
    assert same(state(tmp_path / "longer-seed1"), state(tmp_path / "straight"))
    again = compare(config, ["vanilla"], [1], tmp_path, companions=["patch"], progress=False)
    assert json.dumps(again) == json.dumps(found)  # the results were read, not computed again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, r"experts must be in \[2, 100\]"),
        ({"experts": 4, "curriculum": True}, "Leave out curriculum"),
        ({"experts": 4, "method": "uw"}, "experts are trained with method vanilla"),
        ({"experts": 4, "timesteps": "stratified"}, "experts are trained with method vanilla"),
    ],
)
def test_settings_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_comparison_is_of_one_network_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out --experts"):
        compare(replace(TINY, experts=4), ["vanilla"], [0], tmp_path)
