"""Loss weights of diffusion models, one number per timestep. They compose with any balancing method.

Pass ``table[t]`` as the ``weight`` of :func:`antdiff.ops.cluster_loss`: the weights act within the clusters, and the
balancing method acts between them. Every table is a function of the log-SNR (see :mod:`antdiff.diffusion.schedules`)
and of the quantity that the network predicts:

    ==========  =========================================================  ==========================
    prediction  target for x_t = a x_0 + s eps, SNR = a^2 / s^2            MSE / MSE of x_0
    ==========  =========================================================  ==========================
    "x0"        x_0                                                        1
    "epsilon"   eps                                                        SNR
    "v"         a eps - s x_0, with a^2 + s^2 = 1                          SNR + 1
    ==========  =========================================================  ==========================

A paper states its weight for one of these losses. The tables convert it to the loss that you compute.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from antdiff._checks import MOST_TIMESTEPS, as_choice, as_count, as_generator, as_number, as_tensor

Prediction = Literal["epsilon", "x0", "v"]
_PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def min_snr(log_snr: Tensor, *, gamma: float = 5.0, prediction: Prediction = "epsilon") -> Tensor:
    """Return the weights of Min-SNR-gamma (Hang et al., ICCV 2023): ``min(SNR, gamma)`` on the loss of x_0.

    Args:
        log_snr: ``[T]``. -inf (no signal left) is allowed; the weight is then 1 for every prediction, as in the
            authors' code. This is the limit for epsilon. For x_0 and v the limit is 0, but then the network would
            never be trained at the timestep at which sampling starts.
        gamma: > 0; 5 in the paper.
        prediction: the quantity that the network predicts.

    Returns:
        float64 ``[T]``. For epsilon, ``min(SNR, gamma) / SNR``.
    """
    gamma = _positive("gamma", gamma)
    as_choice("prediction", prediction, _PREDICTIONS)
    # min(SNR, gamma) / SNR = min(1, gamma / SNR), which is 1 for SNR = 0. Logarithms avoid 0 / 0.
    log_weight = (math.log(gamma) - _checked(log_snr)).clamp(max=0)  # for epsilon
    return torch.where(log_snr == -math.inf, 1.0, _from_epsilon(log_weight, log_snr, prediction))


def truncated_snr(log_snr: Tensor, *, prediction: Prediction = "epsilon") -> Tensor:
    """Return the weights of truncated SNR (Salimans and Ho, ICLR 2022): ``max(SNR, 1)`` on the loss of x_0.

    Returns:
        float64 ``[T]``. For epsilon, ``max(1, 1 / SNR)``, which is infinite if no signal is left (SNR = 0).
    """
    as_choice("prediction", prediction, _PREDICTIONS)
    table = _from_epsilon((-_checked(log_snr)).clamp(min=0), log_snr, prediction)
    # SNR = 0: max(SNR, 1) = 1 on the loss of x_0, and 1 / (SNR + 1) of it on that of v.
    return table if prediction == "epsilon" else torch.where(log_snr == -math.inf, 1.0, table)


def p2(log_snr: Tensor, *, k: float = 1.0, gamma: float = 1.0, prediction: Prediction = "epsilon") -> Tensor:
    """Return the weights of P2 (Choi et al., CVPR 2022): ``1 / (k + SNR)^gamma`` on the loss of epsilon.

    Args:
        log_snr, prediction: as in :func:`min_snr`.
        k: > 0; 1 in the paper.
        gamma: >= 0; 0.5 or 1 in the paper, and 0 for the plain loss.

    Returns:
        float64 ``[T]``.
    """
    gamma = as_number("gamma", gamma, least=0, rule="finite and at least 0")
    as_choice("prediction", prediction, _PREDICTIONS)
    log_k = torch.tensor(math.log(_positive("k", k)), dtype=torch.float64)
    return _from_epsilon(-gamma * torch.logaddexp(log_k, _checked(log_snr)), log_snr, prediction)


def edm(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Return the weights of EDM (Karras et al., NeurIPS 2022): ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``.

    They apply to the loss of a denoiser that predicts x_0 from ``x_0 + sigma eps``. With them, the loss starts near 1
    at every noise level.

    Args:
        sigma: noise levels > 0, of any shape.
        sigma_data: standard deviation of the data, > 0; 0.5 in the paper.

    Returns:
        float64, of the shape of ``sigma``.
    """
    sigma_data = _positive("sigma_data", sigma_data)
    sigma = as_tensor("sigma", sigma, kind="real").double()
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive; got {float(sigma.min())}.")
    return sigma.pow(-2) + torch.tensor(sigma_data, dtype=torch.float64).pow(-2)


class NoiseLevelUncertainty(nn.Module):
    """EDM2's learned weight per noise level (Karras et al., CVPR 2024): ``loss / exp(u) + u``.

    This is uncertainty weighting with a continuous function u of the noise level in place of one number per cluster; u
    consists of random Fourier features and one linear layer. At the optimum, exp(u) is the loss at that noise level, so
    that all levels contribute equally to the gradient. The module weights single samples; a balancing method can then
    act on the cluster means of its output.

    In the authors' code, u is a linear layer that normalises its weights, like all layers of their network. Here it is
    a plain one, which starts at zero.

    Args:
        channels: number of Fourier features; 128 in the paper.
        generator: draws the frequencies and phases once. They are saved in the state dict.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, channels: int = 128, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        channels = as_count("channels", channels, most=MOST_TIMESTEPS)
        as_generator("generator", generator)
        self.register_buffer("frequency", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(channels, generator=generator))
        self.linear = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.linear.weight)  # u = 0: training starts with the plain loss

    def u(self, log_sigma: Tensor) -> Tensor:
        """Return the log-uncertainty ``[B]`` at ``log_sigma [B]``, the natural log of sigma (-log_snr / 2)."""
        as_tensor("log_sigma", log_sigma, dims=1, shape="[B]")
        log_sigma = log_sigma.to(self.phase.dtype)
        features = math.sqrt(2) * torch.cos(log_sigma[:, None] / 4 * self.frequency + self.phase)  # [B, channels]
        u: Tensor = self.linear(features)[:, 0] / math.sqrt(len(self.phase))
        return u

    def forward(self, per_sample: Tensor, log_sigma: Tensor) -> Tensor:
        """Return ``per_sample / exp(u) + u``, ``[B]``, for losses ``[B]`` and the log of their noise levels ``[B]``."""
        as_tensor("per_sample", per_sample, dims=1, shape="[B]")
        as_tensor("log_sigma", log_sigma, dims=1, shape="[B]")
        if per_sample.shape != log_sigma.shape or per_sample.device != log_sigma.device:
            raise ValueError(
                f"log_sigma must have the shape and device of per_sample, {list(per_sample.shape)} on "
                f"{per_sample.device}; got {list(log_sigma.shape)} on {log_sigma.device}."
            )
        u = self.u(log_sigma.to(self.phase.dtype))
        return per_sample * torch.exp(-u) + u


def _checked(log_snr: Tensor) -> Tensor:
    log_snr = as_tensor("log_snr", log_snr).double()
    if bool((log_snr.isnan() | (log_snr == math.inf)).any()):
        raise ValueError(
            "log_snr must be finite, or -inf for timesteps without signal; got NaN or inf. An SNR of inf means that a "
            "timestep has no noise: leave it out."
        )
    return log_snr


def _positive(name: str, value: float) -> float:
    return as_number(name, value, above=0, rule="finite and positive")


def _from_epsilon(log_weight: Tensor, log_snr: Tensor, prediction: str) -> Tensor:
    """Convert the log of a weight on the loss of epsilon to the weight on the loss that the network is trained with."""
    log_snr = log_snr.double()
    if prediction == "epsilon":
        return log_weight.exp()
    if prediction == "x0":
        return (log_weight + log_snr).exp()  # since MSE of epsilon = SNR x MSE of x_0
    # prediction is "v": MSE of v = (SNR + 1) x MSE of x_0
    return (log_weight + nn.functional.logsigmoid(log_snr)).exp()
