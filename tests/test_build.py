"""Commands that build and install antdiff, run as they are printed.

The commands run offline and touch nothing outside a temporary folder. ``pip`` is a script that adds the options for
this, and ``cmake`` is a script that configures but does not compile. CUDACXX names no compiler, so that a machine with
nvcc and one without give the same result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from antdiff import info

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake")

# Read from the metadata: to look for the module pip makes setuptools hand back the distutils of the standard library.
INSTALLED = {distribution.metadata["Name"].lower().replace("_", "-") for distribution in metadata.distributions()}

pytestmark = pytest.mark.skipif(
    CMAKE is None or not {"pip", "scikit-build-core", "pybind11"} <= INSTALLED,
    reason="needs cmake, pip, scikit-build-core and pybind11",
)


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"
        programs = folder / "bin"
        programs.mkdir()
        self._script(programs / "pip", f'exec "{sys.executable}" -m pip "$@" --no-index --no-build-isolation $OPTIONS')
        self._script(
            programs / "cmake",
            f'for argument; do case "$argument" in --build | --install) exit 0 ;; esac; done\nexec "{CMAKE}" "$@"',
        )
        chosen = ("ANTDIFF_CUDA", "CMAKE_CUDA_ARCHITECTURES", "CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE", "PYTHONPATH")
        self.environment = {key: value for key, value in os.environ.items() if key not in chosen} | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "CMAKE_EXECUTABLE": str(programs / "cmake"),
            "CUDACXX": str(folder / "nvcc"),
        }

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(self, command: str, options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.environment | {"OPTIONS": options} | environment,
            capture_output=True,
            text=True,
        )

    def configure(self, command: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
        """Run a command that installs the source tree; return its result and the cache of CMake."""
        build = self.folder / "build"
        done = self.run(command, f"--no-deps --target {self.site} -C build-dir={build}", **environment)
        cache = (build / "CMakeCache.txt").read_text()
        return done, dict(re.findall(r"^(\w+):\w+=(.*)$", cache, re.MULTILINE))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def readme_commands() -> list[str]:
    readme = (ROOT / "README.md").read_text()
    return re.findall(r"`((?:[A-Z_]+=\S+ )*pip install [^`]* \.)`", readme)


def test_the_command_that_builds_the_extension(machine: Machine) -> None:
    done, cache = machine.configure(info.COMMANDS["extension"])
    assert done.returncode == 0, done.stderr
    assert cache["ANTDIFF_CUDA"] == "AUTO"
    assert "CMAKE_CUDA_ARCHITECTURES" not in cache  # CMakeLists.txt chooses them
    assert (machine.site / "antdiff").is_dir()
    # pip finds the extra in the metadata of the package that is installed now.
    command = info.COMMANDS["train"].format(target="antdiff")
    done = machine.run(command, "--dry-run", PYTHONPATH=str(machine.site))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "architectures"),
    [
        (info.COMMANDS["cuda"], None),
        (info.COMMANDS["architecture"].format(architecture="90"), "90"),
        *((command, "90") for command in readme_commands()),
    ],
)
def test_the_commands_that_build_cuda_kernels(machine: Machine, command: str, architectures: str | None) -> None:
    done, cache = machine.configure(command)
    assert done.returncode != 0
    assert "ANTDIFF_CUDA is ON, but no CUDA compiler was found." in done.stdout + done.stderr
    assert cache["ANTDIFF_CUDA"] == "ON"
    assert cache.get("CMAKE_CUDA_ARCHITECTURES") == architectures


def test_a_build_folder_keeps_no_earlier_choice(machine: Machine) -> None:
    command = info.COMMANDS["extension"]
    _, cache = machine.configure(command, ANTDIFF_CUDA="AUTO", CMAKE_CUDA_ARCHITECTURES="80-real;90")
    assert cache["CMAKE_CUDA_ARCHITECTURES"] == "80-real;90"
    done, cache = machine.configure(command + " --upgrade", ANTDIFF_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    assert cache["ANTDIFF_CUDA"] == "OFF"
    assert not cache.get("CMAKE_CUDA_ARCHITECTURES")


def test_a_choice_that_does_not_exist_is_refused(machine: Machine) -> None:
    done = machine.run(f"cmake -S . -B {machine.folder / 'build'} -DANTDIFF_CUDA=yes", "")
    assert done.returncode != 0
    assert "ANTDIFF_CUDA must be AUTO, ON or OFF; got 'yes'." in done.stderr


@pytest.mark.parametrize(
    ("capabilities", "nvcc", "chosen"),
    [
        ([], "75 80 86 89 90 100 120", "75-virtual;80-real;90"),  # no GPU
        (None, "50 60 70 75 80 90", "70-virtual;80-real;90"),  # no driver, and an nvcc that knows older GPUs
        (["9.0"], "75 80 86 89 90 100 120", "90-real"),
        (["8.6", "9.0", "8.6"], "75 80 86 89 90 100 120", "86-real;90-real"),
        (["12.0"], "70 75 80 90", "90-virtual"),  # newer than this nvcc
        (["6.1"], "50 60 70 75 80 90", "70-virtual;80-real;90"),  # older than the kernels support
    ],
)
def test_the_default_architectures_are_those_of_the_gpus_that_are_present(
    machine: Machine, capabilities: list[str] | None, nvcc: str, chosen: str
) -> None:
    listed = "exit 9" if capabilities is None else "\n".join(f"echo {capability}" for capability in capabilities)
    machine._script(machine.folder / "bin" / "nvidia-smi", listed)
    script = machine.folder / "choose.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f'include("{ROOT}/cmake/CudaArchitectures.cmake")\n'
        f'antdiff_default_architectures(chosen "{nvcc.replace(" ", ";")}")\n'
        'message(NOTICE "chosen: ${chosen}")\n'
    )
    done = machine.run(f"cmake -P {script}", "")
    assert done.returncode == 0, done.stderr
    assert f"chosen: {chosen}\n" in done.stderr
    everything = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    present = [tuple(map(int, capability.split("."))) for capability in capabilities or [] if capability != "6.1"]
    assert all(info.serves(chosen, *capability) for capability in present or everything)


def test_a_second_installation_compiles_nothing(machine: Machine) -> None:
    """pip makes a new folder with pybind11 for every build, and its name must not be part of a compile command."""
    import pybind11

    build = machine.folder / "build"
    seen = []
    for environment in ("first", "second"):
        copy = machine.folder / environment
        shutil.copytree(Path(pybind11.__file__).parent, copy, copy_function=shutil.copyfile)  # with new times
        done = machine.run(
            f"cmake -S . -B {build} -G Ninja -DANTDIFF_CUDA=OFF -Dpybind11_DIR={copy}/share/cmake/pybind11", ""
        )
        assert done.returncode == 0, done.stderr
        shutil.rmtree(copy)
        commands = machine.run(f"ninja -C {build} -t commands", "").stdout
        headers = {path: path.stat().st_mtime_ns for path in build.rglob("pybind11/**/*.h")}
        assert "bindings/module.cpp" in commands
        # scikit-build-core deletes these two when pip has made a new folder.
        (build / "CMakeCache.txt").unlink()
        shutil.rmtree(build / "CMakeFiles")
        assert not re.search(r"-o CMakeFiles/", commands), "an object would be deleted"
        assert len(headers) > 20
        seen.append((commands, headers))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("command", [info.COMMANDS["torch"], info.COMMANDS["train"].format(target=".")])
def test_the_commands_that_install_packages(machine: Machine, command: str) -> None:
    missing = [name for name in info.TRAIN_PACKAGES if info.version(name) is None]
    if missing and "train" in command:
        pytest.skip(f"needs {', '.join(missing)}")
    done = machine.run(command, f"--dry-run -C build-dir={machine.folder / 'build'}")
    assert done.returncode == 0, done.stderr


def test_every_file_prints_the_commands_that_are_tested() -> None:
    def commands(text: str) -> set[str]:
        return set(re.findall(r"((?:[A-Z_]+=\S+ )*pip install (?:--[\w-]+ )*\.)[ `]", text))

    assert commands((ROOT / "csrc" / "bindings" / "tensor.cpp").read_text()) == {info.COMMANDS["cuda"]}
    assert commands((ROOT / "python" / "antdiff" / "ops" / "_extension.py").read_text()) == {info.COMMANDS["extension"]}
    assert info.COMMANDS["torch"] in (ROOT / "python" / "antdiff" / "ops" / "_extension.py").read_text()
    assert readme_commands()
    for path in ("README.md", "CONTRIBUTING.md", ".ci/run", "benchmarks/gpu_gate.sh", "pyproject.toml"):
        assert "cmake.define." not in (ROOT / path).read_text(), f"{path}: use the environment variables"
        assert "SKBUILD_CMAKE_DEFINE" not in (ROOT / path).read_text(), f"{path}: use the environment variables"
