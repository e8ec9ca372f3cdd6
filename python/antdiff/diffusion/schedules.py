"""Log-SNR of noise schedules in float64, the input of timestep clustering.

Every function returns float64 ``[T]`` on the CPU: the natural logarithm of the SNR. Timestep 0 has the least noise and
T-1 the most, so the log-SNR falls with t. For ``x_t = a_t x_0 + s_t noise`` it is ``2 log(a_t / s_t)``.

Named schedules (T = 1000 by default):

========  ==============================================================================================
linear    beta from 1e-4 to 0.02 (DDPM, ADM), scaled by 1000/T for other T
cosine    abar ~ cos^2(((t/T) + 0.008) / 1.008 * pi/2), beta <= 0.999 (improved DDPM)
ldm       sqrt(beta) linear from sqrt(0.0015) to sqrt(0.0195) (latent diffusion), beta scaled by 1000/T
sd        sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) (Stable Diffusion), beta scaled by 1000/T
flow      noise fraction tau = (t + 1/2) / T of flow matching, x = (1 - tau) x_0 + tau noise
========  ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from antdiff._checks import MOST_TIMESTEPS, as_choice, as_count, as_tensor

SCHEDULES = ("linear", "cosine", "ldm", "sd", "flow")  # the last has no betas

_ROOT_LINEAR = {"ldm": (0.0015, 0.0195), "sd": (0.00085, 0.012)}


def betas(name: str, T: int = 1000) -> Tensor:
    """Return the variance that a named schedule (any but ``"flow"``) adds at each step: float64 ``[T]``.

    Raises:
        ValueError: the name is unknown, or T is so small that some beta would not lie in (0, 1).
    """
    T = as_count("T", T, most=MOST_TIMESTEPS)
    as_choice("name", name, SCHEDULES[:4])
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
    beta = beta * (1000 / T)  # keeps the log-SNR range nearly the same for every T
    if beta[-1] >= 1:
        raise ValueError(
            f"T must be larger for the {name} schedule, whose last beta must stay below 1; got T={T}, which gives "
            f"{beta[-1]:.3g}. Use T > {beta[-1] * T:.3g}."
        )
    return beta


def log_snr(schedule: str | Any, T: int | None = None) -> Tensor:
    """Return the log-SNR of a named schedule or of a diffusers scheduler.

    Args:
        schedule: one of the names above, or an object like a diffusers scheduler (diffusers is not imported). It needs
            the attribute ``betas`` (preferred, since ``alphas_cumprod`` in float32 has lost digits near 1),
            ``alphas_cumprod`` or ``sigmas``. Sigmas are EDM noise levels if the config has ``sigma_data``, otherwise
            flow-matching fractions.
        T: number of timesteps of a named schedule. Default: 1000. Must be None for objects.

    Returns:
        float64 ``[T]``. Zero terminal SNR gives -inf at T-1.

    Raises:
        TypeError, ValueError: the name or object is unknown, or values lie outside the range of their kind.
    """
    if isinstance(schedule, str):
        T = 1000 if T is None else as_count("T", T, most=MOST_TIMESTEPS)
        if schedule == "flow":
            return log_snr_from_flow((torch.arange(T, dtype=torch.float64) + 0.5) / T)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, or a scheduler; got {schedule[:80]!r}.")
        return log_snr_from_betas(betas(schedule, T))
    if T is not None:
        raise ValueError(
            f"T must be None unless schedule is a name, since a {type(schedule).__name__} has its own; got T={T}. "
            "Leave it out."
        )
    if isinstance(getattr(schedule, "betas", None), Tensor):
        return log_snr_from_betas(schedule.betas)
    if isinstance(getattr(schedule, "alphas_cumprod", None), Tensor):
        return log_snr_from_alphas_cumprod(schedule.alphas_cumprod)
    if isinstance(getattr(schedule, "sigmas", None), Tensor):
        sigmas = schedule.sigmas[schedule.sigmas > 0]  # samplers append a final 0
        if sigmas.shape[0] > 1 and sigmas[0] > sigmas[-1]:
            sigmas = sigmas.flip(0)  # samplers run from noise to data
        config = getattr(schedule, "config", {})
        is_edm = "sigma_data" in config if isinstance(config, Mapping) else hasattr(config, "sigma_data")
        return log_snr_from_sigmas(sigmas) if is_edm else log_snr_from_flow(sigmas)
    raise TypeError(
        "schedule must be a name or an object with tensor attributes betas, alphas_cumprod or sigmas; got "
        f"{type(schedule).__name__}. For a tensor, call log_snr_from_betas, log_snr_from_alphas_cumprod, "
        "log_snr_from_sigmas or log_snr_from_flow."
    )


def log_snr_from_betas(betas: Tensor) -> Tensor:
    """Return the log-SNR for the variance added at each step, ``betas`` ``[T]`` in (0, 1].

    With abar = prod(1 - beta), a^2 = abar and s^2 = 1 - abar. abar is summed in logarithms, so that neither end loses
    digits. A last beta of 1 (zero terminal SNR) gives -inf.
    """
    beta = _level("betas", betas)
    if not ((beta > 0) & (beta <= 1)).all():
        raise ValueError(f"betas must lie in (0, 1]; got {_range(beta)}.")
    log_abar = torch.log1p(-beta).cumsum(0)  # [T]
    return log_abar - torch.log(-torch.expm1(log_abar))


def log_snr_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """Return ``log(abar / (1 - abar))`` for abar ``[T]`` in [0, 1). abar = 0 (zero terminal SNR) gives -inf."""
    abar = _level("alphas_cumprod", alphas_cumprod)
    if not ((abar >= 0) & (abar < 1)).all():
        raise ValueError(f"alphas_cumprod must lie in [0, 1); got {_range(abar)}.")
    return torch.log(abar) - torch.log1p(-abar)


def log_snr_from_sigmas(sigmas: Tensor) -> Tensor:
    """Return ``-2 log(sigma)`` for EDM noise levels ``[T]`` > 0, where x = x_0 + sigma noise."""
    sigma = _level("sigmas", sigmas)
    if not ((sigma > 0) & (sigma < torch.inf)).all():
        raise ValueError(f"sigmas must be positive and finite; got {_range(sigma)}.")
    return -2 * torch.log(sigma)


def log_snr_from_flow(tau: Tensor) -> Tensor:
    """Return ``2 log((1 - tau) / tau)`` for flow-matching noise fractions tau ``[T]`` in (0, 1].

    Here x = (1 - tau) x_0 + tau noise. If t = 1 is the data in your code, pass 1 - t. tau = 1 (pure noise) gives -inf.
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
    x = as_tensor(name, x, shape="[T]")
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"{name} must have shape [T] with T >= 1; got {list(x.shape)}.")
    return x.detach().to("cpu", torch.float64)


def _range(x: Tensor) -> str:
    return f"values from {x.min().item():.6g} to {x.max().item():.6g}"
