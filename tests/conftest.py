"""Fixtures for all tests. The cache folder is a temporary one, shared by the tests of one session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

# The default is one thread, since the tensors of the tests are small, and on a busy machine a barrier between OpenMP
# threads takes longer than the work. CI runs the tests whose results depend on the number of threads with two as well.
torch.set_num_threads(int(os.environ.get("ANTDIFF_TEST_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("ANTDIFF_DEBUG", raising=False)
        yield


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut ``digits`` to a few hundred images, since the evaluation of a run on all of them takes seconds."""
    from antdiff.data import sources

    digits = sources._digits()
    assert digits.train_labels is not None
    assert digits.held_out_labels is not None
    few = replace(
        digits,
        train=digits.train[:300],
        train_labels=digits.train_labels[:300],
        held_out=digits.held_out[:40],
        held_out_labels=digits.held_out_labels[:40],
    )
    monkeypatch.setattr(sources, "_digits", lambda: few)
