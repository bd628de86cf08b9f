"""Named experiments: every shipped file is valid, comments of params.yaml stay, a mistake changes nothing."""

import re
import subprocess

import pytest
from typer.testing import CliRunner

from compactgpt import experiments
from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, CheckFailed, MissingInput, Unreachable
from compactgpt.common.storage import write_text
from compactgpt.config import load_params
from compactgpt.experiments import merge_patch, set_values
from tests.support.dvc_projects import ROOT, git
from tests.support.fake_hub import fill_model_cache
from tests.support.tiny_models import save_random_gpt2

CONF = ROOT / "conf"
NAMED = experiments.load_experiments(CONF)
TEXT = (ROOT / "params.yaml").read_text()
SHIPPED = load_params(ROOT / "params.yaml")


@pytest.fixture
def params_file(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    return path


def apply(params_file, name, *settings, conf=CONF):
    return experiments.apply(name, params_file, settings, conf)


def conf_with(folder, text):
    """A folder of named experiments: an empty `demo`, and `mine` with this text."""
    (folder / "experiments").mkdir(parents=True)
    head = "purpose: p\nneeds: n\n"
    (folder / "experiments/demo.yaml").write_text(head + "params: {}")
    (folder / "experiments/mine.yaml").write_text(head + text)
    return folder


@pytest.mark.parametrize("name", NAMED)
def test_every_shipped_experiment_is_valid_and_leaves_nothing_behind(params_file, name):
    """`demo` sets each value that another experiment sets, so that applying it restores params.yaml."""
    assert experiments.configurations(name, params_file, conf=CONF)
    if not NAMED[name].sweep:
        apply(params_file, name)
        assert apply(params_file, name) == []
        apply(params_file, "demo")
        assert load_params(params_file) == SHIPPED
        assert name != "demo" or params_file.read_text() == TEXT


def test_the_experiment_note_is_the_run_that_the_note_describes(params_file):
    assert "training.learning_rate: 0.002 -> 0.0003" in apply(params_file, "note")
    params = load_params(params_file)
    note = params.estimate.note.model_dump(include=set(type(params.model).model_fields))
    assert params.model.model_dump() == note
    assert params.training.max_steps * params.training.tokens_per_step == 655_360_000
    assert {"gpt2", "gpt2-xl"} <= set(params.baseline.names)
    assert params.training.head == "full"  # only the demo's softmax is sampled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params: {training: {max_stps: 7}}", "did you mean max_steps"),
        ("params: {model: {n_head: 3}}", "n_embd"),
        ("sweep: {a: {params: {model.n_head: 3}}}", "n_embd"),
        ("sweep: {a: {}}\nparams: {model: {n_head: 8}}", "set values in the groups"),
        ("- 1", "not valid YAML"),
        ("parts: [none]", "none.yaml is missing"),
    ],
)
def test_a_mistake_in_an_experiment_is_named_and_changes_nothing(params_file, tmp_path, text, message):
    conf = conf_with(tmp_path, text)
    with pytest.raises((BadConfig, MissingInput), match=message):
        experiments.configurations("mine", params_file, conf=conf)
    if "sweep" not in text:
        with pytest.raises((BadConfig, MissingInput), match=message):
            apply(params_file, "mine", conf=conf)
    assert params_file.read_text() == TEXT


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(BadConfig, match=r"no experiment 'nte'.*has ci, .*, note,.*did you mean note\?"):
        experiments.find_experiment("nte", CONF)


def test_a_setting_is_yaml_and_merging_is_json_merge_patch():
    for setting, message in (("a.b", "-S a.b: give key=value"), ("a=[", "is not a valid YAML value")):
        with pytest.raises(BadConfig, match=message):
            set_values({}, [setting])
    tree = {"training": {"max_steps": 1}}
    set_values(tree, ["training.learning_rate=3e-4", "training.max_steps=", "baseline.names=[unigram, xz]"])
    training = {"max_steps": None, "learning_rate": 0.0003}
    assert tree == {"training": training, "baseline": {"names": ["unigram", "xz"]}}
    tree = {"a": {"b": "c"}, "d": [{"b": "c"}], "e": 1}
    merge_patch(tree, {"a": {"b": "d", "c": None}, "d": [1], "e": None, "f": 2})
    assert tree == {"a": {"b": "d"}, "d": [1], "f": 2}


@pytest.mark.parametrize(
    "change",
    ["training.max_steps=80", "model.bias=true", "baseline.specs.gpt2.revision=" + "b" * 40],
)
def test_dvc_and_an_experiment_write_one_changed_line(change, params_file):
    """params.yaml has the layout that DVC's YAML writer keeps, with its comments."""
    from dvc.utils.hydra import apply_overrides  # what `dvc exp run -S` calls

    key, _, value = change.partition("=")
    name = key.rsplit(".", 1)[-1]
    for write in (
        lambda: apply_overrides(params_file, [change]),
        lambda: apply(params_file, "demo", change),
    ):
        params_file.write_text(TEXT)
        write()
        pairs = zip(TEXT.splitlines(), params_file.read_text().splitlines(), strict=True)
        ((_, line),) = [(old, new) for old, new in pairs if old != new]
        assert line.lstrip().startswith(f"{name}: {value}")


def test_a_sweep_has_a_run_for_each_group_and_seed(params_file, tmp_path):
    text = "sweep: {small: {params: {training.max_steps: 10}, seeds: [1, 2]}, large: {start: small-1}}"
    conf = conf_with(tmp_path / "c", text)
    points = experiments.sweep_points("mine", params_file, ["training.beta1=0.7"], conf)
    assert [(point.name, point.values) for point in points] == [
        ("small-1", {"training.max_steps": 10, "training.seed": 1}),
        ("small-2", {"training.max_steps": 10, "training.seed": 2}),
        ("large", {"start": "small-1"}),
    ]
    training = points[1].params.training
    assert (training.seed, training.max_steps, training.beta1) == (2, 10, 0.7)
    assert params_file.read_text() == TEXT


@pytest.fixture
def words_of_dvc(params_file, tmp_path, monkeypatch):
    """A project, and a `dvc` that notes its words and exits with $CODE; returns the path of the notes."""
    program = tmp_path / "bin/dvc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{tmp_path}/words"\nexit ${{CODE:-0}}\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    (tmp_path / "conf").symlink_to(CONF)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/metrics.json").write_text('{"loss": 3.6947, "perplexity": 40.2333}')
    return tmp_path / "words"


def run_experiment(name, *settings):
    options = [word for setting in settings for word in ("-S", setting)]
    return CliRunner().invoke(app, ["experiment", "run", name, *options])


def test_a_failure_of_dvc_or_its_absence_is_one_sentence(params_file, words_of_dvc, monkeypatch):
    monkeypatch.setenv("CODE", "255")
    done = run_experiment("demo")
    assert done.exit_code == CheckFailed.exit_code
    assert re.search(r"error: dvc exp run -n demo-\d{8}-\d{6} failed: [^\n]+\n$", done.output)
    monkeypatch.setenv("PATH", "/nonexistent")
    words_of_dvc.with_name("bin").joinpath("dvc").unlink()
    done = run_experiment("full-softmax")
    assert done.exit_code == MissingInput.exit_code
    assert "compactgpt[pipeline]" in done.output
    assert params_file.read_text() == TEXT


def test_a_corpus_of_the_hub_is_asked_for_before_anything_is_written(params_file, words_of_dvc, tmp_path):
    done = run_experiment("shakespeare")
    assert done.exit_code == Unreachable.exit_code
    advice = r"curl -fLo corpus/input.txt https://.* `cp YOUR_COPY corpus/input.txt` "
    assert re.fullmatch(rf"error: .* karpathy/tiny_shakespeare .*{advice}.*\n", done.output)
    assert params_file.read_text() == TEXT
    assert not words_of_dvc.exists()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/input.txt").touch()
    done = run_experiment("shakespeare")
    assert done.exit_code == 0
    assert done.output.endswith(
        "our model, measured: loss 3.695, perplexity 40.23\nThe page: reports/index.html\n"
        "to keep the values: compactgpt experiment record shakespeare\n"
        "to undo: git checkout HEAD -- params.yaml dvc.lock reports; git clean -fdq reports; "
        "rm -rf data models; make repro\n"
    )


def test_a_diverged_training_has_no_perplexity_to_print(params_file, words_of_dvc, tmp_path):
    (tmp_path / "reports/metrics.json").write_text('{"loss": 3075166.0}')
    done = run_experiment("demo")
    assert done.exit_code == 0
    assert "our model, measured: loss 3075166.000, perplexity not defined\nThe page: " in done.output


def test_the_printed_undo_restores_files_that_are_not_in_a_commit(params_file, words_of_dvc, tmp_path):
    """On another processor than the authors', the results of `make repro` differ from those of HEAD."""
    report, lock = tmp_path / "reports/metrics.json", tmp_path / "dvc.lock"
    lock.write_text("schema: '2.0'\n")
    git(tmp_path, "add", "params.yaml", "dvc.lock", "reports")
    git(tmp_path, "commit", "-q", "-m", "x")
    own = {report: '{"loss": 3.7}', lock: "schema: '2.0' # mine\n", params_file: TEXT + "# mine\n"}
    for path, text in own.items():
        path.write_text(text)
    done = CliRunner().invoke(app, ["experiment", "apply", "note"])
    assert load_params(params_file).download.corpus == "hub"
    for path in (report, lock):
        path.write_text("of the other version")
    (tmp_path / "reports/other.json").touch()
    undo = re.search(r"to undo: (.*); make repro\n", done.output)[1]
    subprocess.run(undo, shell=True, check=True, cwd=tmp_path)
    assert {path: path.read_text() for path in own} == own
    assert not (tmp_path / "reports/other.json").exists()


def test_gpt2_without_the_hub_runs_from_local_copies_that_the_error_asks_for(
    params_file, words_of_dvc, tmp_path
):
    """One -S per model or file, each with the hash that the file must have."""
    done = run_experiment("gpt2")
    assert done.exit_code == Unreachable.exit_code
    assert done.output.startswith("error: the hub can't be reached for openai-community/gpt2 ")
    assert done.output.count("\n") == 1
    assert params_file.read_text() == TEXT
    settings = re.findall(r"-S '(.*?)'", done.output)
    tasks = NAMED["gpt2"].params["evaluation"]["tasks"]
    hashes = [tasks["lambada"]["sha256"], tasks["wikitext"]["wikitext-2"]["sha256"]]
    assert settings == [
        "baseline.specs.gpt2={kind: folder, path: FOLDER}",
        f"evaluation.tasks.lambada={{path: FILE, sha256: {hashes[0]}}}",
        f"evaluation.tasks.wikitext.wikitext-2={{path: FILE, sha256: {hashes[1]}}}",
    ]
    assert "FOLDER is not a folder" in run_experiment("gpt2", *settings).output
    save_random_gpt2(tmp_path / "FOLDER")
    done = run_experiment("gpt2", *settings)
    assert done.exit_code == BadConfig.exit_code
    settings[0] = re.findall(r"-S '(.*?)'", done.output)[0]  # with the hash of the folder
    assert "FILE is not a file" in run_experiment("gpt2", *settings).output
    (tmp_path / "FILE").touch()
    assert run_experiment("gpt2", *settings).exit_code == 0
    assert words_of_dvc.read_text().startswith("exp run -n gpt2-")
    assert load_params(params_file).baseline.specs["gpt2"].path == "FOLDER"


def test_gpt2_runs_offline_from_the_cache_of_the_hub(params_file, words_of_dvc, tmp_path):
    """The error asks for what is not there, with a larger GPT-2 only for that one."""
    tasks = NAMED["gpt2"].params["evaluation"]["tasks"]
    for source in (tasks["lambada"], tasks["wikitext"]["wikitext-2"]):
        folder = f"cache/datasets--{source['repo'].replace('/', '--')}/snapshots/{source['revision']}"
        write_text(tmp_path / folder / source["file"], "x")
    fill_model_cache(tmp_path / "cache", SHIPPED, "gpt2")
    larger = "baseline.names=[gpt2,gpt2-medium]"
    done = run_experiment("gpt2", larger)
    assert done.exit_code == Unreachable.exit_code
    assert re.findall(r"-S '(.*?)'", done.output) == [
        "baseline.specs.gpt2-medium={kind: folder, path: FOLDER}"
    ]
    fill_model_cache(tmp_path / "cache", SHIPPED, "gpt2-medium")
    assert run_experiment("gpt2", larger).exit_code == 0
    assert words_of_dvc.read_text().startswith("exp run -n gpt2-")
    assert load_params(params_file).baseline.names == ("gpt2", "gpt2-medium")


def test_the_command_lists_shows_and_applies(params_file, monkeypatch):
    monkeypatch.chdir(params_file.parent)
    (params_file.parent / "conf").symlink_to(ROOT / "conf")
    listed = CliRunner().invoke(app, ["experiment", "list"]).output
    assert all(f"{name}\n  {one.purpose}\n  needs {one.needs}\n" in listed for name, one in NAMED.items())
    options = ["--set-param", "training.max_steps=7"]
    shown = CliRunner().invoke(app, ["experiment", "show", "note", *options]).output
    assert params_file.read_text() == TEXT
    applied = CliRunner().invoke(app, ["experiment", "apply", "note", *options]).output
    assert "training.max_steps: 1400 -> 7\n" in shown
    assert "training.max_steps: 1400 -> 7\n" in applied
    assert load_params(params_file).training.max_steps == 7
