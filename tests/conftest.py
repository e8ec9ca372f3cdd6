"""Shared by all tests: nothing is written into the user's cache, and what is cached is made once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The tests' tensors are small, and on a busy machine a barrier between OpenMP threads takes longer than the work.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("ANTDIFF_DEBUG", raising=False)
        yield
