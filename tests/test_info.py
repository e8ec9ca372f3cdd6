"""``antdiff info`` reports what is installed, and names a remedy for what is missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from antdiff import _C, info

HOW = "To use the GPU, install the CUDA toolkit and run this in the source tree"


def test_report_says_what_is_there() -> None:
    text = info.report()
    build = _C.build_info()
    for part in (torch.__version__, build["version"], build["compiler"], build["isa"], "diffusers", "will be used"):
        assert part in text
    if torch.version.cuda is None:  # a CUDA build of torch on a machine without a GPU lacks nothing
        assert "To use a GPU" in text


def test_every_missing_thing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "version", lambda package: None if package in ("diffusers", "tyro") else "1.0")
    text = info.report()
    assert 'need diffusers, tyro. Install the extra: pip install "antdiff[train]"' in text
    monkeypatch.setitem(sys.modules, "antdiff._C", None)  # import now raises ImportError
    monkeypatch.delattr("antdiff._C")
    facts, remedies = info.collect()
    assert facts["will be used"] == "nothing: the extension does not load"
    assert any(remedy.endswith(info.COMMANDS["extension"]) for remedy in remedies)
    monkeypatch.setattr(info, "version", lambda package: None)  # nothing is installed, antdiff included
    assert any(remedy.endswith('in the source tree: pip install ".[train]"') for remedy in info.collect()[1])


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("80-real,90-real", (9, 0), True),
        ("80-real,90-real", (8, 6), True),  # machine code of the same major version
        ("80-real,90-real", (10, 0), False),
        ("80-real,90", (10, 0), True),  # PTX is compiled for newer GPUs
        ("80", (7, 5), False),
        ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("75-real,120-real", (12, 0), True),
        ("all-major", (9, 0), True),
        ("", (9, 0), False),
        (["80", "90-real"], (9, 0), True),
    ],
)
def test_which_gpus_a_build_serves(archs: Any, capability: tuple[int, int], expected: bool) -> None:
    assert info.serves(archs, *capability) is expected


@pytest.mark.parametrize(
    ("archs", "remedy"),
    [
        ("80-real", f"do not serve sm_90. {HOW}: {info.COMMANDS['architecture'].format(architecture='90')}\n"),
        (None, f"This build has no CUDA kernels. {HOW}: {info.COMMANDS['cuda']}\n"),
    ],
)
def test_a_gpu_the_build_cannot_use_is_reported(
    archs: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = {**_C.build_info(), "cuda": archs is not None, "cuda_compiler": "13.0", "cuda_archs": archs or ""}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    text = info.report()
    assert "cuda:0 H200 (sm_90)" in text
    assert remedy in text + "\n"
    assert "will be used" in text
    assert "CUDA kernels for tensors" not in text
    build |= {"cuda": True, "cuda_archs": "90-real"}
    assert "CUDA kernels for tensors on cuda" in info.report()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    assert "need a GPU of compute capability 7.0 or later, and this one is sm_61" in info.report()


def test_module_runs_without_the_optional_packages() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('tyro', 'diffusers', 'sklearn', 'matplotlib', 'tqdm')))\n"
    for run in (
        "import runpy; runpy.run_module('antdiff.info', run_name='__main__')",
        "import antdiff.cli; antdiff.cli.main(['info'])",
    ):
        done = subprocess.run([sys.executable, "-c", blocked + run], capture_output=True, text=True, check=True)
        assert "will be used" in done.stdout
