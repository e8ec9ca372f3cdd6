"""The recorded coverage of diffusers' denoisers still holds: benchmarks/results/coverage_cpu.csv.

A representative part runs by default. ``ANTDIFF_SWEEP=1`` runs every case and every variant, with the choice of
``auto``, which takes minutes. If an outcome improves, record it: run tests/denoisers.py --sweep --csv with the path of
that file, then docs/coverage_table.py.
"""

from __future__ import annotations

import csv
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
if not diffusers.__version__.startswith("0.42."):
    pytest.skip("the corpus holds the models of diffusers 0.42", allow_module_level=True)

from denoiser_cases import CASES, LEFT_OUT  # noqa: E402
from denoisers import EXACT, RESULTS, applies, check, quiet, variants_of  # noqa: E402

SWEEP = os.environ.get("ANTDIFF_SWEEP") == "1"
# One model per way of building a denoiser: convolutions in 1, 2 and 3 dimensions, fused and separate attention, adaLN,
# gates, video, audio, masks, ControlNets, experts, priors, and weights that are computed from weights.
REPRESENTATIVE = [
    "UNet1DModel", "UNet2DModel, classes and scale-shift", "UNet2DConditionModel, SDXL", "StableCascadeUNet, prior",
    "UVit2DModel", "ControlNetModel", "FluxControlNetModel, union", "SparseControlNetModel", "T2IAdapter",
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel, 3.5", "PriorTransformer",
    "Flux2Transformer2DModel", "HunyuanVideoTransformer3DModel", "LTX2VideoTransformer3DModel",
    "NucleusMoEImageTransformer2DModel", "QwenImageTransformer2DModel", "RFD4ProteinaTransformer",
    "SanaTransformer2DModel", "StableAudioDiTModel", "T5FilmDecoder", "WanTransformer3DModel",
    "ZImageTransformer2DModel",
]  # fmt: skip
VARIED = ["UNet2DConditionModel", "FluxTransformer2DModel"]

with RESULTS.open(newline="") as file:
    RECORDED = {(row["name"], row["variant"]): row for row in csv.DictReader(file)}


def chosen() -> Iterator[Any]:
    for case in CASES:
        for variant in variants_of(case):
            row = RECORDED.get((case.name, variant))
            assert row, f"no result of {case.name} {variant} is recorded"
            names = VARIED if variant else REPRESENTATIVE
            default = case.name in names or row["outcome"] == "wrong" or (row["outcome"] != "exact" and not variant)
            if default or SWEEP:
                yield pytest.param(
                    case, variant, id=f"{case.name} [{variant}]" if variant else case.name,
                    marks=[] if default else pytest.mark.slow,
                )  # fmt: skip


def cause(reason: str) -> str:
    """Return the first sentence of a message, without numbers."""
    return re.sub(r"\d+", "#", reason.split(". ")[0])


@pytest.fixture(autouse=True)
def _diffusers_is_quiet() -> None:
    quiet()


@pytest.mark.parametrize(("case", "variant"), list(chosen()))
@pytest.mark.filterwarnings("ignore")
def test_the_recorded_outcome_holds(case: Any, variant: str) -> None:
    recorded = RECORDED[case.name, variant]
    result = check(case, variant, auto=SWEEP)
    assert result.outcome == recorded["outcome"], result
    if result.outcome == "exact" and result.precision != "bfloat16":
        # Most classes with a part in float32 have errors of float64 all the same. 30 is for kernels of other CPUs.
        assert result.error < max(EXACT["float64"], 30 * float(recorded["error"])), result
    if result.outcome in ("refused", "fails"):
        assert cause(result.reason) == cause(recorded["reason"])
    if result.outcome == "wrong" and variant != "own initialisation":
        assert result.verify == "raises"
    if SWEEP:
        assert result.auto == recorded["auto"], result


def test_every_exported_model_has_a_case_or_a_reason() -> None:
    """Autoencoders and vocoders are no denoisers; two of them that hold a diffusion model are named."""
    exported, autoencoders = set(), set()
    for module in (diffusers, diffusers.models):
        for name in dir(module):
            model = getattr(module, name, None)
            if inspect.isclass(model) and issubclass(model, diffusers.ModelMixin):
                (autoencoders if ".autoencoders." in model.__module__ else exported).add(name)
    cases = {case.model for case in CASES}
    assert not cases & set(LEFT_OUT)
    assert cases | set(LEFT_OUT) - autoencoders == exported
    assert {"AutoencoderKL", "VQModel"} <= autoencoders


def test_names_are_unique_and_each_case_is_recorded() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert set(RECORDED) == {(case.name, variant) for case in CASES for variant in variants_of(case)}


def test_no_case_is_left_without_an_outcome() -> None:
    assert {row["outcome"] for row in RECORDED.values()} <= {"exact", "refused", "wrong", "fails"}


def test_what_grouped_gets_wrong_is_found_by_verify() -> None:
    rows = [r for r in RECORDED.values() if r["outcome"] == "wrong" and r["variant"] != "own initialisation"]
    assert [r["name"] for r in rows if r["verify"] != "raises"] == []


def test_auto_is_never_wrong() -> None:
    wrong = [
        f"{row['name']} [{row['variant']}]: {row['auto_error']} by {row['auto']}"
        for row in RECORDED.values()
        if row["variant"] != "bfloat16 autocast" and row["auto_error"] != "nan"
        if float(row["auto_error"]) > EXACT["float32"]
    ]
    assert wrong == []


def test_auto_never_raises() -> None:
    raised = [
        f"{row['name']} [{row['variant']}]"
        for row in RECORDED.values()
        if row["auto"].startswith("raises") or (row["outcome"] == "refused" and row["variant"] == "own initialisation")
    ]
    assert raised == []


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("UNet2DModel", "FluxTransformer2DModel")], ids=str)
def test_a_variant_of_a_case_is_what_its_name_says(case: Any) -> None:
    assert applies(case, "bfloat16 autocast")
    assert check(case, "frozen parts", auto=False).parameters < check(case, auto=False).parameters


def test_the_tables_of_the_documentation_are_up_to_date() -> None:
    script = Path(__file__).resolve().parent.parent / "docs" / "coverage_table.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)
