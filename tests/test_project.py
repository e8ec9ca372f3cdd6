"""The project's own files: workflows, hooks, metadata and instructions agree with each other and with the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from antdiff.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / ".ci" / "run").exists():
    pytest.skip("the source distribution leaves these files out", allow_module_level=True)

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
RUN = (ROOT / ".ci" / "run").read_text()
STAGES = [*re.findall(r'^stages="(.*)"$', RUN, re.MULTILINE)[0].split(), "unpinned"]
YAML = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
OLDEST = "3.10"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def commands(markdown: str) -> list[list[str]]:
    """Every command of the bash blocks of a page, split into words."""
    blocks = re.findall(r"^( *)```bash\n(.*?)^\1```$", (ROOT / markdown).read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(block for _, block in blocks).splitlines()
    return [shlex.split(part) for line in lines if line for part in line.split("&&")]


def steps(workflow: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of a job and one of its steps."""
    return [(job, step) for job in load(workflow)["jobs"].values() for step in job["steps"]]


# ---- continuous integration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_files_parse(path: Path) -> None:
    assert isinstance(load(path), dict)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_stages_that_exist(workflow: Path) -> None:
    called = []
    for job, step in steps(workflow):
        matrix = job.get("strategy", {}).get("matrix", {})
        for words in re.findall(r"\.ci/run(.*)", step.get("run", "")):
            for name in re.findall(r"\$\{\{ *matrix\.(\w+) *\}\}", words):
                called += matrix[name]
            called += re.sub(r"\$\{\{.*?\}\}", "", words).split()
    assert called
    assert set(called) <= set(STAGES)
    if workflow.name == "ci.yml":
        assert sorted(called) == sorted(STAGES), "ci.yml runs every stage once"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_the_least_rights_and_pinned_actions(workflow: Path) -> None:
    assert load(workflow)["permissions"] == {"contents": "read"}
    for _, step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert "@" in step.get("uses", "@")


def test_each_stage_is_a_function_and_is_described() -> None:
    for stage in STAGES:
        assert re.search(rf"^{stage}\(\) {{", RUN, re.MULTILINE), f"no function {stage}"
        assert re.search(rf"^#   {stage}  ", RUN, re.MULTILINE), f"{stage} is not described at the top"


def test_an_unknown_stage_is_refused_before_anything_runs() -> None:
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "lint", "nosuch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"unknown stage 'nosuch': choose from {' '.join(STAGES)}\n"
    assert done.stdout == ""


# ---- versions --------------------------------------------------------------------------------------------------------


def test_every_tool_targets_the_oldest_python_that_is_promised() -> None:
    assert PROJECT["requires-python"] == f">={OLDEST}"
    prefix = "Programming Language :: Python :: 3."
    minors = sorted(int(c.removeprefix(prefix)) for c in PROJECT["classifiers"] if c.startswith(prefix))
    assert minors == list(range(10, minors[-1] + 1))
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + OLDEST.replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == OLDEST
    assert PYPROJECT["tool"]["cibuildwheel"]["build"] == [f"cp3{minor}-*" for minor in minors]
    unpinned = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["unpinned"]
    assert unpinned["strategy"]["matrix"]["python"] == [OLDEST, f"3.{minors[-1]}"]


def test_hooks_use_the_versions_of_constraints() -> None:
    """A remote hook would state its own version; local hooks run what ``pip install -c constraints.txt`` installs."""
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    repos = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = {hook["id"]: hook for hook in repos[0]["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "clang-format", "mypy"}
    for hook in hooks.values():
        assert hook["language"] == "system"
        folder, tool = hook["entry"].split()[0].rsplit("/", 1)
        assert folder == ".venv/bin"
        assert tool in pinned


def test_pins_admit_what_pyproject_asks_for() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in {r for group in groups for r in group}:
        name, least = re.match(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
        if name in pins and least:
            assert [int(n) for n in pins[name].split(".")] >= [int(n) for n in least.split(".")], requirement


def test_one_version_everywhere() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_complete() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert [author["family-names"] for author in paper["authors"]] == ["Go", "Kim", "Lee", "Lee", "Oh", "Moon", "Choi"]
    assert paper["url"] == PROJECT["urls"]["Paper"]


# ---- instructions ----------------------------------------------------------------------------------------------------

PROGRAMS = {"python", "python3", "pip", "pytest", "pre-commit", "cmake", "ctest", "bash", "git", "."}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/releasing.md"])
def test_commands_on_the_page_exist(page: str) -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    found = commands(page)
    assert found
    for program, *arguments in found:
        assert program in PROGRAMS, program
        if program == "bash":
            assert (ROOT / arguments[0]).exists()
            assert set(arguments[1:]) <= set(STAGES)
        for extras in re.findall(r"\.\[(.*?)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
        for option in re.findall(r"-D(ANTDIFF_\w+)=", " ".join(arguments)):
            assert re.search(rf"(set|option)\({option} ", cmake), option
        for file in (a for a in arguments if re.fullmatch(r"[\w/.-]+\.(txt|toml|sh|py|md)", a)):
            assert (ROOT / file).exists(), file


def options(markdown: str) -> dict[str, set[str]]:
    """The subcommands of ``antdiff`` on a page, with the options that the page gives them."""
    found: dict[str, set[str]] = {}
    text = (ROOT / markdown).read_text().replace("\\\n", " ")
    for subcommand, rest in re.findall(r"(?:^ +|`|/|> )antdiff ([a-z]+)([^`\n]*)", text, re.MULTILINE):
        found.setdefault(subcommand, set()).update(re.findall(r"(?<= )--[a-z][a-z-]*", rest))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if options(page)])
def test_options_on_the_page_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for subcommand, wanted in options(page).items():
        with pytest.raises(SystemExit) as ended:
            main([subcommand, "--help"])
        assert ended.value.code == 0
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert wanted <= known, subcommand


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/releasing.md", "docs/companions.md"])
def test_files_named_on_the_page_exist(page: str) -> None:
    names = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|md|yml|toml|txt|cff))`", (ROOT / page).read_text())
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_the_environment_of_contributors_has_every_tool_they_are_told_to_run() -> None:
    wanted = " ".join(r for extra in ("dev", "test", "bench") for r in PROJECT["optional-dependencies"][extra])
    assert "antdiff[bench,test]" in wanted
    for tool in ("pre-commit", "pytest", "ruff", "mypy", "clang-format", "build"):
        assert tool in wanted
