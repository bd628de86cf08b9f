"""Named settings: every shipped file is valid, comments of params.yaml stay, a mistake changes nothing."""

import pytest
from tiny import ROOT
from typer.testing import CliRunner

from compactgpt.config import lay_over, load_params
from stages.apply import app

CONF = sorted((ROOT / "conf").rglob("*.yaml"))


@pytest.fixture
def params_file(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


def apply(params_file, *settings):
    return CliRunner().invoke(app, ["--params", str(params_file), *map(str, settings)])


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(params_file, path):
    done = apply(params_file, path)
    assert (done.exit_code, done.exception) == (0, None)
    load_params(params_file)


def test_params_yaml_is_shipped_with_the_tuned_recipe(params_file):
    assert apply(params_file, ROOT / "conf/recipes/tuned.yaml").output == ""
    assert params_file.read_text() == (ROOT / "params.yaml").read_text()


def test_the_notes_run_is_two_files(params_file):
    told = apply(params_file, ROOT / "conf/note.yaml", ROOT / "conf/recipes/nanogpt.yaml").output
    assert "training.beta2: 0.95 -> 0.99\n" in told
    params = load_params(params_file)
    note = params.estimate.note.model_dump(include=set(type(params.model).model_fields))
    assert params.model.model_dump() == note
    assert params.training.max_steps * params.training.tokens_per_step == 655_360_000
    assert params.training.learning_rate * params.training.min_lr_ratio == pytest.approx(3e-5)


def test_comments_and_all_other_lines_stay(params_file):
    before = params_file.read_text().splitlines()
    (params_file.parent / "c.yaml").write_text("training: {seed: 7}\n")
    apply(params_file, params_file.parent / "c.yaml")
    after = params_file.read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert [line.split()[:2] for line in changed] == [["seed:", "7"]]
    assert len(after) == len(before)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("training: {max_stps: 7}", "did you mean max_steps"),
        ("model: {n_head: 3}", "n_embd"),
        ("- 1", "no sections"),
        ("a: [", "no valid YAML"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(params_file, content, says):
    (params_file.parent / "c.yaml").write_text(content)
    done = apply(params_file, params_file.parent / "c.yaml")
    assert done.exit_code == 78
    assert says in done.output
    assert params_file.read_text() == (ROOT / "params.yaml").read_text()


def test_a_missing_file_is_told(params_file):
    assert apply(params_file, "conf/none.yaml").exit_code == 66


@pytest.mark.parametrize(  # examples of RFC 7386, appendix A
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ],
)
def test_laying_over_is_json_merge_patch(target, patch, result):
    lay_over(target, patch)
    assert target == result
