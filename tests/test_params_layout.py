"""params.yaml has the layout that DVC's YAML writer keeps: `dvc exp run -S` changes one line of it."""

import difflib

import pytest

from compactgpt import experiments
from compactgpt.common.sections import read_yaml
from tests.support.dvc_projects import ROOT, dvc, git, git_repository

TEXT = (ROOT / "params.yaml").read_text()
CHANGES = (
    "training.max_steps=80",
    "training.learning_rate=0.003",
    "training.schedule=cosine",
    "training.init_sha256=" + "a" * 64,
    "model.bias=true",
    "download.max_documents=10",
    "runtime.sample_prompt=Once",
    "download.docstrings.min_characters=300",
    "download.tokenizer.encoding=other",
    "evaluation.text.seed=2",
    "baseline.specs.gpt2.revision=" + "b" * 40,
    "estimate.note.hand_set_loss.value=4.5",
    "comparison.language=fr",
)


def changed_lines(before: str, after: str) -> list[str]:
    """The lines that were removed and added."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-"][2:]


@pytest.mark.parametrize("change", CHANGES)
def test_dvc_writes_one_changed_line(change, tmp_path):
    from dvc.utils.hydra import apply_overrides  # what `dvc exp run -S` calls, on top of modify_yaml

    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    apply_overrides(path, [change])
    removed, added = changed_lines(TEXT, path.read_text())
    key, _, value = change.partition("=")
    name = key.rsplit(".", 1)[-1]
    assert removed.lstrip("- ").startswith(f"{name}:")
    assert added.lstrip("+ ").startswith(f"{name}: {value}")


def test_an_experiment_changes_only_the_lines_of_its_values(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    experiments.apply("demo", path, ["training.max_steps=80"], ROOT / "conf")
    assert len(changed_lines(TEXT, path.read_text())) == 2


@pytest.mark.slow
def test_exp_run_and_exp_apply_change_one_line(tmp_path):
    stage = {"cmd": "echo trained > model", "params": ["training.max_steps"], "outs": ["model"]}
    place = git_repository(tmp_path / "project", {"training": stage})
    (place / "params.yaml").write_text(TEXT)
    git(place, "add", ".")
    git(place, "commit", "-q", "-m", "first")
    dvc(place, "exp", "run", "-n", "short", "-S", "training.max_steps=80")
    assert git(place, "diff", "--numstat", "params.yaml").split() == ["1", "1", "params.yaml"]
    git(place, "checkout", "--", "params.yaml")
    dvc(place, "exp", "apply", "short")
    assert git(place, "diff", "--numstat", "params.yaml").split() == ["1", "1", "params.yaml"]
    assert read_yaml(place / "params.yaml")["training"]["max_steps"] == 80
