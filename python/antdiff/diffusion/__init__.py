"""Noise schedules, as the rest of antdiff needs them."""

from antdiff.diffusion.schedules import (
    SCHEDULES,
    betas,
    log_snr,
    log_snr_from_alphas_cumprod,
    log_snr_from_betas,
    log_snr_from_flow,
    log_snr_from_sigmas,
)

__all__ = [
    "SCHEDULES",
    "betas",
    "log_snr",
    "log_snr_from_alphas_cumprod",
    "log_snr_from_betas",
    "log_snr_from_flow",
    "log_snr_from_sigmas",
]
