"""On which devices a test runs: the CPU, and a GPU where there is one.

``ANTDIFF_REQUIRE_CUDA=1`` (the GPU gate) takes the GPU for granted, so that a machine that has lost it fails instead of
skipping. CUDA parameters carry the marker ``cuda``.
"""

from __future__ import annotations

import os

import pytest
import torch

from antdiff import _C

HAS_CUDA = os.environ.get("ANTDIFF_REQUIRE_CUDA") == "1" or (torch.cuda.is_available() and _C.build_info()["cuda"])
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_CUDA else [])]
