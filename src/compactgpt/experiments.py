"""Named experiments: the files conf/experiments/NAME.yaml, whose values replace those of params.yaml."""

import copy
import difflib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from ruamel.yaml import YAML

from compactgpt.common.errors import BadConfig, CheckFailed, MissingInput
from compactgpt.common.git import require_repository
from compactgpt.common.sections import YAML_ERRORS, Name, Section, load_section, parse_yaml, read_yaml
from compactgpt.common.storage import write_text
from compactgpt.config import Params, parse_params
from compactgpt.data.inputs import check_dependencies

CONF = Path("conf")
DEMO = "demo"
TextFigure = Literal["seq_rep_4", "distinct_2", "tokens"]
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class Part(Section):
    """A file of conf/parts: settings that several experiments share."""

    params: dict[str, Any]


class SweepGroup(Section):
    """Runs of a sweep that differ only in their seed."""

    params: dict[str, int | float | str] = Field(default_factory=dict)  # dotted key of params.yaml -> value
    seeds: tuple[int, ...] = ()  # one run for each seed; empty: one run with the seed of params.yaml
    start: Name | None = None  # start from the final weights of this earlier run of the sweep
    train_documents: int | None = None  # number of train documents, spread evenly over the split; None: all
    train_source: str | None = None  # train only on the documents of this Python package


class Expected(Section):
    """A ratio or a difference that an experiment measures to test claims of claims.yaml."""

    claims: tuple[str, ...]  # ids of the claims in claims.yaml
    # The claims expect a ratio above or below 1, or a difference above or below 0.
    expected: Literal["above", "below"]
    quantity: Line  # the name of the ratio or difference in the report
    otherwise: Line  # the report's conclusion if the runs do not support the claims


class Comparison(Expected):
    """The perplexity of one group of runs divided by that of another group."""

    ours: Name  # the group in the numerator
    theirs: Name  # the group in the denominator
    source: str | None = None  # score only the val documents of this Python package


class TextComparison(Expected):
    """A statistic of our model's generated texts minus that of a baseline's texts."""

    baseline: Name
    figure: TextFigure  # the statistic


@dataclass(frozen=True)
class SweepPoint:
    """A planned run of a sweep."""

    name: str
    group: str
    sweep: SweepGroup
    values: dict[str, Any]  # the values that differ from params.yaml, for the report
    params: Params


class Experiment(Part):
    """A file of conf/experiments: a named change of params.yaml, or a sweep."""

    purpose: Line
    needs: Line
    parts: tuple[Name, ...] = ()
    params: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[Name, SweepGroup] = Field(default_factory=dict)  # name of a group -> its runs
    # A comparison names two groups. Each group is in this sweep, or in the sweep conf/experiments/seeds.yaml.
    comparisons: tuple[Comparison, ...] = ()
    texts: tuple[TextComparison, ...] = ()  # comparisons of the generated texts in reports/

    def _mistakes(self) -> Iterator[str]:
        if self.sweep and (self.params or self.parts):
            yield "sweep is set, so params and parts must be empty: set values in the groups of sweep"


def load_experiments(conf: Path = CONF) -> dict[str, Experiment]:
    """Return all named experiments: name -> experiment."""
    folder = conf / "experiments"
    if not folder.is_dir():
        raise MissingInput(f"{folder} is missing: run from the repository folder")
    return {path.stem: load_section(path, Experiment) for path in sorted(folder.glob("*.yaml"))}


def find_experiment(name: str, conf: Path = CONF) -> Experiment:
    """Return the experiment with this name; raises BadConfig if there is none."""
    known = load_experiments(conf)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadConfig(f"there is no experiment {name!r}: {conf}/experiments has {', '.join(known)}{hint}")
    return known[name]


def set_experiment(tree: dict[str, Any], name: str, conf: Path = CONF, settings: Sequence[str] = ()) -> None:
    """Apply the experiment `demo`, then the experiment `name`, then `settings`, to `tree` (params.yaml)."""
    experiment = find_experiment(name, conf)
    merge_patch(tree, find_experiment(DEMO, conf).params)
    for part in experiment.parts:
        merge_patch(tree, load_section(conf / "parts" / f"{part}.yaml", Part).params)
    merge_patch(tree, experiment.params)
    set_values(tree, settings)


def merge_patch(tree: dict[str, Any], patch: Mapping[str, Any]) -> None:
    """Apply a JSON merge patch (RFC 7386) to a tree: mappings are merged, null removes a key."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge_patch(tree[key], value)
            if not tree[key]:
                # Replace the emptied mapping by a new one: ruamel.yaml would not indent the emptied one.
                tree[key] = {}
        elif value is None:
            if tree.get(key) is not None:  # a key that is already null keeps its line and comment
                del tree[key]
        elif tree.get(key) != value:  # leave an equal value: 2.0e-3 would become 0.002
            tree[key] = copy.deepcopy(value)


def set_values(tree: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply settings such as `training.max_steps=9` to the tree of params.yaml, as `dvc exp run -S` does."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise BadConfig(f"-S {setting}: give key=value, such as training.max_steps=1600")
        try:
            value = copy.deepcopy(parse_yaml(text))
        except YAML_ERRORS as error:
            raise BadConfig(f"-S {setting}: {text!r} is not a valid YAML value") from error
        *parents, key = path.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if key not in node or node[key] != value:  # leave an equal value: 2.0e-3 would become 0.002
            node[key] = value


def load_changed_params(params_file: Path, settings: Sequence[str]) -> Params:
    """Return the configuration of params.yaml with changes `key=value`. The file stays as it is."""
    tree = _read_tree(params_file)
    set_values(tree, settings)
    return parse_params(tree, " ".join([str(params_file), *(f"-S {setting}" for setting in settings)]))


def _read_tree(params_file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = read_yaml(params_file)
    if not isinstance(tree, dict):
        parse_params(tree, str(params_file))  # raises BadConfig
    return tree


def edit_params(
    params_file: Path, change: Callable[[dict[str, Any]], None], source: str
) -> tuple[str, list[str]]:
    """Return the text of params.yaml after `change`, and a line for each value that differs.

    Raises BadConfig if the new text is not valid. The error message contains `source` as the text's name.
    """
    before = _read_tree(params_file)
    yaml = YAML()
    yaml.default_flow_style = False
    tree = yaml.load(params_file)
    change(tree)
    content = io.StringIO()
    yaml.dump(tree, content)
    after = parse_yaml(content.getvalue())
    parse_params(after, source)
    return content.getvalue(), _list_changes(before, after)


def _list_changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in dict.fromkeys([*after, *before]):
        path = f"{prefix}{key}"
        old, new = before.get(key), after.get(key)
        if key not in after:
            lines.append(f"{path}: {old!r} removed")
        elif key not in before:
            lines.append(f"{path}: {new!r} added")
        elif isinstance(old, dict) and isinstance(new, dict):
            lines += _list_changes(old, new, f"{path}.")
        elif old != new:
            lines.append(f"{path}: {old!r} -> {new!r}")
    return lines


def apply(
    name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF, *, write: bool = True
) -> list[str]:
    """Write the values of an experiment, then `settings`, to params.yaml. Return a line for each change.

    Each of `settings` is `key=value`. With `write=False`, params.yaml stays as it is.
    """
    change = partial(set_experiment, name=name, conf=conf, settings=settings)
    content, changes = edit_params(params_file, change, f"params.yaml with {name}")
    if write and changes:
        write_text(params_file, content)
    return changes


def describe(name: str, params_file: Path, settings: Sequence[str] = ()) -> list[str]:
    """Return lines with the purpose of an experiment, its needs, and its changes of params.yaml."""
    experiment = find_experiment(name)
    changes = [f"{point.name}: {point.values}" for point in sweep_points(name, params_file, settings)]
    if not experiment.sweep:
        changes = apply(name, params_file, settings, write=False)
    return [experiment.purpose, f"needs {experiment.needs}", *changes]


def sweep_points(
    name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF
) -> list[SweepPoint]:
    """Return the runs of a sweep, each with its configuration."""
    points = []
    for group, sweep in find_experiment(name, conf).sweep.items():
        chosen = sweep.model_dump(include={"start", "train_documents", "train_source"}, exclude_none=True)
        for seed in sweep.seeds or (None,):
            values = sweep.params if seed is None else {**sweep.params, "training.seed": seed}
            words = [f"{key}={value}" for key, value in values.items()]
            params = load_changed_params(params_file, [*settings, *words])
            run_name = group if seed is None else f"{group}-{seed}"
            points.append(SweepPoint(run_name, group, sweep, values | chosen, params))
    return points


def configurations(
    name: str, params_file: Path, settings: Sequence[str] = (), conf: Path = CONF
) -> list[Params]:
    """Return the configuration of each run of an experiment; params.yaml stays as it is."""
    if find_experiment(name, conf).sweep:
        return [point.params for point in sweep_points(name, params_file, settings, conf)]
    tree = _read_tree(params_file)
    set_experiment(tree, name, conf, settings)
    return [parse_params(tree, f"params.yaml with {name}")]


def run(name: str, params_file: Path, settings: Sequence[str] = ()) -> None:
    """Apply an experiment, then `settings` (`key=value`), to params.yaml, and run `dvc exp run`."""
    _dvc_environment()
    require_repository(Path())
    check_dependencies(params_file.parent)
    apply(name, params_file, settings)
    # The name contains the time, because DVC refuses a second experiment of the same name.
    run_dvc(["exp", "run", "-n", time.strftime(f"{name}-%Y%m%d-%H%M%S")])


def _dvc_environment() -> dict[str, str]:
    """Return the environment variables, with this Python's folder first in PATH.

    Raises MissingInput if DVC is not installed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not shutil.which("dvc", path=path):
        raise MissingInput("DVC is not installed: run `pip install 'compactgpt[pipeline]'`")
    return {**os.environ, "PATH": path}


def run_dvc(words: list[str]) -> None:
    """Run DVC, which prints what it does; raises CheckFailed if DVC fails."""
    if subprocess.run(["dvc", *words], check=False, env=_dvc_environment()).returncode:
        raise CheckFailed(f"dvc {' '.join(words)} failed: correct what DVC reports above, then run it again")
