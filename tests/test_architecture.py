"""The house stands as it is drawn: imports go one way, DVC's deps are complete, the README's tree is true."""

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


def outs(stage: str) -> set[str]:
    listed = [*body(stage).get("outs", []), *body(stage).get("metrics", []), *body(stage).get("plots", [])]
    return {re.sub(r"/\$\{.*", "", out if isinstance(out, str) else next(iter(out))) for out in listed}


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
    names.add("triton")  # comes with torch for Nvidia's GPUs, and is asked for there only
    for name, path in ROOMS.items():
        imported = {"ruamel.yaml" if found == "ruamel" else found for found in heavy_imports(path)}
        assert imported - set(sys.stdlib_module_names) - {"compactgpt"} <= names, name


def test_rooms_never_look_out_of_the_door():
    for name, path in ROOMS.items():
        allowed = {"typer"} if name == "cli" else set()
        assert not heavy_imports(path) & {"stages", "typer", "dvc"} - allowed, name


def groups_of_the_page() -> dict[str, list[str]]:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| \[\w+\]\(reference/(\w+)\.md\) \|.*\| (.*) \|$", page, re.MULTILINE)
    return {group: re.findall(r"`([\w.]+)`", rooms) for group, rooms in rows}


def test_the_pages_groups_are_the_rooms_and_imports_go_up_the_table():
    groups = groups_of_the_page()
    level = {room: number for number, rooms in enumerate(groups.values()) for room in rooms}
    assert sorted(room for rooms in groups.values() for room in rooms) == sorted(set(ROOMS) - {"__init__"})
    for room in level:
        assert all(level[other] <= level[room] for other in rooms_imported(room)), room


@cache
def rooms_imported(room: str) -> set[str]:
    """The rooms that a room imports, anywhere in it."""
    return {name.replace("/", ".") for name in imported_modules(ROOT, ROOMS[room])}


def test_no_rooms_import_each_other_in_a_circle():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter({room: rooms_imported(room) for room in ROOMS}).prepare()


def test_the_reference_has_each_room_in_its_group():
    for group, rooms in groups_of_the_page().items():
        page = (ROOT / f"docs/reference/{group}.md").read_text()
        assert re.findall(r"^::: compactgpt\.([\w.]+)$", page, re.MULTILINE) == rooms


def test_the_picture_shows_the_chain_as_dvc_has_it():
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert picture
    arrows = set(re.findall(r"^ +(\w+)(?:\[.*\])? --> ?(?:\|.*\| )?(\w+)", picture[1], re.MULTILINE))
    made = {out: stage for stage in PIPELINE for out in outs(stage)}
    wanted = {(made[dep], stage) for stage in PIPELINE for dep in body(stage)["deps"] if dep in made}
    indirect = {("download", "evaluation"), ("download", "baseline"), ("download", "inspection")}
    into_the_record = {(stage, "comparison") for stage in PIPELINE}  # it reads every report
    drawn = {(a, b) for a, b in arrows if a in PIPELINE and b in PIPELINE}
    assert drawn <= wanted
    assert wanted - drawn <= indirect | into_the_record


def tracked_files() -> set[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_the_readmes_tree_is_the_disks():
    tree = re.search(r"```\ncompactgpt/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree, "README.md has no tree"
    folder, named = "", set()
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        if not line.startswith("    "):
            folder = name if name.endswith("/") else ""
        named.add(name if not line.startswith("    ") else folder + name)
    rooms = {str(path.relative_to(ROOT)) for name, path in ROOMS.items() if name != "__init__"}
    doors = {f"stages/{path.name}" for path in STAGES.values() if path.stem != "__init__"}
    for path in named:
        assert (ROOT / path).exists(), f"the README names {path}"
    assert rooms | doors <= named
    top = {name.split("/")[0] for name in tracked_files()} - {".gitignore", ".dvcignore"}
    assert top <= {path.split("/")[0] for path in named}


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    gone = {link for link in links if not (path.parent / link).exists()}
    files = set(re.findall(r"`((?:src|stages|tests|docs|bench)/[\w./-]+\.\w+)`", text))
    placeholders = {f"{where}X.py" for where in ("src/compactgpt/", "stages/", "tests/test_")}
    gone |= {name for name in files - placeholders if not (ROOT / name).exists()}
    assert not gone


def test_nothing_reads_or_writes_pickle():
    for path in [*ROOMS.values(), *STAGES.values()]:
        text = path.read_text()
        assert not re.search(
            r"\bpickle\b|torch\.(save|load)\(|allow_pickle=True|trust_remote_code=True", text
        ), path
