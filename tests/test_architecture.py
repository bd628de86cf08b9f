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
from compactgpt.reporting.provenance import code_hashes, imported_modules, stage_modules

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


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_code_that_a_stage_depends_on_is_the_code_that_it_imports(stage):
    """Of the modules that a stage imports only those in UNTRACKED, which display and log, rerun nothing."""
    listed = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("src/", "stages"))}
    imported = {f"src/compactgpt/{name}.py" for name in stage_modules(ROOT, STAGES[stage])}
    imported.add(f"stages/{stage}.py")
    parents = {path: {path, *(str(parent) for parent in Path(path).parents)} for path in imported}
    assert {path for path in imported if not parents[path] & listed} == set()
    if stage != "comparison":  # which hashes the code of every stage
        modules = {str(path) for dep in listed for path in Path(dep).rglob("*") if path.suffix != ".pyc"}
        files = {path for path in modules if not path.endswith(("__pycache__", "__init__.py"))}
        assert files | {dep for dep in listed if dep.endswith(".py")} == imported


def test_each_stage_has_a_hash_of_its_code():
    assert set(PIPELINE) <= set(code_hashes(ROOT))


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_has_a_script_and_a_section_of_params_of_its_name(stage):
    assert stage in STAGES
    assert stage in Params.model_fields
    assert PIPELINE[stage]["cmd"].startswith(f"exec python -m stages.{stage}")


def test_every_section_of_params_belongs_to_a_stage_or_the_gate():
    tracked = {param.split(".")[0] for stage in PIPELINE.values() for param in stage["params"]}
    gate = {"regression"}  # checks what the stages made: other bounds run no stage again
    assert not tracked & gate
    assert tracked | gate == set(Params.model_fields)


def test_every_tracked_param_exists():
    params = read_yaml(ROOT / "params.yaml")
    for stage in PIPELINE.values():
        for name in stage["params"]:
            node = params
            for part in name.split("."):
                if part.startswith("${"):
                    break
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


def test_importing_the_modules_loads_no_heavy_library():
    # cross_entropy_triton needs Triton, which comes with torch for Nvidia's GPUs only.
    without = {*COMMANDS, "model.cross_entropy_triton"}
    names = [f"compactgpt.{name}" for name in sorted(set(MODULES) - without)]
    assert loaded_by(["compactgpt"], [*HEAVY, "torch", "numpy"]) == []
    assert loaded_by(names, HEAVY) == []


def test_the_help_of_a_stage_loads_no_heavy_library():
    stages = [f"stages.{name}" for name in sorted(set(STAGES) - {"__init__"})]
    assert loaded_by(["compactgpt.cli", *stages], [*set(HEAVY) - {"typer"}, "torch"]) == []
    metrics = "compactgpt.evaluation.metrics"
    assert loaded_by([metrics], ["numpy"]) == [f"{metrics} loads ['numpy']"]


@cache
def libraries(path: Path) -> set[str]:
    """The packages that a file imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[0] for name in names}
    return found


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("datasets", {"data.hub_texts"}),
        ("great_expectations", {"data.validation"}),
        ("transformers", {"evaluation.baselines", "tracking.registry"}),
        ("typer", COMMANDS),
        ("stages", set()),
    ],
)
def test_only_these_modules_import_a_library(library, allowed):
    assert {name for name, path in MODULES.items() if library in libraries(path)} == allowed


@pytest.mark.parametrize("library", ["mlflow", "dvc"])
def test_only_the_tracking_folder_imports(library):
    assert {name.split(".")[0] for name, path in MODULES.items() if library in libraries(path)} == {
        "tracking"
    }


def test_each_library_that_a_module_imports_is_a_dependency_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"core": project["dependencies"], **project["optional-dependencies"]}
    names = {re.split(r"[<>=\[ ]", line)[0].replace("-", "_") for lines in asked.values() for line in lines}
    names.add("dvc_data")  # comes with DVC, whose API takes its types
    names.add("triton")  # comes with torch for Nvidia's GPUs, and is asked for there only
    for name, path in MODULES.items():
        imported = {"ruamel.yaml" if found == "ruamel" else found for found in libraries(path)}
        assert imported - set(sys.stdlib_module_names) - {"compactgpt"} <= names, name


# Lowest first. A module imports from its own folder and from those on lower lines only.
LEVELS = [
    {"common"},
    {"config"},
    {"data"},
    {"experiments"},
    {"model", "forecast"},
    {"training"},
    {"evaluation"},
    {"tracking"},
    {"reporting"},
    {"gate"},
    {"api"},
    {"init_corpus", "doctor"},
    {"commands"},
    {"cli"},
]
LEVEL = {folder: number for number, folders in enumerate(LEVELS) for folder in folders}


@cache
def imports_of(module: str) -> set[str]:
    return {name.replace("/", ".") for name in imported_modules(ROOT, MODULES[module])}


def test_every_module_has_a_level():
    assert {module.split(".")[0] for module in MODULES} == set(LEVEL)


def test_folders_import_downwards_only():
    upwards = set()
    for module in MODULES:
        folder = module.split(".")[0]
        for imported in imports_of(module):
            other = imported.split(".")[0]
            if other != folder and LEVEL[other] >= LEVEL[folder]:
                upwards.add((module, imported))
    assert upwards == set()


def test_no_modules_import_each_other_in_a_circle():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_exist(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    assert not {link for link in links if not (path.parent / link).exists()}


def test_no_test_file_imports_another():
    """What tests share is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in nodes for alias in n.names]
        assert not {name for name in names if name.rpartition(".")[2].startswith("test_")}, path
