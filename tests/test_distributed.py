"""Several ranks compute what one process does, send what the formulas say, and fail by name."""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import pytest
from ranks import run

FLOAT64, FLOAT32 = 1e-12, 1e-5


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(4, cases.CASES, tmp_path_factory.mktemp("four") / "ranks")


def test_p_grad_is_that_of_one_process(four: list[dict[str, Any]]) -> None:
    for results in four:
        for case, (gradient, losses) in results["every_scheme_and_method"].items():
            limit = FLOAT64 if case[-1] == "torch.float64" else FLOAT32
            assert gradient < limit, (case, gradient)
            assert losses < limit, (case, losses)
