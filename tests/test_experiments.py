"""Named experiments: every shipped file is valid, comments of params.yaml stay, a mistake changes nothing."""

import os
import subprocess

import pytest
from typer.testing import CliRunner

from compactgpt import experiments
from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, CheckFailed, MissingInput
from compactgpt.config import Params, lay_over, load_params, read_yaml, set_values
from compactgpt.forecast.estimate import configured_run
from compactgpt.forecast.sweep import ladder_report, read_ladder
from tests.support.tiny_models import ROOT

CONF = ROOT / "conf"
NAMED = experiments.experiments(CONF)
SHIPPED = load_params(ROOT / "params.yaml")


@pytest.fixture
def params_file(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    return path


def apply(params_file, name, *settings, conf=CONF):
    return experiments.apply(name, params_file, settings, conf)


def own_experiment(folder, text, name="mine", demo="params: {}"):
    """A folder of named experiments with one of ours."""
    (folder / "experiments").mkdir(parents=True, exist_ok=True)
    head = "purpose: p\nneeds: n\n"
    (folder / "experiments/demo.yaml").write_text(head + demo)
    (folder / f"experiments/{name}.yaml").write_text(head + text)
    return folder


def test_all_experiments_of_the_notes_recommendations_are_there():
    assert set(NAMED) == {
        "demo", "note", "gpt2-124m", "shakespeare", "shakespeare-quick", "finetune", "full-softmax",
        "ladder", "long", "context-1024", "ci",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, one in NAMED.items() if not one.sweep])
def test_every_shipped_experiment_is_valid_and_the_same_whatever_was_applied_before(params_file, name):
    """Demo names each value that another one sets, so nothing of an earlier experiment is left."""
    apply(params_file, name)
    load_params(params_file)
    apply(params_file, "demo")
    assert load_params(params_file) == SHIPPED


@pytest.mark.parametrize("name", [name for name, one in NAMED.items() if one.sweep])
def test_every_point_of_a_shipped_sweep_is_valid(params_file, name):
    for point in NAMED[name].sweep:
        assert isinstance(experiments.changed(params_file, NAMED[name], point), Params)


def test_params_yaml_ships_the_demo(params_file):
    assert apply(params_file, "demo") == []
    assert params_file.read_text() == (ROOT / "params.yaml").read_text()


def test_the_notes_run_is_the_notes(params_file):
    assert "training.learning_rate: 0.002 -> 0.0003" in apply(params_file, "note")
    params = load_params(params_file)
    note = params.estimate.note.model_dump(include=set(type(params.model).model_fields))
    assert params.model.model_dump() == note
    assert params.training.max_steps * params.training.tokens_per_step == 655_360_000
    assert params.training.learning_rate * params.training.min_lr_ratio == pytest.approx(3e-5)
    assert {"gpt2", "gpt2-xl"} <= set(params.baseline.names)


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("long", {"training.max_steps", "training.eval_interval", "training.checkpoint_interval"}),
        ("context-1024", {"model.block_size", "training.micro_batch_size", "evaluation.likelihood.window"}),
    ],
)
def test_the_notes_variants_differ_from_it_in_one_thing(params_file, name, differs):
    apply(params_file, "note")
    told = apply(params_file, name)
    assert {line.split(":")[0] for line in told} == differs


@pytest.mark.parametrize("name", ["note", "long", "context-1024", "gpt2-124m", "finetune", "full-softmax"])
def test_only_the_demos_softmax_is_sampled(params_file, name):
    demo = load_params(params_file).training
    assert (demo.head, demo.init_unigram > 0) == ("sampled", True)
    apply(params_file, name)
    training = load_params(params_file).training
    assert (training.head, training.init_unigram) == ("full", 0.0)


def test_the_recipe_with_the_full_softmax_is_that_of_the_ladder(params_file):
    """So that what the sampled one gains is measured against the runs that results/ladder.json keeps."""
    ladder = read_ladder(ROOT / "results/ladder.json")
    params = load_params(params_file)
    run = configured_run(params)
    shipped = ladder_report(ladder, params, run)
    assert {"training.head", "training.tokens_per_step"} <= set(shipped["differs"])
    assert shipped["expected_loss"] is None
    apply(params_file, "full-softmax")
    assert ladder_report(ladder, load_params(params_file), run)["differs"] == []


def test_gpt2_124m_is_gpt2s_size_at_nanogpts_budget(params_file):
    apply(params_file, "gpt2-124m")
    params = load_params(params_file)
    run = (params.model.n_layer, params.model.n_head, params.model.n_embd, params.model.block_size)
    assert run == (12, 12, 768, 1024)
    assert (params.training.max_steps, params.training.tokens_per_step) == (600_000, 491_520)


def test_comments_and_all_other_lines_stay(params_file, tmp_path):
    before = params_file.read_text().splitlines()
    apply(params_file, "mine", conf=own_experiment(tmp_path, "params: {training: {seed: 7}}"))
    after = params_file.read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert [line.split()[:2] for line in changed] == [["seed:", "7"]]
    assert len(after) == len(before)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("params: {training: {max_stps: 7}}", "did you mean max_steps"),
        ("params: {model: {n_head: 3}}", "n_embd"),
        ("- 1", "no valid YAML"),
        ("parms: {}", "did you mean params"),
        ("parts: [none]", "none.yaml is missing"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(params_file, tmp_path, text, says):
    with pytest.raises((BadConfig, MissingInput), match=says):
        apply(params_file, "mine", conf=own_experiment(tmp_path, text))
    assert params_file.read_text() == (ROOT / "params.yaml").read_text()


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(BadConfig, match=r"no experiment 'nte'.*did you mean note"):
        experiments.find("nte", CONF)


def test_settings_come_last_and_show_changes_nothing(params_file):
    told = experiments.shown("note", params_file, ["training.max_steps=7"], CONF)
    assert told[0] == NAMED["note"].purpose
    assert "training.max_steps: 20000 -> 7" in told
    assert params_file.read_text() == (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training.max_steps=1600", 1600),
        ("training.learning_rate=3e-4", 0.0003),
        ("baseline.names=[unigram, xz]", ["unigram", "xz"]),
        ("download.max_bytes=null", None),
        ("training.init_sha256=", None),
    ],
)
def test_settings_are_yaml(setting, value):
    tree = read_yaml(ROOT / "params.yaml")
    set_values(tree, [setting])
    section, key = setting.split("=")[0].split(".")
    assert tree[section][key] == value


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("training.max_stps=1", r"no key training\.max_stps; did you mean max_steps"),
        ("trainin.max_steps=1", r"no key trainin; did you mean training"),
        ("training.max_steps.x=1", r"no key training\.max_steps\.x"),
        ("training.max_steps", "give key=value"),
        ("training.max_steps=[", "no YAML value"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path(setting, says):
    tree = read_yaml(ROOT / "params.yaml")
    with pytest.raises(BadConfig, match=says):
        set_values(tree, [setting])


def test_the_runs_of_a_sweep_are_called_by_their_values():
    one = experiments.Experiment(purpose="p", needs="n", sweep=({"a.b": 32, "c.d": 1}, {"a.b": 64, "c.d": 1}))
    assert experiments.run_names("x", one) == ["x-32-1", "x-64-1"]


def fake_dvc(folder, code=0):
    """A `dvc` that notes its words."""
    folder.mkdir()
    path = folder / "dvc"
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{folder}/words"\nexit {code}\n')
    path.chmod(0o755)
    return folder


def test_running_hands_dvc_every_point_of_a_sweep(params_file, tmp_path, monkeypatch):
    folder = fake_dvc(tmp_path / "bin")
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    git("init", "-q", ".")
    git("commit", "-q", "--allow-empty", "-m", "x")
    conf = own_experiment(
        tmp_path / "conf",
        "params: {training: {eval_windows: 9}}\ntargets: [training]\n"
        "sweep: [{training.max_steps: 10}, {training.max_steps: 20}]",
    )
    assert experiments.run("mine", params_file, ["training.seed=2"], conf) == ["mine-10", "mine-20"]
    first, second = (folder / "words").read_text().splitlines()
    assert first == (
        "exp run --temp -n mine-10 -S training.eval_windows=9 -S training.max_steps=10 "
        "-S training.seed=2 training"
    )
    assert second == first.replace("10", "20")
    assert params_file.read_text() == (ROOT / "params.yaml").read_text()


def test_an_impossible_point_is_refused_before_any_run(params_file, tmp_path, monkeypatch):
    folder = fake_dvc(tmp_path / "bin")
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    conf = own_experiment(tmp_path / "conf", "sweep: [{model.n_head: 4}, {model.n_head: 3}]")
    with pytest.raises(BadConfig, match="n_embd"):
        experiments.run("mine", params_file, conf=conf)
    assert not (folder / "words").exists()


def test_a_failing_dvc_is_one_sentence(params_file, tmp_path, monkeypatch):
    folder = fake_dvc(tmp_path / "bin", code=255)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    git("init", "-q", ".")
    git("commit", "-q", "--allow-empty", "-m", "x")
    with pytest.raises(CheckFailed, match="dvc exp run -n demo failed"):
        experiments.run("demo", params_file, conf=CONF)


def git(*words):
    who = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@a",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@a",
    }
    done = subprocess.run(
        ["git", *words], check=True, capture_output=True, text=True, env={**os.environ, **who}
    )
    return done.stdout.strip()


def test_files_of_an_experiment_are_read_from_its_git_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "-q", ".")
    (tmp_path / "a.txt").write_text("first")
    git("add", "a.txt")
    git("commit", "-qm", "x")
    git("update-ref", "refs/exps/ab/cdef/mine", "HEAD")
    ref = experiments.experiment_ref("mine")
    assert ref == "refs/exps/ab/cdef/mine"
    assert experiments.file_of(ref, "a.txt") == "first"
    with pytest.raises(MissingInput, match=r"has no b\.txt"):
        experiments.file_of(ref, "b.txt")
    with pytest.raises(MissingInput, match="DVC has no experiment other"):
        experiments.experiment_ref("other")


def test_the_command_lists_and_applies(params_file, monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = CliRunner().invoke(app, ["experiment", "list"])
    assert all(one.purpose in listed.output for one in NAMED.values())
    words = ["experiment", "apply", "ci", "--params", str(params_file), "-S", "training.seed=5"]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.exception) == (0, None)
    assert "training.seed: 1337 -> 5" in done.output
    assert load_params(params_file).training.seed == 5


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


def test_the_finetuning_experiment_trains_from_a_gpt2_in_a_folder(params_file, tmp_path):
    """Really, with a GPT-2 that transformers made: small, but by the experiment's own recipe."""
    import warnings

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from compactgpt.training import trainer
    from compactgpt.training.initialization import folder_sha256
    from tests.support.tiny_training import make_tokens

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    small = ["model.n_layer=1", "model.n_head=1", "model.n_embd=8", "model.block_size=8"]
    few = ["training.max_steps=3", "training.tokens_per_step=16", "evaluation.likelihood.window=8"]
    start = [f"training.init_from={tmp_path / 'gpt2'}", "runtime.num_threads=1"]
    apply(params_file, "finetune", *small, *few, *start)
    splits = trainer.open_splits(make_tokens(tmp_path / "tokens"))
    sha256 = folder_sha256(tmp_path / "gpt2")
    with pytest.raises(BadConfig, match=sha256):  # the stage tells the hash to write
        trainer.train(load_params(params_file), splits, tmp_path / "state")
    apply(params_file, "finetune", *small, *few, *start, f"training.init_sha256={sha256}")
    trained = trainer.train(load_params(params_file), splits, tmp_path / "state")
    assert len(trained.rows) == 2
    assert trained.model.shape.bias
