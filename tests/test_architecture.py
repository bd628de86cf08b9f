"""Structure of the code: folders import downwards, and dvc.yaml lists the files that a stage reads."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from compactgpt.common.sections import read_yaml
from compactgpt.config import Params

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/compactgpt"
# By name with dots, such as `model.gpt`.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
COMMANDS = {name for name in MODULES if name.split(".")[0] in ("cli", "commands")}
STAGES = {path.stem: path for path in (ROOT / "stages").glob("*.py")}
PIPELINE = read_yaml(ROOT / "dvc.yaml")["stages"]
HEAVY = ["mlflow", "dvc", "typer", "great_expectations", "transformers", "datasets", "pandas", "pyarrow"]


# Modules that can't change a stage's output: they write messages, progress and MLflow logs. The module
# `config` only reads params.yaml, and DVC tracks the values of params.yaml as params.
UNTRACKED = {
    "common.console", "common.errors", "common.sections", "config", "tracking.journal",
    "tracking.training_callbacks",
}  # fmt: skip


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Return what a file imports, at its top or inside functions: `a.b` for `from a import b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of compactgpt that a file imports. In `from m import n`, `n` may be a module."""
    names = {name.removeprefix("compactgpt.") for name in imported_names(path)}
    return {one for name in names for one in (name, name.rpartition(".")[0]) if one in MODULES}


def stage_modules(script: Path) -> set[str]:
    """Return the modules that a stage script imports, directly or through another module."""
    seen, todo = set(), imported_modules(script) - UNTRACKED
    while todo:
        seen.add(name := todo.pop())
        todo |= imported_modules(MODULES[name]) - UNTRACKED - seen
    return seen


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_has_a_script_params_and_the_code_that_it_imports_as_dependencies(stage):
    """Of the modules that a stage imports only those in UNTRACKED, which display and log, rerun nothing."""
    assert stage in Params.model_fields
    assert PIPELINE[stage]["cmd"].startswith(f"exec python -m stages.{stage}")
    listed = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("src/", "stages"))}
    imported = {f"src/compactgpt/{name.replace('.', '/')}.py" for name in stage_modules(STAGES[stage])}
    imported.add(f"stages/{stage}.py")
    parents = {path: {path, *(str(parent) for parent in Path(path).parents)} for path in imported}
    assert {path for path in imported if not parents[path] & listed} == set()
    if stage != "comparison":  # which hashes the code of every stage
        modules = {str(path) for dep in listed for path in Path(dep).rglob("*") if path.suffix != ".pyc"}
        files = {path for path in modules if not path.endswith(("__pycache__", "__init__.py"))}
        assert files | {dep for dep in listed if dep.endswith(".py")} == imported


def test_every_param_of_a_stage_exists_and_every_section_belongs_to_a_stage_or_the_gate():
    names = [name for stage in PIPELINE.values() for name in stage["params"]]
    # The gate checks what the stages made: other limits run no stage again.
    assert {name.split(".")[0] for name in names} == set(Params.model_fields) - {"regression"}
    for name in names:
        node = read_yaml(ROOT / "params.yaml")
        for part in name.partition(".${")[0].split("."):
            assert part in node, name
            node = node[part]


def loaded_by(modules: list[str], unwanted: list[str]) -> list[str]:
    """Import modules one after the other in a new process; return the line that names an unwanted library."""
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    found = [library for library in {unwanted} if library in sys.modules]
    if found:
        sys.exit(f"{{name}} loads {{found}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stderr.splitlines()


def test_importing_modules_or_asking_for_help_loads_no_heavy_library():
    # cross_entropy_triton needs Triton, which comes with torch for Nvidia's GPUs only.
    names = [f"compactgpt.{name}" for name in sorted({*MODULES} - COMMANDS - {"model.cross_entropy_triton"})]
    assert loaded_by(["compactgpt"], [*HEAVY, "torch", "numpy"]) == []
    assert loaded_by(names, HEAVY) == []
    stages = [f"stages.{name}" for name in sorted(set(STAGES) - {"__init__"})]
    assert loaded_by(["compactgpt.cli", *stages], [*set(HEAVY) - {"typer"}, "torch"]) == []
    metrics = "compactgpt.evaluation.metrics"
    assert loaded_by([metrics], ["numpy"]) == [f"{metrics} loads ['numpy']"]  # the check finds what is there


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("datasets", {"data.hub_texts"}),
        ("great_expectations", {"data.validation"}),
        ("transformers", {"evaluation.baselines", "tracking.registry"}),
        ("typer", COMMANDS),
        ("stages", set()),
        ("mlflow", {name for name in MODULES if name.startswith("tracking.")}),
        ("dvc", {name for name in MODULES if name.startswith("tracking.")}),
    ],
)
def test_only_these_modules_import_a_library(library, allowed):
    found = {name for name, path in MODULES.items() if library in libraries(path)}
    assert found <= allowed
    assert bool(found) == bool(allowed)


def test_each_library_that_a_module_imports_is_a_dependency_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.split(r"[<>=\[ ]", line)[0].replace("-", "_") for line in lines}
    # dvc_data comes with DVC, triton with torch for Nvidia's GPUs.
    names |= {"dvc_data", "triton", "compactgpt", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        assert {"ruamel.yaml" if each == "ruamel" else each for each in libraries(path)} <= names, name


# Lowest first. A module imports from its own folder and from those on lower lines only.
LEVELS = [
    {"common"}, {"config"}, {"data"}, {"experiments"}, {"model", "forecast"}, {"training"}, {"evaluation"},
    {"tracking"}, {"reporting"}, {"gate"}, {"api", "speed"}, {"init_corpus", "doctor"}, {"commands"}, {"cli"},
]  # fmt: skip
LEVEL = {folder: number for number, folders in enumerate(LEVELS) for folder in folders}


def test_folders_import_downwards_only_and_no_modules_import_each_other_in_a_circle():
    assert {module.split(".")[0] for module in MODULES} == set(LEVEL)
    graph = {module: imported_modules(path) for module, path in MODULES.items()}
    for module, names in graph.items():
        folder = module.split(".")[0]
        others = {name.split(".")[0] for name in names} - {folder}
        assert not {other for other in others if LEVEL[other] >= LEVEL[folder]}, module
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_exist(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    assert not {link for link in links if not (path.parent / link).exists()}


def test_no_test_file_imports_another():
    """What tests share is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imported_names(path) if re.search(r"(^|\.)test_", name)], path
