"""Named experiments: every shipped file is valid, comments of params.yaml stay, a mistake changes nothing."""

import fcntl
import json
import re
from functools import partial

import pytest
from typer.testing import CliRunner

from compactgpt import experiments
from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, Busy, CheckFailed, MissingInput, Unreachable
from compactgpt.common.sections import read_yaml
from compactgpt.config import load_params
from compactgpt.experiments import merge_patch, set_values
from compactgpt.forecast.estimate import estimate_configuration, format_estimate
from tests.support.dvc_projects import ENVIRONMENT, ROOT, dvc, git, git_repository
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


def test_params_yaml_ships_the_demo(params_file):
    assert apply(params_file, "demo") == []
    assert params_file.read_text() == TEXT


def test_the_experiment_note_is_the_run_that_the_note_describes(params_file):
    assert "training.learning_rate: 0.002 -> 0.0003" in apply(params_file, "note")
    params = load_params(params_file)
    note = params.estimate.note.model_dump(include=set(type(params.model).model_fields))
    assert params.model.model_dump() == note
    assert params.training.max_steps * params.training.tokens_per_step == 655_360_000
    assert {"gpt2", "gpt2-xl"} <= set(params.baseline.names)
    assert params.training.head == "full"  # only the demo's softmax is sampled
    text = params.evaluation.text
    assert (text.documents, text.prompt_tokens, text.max_new_tokens) == (128, 256, 256)  # claims C3, C8, C9
    changes = apply(params_file, "long")
    assert {line.split(":")[0].split(".")[1] for line in changes} == {
        "max_steps", "eval_interval", "checkpoint_interval",
    }  # fmt: skip


def test_the_law_of_results_ladder_is_not_used_for_the_present_corpus(params_file):
    """Its runs are of an earlier corpus and val split; the recipe of full-softmax is otherwise theirs."""
    found = estimate_configuration(SHIPPED, ROOT / "results/ladder.json")
    assert found["ladder"]["expected_loss"] is None
    assert {"corpus", "training.head", "training.tokens_per_step"} <= set(found["ladder"]["differs"])
    assert re.search(r"our ladder's law +does not apply here: other corpus, ", format_estimate(found))
    apply(params_file, "full-softmax")
    found = estimate_configuration(load_params(params_file), ROOT / "results/ladder.json")
    assert found["ladder"]["differs"] == ["corpus"]


def test_comments_and_all_other_lines_stay(params_file, tmp_path):
    apply(params_file, "mine", conf=conf_with(tmp_path, "params: {training: {seed: 7}}"))
    changed = [line for line in params_file.read_text().splitlines() if line not in TEXT.splitlines()]
    assert [line.split() for line in changed] == [["seed:", "7"]]
    assert params_file.read_text().count("\n") == TEXT.count("\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params: {training: {max_stps: 7}}", "did you mean max_steps"),
        ("params: {model: {n_head: 3}}", "n_embd"),
        ("sweep: {a: {params: {model.n_head: 3}}}", "n_embd"),
        ("sweep: {a: {}}\nparams: {model: {n_head: 8}}", "set values in its groups"),
        ("- 1", "not valid YAML"),
        ("parms: {}", "did you mean params"),
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
    with pytest.raises(BadConfig, match=r"no experiment 'nte'.*it has ci, .*, note,"):
        experiments.find_experiment("nte", CONF)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("training.max_steps=1600", 1600),
        ("training.learning_rate=3e-4", 0.0003),
        ("baseline.names=[unigram, xz]", ["unigram", "xz"]),
        ("training.init_sha256=", None),
        ("training.max_stps=1", "training.max_stps: unknown key; did you mean max_steps?"),
        ("trainin.max_steps=1", "trainin: unknown key; did you mean training?"),
        ("training.max_steps.x=1", "training.max_steps: input should be a valid integer"),
        ("training.max_steps", "give key=value"),
        ("training.max_steps=[", "not a valid YAML value"),
        ("training.max_steps=!!int x", "not a valid YAML value"),
    ],
)
def test_a_setting_is_yaml_and_a_wrong_one_is_refused_with_its_key(setting, found):
    tree = read_yaml(ROOT / "params.yaml")
    if isinstance(found, str):
        with pytest.raises(BadConfig) as refused:
            experiments.configurations("demo", ROOT / "params.yaml", [setting], CONF)
        assert found.lower() in str(refused.value).lower()
    else:
        set_values(tree, [setting])
        section, key = setting.split("=")[0].split(".")
        assert tree[section][key] == found


@pytest.mark.parametrize(  # examples of RFC 7386, appendix A
    ("tree", "patch", "result"),
    [
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ],
)
def test_merging_is_json_merge_patch(tree, patch, result):
    merge_patch(tree, patch)
    assert tree == result


@pytest.fixture
def fake_dvc(params_file, tmp_path, monkeypatch):
    """A git repository, and a `dvc` that fails after noting its words; returns the notes."""
    program = tmp_path / "bin/dvc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{tmp_path}/words"\nexit ${{CODE:-0}}\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    return tmp_path / "words"


def test_a_sweep_has_a_run_for_each_group_and_seed(params_file, tmp_path):
    text = "sweep: {small: {params: {training.max_steps: 10}, seeds: [1, 2]}, large: {start: small-1}}"
    points = experiments.sweep_points(
        "mine", params_file, ["training.beta1=0.7"], conf_with(tmp_path / "c", text)
    )
    assert [(point.name, point.values) for point in points] == [
        ("small-1", {"training.max_steps": 10, "training.seed": 1}),
        ("small-2", {"training.max_steps": 10, "training.seed": 2}),
        ("large", {"start": "small-1"}),
    ]
    training = points[1].params.training
    assert (training.seed, training.max_steps, training.beta1) == (2, 10, 0.7)
    assert params_file.read_text() == TEXT


def test_a_failure_of_dvc_is_one_sentence(params_file, fake_dvc, monkeypatch):
    monkeypatch.setenv("CODE", "255")
    with pytest.raises(CheckFailed, match="dvc exp run -n demo failed"):
        experiments.run("demo", params_file, conf=CONF)


@pytest.mark.parametrize("words", ["experiment run demo", "experiment apply note"])
def test_params_yaml_does_not_change_while_a_stage_runs(params_file, fake_dvc, tmp_path, words):
    (tmp_path / "conf").symlink_to(CONF)
    locks = tmp_path / ".state/locks"
    locks.mkdir(parents=True)
    (locks / "download.lock").write_text("1")  # of a stage that has ended
    with open(locks / "training.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(7, file=lock, flush=True)
        done = CliRunner().invoke(app, words.split())
    assert done.exit_code == Busy.exit_code
    assert "error: stage training is running here (process 7), and nothing was changed: " in done.output
    assert params_file.read_text() == TEXT
    assert not fake_dvc.exists()
    if "apply" in words:
        assert CliRunner().invoke(app, words.split()).exit_code == 0


@pytest.fixture
def run_experiment(params_file, fake_dvc, tmp_path, monkeypatch):
    """Call `compactgpt experiment run` with an empty cache of the hub, which does not answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "conf").symlink_to(CONF)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/metrics.json").write_text('{"loss": 3.6947, "perplexity": 40.2333}')

    def run(name, *settings):
        options = [word for setting in settings for word in ("-S", setting)]
        return CliRunner().invoke(app, ["experiment", "run", name, *options])

    return run


@pytest.fixture
def run_gpt2(run_experiment):
    return partial(run_experiment, "gpt2")


def test_a_corpus_of_the_hub_is_asked_for_before_anything_is_written(
    run_experiment, params_file, fake_dvc, tmp_path
):
    done = run_experiment("shakespeare")
    assert done.exit_code == Unreachable.exit_code
    assert done.output.startswith("error: the hub can't be reached for karpathy/tiny_shakespeare ")
    assert "bring the text: curl -fLo corpus/input.txt https://raw.githubusercontent.com/" in done.output
    assert done.output.count("\n") == 1
    assert params_file.read_text() == TEXT
    assert not fake_dvc.exists()
    done = run_experiment("demo", "download.corpus=hub")
    assert "name a copy of the repository in download.hub.mirror" in done.output

    text = tmp_path / "corpus/input.txt"
    text.parent.mkdir()
    text.touch()
    done = run_experiment("shakespeare")
    assert done.exit_code == 0
    assert done.output.endswith(
        "our model, measured: loss 3.695, perplexity 40.23\nThe page: reports/index.html\n"
        "next: compactgpt experiment record shakespeare\n"
    )
    text.unlink()
    report = tmp_path / "reports/download.json"
    for corpus, exit_code in (("docstrings", Unreachable.exit_code), ("hub", 0)):
        report.write_text(json.dumps({"corpus": corpus}))  # hub: the text was downloaded already
        assert run_experiment("shakespeare", "training.max_steps=320").exit_code == exit_code


def test_gpt2_runs_from_the_cache_of_the_hub_and_without_it_says_at_once_what_to_give(
    run_gpt2, params_file, fake_dvc, tmp_path
):
    """One -S per model or file, each with the hash that the file must have."""
    done = run_gpt2()
    assert done.exit_code == Unreachable.exit_code
    assert done.output.startswith("error: the hub can't be reached for openai-community/gpt2 ")
    assert done.output.count("\n") == 1
    tasks = NAMED["gpt2"].params["evaluation"]["tasks"]
    sources = {"lambada": tasks["lambada"], "wikitext.wikitext-2": tasks["wikitext"]["wikitext-2"]}
    for name, source in sources.items():
        assert f"-S 'evaluation.tasks.{name}={{path: FILE, sha256: {source['sha256']}}}'" in done.output
    assert "-S 'baseline.specs.gpt2={kind: folder, path: FOLDER}'" in done.output
    assert params_file.read_text() == TEXT
    assert not fake_dvc.exists()

    for source in sources.values():  # the layout of the hub's cache
        repo = "datasets--" + source["repo"].replace("/", "--")
        file = tmp_path / "cache" / repo / "snapshots" / source["revision"] / source["file"]
        file.parent.mkdir(parents=True)
        file.touch()
    gpt2 = SHIPPED.baseline.specs["gpt2"]
    snapshot = tmp_path / "cache" / f"models--openai-community--gpt2/snapshots/{gpt2.revision}"
    save_random_gpt2(snapshot)
    (snapshot / "tokenizer.json").touch()
    assert run_gpt2().exit_code == 0
    assert fake_dvc.read_text() == "exp run -n gpt2\n"
    params = load_params(params_file)
    assert params.baseline.names == (*SHIPPED.baseline.names, "gpt2")
    assert params.training == SHIPPED.training


def test_gpt2_runs_with_local_copies_and_asks_for_the_hash_of_a_folder(run_gpt2, params_file, tmp_path):
    (tmp_path / "lambada.jsonl").touch()
    tasks = [
        "evaluation.tasks.wikitext={}",
        f"evaluation.tasks.lambada={{path: lambada.jsonl, sha256: {'a' * 64}}}",
    ]
    folder = "baseline.specs.gpt2={kind: folder, path: weights}"
    assert "weights is not a folder" in run_gpt2(*tasks, folder).output
    save_random_gpt2(tmp_path / "weights")
    done = run_gpt2(*tasks, folder)
    assert done.exit_code == BadConfig.exit_code
    advised = done.output.split("-S '")[1].split("'")[0]
    assert run_gpt2(*tasks, advised).exit_code == 0
    assert load_params(params_file).baseline.specs["gpt2"].path == "weights"
    (tmp_path / "lambada.jsonl").unlink()
    assert "lambada.jsonl is not a file" in run_gpt2(*tasks, advised).output


@pytest.mark.slow
def test_an_earlier_experiment_of_the_same_name_keeps_its_results(tmp_path, monkeypatch):
    stage = {"cmd": "cp params.yaml out", "params": ["seed"], "outs": [{"out": {"cache": False}}]}
    folder = git_repository(tmp_path / "project", {"training": stage})
    (folder / "params.yaml").write_text("seed: 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    monkeypatch.chdir(folder)
    for seed in (2, 3):
        experiments._rename_earlier("demo", ENVIRONMENT)
        dvc(folder, "exp", "run", "-q", "-n", "demo", "-S", f"seed={seed}")
    refs = git(folder, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    kept = {ref.split("/")[-1]: git(folder, "show", f"{ref}:out") for ref in refs if "/exec/" not in ref}
    assert kept == {"demo-old1": "seed: 2\n", "demo": "seed: 3\n"}


def test_the_command_lists_shows_and_applies(params_file, monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = CliRunner().invoke(app, ["experiment", "list"])
    assert all(
        f"{name}\n  {one.purpose}\n  needs {one.needs}\n" in listed.output for name, one in NAMED.items()
    )
    options = ["--params", str(params_file), "--set-param", "training.max_steps=7"]
    shown = CliRunner().invoke(app, ["experiment", "show", "note", *options]).output
    assert params_file.read_text() == TEXT
    applied = CliRunner().invoke(app, ["experiment", "apply", "note", *options]).output
    assert "training.max_steps: 1400 -> 7\n" in shown
    assert "training.max_steps: 1400 -> 7\n" in applied
    assert load_params(params_file).training.max_steps == 7


@pytest.mark.parametrize("content", ["", "- a\n"])
def test_a_params_file_without_sections_is_refused(tmp_path, content):
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(BadConfig):
        apply(tmp_path / "params.yaml", "note")
