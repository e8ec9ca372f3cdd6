"""Four more methods that treat timesteps as tasks. Each can be added alone to an existing model or loop."""

from antdiff.companions.curriculum import Curriculum, RestrictedTimesteps, SigmaCurriculum
from antdiff.companions.experts import (
    ExpertBank,
    InceptionBlock2d,
    InceptionMixer2d,
    SoftIntervalSampler,
    add_inception,
    high_ratio_schedule,
)
from antdiff.companions.patching import MixtureOfPrompts, patch_dit, save_patch, unpatch
from antdiff.companions.routing import ChannelRouting, edm_rank, route, start_table

__all__ = [
    "ChannelRouting",
    "Curriculum",
    "ExpertBank",
    "InceptionBlock2d",
    "InceptionMixer2d",
    "MixtureOfPrompts",
    "RestrictedTimesteps",
    "SigmaCurriculum",
    "SoftIntervalSampler",
    "add_inception",
    "edm_rank",
    "high_ratio_schedule",
    "patch_dit",
    "route",
    "save_patch",
    "start_table",
    "unpatch",
]
