"""The structure of the code: imports go one way, and a stage's deps in dvc.yaml are what it reads."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from compactgpt.config import Params, read_yaml
from compactgpt.provenance import code_hashes, imported_modules, rooms_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/compactgpt"
# by name with dots: modules in folders too, such as `reporting.tables`
ROOMS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent == PACKAGE or path.stem != "__init__"
}
STAGES = {path.stem: path for path in (ROOT / "stages").glob("*.py")} if (ROOT / "stages").exists() else {}
PIPELINE = read_yaml(ROOT / "dvc.yaml")["stages"]
HEAVY = ["mlflow", "dvc", "typer", "great_expectations", "transformers", "datasets", "pandas", "pyarrow"]


def body(stage: str) -> dict:
    return PIPELINE[stage]


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stages_deps_are_the_files_that_it_reads_and_no_others(stage):
    listed = {dep for dep in body(stage)["deps"] if dep.startswith(("src/", "stages"))}
    used = {f"src/compactgpt/{name}.py" for name in rooms_of(ROOT, STAGES[stage])}
    if stage == "comparison":  # it hashes the code of every stage
        assert listed == {"src/compactgpt", "stages"}
    else:
        assert listed == used | {f"stages/{stage}.py"}


def test_each_stage_has_a_hash_of_its_code():
    assert set(PIPELINE) <= set(code_hashes(ROOT))


@pytest.mark.parametrize("stage", PIPELINE)
def test_one_word_in_every_place(stage):
    assert stage in ROOMS
    assert stage in STAGES
    assert stage in Params.model_fields
    assert (ROOT / "tests" / f"test_{stage}.py").exists()
    assert body(stage)["cmd"].startswith(f"exec python -m stages.{stage}")


def test_every_section_of_params_is_somebodys_param():
    tracked = {param.split(".")[0] for stage in PIPELINE.values() for param in stage["params"]}
    gate = {"regression"}  # judges what the stages made: other bounds run no stage again
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
    """Which unwanted libraries appear as the modules are imported one after the other, in a new process."""
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


def test_importing_the_rooms_loads_no_heavy_library():
    # exponentials_kernel needs Triton, which comes with torch for Nvidia's GPUs only.
    others = {"__init__", "cli", "exponentials_kernel"}
    rooms = [f"compactgpt.{name}" for name in sorted(set(ROOMS) - others)]
    assert loaded_by(["compactgpt"], [*HEAVY, "torch", "numpy"]) == []
    assert loaded_by(rooms, HEAVY) == []


def test_asking_a_door_for_help_loads_no_heavy_library():
    doors = [f"stages.{name}" for name in sorted(set(STAGES) - {"__init__"})]
    assert loaded_by(["compactgpt.cli", *doors], [*set(HEAVY) - {"typer"}, "torch"]) == []
    assert loaded_by(["compactgpt.metrics"], ["numpy"]) == ["compactgpt.metrics loads ['numpy']"]


@cache
def heavy_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[0] for name in names}
    return found


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("datasets", {"hubtexts"}),
        ("great_expectations", {"validation"}),
        ("mlflow", {f"tracking.{name}" for name in ("mlflow_logger", "registry", "store", "system_metrics")}),
        ("transformers", {"baseline", "tracking.registry"}),
    ],
)
def test_a_heavy_library_has_its_room(library, rooms):
    assert {name for name, path in ROOMS.items() if library in heavy_imports(path)} == rooms


def test_each_library_that_a_room_imports_is_asked_for_by_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"core": project["dependencies"], **project["optional-dependencies"]}
    names = {re.split(r"[<>=\[ ]", line)[0].replace("-", "_") for lines in asked.values() for line in lines}
    names.add("dvc_data")  # comes with DVC, whose API takes its types
    names.add("triton")  # comes with torch for Nvidia's GPUs, and is asked for there only
    for name, path in ROOMS.items():
        imported = {"ruamel.yaml" if found == "ruamel" else found for found in heavy_imports(path)}
        assert imported - set(sys.stdlib_module_names) - {"compactgpt"} <= names, name


def test_rooms_never_look_out_of_the_door():
    for name, path in ROOMS.items():
        allowed = {"cli": {"typer"}, "reproduction": {"dvc"}}.get(name, set())
        assert not heavy_imports(path) & {"stages", "typer", "dvc"} - allowed, name


# The folders of src/compactgpt, lowest first, with the modules that are still flat. A module imports from its
# own folder and from lower ones.
FOLDERS = {
    "common": "errors storage console progress parallel runtime",
    "config": "config",
    "data": "inputs download sources corpus documents docstrings textfiles parquetpages hubtexts hub wheels "
    "gguf_check encoding encoder tokenization ledger engine data validation inspection duplicates",
    "model": "model exponentials exponentials_kernel sampled_softmax export",
    "forecast": "sizes laws calibration ladder fitting estimate whatif",
    "training": "training optim checkpoint initial distributed launching sharding watching",
    "evaluation": "evaluation metrics compact generation text tasks wikitext harness baseline",
    "tracking": "tracking syncing gauges lineage pipelines records registry reproduction diffing served",
    "reporting": "claims comparison provenance readings recording results verification",
    "gate": "regression references verdicts",
    "cli": "cli experiments",
}
UPWARDS = {  # to be moved, with what is imported
    ("console", "launching"), ("runtime", "config"), ("export", "checkpoint"), ("fitting", "experiments"),
    ("recording", "experiments"),
}  # fmt: skip
FOLDER_OF = {module: folder for folder, modules in FOLDERS.items() for module in modules.split()}


def folder_of(module: str) -> str:
    folder, dot, _ = module.partition(".")
    return folder if dot else FOLDER_OF[module]


def test_every_module_has_a_folder():
    modules = set(ROOMS) - {"__init__"}
    assert not {module for module in modules if "." not in module} - set(FOLDER_OF), "FOLDERS lacks a module"
    assert {folder_of(module) for module in modules} <= set(FOLDERS)


def test_folders_import_downwards_only():
    levels = {folder: number for number, folder in enumerate(FOLDERS)}
    upwards = {
        (module, imported)
        for module in set(ROOMS) - {"__init__"}
        for imported in rooms_imported(module)
        if levels[folder_of(imported)] > levels[folder_of(module)]
    }
    assert upwards <= UPWARDS


@cache
def rooms_imported(room: str) -> set[str]:
    """The rooms that a room imports, anywhere in it."""
    return {name.replace("/", ".") for name in imported_modules(ROOT, ROOMS[room])}


def test_no_rooms_import_each_other_in_a_circle():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter({room: rooms_imported(room) for room in ROOMS}).prepare()


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    gone = {link for link in links if not (path.parent / link).exists()}
    assert not gone


def test_no_test_file_imports_another():
    """What tests share is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes for alias in node.names]
        found = {name for name in names if name.rpartition(".")[2].startswith("test_")}
        if path.name == "test_security.py":
            found.discard("tests.test_registry")  # moves when the registry has its place
        assert not found, path
