"""Named experiments: small files laid over params.yaml, which stays the one thing that DVC reads.

`conf/experiments/<name>.yaml` says what the experiment is for, what it needs and which values it sets;
`conf/parts/` holds what several of them share (a recipe, a machine). An experiment is laid over the shipped
demo, so that it is the same whatever was applied before it. One with a `sweep` is many runs instead, over
params.yaml as it is: each a DVC experiment of its own, in a scratch folder.
"""

import difflib
import io
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from ruamel.yaml import YAML

from compactgpt.common.errors import BadConfig, CheckFailed, MissingInput
from compactgpt.common.git import require_repository, run_git
from compactgpt.common.storage import write_text
from compactgpt.config import (
    Name,
    Params,
    Section,
    lay_over,
    load_params,
    load_section,
    parse_params,
    read_yaml,
    set_values,
)
from compactgpt.data.inputs import check_dependencies

CONF = Path("conf")
DEMO = "demo"
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class Part(Section):
    """Settings that several experiments share."""

    params: dict[str, Any]


class Experiment(Part):
    """One file of conf/experiments."""

    purpose: Line
    needs: Line
    parts: tuple[Name, ...] = ()
    params: dict[str, Any] = Field(default_factory=dict)
    sweep: tuple[dict[str, int | float | str], ...] = ()  # of each run, its values by dotted key
    targets: tuple[Name, ...] = ()  # stages to run; all, where it names none


def experiments(conf: Path = CONF) -> dict[str, Experiment]:
    """All named experiments, by name.

    Raises:
        MissingInput: there is no such folder here.
        BadConfig: one of the files can't be used.
    """
    if not (folder := conf / "experiments").is_dir():
        raise MissingInput(f"{folder} is missing: run from the repository folder")
    files = sorted(folder.glob("*.yaml"))
    return {path.stem: load_section(path, Experiment) for path in files}


def find(name: str, conf: Path = CONF) -> Experiment:
    """One experiment by its name.

    Raises:
        MissingInput, BadConfig: there is none of that name.
    """
    known = experiments(conf)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadConfig(
            f"there is no experiment {name!r} in {conf}/experiments: it has {', '.join(known)}{hint}"
        )
    return known[name]


def patch(name: str, conf: Path = CONF) -> dict[str, Any]:
    """What an experiment lays over params.yaml: the demo, its parts, its own values, in this order.

    Raises:
        BadConfig, MissingInput: it names a part that is not there.
    """
    one = find(name, conf)
    layers = [find(DEMO, conf).params]
    layers += [load_section(conf / "parts" / f"{part}.yaml", Part).params for part in one.parts]
    merged: dict[str, Any] = {}
    for layer in [*layers, one.params]:
        merged = _merged(merged, layer)
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One merge patch for two; a null stays, since it takes a key away from what they are laid over."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = _merged(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return both


def apply(
    name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF, *, write: bool = True
) -> list[str]:
    """Lay an experiment over params.yaml; its comments stay.

    Args:
        name: the experiment.
        params_file: params.yaml.
        settings: `key=value`, set after it.
        conf: folder of named settings.
        write: or only say what would change.

    Returns:
        A line for each value that changed.

    Raises:
        MissingInput, BadConfig: params.yaml would not be valid after it; nothing was changed.
    """
    load_params(params_file)
    yaml = _round_trip()
    tree = yaml.load(params_file)
    told = lay_over(tree, patch(name, conf))
    told += set_values(tree, settings)
    content = io.StringIO()
    yaml.dump(tree, content)
    parse_params(YAML(typ="safe", pure=True).load(content.getvalue()), f"params.yaml with {name}")
    if told and write:
        write_text(params_file, content.getvalue())
    return told


def shown(name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF) -> list[str]:
    """What an experiment is and would change, line by line."""
    one = find(name, conf)
    told = [one.purpose, f"needs {one.needs}"]
    if one.sweep:
        runs = zip(run_names(name, one), one.sweep, strict=True)
        return [*told, *(f"{run_name}: {point}" for run_name, point in runs)]
    return [*told, *apply(name, params_file, settings, conf, write=False)]


def _round_trip() -> YAML:
    """The YAML reader and writer that `dvc exp run -S` uses: it keeps the layout that params.yaml has."""
    yaml = YAML()
    yaml.default_flow_style = False
    return yaml


def run_names(name: str, one: Experiment) -> list[str]:
    """What DVC calls each run of a sweep: `ladder-32-100`."""
    return ["-".join([name, *map(str, point.values())]) for point in one.sweep]


def changed(
    params_file: Path, one: Experiment, point: Mapping[str, Any], settings: Sequence[str] = ()
) -> Params:
    """The whole configuration of one run of a sweep.

    Raises:
        BadConfig: it is impossible.
    """
    tree = read_yaml(params_file)
    lay_over(tree, one.params)
    set_values(tree, [*(f"{key}={value}" for key, value in point.items()), *settings])
    return parse_params(tree, f"params.yaml with {dict(point)}")


def configurations(
    name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF
) -> list[Params]:
    """Return the configuration of each run that an experiment starts; nothing is written.

    Raises:
        BadConfig, MissingInput: one of them is impossible.
    """
    one = find(name, conf)
    if one.sweep:
        return [changed(params_file, one, point) for point in one.sweep]
    tree = read_yaml(params_file)
    lay_over(tree, patch(name, conf))
    set_values(tree, settings)
    return [parse_params(tree, f"params.yaml with {name}")]


def run(name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF) -> list[str]:
    """Run an experiment as DVC runs experiments: one in this folder, a sweep in scratch folders.

    Returns:
        The names of the DVC experiments.

    Raises:
        BadConfig: a configuration is impossible; then nothing ran.
        MissingInput: DVC is not installed, or this folder is not a git repository.
        CheckFailed: DVC failed; it has said why.
    """
    one = find(name, conf)
    require_tools()
    check_dependencies(params_file.parent)
    if not one.sweep:
        apply(name, params_file, settings, conf)
        _rename_earlier(name)
        _dvc(["exp", "run", "-n", name, *one.targets])
        return [name]
    fixed = [f"{key}={value}" for key, value in _dotted(one.params).items()]
    for point in one.sweep:
        changed(params_file, one, point, settings)
    names = run_names(name, one)
    for run_name, point in zip(names, one.sweep, strict=True):
        values = [*fixed, *(f"{key}={value}" for key, value in point.items()), *settings]
        options = [word for value in values for word in ("-S", value)]
        _rename_earlier(run_name)
        _dvc(["exp", "run", "--temp", "-n", run_name, *options, *one.targets])
    return names


def require_tools() -> None:
    """Check for DVC and a git repository, which running an experiment needs.

    Raises:
        MissingInput: one of them is missing.
    """
    _with_dvc()
    require_repository(Path())


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(_dotted(value, f"{path}.") if isinstance(value, dict) else {path: value})
    return flat


def _rename_earlier(run_name: str) -> None:
    """Free a name by renaming the experiment that has it, so that its results stay.

    (`dvc exp run -f` would replace it and run every stage again.) DVC keeps names by commit.
    """
    head = run_git(Path(), "rev-parse", "HEAD").decode().strip()
    refs = run_git(Path(), "for-each-ref", "--format=%(refname:lstrip=4)", f"refs/exps/{head[:2]}/{head[2:]}")
    taken = refs.decode().split()
    if run_name in taken:
        number = next(n for n in itertools.count(1) if f"{run_name}-old{n}" not in taken)
        _dvc(["exp", "rename", "-q", run_name, f"{run_name}-old{number}"])


def _with_dvc() -> dict[str, str]:
    """The environment, with this Python's programs before others."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not shutil.which("dvc", path=path):
        raise MissingInput("this needs DVC, which is not installed: pip install 'compactgpt[pipeline]'")
    return {**os.environ, "PATH": path}


def _dvc(words: list[str]) -> None:
    if subprocess.run(["dvc", *words], check=False, env=_with_dvc()).returncode:
        raise CheckFailed(f"dvc {' '.join(words)} failed: mend what it says above and run the same again")


def experiment_ref(run_name: str) -> str:
    """The newest git reference of a DVC experiment.

    Raises:
        MissingInput: DVC has none of that name, or this folder is not a git repository.
    """
    require_repository(Path())
    refs = run_git(Path(), "for-each-ref", "--sort=-creatordate", "--format=%(refname)", "refs/exps")
    for ref in refs.decode().splitlines():
        if ref.rsplit("/", 1)[-1] == run_name:
            return ref
    raise MissingInput(f"DVC has no experiment {run_name}: `compactgpt experiment run` makes it")


def file_of(ref: str, path: str) -> str:
    """A file as an experiment left it.

    Raises:
        MissingInput: it left none.
    """
    try:
        return run_git(Path(), "show", f"{ref}:{path}").decode()
    except subprocess.CalledProcessError as error:
        raise MissingInput(f"{ref} has no {path}: run that experiment again") from error
