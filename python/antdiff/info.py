"""``antdiff info`` and ``python -m antdiff.info``: report what is installed, how it was built and what will be used.

The report has one line with the remedy for each missing component. It is meant to be pasted into a bug report. It needs
no optional package: it also works if torch is missing or the extension does not load.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

TORCH_NEEDED = (2, 10)
CAPABILITY_NEEDED = (7, 0)  # the kernels take tables as __grid_constant__ parameters
TRAIN_PACKAGES = ("diffusers", "matplotlib", "mlxtend", "pillow", "safetensors", "scikit-learn", "tensorboard",
                  "torchmetrics", "tqdm", "tyro")  # fmt: skip
# Every command that a report can contain. The tests run each of them. {target} is `antdiff`, or `.` for a source tree.
COMMANDS = {
    "extension": "pip install .",
    "cuda": "ANTDIFF_CUDA=ON pip install --force-reinstall --no-deps .",
    "architecture": "ANTDIFF_CUDA=ON CMAKE_CUDA_ARCHITECTURES={architecture} pip install --force-reinstall --no-deps .",
    "torch": 'pip install "torch>=2.10"',
    "train": 'pip install "{target}[train]"',
}


def collect() -> tuple[dict[str, str], list[str]]:
    """Return the facts, label to text in the order of the report, and one remedy for each missing component."""
    installed = version("antdiff")
    facts = {
        "antdiff": installed or "not installed (imported from a source tree)",
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    remedies: list[str] = []
    build = _extension(facts, remedies)
    gpu = _torch(facts, remedies, build)
    facts["packages"] = ", ".join(f"{name} {version(name)}" for name in ("numpy", "cvxpy", "einops") if version(name))
    missing = [name for name in TRAIN_PACKAGES if version(name) is None]
    facts["train extra"] = ", ".join(f"{name} {version(name)}" for name in TRAIN_PACKAGES if version(name)) or "none"
    if missing:
        remedies.append(f"antdiff train, compare and sample need {', '.join(missing)}. {train_extra_remedy()}")
    if build is None:
        facts["will be used"] = "nothing: the extension does not load"
    else:
        isa, best, threads = build.get("isa", "?"), build.get("supported_isa"), facts.get("threads", "?")
        if best not in (None, isa):
            isa += f", lowered from {best} by ANTDIFF_CPU_CAPABILITY"
        cpu = f"CPU kernels ({isa}, {'OpenMP' if build.get('openmp') else 'no OpenMP'}, {threads} threads)"
        facts["will be used"] = f"CUDA kernels for tensors on {gpu}, {cpu} for the rest" if gpu else cpu
    return facts, remedies


def train_extra_remedy() -> str:
    """Return the sentence that says how to install the train extra."""
    installed = version("antdiff") is not None
    command = COMMANDS["train"].format(target="antdiff" if installed else ".")
    return f"Install the extra{'' if installed else ' in the source tree'}: {command}"


def _extension(facts: dict[str, str], remedies: list[str]) -> dict[str, Any] | None:
    """Describe the extension; return its build_info, or None if it does not load."""
    try:
        from antdiff import _C
    except ImportError as error:
        facts["extension"] = f"does not load: {error}"
        remedies.append(
            str(error)
            if "ANTDIFF_CPU_CAPABILITY" in str(error)
            else "The extension does not load. Build it in the source tree, with a C++17 compiler: "
            + COMMANDS["extension"]
        )
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
    """Describe torch and the GPUs; return "cuda" if the CUDA kernels serve the current GPU, else None."""
    try:
        import torch
    except ImportError as error:
        facts["torch"] = f"does not load: {error}"
        remedies.append(f"torch does not load. Install it: {COMMANDS['torch']}")
        return None
    facts["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    facts["threads"] = str(torch.get_num_threads())
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < TORCH_NEEDED:
        remedies.append(
            "This torch lacks the DLPack exchange API through which antdiff reads tensors. Install a later one: "
            f"{COMMANDS['torch']}"
        )
    if not torch.cuda.is_available():
        facts["gpu"] = "none that torch can use"
        if torch.version.cuda is None:
            remedies.append(
                "This torch is built for CPUs only. To use a GPU, install a CUDA build of torch: https://pytorch.org"
            )
        return None
    facts["gpu"] = "; ".join(
        f"cuda:{i} {torch.cuda.get_device_name(i)} (sm_{major}{minor})"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
    )
    capability = torch.cuda.get_device_capability()
    sm = f"sm_{capability[0]}{capability[1]}"
    if capability < CAPABILITY_NEEDED:
        remedies.append(
            f"The CUDA kernels need a GPU of compute capability 7.0 or later, and this one is {sm}. "
            "Keep the tensors on the CPU."
        )
        return None
    if build is None or not build.get("cuda"):
        remedies.append(
            "This build has no CUDA kernels. To use the GPU, install the CUDA toolkit and run this in the source tree: "
            f"{COMMANDS['cuda']}"
        )
        return None
    if not serves(build["cuda_archs"], *capability):
        command = COMMANDS["architecture"].format(architecture=sm.removeprefix("sm_"))
        remedies.append(
            f"The CUDA kernels of this build do not serve {sm}. To use the GPU, install the CUDA toolkit and run this "
            f"in the source tree: {command}"
        )
        return None
    return "cuda"


def archs_text(archs: str | list[str]) -> str:
    """Return the architectures as one line, from a list or from the comma-separated text that CMake wrote."""
    return archs if isinstance(archs, str) else ", ".join(str(arch) for arch in archs)


def serves(archs: str | list[str], major: int, minor: int) -> bool:
    """Tell whether kernels built for `archs` (CMake's spelling: 80, 90-real, 90a-real, all-major) run on this GPU.

    Machine code runs on GPUs of the same major version and the same or a later minor version. PTX, which an
    architecture without ``-real`` includes, runs on every later GPU. Code for one architecture's own features (90a)
    runs on exactly that architecture.
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
    """Return the installed version of a package, or None. This reads metadata and imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> str:
    """Return the text of ``antdiff info``."""
    facts, remedies = collect()
    width = max(len(label) for label in facts)
    lines = [f"{label:<{width}}  {text}" for label, text in facts.items()]
    lines += ["", *(f"- {remedy}" for remedy in remedies)] if remedies else ["", "Nothing is missing."]
    return "\n".join(lines)


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
