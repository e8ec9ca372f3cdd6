"""The devices on which tests run: the CPU, and a GPU if there is one.

``ANTDIFF_REQUIRE_CUDA=1``, which the GPU gate sets, assumes a GPU, so that a machine that has lost its GPU fails rather
than skips. Parameters for CUDA carry the marker ``cuda``.
"""

from __future__ import annotations

import os

import pytest
import torch

from antdiff import _C

HAS_CUDA = os.environ.get("ANTDIFF_REQUIRE_CUDA") == "1" or (torch.cuda.is_available() and _C.build_info()["cuda"])
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_CUDA else [])]
