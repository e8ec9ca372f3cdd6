"""Log-SNR of schedules, compared with their definitions and with diffusers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from antdiff import diffusion


@pytest.mark.parametrize(
    ("name", "first", "last"), [("linear", 9.21, -10.12), ("ldm", 6.50, -8.86), ("cosine", 10.09, -19.84)]
)
def test_known_ranges(name: str, first: float, last: float) -> None:
    x = diffusion.log_snr(name)
    assert x.shape == (1000,)
    assert x.dtype == torch.float64
    assert (x.diff() < 0).all()
    assert x[0].item() == pytest.approx(first, abs=0.006)
    assert x[-1].item() == pytest.approx(last, abs=0.006)


def test_flow() -> None:
    x = diffusion.log_snr("flow", 10)
    assert x.shape == (10,)
    assert x[0].item() == pytest.approx(2 * math.log(19))
    assert torch.allclose(x, -x.flip(0), rtol=1e-14, atol=0)


def test_all_routes_agree() -> None:
    betas = diffusion.betas("sd")
    abar = (1 - betas).cumprod(0)
    x = diffusion.log_snr_from_betas(betas)
    # Near abar = 1, log(1 - abar) loses log2(1 / (1 - abar)) bits. Here 1 - abar is at least about 1e-3, so the error
    # of 1000 roundings is amplified by 1e3.
    assert torch.allclose(x, diffusion.log_snr_from_alphas_cumprod(abar), rtol=1e-9, atol=0)
    sigma = ((1 - abar) / abar).sqrt()
    assert torch.allclose(x, diffusion.log_snr_from_sigmas(sigma), rtol=1e-9, atol=0)
    assert torch.allclose(x, diffusion.log_snr_from_flow(sigma / (1 + sigma)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine", "ldm", "sd"])
def test_other_numbers_of_timesteps_keep_the_range(name: str) -> None:
    full, half = diffusion.log_snr(name), diffusion.log_snr(name, 500)
    assert half.shape == (500,)
    assert half[250].item() == pytest.approx(full[501].item(), abs=0.05)


def test_diffusers_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for name, arguments in (
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("sd", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ):
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, **arguments)
        want = diffusion.log_snr(name)
        # diffusers' betas are float32, each with a relative error of 6e-8. The absolute error of the log-SNR is about
        # that per unit of |log abar|.
        assert torch.allclose(diffusion.log_snr(scheduler), want, rtol=0, atol=1e-4 if name == "cosine" else 1e-5)
    zero_terminal = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    assert diffusion.log_snr(zero_terminal)[-1] < -30

    flow = diffusion.log_snr(diffusers.FlowMatchEulerDiscreteScheduler())  # tau = 1/1000 .. 1
    assert flow.shape == (1000,)
    assert flow[0].item() == pytest.approx(2 * math.log(999), rel=1e-4)
    assert flow[-1] == -math.inf
    edm = diffusion.log_snr(diffusers.EDMEulerScheduler())
    assert (edm.diff() < 0).all()
    assert edm[0].item() == pytest.approx(-2 * math.log(0.002), rel=1e-5)
    assert edm[-1].item() == pytest.approx(-2 * math.log(80), rel=1e-5)


def test_objects_like_schedulers() -> None:
    abar = torch.tensor([0.9, 0.5, 0.1])
    assert torch.equal(
        diffusion.log_snr(SimpleNamespace(alphas_cumprod=abar)), diffusion.log_snr_from_alphas_cumprod(abar)
    )
    sigmas = torch.tensor([3.0, 2.0, 1.0, 0.0])
    config = SimpleNamespace(sigma_data=0.5)
    assert torch.equal(
        diffusion.log_snr(SimpleNamespace(sigmas=sigmas, config=config)), -2 * torch.tensor([1.0, 2, 3]).double().log()
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: diffusion.log_snr("sqrt"), ValueError, "schedule must be one of linear"),
        (lambda: diffusion.betas("flow"), ValueError, "name must be one of"),
        (lambda: diffusion.betas("linear", 10), ValueError, "T must be larger for the linear schedule"),
        (lambda: diffusion.log_snr("linear", 0), ValueError, "T must be at least 1"),
        (lambda: diffusion.log_snr(SimpleNamespace(alphas_cumprod=torch.ones(3) / 2), T=3), ValueError, "Leave it out"),
        (lambda: diffusion.log_snr(torch.ones(3)), TypeError, "log_snr_from_betas"),
        (lambda: diffusion.log_snr(None), TypeError, "schedule must be a name"),
        (lambda: diffusion.log_snr_from_betas(torch.tensor([0.1, 1.1])), ValueError, r"betas must lie in \(0, 1\]"),
        (lambda: diffusion.log_snr_from_betas(torch.tensor([math.nan])), ValueError, "betas must lie"),
        (lambda: diffusion.log_snr_from_alphas_cumprod(torch.ones(2)), ValueError, "alphas_cumprod must lie"),
        (lambda: diffusion.log_snr_from_sigmas(torch.tensor([0.0])), ValueError, "sigmas must be positive"),
        (lambda: diffusion.log_snr_from_flow(torch.tensor([1.5])), ValueError, "tau must lie"),
        (lambda: diffusion.log_snr_from_flow(torch.ones(2, 2)), ValueError, r"tau must have shape \[T\]"),
        (lambda: diffusion.log_snr_from_flow([0.5]), TypeError, "tau must be a float tensor"),
    ],
)
def test_misuse(call: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()  # type: ignore[operator]
