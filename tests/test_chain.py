"""What DVC runs again: the stages of dvc.yaml, their commands replaced by one that only writes their outs."""

import contextlib
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from compactgpt.common.sections import read_yaml

ROOT = Path(__file__).parents[1]
COMMAND = """#!/bin/sh
for out in "$@"; do
  case "$out" in */*.*) file="$out";; *) file="$out/made";; esac
  mkdir -p "${file%/*}"
  echo made > "$file"
done
"""


def short_params():
    """The keys of params.yaml that stages track, each with a short value: DVC parses them often."""
    tree = read_yaml(ROOT / "params.yaml")
    short = {section: dict.fromkeys(values, 1) for section, values in tree.items()}
    specs = dict.fromkeys(tree["baseline"]["specs"], 1)
    return short | {"baseline": {"names": tree["baseline"]["names"][:2], "specs": specs}}


@pytest.fixture
def chain(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "stages", "conf", "corpus", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("claims.yaml", "published.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    YAML().dump(short_params(), tmp_path / "params.yaml")
    tree = read_yaml(ROOT / "dvc.yaml")
    for stage in tree["stages"].values():
        outs = [out for key in ("outs", "metrics", "plots") for out in stage.get(key, [])]
        paths = [next(iter(out)) if isinstance(out, dict) else out for out in outs]
        stage["cmd"] = " ".join(["./make", *paths])
    YAML().dump(tree, tmp_path / "dvc.yaml")
    (tmp_path / "make").write_text(COMMAND)
    (tmp_path / "make").chmod(0o755)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    return tmp_path


def ran(folder):
    """The stages that `dvc repro` runs."""
    from dvc.repo import Repo

    with contextlib.chdir(folder), Repo() as repo:
        return {stage.name for stage in repo.reproduce()}


@pytest.mark.slow
def test_a_second_run_evaluates_nothing_and_another_baseline_runs_itself_alone(chain):
    everything = ran(chain)
    tree = read_yaml(chain / "params.yaml")
    names = tree["baseline"]["names"]
    assert {"training", "evaluation", "comparison", *(f"baseline@{name}" for name in names)} <= everything
    assert ran(chain) == set()
    tree["baseline"]["names"] = [*names, "gpt2"]
    YAML().dump(tree, chain / "params.yaml")
    assert ran(chain) == {"estimate", "baseline@gpt2", "comparison"}  # the first checks the name
