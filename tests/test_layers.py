"""The structure of the project: imports run in one direction, and every op has all of its parts."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import antdiff
from antdiff import _C, ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "antdiff"
CSRC = ROOT / "csrc"

# A package may import from packages of a lower rank, and from itself.
RANK = {"_command": 0, "_csv": 0, "_devices": 0, "_files": 0, "_folders": 0, "_progress": 0, "_signals": 0,
        "_checks": 0, "_checkpoints": 1, "ops": 1, "info": 1, "distributed": 2, "clustering": 3, "gradients": 3,
        "balancing": 3, "diffusion": 3, "analysis": 4, "companions": 4, "plotting": 5, "data": 6, "train": 7,
        "experiments": 8, "cli": 9, "__main__": 10}  # fmt: skip
LIGHT = {"torch", "numpy", "antdiff"}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports; with ``top_level_only``, those imported when it is."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "antdiff" else {node.module}
            )
    return found


def test_imports_run_leftwards_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if mine == "__init__":
            continue
        assert mine in RANK, f"{path}: give {mine} a place in the layers"
        for module in imports(path):
            parts = module.split(".")
            if parts[0] != "antdiff" or len(parts) < 2 or parts[1] in (mine, "_C"):
                continue
            assert RANK.get(parts[1], 0) < RANK[mine], f"{path} imports {module}"


def module_graph() -> dict[str, set[str]]:
    """Return, for each module of the package, the modules that it names in any import statement.

    Imports inside functions and under TYPE_CHECKING count. Importing a name from a package counts as importing the
    package itself.
    """
    files = {
        ".".join(("antdiff", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in (*PACKAGE.rglob("*.pyi"), *PACKAGE.rglob("*.py"))
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                modules = {f"{base}.{alias.name}" for alias in node.names} & files.keys()
                named |= modules if len(modules) == len(node.names) else {base, *modules}
        graph[name] = (named & files.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of two or more modules."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for module in graph[stack.pop()] - seen:
                seen.add(module)
                stack.append(module)
        reached[start] = seen
    components = {frozenset(m for m in seen if start in reached[m]) for start, seen in reached.items() if start in seen}
    return [set(c) for c in sorted(components, key=sorted)]


def test_modules_do_not_import_each_other_in_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles(module_graph()) == []


@pytest.mark.parametrize("package", ["ops", "clustering", "gradients", "balancing", "diffusion", "distributed"])
def test_light_packages_import_only_torch_and_numpy(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        for module in imports(path, top_level_only=True):
            top = module.split(".")[0]
            assert top in LIGHT or top in sys.stdlib_module_names, f"{path} imports {module} at its top"


def test_importing_antdiff_loads_nothing_heavy_and_leaves_cuda_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import antdiff, antdiff.ops\n"
        "print('torch._dynamo' in sys.modules and 'torch._dynamo' not in before)\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "heavy = {'cvxpy', 'einops', 'diffusers', 'matplotlib', 'sklearn', 'scipy', 'torchmetrics', 'tyro'}\n"
        "print(*sorted(new & heavy))\n"
        "print(torch.cuda.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out == ["False", "", "False"]


def families() -> list[str]:
    return sorted(
        p.stem for p in (PACKAGE / "ops").glob("*.py") if p.stem != "reference" and not p.stem.startswith("_")
    )


@pytest.mark.parametrize("family", families())
def test_every_op_is_whole(family: str) -> None:
    params = "".join(part.capitalize() for part in family.split("_")) + "Params"
    files = [f"csrc/bindings/{family}.cpp", f"csrc/cpu/{family}.cpp", f"tests/test_{family}.py"]
    if family == "interval":  # runs once before training, so it has no CUDA kernel, and cpu/ holds its parameters
        header = "cpu"
    else:
        header = "core"
        files.append(f"csrc/cuda/{family}.cu")
    declared = "".join(p.read_text() for p in (CSRC / header).glob("*.h"))
    assert f"struct {params} " in declared, f"no {params} in csrc/{header}"
    missing = [name for name in files if not (ROOT / name).exists()]
    assert not missing
    benches = "".join(p.read_text() for p in (ROOT / "benchmarks").glob("bench_*.py"))
    tests = "".join(p.read_text() for p in (CSRC / "tests").glob("*.cpp"))
    assert re.search(rf"\b{family}", benches), f"no benchmark of {family}"
    assert re.search(rf"\bcpu_{family}", tests), f"no C++ test of {family}"


# For each folder of csrc: the folders that it may include besides itself, and a pattern for the headers that it may
# include in angle brackets.
INCLUDES = {
    "core": ([], r"c?[a-z_]+|cuda_fp16\.h"),
    "cpu": (["core"], r"c?[a-z_]+|omp\.h"),
    "cuda": (["core", "tests"], r"c?[a-z_]+|cuda_runtime\.h"),
    "bindings": (["core", "cpu", "cuda"], r"c?[a-z_]+|pybind11/pybind11\.h"),
    "tests": (["core", "cpu", "cuda"], r".+"),
}


@pytest.mark.parametrize("folder", INCLUDES)
def test_csrc_includes_run_one_way(folder: str) -> None:
    allowed, system = INCLUDES[folder]
    for path in (CSRC / folder).rglob("*.*"):
        text = path.read_text()
        for header in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
            assert header.split("/")[0] in [folder, *allowed], f"{path} includes {header}"
        for header in re.findall(r"^#include <([^>]+)>", text, re.MULTILINE):
            assert re.fullmatch(system, header), f"{path} includes <{header}>"
        if folder == "core":
            found = re.search(r"__int128|__builtin_|__attribute__|\[\[gnu::", text)
            assert not found, f"{path} is not standard C++: {found.group()}"


def test_the_stub_of_the_extension_matches_the_compiled_module() -> None:
    def kind(annotation: str) -> str:
        for scalar in ("bool", "str", "float", "int"):
            if annotation == scalar or annotation.startswith(f"typing.Supports{scalar.capitalize()}"):
                return scalar
        return "None" if annotation == "None" else "object"

    stub: dict[str, list[tuple[str, str]]] = {}
    build_info: set[str] = set()
    for node in ast.parse((PACKAGE / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            arguments = [(a.arg, kind(ast.unparse(a.annotation))) for a in node.args.args if a.annotation]
            stub[node.name] = [*arguments, ("return", kind(ast.unparse(node.returns) if node.returns else ""))]
        elif isinstance(node, ast.ClassDef):
            build_info = {field.target.id for field in node.body
                          if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}  # fmt: skip
    compiled: dict[str, list[tuple[str, str]]] = {}
    for name, function in vars(_C).items():
        if name.startswith("__"):
            continue
        text, _, returned = function.__doc__.partition("\n")[0].partition(" -> ")  # pybind11 writes the signature there
        arguments = re.findall(r"(\w+): ([^,)]+)", text)
        compiled[name] = [
            *((argument, kind(annotation)) for argument, annotation in arguments),
            ("return", kind(returned)),
        ]
    assert stub == compiled
    assert build_info == set(_C.build_info())


def test_reference_twins_have_the_same_names_and_parameters() -> None:
    for name in ops.__all__:
        op = getattr(ops, name)
        if not inspect.isfunction(op) or name == "check_errors":
            continue
        twin = getattr(ops.reference, name, None)
        assert twin is not None, f"ops.reference has no {name}"
        assert list(inspect.signature(twin).parameters) == list(inspect.signature(op).parameters), name


def test_public_names_have_docstrings() -> None:
    for module in (antdiff, ops):
        for name in module.__all__:
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"


def test_the_version_is_that_of_pyproject() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert antdiff.__version__ in (declared[1], f"{declared[1]}+source")
