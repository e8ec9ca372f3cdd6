"""``antdiff info`` and ``python -m antdiff.info``: what is installed, how it was built, what will be used, what is
missing and how to mend it. For a newcomer to read, and to paste into a bug report. Needs no optional package.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

TORCH_NEEDED = (2, 10)
TRAIN_PACKAGES = ("diffusers", "matplotlib", "mlxtend", "pillow", "safetensors", "scikit-learn", "tensorboard",
                  "torchmetrics", "tqdm", "tyro")  # fmt: skip
REBUILD_CUDA = "install the CUDA toolkit and run: ANTDIFF_CUDA=ON pip install --force-reinstall --no-deps ."


def collect() -> tuple[dict[str, str], list[str]]:
    """What there is, label to text in the order to print, and one line of remedy for each thing missing."""
    facts = {
        "antdiff": version("antdiff") or "not installed (imported from a source tree)",
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    remedies: list[str] = []
    build = _extension(facts, remedies)
    gpu = _torch(facts, remedies, build)
    facts["packages"] = ", ".join(f"{name} {version(name)}" for name in ("numpy", "cvxpy", "einops") if version(name))
    missing = [name for name in TRAIN_PACKAGES if version(name) is None]
    facts["train extra"] = ", ".join(f"{name} {version(name)}" for name in TRAIN_PACKAGES if version(name)) or "none"
    if missing:
        remedies.append(
            f'for antdiff train, compare and sample: pip install "antdiff[train]" (missing: {", ".join(missing)})'
        )
    if build is None:
        facts["will be used"] = "nothing: the extension does not load"
    else:
        isa, threads = build.get("isa", "?"), facts.get("threads", "?")
        cpu = f"CPU kernels ({isa}, {'OpenMP' if build.get('openmp') else 'no OpenMP'}, {threads} threads)"
        facts["will be used"] = f"CUDA kernels for tensors on {gpu}, {cpu} for the rest" if gpu else cpu
    return facts, remedies


def _extension(facts: dict[str, str], remedies: list[str]) -> dict[str, Any] | None:
    """The build_info of antdiff._C, or None if it does not load."""
    try:
        from antdiff import _C
    except ImportError as error:
        facts["extension"] = f"does not load: {error}"
        remedies.append("build the extension: pip install . in the source tree (a C++17 compiler is enough)")
        return None
    build: dict[str, Any] = dict(_C.build_info())
    cuda = (
        f"CUDA {build['cuda_compiler']} for {archs_text(build['cuda_archs'])}"
        if build.get("cuda")
        else "no CUDA kernels"
    )
    facts["extension"] = f"{build.get('version')}, {build.get('compiler')}, {cuda}"
    facts["extension file"] = str(getattr(_C, "__file__", "?"))
    return build


def _torch(facts: dict[str, str], remedies: list[str], build: Mapping[str, Any] | None) -> str | None:
    """Describe torch and the GPU; the device's name if its tensors will go through our kernels, else None."""
    try:
        import torch
    except ImportError as error:
        facts["torch"] = f"does not load: {error}"
        remedies.append('install torch: pip install "torch>=2.10"')
        return None
    facts["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    facts["threads"] = str(torch.get_num_threads())
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < TORCH_NEEDED:
        remedies.append(
            'this torch lacks the DLPack exchange API antdiff reads tensors with: pip install "torch>=2.10"'
        )
    if not torch.cuda.is_available():
        facts["gpu"] = "none that torch can use"
        if torch.version.cuda is None:
            remedies.append("to use a GPU: this torch is built for CPUs; install a CUDA build of it (pytorch.org)")
        return None
    facts["gpu"] = "; ".join(
        f"cuda:{i} {torch.cuda.get_device_name(i)} (sm_{major}{minor})"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
    )
    if build is None or not build.get("cuda"):
        remedies.append(f"to use the GPU: this build has no CUDA kernels; {REBUILD_CUDA}")
        return None
    major, minor = torch.cuda.get_device_capability()
    if not serves(build["cuda_archs"], major, minor):
        remedies.append(
            f"the kernels do not serve sm_{major}{minor}: CMAKE_CUDA_ARCHITECTURES={major}{minor}, then {REBUILD_CUDA}"
        )
        return None
    return "cuda"


def archs_text(archs: str | list[str]) -> str:
    """The architectures as one line, from a list or from CMake's comma-separated text."""
    return archs if isinstance(archs, str) else ", ".join(str(arch) for arch in archs)


def serves(archs: str | list[str], major: int, minor: int) -> bool:
    """Whether kernels built for `archs` (CMake's spelling: 80, 90-real, 90a-real, all-major) run on this GPU.

    Machine code runs on its own major version from its minor on; PTX (no ``-real``) on everything newer. Code for
    features of one architecture (90a) runs on exactly that one.
    """
    for arch in archs_text(archs).replace(";", ",").split(","):
        number, _, kind = arch.strip().partition("-")
        if number in ("all", "native") or arch.strip() == "all-major":
            return True
        exact = number.endswith(("a", "f"))
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        built = (int(digits) // 10, int(digits) % 10)
        if built == (major, minor) or (not exact and built[0] == major and built[1] <= minor):
            return True
        if not exact and kind != "real" and built <= (major, minor):
            return True
    return False


def version(package: str) -> str | None:
    """The installed version of a package, or None. Reads metadata only, so it imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> str:
    """The text of ``antdiff info``."""
    facts, remedies = collect()
    width = max(len(label) for label in facts)
    lines = [f"{label:<{width}}  {text}" for label, text in facts.items()]
    lines += ["", *(f"- {remedy}" for remedy in remedies)] if remedies else ["", "Nothing is missing."]
    return "\n".join(lines)


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
