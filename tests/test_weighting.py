"""Loss weights per timestep: formulas of the papers, equal objectives for all predictions, and limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from antdiff import balancing, ops
from antdiff.diffusion import log_snr
from antdiff.diffusion.weighting import NoiseLevelUncertainty, edm, min_snr, p2, truncated_snr

LOG_SNR = log_snr("cosine", 50)
SNR = LOG_SNR.exp()
TABLES = [min_snr, truncated_snr, p2]


def test_the_papers_formulas() -> None:
    exact = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(min_snr(LOG_SNR), SNR.clamp(max=5) / SNR, **exact)
    torch.testing.assert_close(min_snr(LOG_SNR, gamma=2, prediction="x0"), SNR.clamp(max=2), **exact)
    torch.testing.assert_close(min_snr(LOG_SNR, prediction="v"), SNR.clamp(max=5) / (SNR + 1), **exact)
    torch.testing.assert_close(truncated_snr(LOG_SNR, prediction="x0"), SNR.clamp(min=1), **exact)
    torch.testing.assert_close(p2(LOG_SNR), 1 / (1 + SNR), **exact)
    torch.testing.assert_close(p2(LOG_SNR, k=2, gamma=0.5), (2 + SNR) ** -0.5, **exact)
    assert (p2(LOG_SNR, gamma=0) == 1).all()
    sigma = torch.tensor([0.002, 0.5, 80.0])
    want = (sigma.double() ** 2 + 0.25) / (sigma.double() * 0.5) ** 2
    torch.testing.assert_close(edm(sigma), want, **exact)


@pytest.mark.parametrize("table", TABLES)
def test_every_prediction_has_the_same_objective(table: Callable[..., Tensor]) -> None:
    """The error of one denoiser, expressed in x_0, epsilon and v, each weighted by its own table."""
    alpha, sigma = torch.sigmoid(LOG_SNR).sqrt(), torch.sigmoid(-LOG_SNR).sqrt()
    error = torch.ones(50, dtype=torch.float64)  # of x_0
    errors = {"x0": error, "epsilon": -alpha / sigma * error, "v": -error / sigma}
    objectives = [table(LOG_SNR, prediction=kind) * e.square() for kind, e in errors.items()]
    for other in objectives[1:]:
        torch.testing.assert_close(other, objectives[0], rtol=1e-11, atol=0)


def test_no_signal_left() -> None:
    end = torch.tensor([-math.inf])
    for prediction in ("epsilon", "x0", "v"):  # the authors' code: mse_loss_weight[snr == 0] = 1
        assert min_snr(end, prediction=prediction) == 1  # type: ignore[arg-type]
    assert p2(end) == 1
    assert truncated_snr(end) == math.inf


def test_weights_compose_with_balancing() -> None:
    """The total is sum_k w_k loss_k, where each loss is weighted within its cluster."""
    t, cluster = torch.tensor([1, 8, 30, 45]), torch.tensor([0, 0, 1, 1])
    pred, target = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    pred.requires_grad_()
    losses, counts = ops.cluster_loss(pred, target, cluster, 2, min_snr(LOG_SNR)[t].float())
    per_sample = (pred - target).square().mean(1) * min_snr(LOG_SNR)[t].float()
    torch.testing.assert_close(losses, per_sample.view(2, 2).mean(1))
    for name in ("linear", "gls", "uw", "famo"):
        balancing.get(name)(2).loss(losses, counts).backward(retain_graph=True)
    assert pred.grad is not None


def test_learned_uncertainty_finds_the_loss_at_each_noise_level() -> None:
    module = NoiseLevelUncertainty(64, generator=torch.Generator().manual_seed(0))
    log_sigma = torch.linspace(-3, 3, 64)
    losses = torch.exp(0.5 * log_sigma)
    assert torch.equal(module(losses, log_sigma), losses)  # u = 0 at first
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        module(losses, log_sigma).mean().backward()
        optimizer.step()
    assert (module.u(log_sigma) - losses.log()).abs().mean() < 0.1
    other = NoiseLevelUncertainty(64)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.u(log_sigma), module.u(log_sigma))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: min_snr(LOG_SNR, gamma=0.0), "gamma must be finite and positive"),
        (lambda: p2(LOG_SNR, k=-1.0), "k must be finite and positive"),
        (lambda: p2(LOG_SNR, gamma=-1.0), "gamma must be finite and at least 0"),
        (lambda: min_snr(LOG_SNR * math.nan), "log_snr must be finite"),
        (lambda: min_snr(LOG_SNR, prediction="x"), "prediction must be one of"),  # type: ignore[arg-type]
        (lambda: edm(torch.zeros(2)), "sigma must be positive"),
        (lambda: edm(torch.ones(2), sigma_data=0.0), "sigma_data must be finite"),
        (lambda: NoiseLevelUncertainty(0), "channels must be at least 1"),
    ],
)
def test_bad_input(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
