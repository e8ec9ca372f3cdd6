"""A sample of the random bad calls of ``fuzz_calls.py``, and the faults that it has found."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_recipes
import pytest
import torch
from tolerances import gram as gram_tolerance

import antdiff
from antdiff import analysis, balancing, companions, diffusion, distributed, ops

HUGE = 2**33


def test_every_public_name_has_a_recipe() -> None:
    assert fuzz_recipes.missing() == []


def test_a_sample_of_random_bad_calls_ends_in_results_or_clear_errors() -> None:
    program = Path(__file__).with_name("fuzz_calls.py")
    command = [sys.executable, "-W", "ignore", str(program), "--minutes", "10", "--calls", "4000", "--sessions", "2500"]
    environment = {**os.environ, "PYTHONPATH": str(Path(antdiff.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seed", "77"], capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert "0 kinds of failure" in done.stdout.splitlines()[-1]


def negated(x: torch.Tensor) -> torch.Tensor:
    """Return a view equal to ``x`` whose memory holds ``-x``, as the imaginary part of a conjugate does."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


def test_ops_read_negated_views_as_torch_does() -> None:
    x, y = torch.randn(2, 6, 5, dtype=torch.float64).unbind(0)
    cluster = torch.tensor([0, 1, 2, 0, 1, 2])
    close = torch.testing.assert_close
    bound = {"rtol": gram_tolerance(torch.float64), "atol": 0.0}
    close(ops.gram(negated(x)), ops.gram(x), **bound)
    close(ops.gram([negated(x), y]), ops.gram([x, y]), **bound)
    close(ops.cluster_loss(negated(x), y, cluster, 3)[0], ops.cluster_loss(x, y, cluster, 3)[0], **bound)
    weights = torch.rand(6, dtype=torch.float64)
    close(ops.combine(negated(weights), x), ops.combine(weights, x), **bound)
    image, target = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind(0)
    last = torch.channels_last
    image_view = negated(image).contiguous(memory_format=last)
    got = ops.cluster_loss(image_view, target.contiguous(memory_format=last), cluster[:2], 3)
    close(got, ops.cluster_loss(image, target, cluster[:2], 3), **bound)
    got = ops.cluster_loss_and_grad(image_view, target.contiguous(memory_format=last), cluster[:2], 3)
    close(got, ops.cluster_loss_and_grad(image, target, cluster[:2], 3), **bound)
    empty = ops.cluster_loss_and_grad(negated(x[:0]), y[:0], cluster[:0], 3)
    assert empty[2].shape == (0, 5)


def test_negated_outputs_are_refused() -> None:
    J, total = torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="out must not be a negated view"):
        ops.gram_(negated(total), J)
    with pytest.raises(ValueError, match="must not be a negated view"):
        ops.combine(torch.ones(2, dtype=torch.float64), J, negated(torch.zeros(3, dtype=torch.float64)))


def test_truncated_snr_without_signal_is_its_limit() -> None:
    log_snr = torch.tensor([2.0, -math.inf], dtype=torch.float64)
    assert diffusion.truncated_snr(log_snr, prediction="x0")[1] == 1
    assert diffusion.truncated_snr(log_snr, prediction="v")[1] == 1
    assert diffusion.truncated_snr(log_snr)[1] == math.inf


def expanded(*shape: int) -> torch.Tensor:
    return torch.zeros(()).double().expand(*shape)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.cluster_mean(torch.zeros(()).half().expand(HUGE), torch.zeros(1).long(), 1), "per_sample"),
        (lambda: ops.gram(expanded(HUGE, 0)), "J must have at most"),
        (lambda: diffusion.min_snr(expanded(HUGE)), "log_snr must not be an expanded view"),
        (lambda: analysis.student_interval(expanded(HUGE, 2)), "values must not be an expanded view"),
        (lambda: antdiff.TimestepClusters(20, torch.zeros(()).long().expand(HUGE)), "starts must not be an expanded"),
        (lambda: antdiff.TimestepClusters.uniform(HUGE, HUGE), "T must be at most"),
        (lambda: antdiff.StratifiedTimesteps(antdiff.TimestepClusters.uniform(9, 2)).sample(HUGE), "B must be at most"),
        (lambda: diffusion.betas("cosine", HUGE), "T must be at most"),
        (lambda: companions.MixtureOfPrompts(HUGE, 2, 2), "depth must be at most"),
        (lambda: analysis.Telemetry(3, window=HUGE), "window"),
        (lambda: distributed.cost_model(10, 3, HUGE), "world_size"),
    ],
)
def test_a_size_that_would_fill_the_memory_is_refused(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def _methods() -> list[str]:
    return [name for name in balancing.names() if name not in ("linear", "gls", "uw", "imtl_l")]


@pytest.mark.parametrize("name", _methods())
def test_a_bad_state_changes_nothing(name: str) -> None:
    make = balancing.get(name)
    balancer = make(3) if make.needs == "losses" else make()
    if make.needs == "losses":
        balancer.observe(torch.rand(3))
    elif make.needs == "gram":
        balancer.weights(torch.eye(3, dtype=torch.float64))
    before = balancer.state_dict()
    for key in before:
        spoiled = {**balancer.state_dict(), key: object()}
        with pytest.raises((TypeError, ValueError), match="state"):
            balancer.load_state_dict(spoiled)
        with pytest.raises(ValueError, match=f"{key} is missing"):
            balancer.load_state_dict({k: x for k, x in before.items() if k != key})
    after = balancer.state_dict()
    assert all(torch.equal(torch.as_tensor(after[k]), torch.as_tensor(x)) for k, x in before.items() if x is not None)
    with pytest.raises(TypeError, match="state must be a dict"):
        balancer.load_state_dict([])
