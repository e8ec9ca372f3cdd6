"""Log-SNR of noise schedules, in float64: what timestep clustering works on.

Every function returns float64 ``[T]`` on the CPU, ``log_snr[t]`` natural log, t = 0 the least noise and T-1 the most,
so it falls with t. For ``x_t = a_t x_0 + s_t noise``, log-SNR is ``2 log(a_t / s_t)``.

Named schedules (T = 1000 unless said):

========  ==============================================================================================
linear    beta from 1e-4 to 0.02 (DDPM, ADM), scaled by 1000/T for other T
cosine    abar ~ cos^2(((t/T) + 0.008) / 1.008 * pi/2), beta <= 0.999 (improved DDPM)
ldm       sqrt(beta) linear from sqrt(0.0015) to sqrt(0.0195) (latent diffusion), beta scaled likewise
sd        sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) (Stable Diffusion), beta scaled likewise
flow      noise fraction tau = (t + 1/2) / T of flow matching, x = (1 - tau) x_0 + tau noise
========  ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from antdiff._checks import as_count

SCHEDULES = ("linear", "cosine", "ldm", "sd", "flow")

_ROOT_LINEAR = {"ldm": (0.0015, 0.0195), "sd": (0.00085, 0.012)}


def betas(name: str, T: int = 1000) -> Tensor:
    """Variance added at each step: float64 ``[T]``, of a named schedule other than ``"flow"``.

    Raises:
        ValueError: an unknown name, or T so small that the schedule leaves 0 < beta < 1.
    """
    T = as_count("T", T)
    if name == "cosine":
        t = torch.arange(T + 1, dtype=torch.float64) / T
        abar = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)).square()
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    if name == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif name in _ROOT_LINEAR:
        first, last = _ROOT_LINEAR[name]
        beta = torch.linspace(math.sqrt(first), math.sqrt(last), T, dtype=torch.float64).square()
    else:
        raise ValueError(f"name must be one of {', '.join(s for s in SCHEDULES if s != 'flow')}; got {name!r}.")
    beta = beta * (1000 / T)  # the same log-SNR range for every T
    if beta[-1] >= 1:
        raise ValueError(
            f"T must be larger for the {name} schedule, whose last beta would be {beta[-1]:.3g}; got T={T}."
        )
    return beta


def log_snr(schedule: str | Any, T: int | None = None) -> Tensor:
    """Log-SNR of a named schedule, or of a diffusers scheduler.

    Args:
        schedule: one of the names above, or an object like a diffusers scheduler: one with ``betas`` (preferred, since
            ``alphas_cumprod`` in float32 has lost digits near 1) or ``alphas_cumprod``, or one with ``sigmas``: EDM
            noise levels if its config has ``sigma_data``, else flow-matching fractions. diffusers is not imported.
        T: number of timesteps of a named schedule, default 1000; not for objects.

    Returns:
        float64 ``[T]``. Zero terminal SNR gives -inf at T-1.

    Raises:
        TypeError, ValueError: an unknown name or object, or values outside the range of their kind.
    """
    if isinstance(schedule, str):
        T = 1000 if T is None else as_count("T", T)
        if schedule == "flow":
            return log_snr_from_flow((torch.arange(T, dtype=torch.float64) + 0.5) / T)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, or a scheduler; got {schedule!r}.")
        return log_snr_from_betas(betas(schedule, T))
    if T is not None:
        raise ValueError(f"T goes with a named schedule; a {type(schedule).__name__} has its own. Leave it out.")
    if isinstance(getattr(schedule, "betas", None), Tensor):
        return log_snr_from_betas(schedule.betas)
    if isinstance(getattr(schedule, "alphas_cumprod", None), Tensor):
        return log_snr_from_alphas_cumprod(schedule.alphas_cumprod)
    if isinstance(getattr(schedule, "sigmas", None), Tensor):
        sigmas = schedule.sigmas[schedule.sigmas > 0]  # samplers append the final 0
        if sigmas.shape[0] > 1 and sigmas[0] > sigmas[-1]:
            sigmas = sigmas.flip(0)  # and run from noise to data
        config = getattr(schedule, "config", {})
        is_edm = "sigma_data" in config if isinstance(config, Mapping) else hasattr(config, "sigma_data")
        return log_snr_from_sigmas(sigmas) if is_edm else log_snr_from_flow(sigmas)
    raise TypeError(
        "schedule must be a name or an object with tensor attributes betas, alphas_cumprod or sigmas; got "
        f"{type(schedule).__name__}. For tensors there are log_snr_from_betas, log_snr_from_alphas_cumprod, "
        "log_snr_from_sigmas and log_snr_from_flow."
    )


def log_snr_from_betas(betas: Tensor) -> Tensor:
    """From the variance added at each step, ``[T]`` in (0, 1]: abar = prod(1 - beta), a^2 = abar, s^2 = 1 - abar.

    abar is summed up in logs, so neither end loses digits. A last beta of 1 (zero terminal SNR) gives -inf.
    """
    beta = _level("betas", betas)
    if not ((beta > 0) & (beta <= 1)).all():
        raise ValueError(f"betas must lie in (0, 1]; got {_range(beta)}.")
    log_abar = torch.log1p(-beta).cumsum(0)  # [T]
    return log_abar - torch.log(-torch.expm1(log_abar))


def log_snr_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """From abar ``[T]`` in [0, 1): ``log(abar / (1 - abar))``. abar = 0 (zero terminal SNR) gives -inf."""
    abar = _level("alphas_cumprod", alphas_cumprod)
    if not ((abar >= 0) & (abar < 1)).all():
        raise ValueError(f"alphas_cumprod must lie in [0, 1); got {_range(abar)}.")
    return torch.log(abar) - torch.log1p(-abar)


def log_snr_from_sigmas(sigmas: Tensor) -> Tensor:
    """From EDM noise levels ``[T]`` > 0, x = x_0 + sigma noise: ``-2 log(sigma)``."""
    sigma = _level("sigmas", sigmas)
    if not ((sigma > 0) & (sigma < torch.inf)).all():
        raise ValueError(f"sigmas must be positive and finite; got {_range(sigma)}.")
    return -2 * torch.log(sigma)


def log_snr_from_flow(tau: Tensor) -> Tensor:
    """From flow-matching noise fractions ``[T]`` in (0, 1], x = (1 - tau) x_0 + tau noise: ``2 log((1 - tau) / tau)``.

    Code that calls t = 1 the data has to pass 1 - t. tau = 1 (pure noise) gives -inf.
    """
    tau = _level("tau", tau)
    if not ((tau > 0) & (tau <= 1)).all():
        raise ValueError(f"tau must lie in (0, 1]; got {_range(tau)}.")
    return 2 * (torch.log1p(-tau) - torch.log(tau))


def _level(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name} must be a float tensor [T]; got {x.dtype if isinstance(x, Tensor) else type(x).__name__}."
        )
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"{name} must have shape [T] with T >= 1; got {list(x.shape)}.")
    return x.detach().to("cpu", torch.float64)


def _range(x: Tensor) -> str:
    return f"values from {x.min().item():.6g} to {x.max().item():.6g}"
