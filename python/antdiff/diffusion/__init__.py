"""Log-SNR of noise schedules, and loss weights per timestep."""

from antdiff.diffusion.schedules import (
    SCHEDULES,
    betas,
    log_snr,
    log_snr_from_alphas_cumprod,
    log_snr_from_betas,
    log_snr_from_flow,
    log_snr_from_sigmas,
)
from antdiff.diffusion.weighting import NoiseLevelUncertainty, edm, min_snr, p2, truncated_snr

__all__ = [
    "SCHEDULES",
    "NoiseLevelUncertainty",
    "betas",
    "edm",
    "log_snr",
    "log_snr_from_alphas_cumprod",
    "log_snr_from_betas",
    "log_snr_from_flow",
    "log_snr_from_sigmas",
    "min_snr",
    "p2",
    "truncated_snr",
]
