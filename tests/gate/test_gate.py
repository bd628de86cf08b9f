"""The gate: what it lets through, what it stops, how often it is wrong, and what it says where."""

import json
import math
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import read_json, write_json
from compactgpt.evaluation.metrics import ratio_interval
from compactgpt.forecast.sweep import documents_sha256
from compactgpt.gate import formats, gate, references
from compactgpt.gate.gate import Check, Documents, Noise, Snapshot, Verdict
from compactgpt.model.weights import save_model
from compactgpt.tracking.mlflow_logger import sync
from tests.support import comparison_inputs as inputs
from tests.support import tracking_store
from tests.support.tiny_models import save_tokenizer, tiny_gpt

SETTINGS = inputs.PARAMS.regression.model_copy(
    update={"tolerances": {"perplexity": 0.01, "accuracy.cloze": 0.02}}
)
NOISE = Noise(0.01, 7, "eight seeds")


def documents(count=30, loss=4.0, spread=0.3, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(50, 2000, count).astype(float)
    nats = tokens * (loss + spread * generator.standard_normal(count))
    return Documents(tuple(f"{row:032x}" for row in range(count)), tokens, {"perplexity": nats}, count)


def snapshot(**changes):
    found = Snapshot(
        "then", {"val": "a" * 64, "window": 8}, {"train": "b" * 64},
        {"training.seed": 1, "comparison.language": "en"},
        {"perplexity": 54.6, "loss": 4.0}, {"unigram": 6.0},
        {"cloze": {"items_sha256": "c", "hits": "1100" * 25}}, documents(),
    )  # fmt: skip
    return replace(found, **changes)


# --- what is decided ---------------------------------------------------------------------------------------


def test_a_state_passes_against_itself():
    verdict = gate.run_gate(snapshot(), snapshot(), SETTINGS, NOISE)
    assert [check.name for check in verdict.metrics] == ["perplexity", "accuracy.cloze"]
    assert {check.status for check in verdict.checks if check.name != "noise"} == {"pass"}
    assert verdict.metrics[0].bounds == (0, 0)


def test_worse_must_be_more_than_tolerated_and_more_than_chance():
    """A change equal to the tolerance is tolerated, and an interval from 0 is not above 0."""
    cases = ((-0.01, 0.01, "pass"), (0, 0.02, "warn"), (0.001, 0.005, "warn"), (0.001, 0.02, "fail"))
    for low, value, status in cases:
        assert gate.decide(gate.Interval(value, low, 0.5), 0.01) == status


def test_the_two_parts_of_chance_add_as_squares_and_empty_documents_have_none():
    """The interval of the rise in nats per token is widened by the noise of both runs."""
    tokens = np.array([0.0, 1.0, 300.0, 110.0, 40.0, 75.0])
    change = np.array([5.0, 0.3, 9.0, 1.1, 3.2, -1.5])
    found = gate.perplexity_rise(change + 7, np.full(6, 7.0), tokens, Noise(0.01, 3, ""), 0.2)
    documents = ratio_interval(change[1:], tokens[1:], confidence=0.6)
    value, low, high = documents.value, documents.low, documents.high
    noise = 0.01 * math.sqrt(2) * scipy.stats.t.ppf(0.8, 3)
    ends = [value - math.hypot(value - low, noise), value + math.hypot(high - value, noise)]
    assert (found.value, found.low, found.high) == pytest.approx(tuple(np.expm1([value, *ends])))


@pytest.mark.parametrize("count", [1, 2])
def test_the_chance_of_a_false_alarm_is_divided_among_the_groups(count):
    """The loss of every document rose by 0.04 nats per token, so only the noise between runs is left."""
    tolerances = dict([("perplexity", 0.01), ("accuracy.cloze", 0.02)][:count])
    judged = SETTINGS.model_copy(update={"tolerances": tolerances, "false_alarms": 0.04})
    held = documents()
    now = snapshot(documents=replace(held, nats={"perplexity": held.nats["perplexity"] + 0.04 * held.tokens}))
    check = gate.run_gate(snapshot(), now, judged, NOISE).metrics[0]
    distance = 0.01 * math.sqrt(2) * scipy.stats.t.ppf(1 - 0.04 / count, 7)
    assert check.bounds == pytest.approx(tuple(np.expm1([0.04 - distance, 0.04 + distance])))
    assert check.status == ("fail" if distance < 0.04 else "warn")


@pytest.mark.parametrize(
    ("hits", "gated", "level"),
    [
        ({"cloze": (7, 50)}, [], 0.01),  # 2^-7 is below 0.01, but not below its half
        ({"cloze": (8, 50)}, ["cloze"], 0.01 / 2),
        ({"cloze": (3, 50), "lambada_word": (900, 5000)}, ["lambada_word"], 0.01 / 2),
        ({"cloze": (9, 50), "lambada_word": (900, 5000)}, ["lambada_word", "cloze"], 0.01 / 3),
        ({"lambada_word": (40, 5000)}, [], 0.01),  # all right answers are fewer than is tolerated
    ],
)
def test_a_task_that_cannot_fail_is_watched_and_takes_no_part_of_the_false_alarms(hits, gated, level):
    strings = {f"accuracy.{name}": ("1" * right).ljust(of, "0") for name, (right, of) in hits.items()}
    tasks = {name: {"items_sha256": "c", "hits": strings[f"accuracy.{name}"]} for name in hits}
    judged = SETTINGS.model_copy(update={"tolerances": dict.fromkeys(["perplexity", *strings], 0.01)})
    names, found = gate.choose_accuracies(strings, judged, has_perplexity=True)
    assert (names, found) == ([f"accuracy.{name}" for name in gated], level)
    none_right = {name: {**task, "hits": "0" * len(task["hits"])} for name, task in tasks.items()}
    verdict = gate.run_gate(snapshot(tasks=tasks), snapshot(tasks=none_right), judged, NOISE)
    assert {check.name for check in verdict.failures} == {f"accuracy.{name}" for name in gated}
    watched = {check.name for check in verdict.watched if check.says}
    assert watched == {f"accuracy.{name}" for name in hits if name not in gated}


@pytest.mark.parametrize(
    ("lost", "won", "tolerance", "status"),
    [
        (7, 0, 0.02, "fail"),
        (6, 0, 0.02, "warn"),
        (9, 0, 0.09, "pass"),
        (0, 9, 0.02, "pass"),
    ],
)
def test_a_task_fails_by_more_lost_answers_than_tolerance_and_chance(lost, won, tolerance, status):
    """Of 100 items. By chance, 7 answers are lost once in 128 times: the allowed rate."""
    right = "1" * 50 + "0" * 50
    hits = "0" * lost + right[lost : 100 - won] + "1" * won
    then, now = ({"wikitext.2": {"items_sha256": "c", "hits": each}} for each in (right, hits))
    tolerances = {"accuracy.wikitext.2": tolerance}
    judged = SETTINGS.model_copy(update={"tolerances": tolerances, "false_alarms": 2**-7})
    (check,) = gate.run_gate(snapshot(tasks=then), snapshot(tasks=now), judged, NOISE).metrics
    chance = scipy.stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue
    says = f"of 100 items, {lost} became wrong and {won} right; p = {chance:.2g}"
    now, fall = (50 - lost + won) / 100, pytest.approx((lost - won) / 100)
    assert check == Check("accuracy.wikitext.2", status, says, 0.5, now, fall, None, tolerance)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"fingerprint": {"val": "f" * 64, "window": 8}},
            "val aaaaaaaaaaaa -> ffffffffffff). Restore the old values",
        ),
        ({"documents": documents(29)}, "the reference has documents that are missing now"),
        ({"tasks": {"cloze": {"items_sha256": "d", "hits": "1100" * 25}}}, "the task's items changed"),
    ],
)
def test_other_text_and_other_items_are_not_compared(changes, says):
    verdict = gate.run_gate(snapshot(), snapshot(**changes), SETTINGS, NOISE)
    (failed,) = verdict.failures
    assert failed.says.startswith("not comparable: ")
    assert says in failed.says
    assert bool(verdict.metrics) == ("tasks" in changes)


def test_figures_without_a_tolerance_are_shown_and_throughput_is_a_ratio():
    then, now = snapshot(reason="a better recipe"), snapshot(figures={"loss": 4.5, "bits": 1.0})
    judged = SETTINGS.model_copy(update={"min_throughput_ratio": 1.2})
    for ratio, status in ((1.2, "pass"), (1.1, "fail")):
        verdict = gate.run_gate(then, now, judged, NOISE, ratio)
        assert (verdict.against, verdict.reason) == ("then", "a better recipe")
        assert verdict.watched == [Check("bits", "info", "", None, 1.0), Check("loss", "info", "", 4.0, 4.5)]
        other_text = gate.run_gate(then, replace(now, fingerprint={"val": "f" * 64}), judged, NOISE, ratio)
        assert not [*other_text.metrics, *other_text.watched]
        for guards in (verdict.guards, other_text.guards):
            assert [check.status for check in guards if check.name == "throughput"] == [status]


def test_changed_parameters_that_can_explain_other_metrics_are_named():
    """Not named: parameters of unused baselines and of reporting, and of the data if the data are equal."""
    keys = ["training.seed", "baseline.specs.xz.level", "download.corpus"]
    keys += ["baseline.specs.gpt2.revision", "estimate.note.n_layer", "training.launcher.mode"]
    then, now = (snapshot(params={"baseline.names": '["xz"]', **dict.fromkeys(keys, n)}) for n in (1, 2))
    for state, named in ((now, keys[:2]), (replace(now, data={"train": "e" * 64}), keys[:3])):
        check = gate.run_gate(then, state, SETTINGS, NOISE).guards[1]
        assert (set(re.findall(r"(\S+) 1 -> 2", check.says)), check.status) == (set(named), "warn")


def test_a_baseline_that_moved_fails_unless_something_explains_it():
    then = snapshot(baselines={"gone": 1.0, "unigram": 6.0, "xz": 5.0})
    moved = {"new": 2.0, "unigram": 6.25, "xz": 5.0}
    judged = SETTINGS.model_copy(update={"max_baseline_change": 0.125})
    says = "the baseline's loss changed, so its settings, the evaluation or the data changed"
    for other, status in (({}, "fail"), ({"data": {"train": "e" * 64}}, "warn")):
        guards = gate.run_gate(then, snapshot(baselines=moved, **other), judged, NOISE).guards
        assert guards[2:-1] == [Check("baseline.unigram", status, says, 6.0, 6.25)]


def test_a_metric_that_is_no_longer_measured_fails_and_a_new_one_does_not():
    without = snapshot(tasks={}, figures={"accuracy.cloze": 0.4})
    having = snapshot(figures={"accuracy.cloze": 0.5})
    lost = gate.run_gate(having, without, SETTINGS, NOISE).metrics[1]
    new = gate.run_gate(without, having, SETTINGS, NOISE).metrics[1]
    assert lost == Check("accuracy.cloze", "fail", "no longer measured", 0.5)
    assert new == Check("accuracy.cloze", "warn", "not in the reference", None, 0.5)


def seeds_file(path, state, losses=(4.0, 4.03, 3.98), **changes):
    """Write results/seeds.json for a state's recipe and documents: shipped runs with other losses."""
    shipped = read_json(inputs.ROOT / "results/seeds.json")
    tokens = state.documents.tokens.astype(int).tolist()
    runs = [{**run, "loss": loss, "nats": []} for run, loss in zip(shipped["runs"], losses, strict=False)]
    hashed = documents_sha256(state.documents.ids, tokens)
    scored = {"ids_sha256": hashed, "tokens": tokens, "sources": [""] * len(tokens)}
    made = {"documents": scored, "settings": {"training.seed": 1}, "runs": runs}
    write_json(path, shipped | made | changes)


def test_the_noise_is_that_of_the_seeds_or_an_assumption_that_the_verdict_names(tmp_path):
    path, now = tmp_path / "results/seeds.json", snapshot()
    than = "than the compared versions"
    for state, changes, missing in (
        (now, {"losses": [4.0]}, "is missing or has fewer than 2 runs"),
        (snapshot(documents=documents(29)), {}, f"has losses on another val split {than}"),
        (now, {"settings": {"training.seed": 2}}, f"has runs with other settings {than}"),
    ):
        seeds_file(path, now, **changes)
        found = references.read_noise(path, now, state, SETTINGS)
        assert (found.deviation, found.degrees_of_freedom) == (SETTINGS.fallback_noise, math.inf)
        assert f"results/seeds.json {missing}: the gate assumes a noise of 0.02 nats" in found.source
    seeds_file(path, now)
    other_recipe = snapshot(params={"training.seed": 2})  # it has the noise of the accepted recipe
    for pair in ((now, now), (other_recipe, now), (now, other_recipe)):
        found = references.read_noise(path, *pair, SETTINGS)
        assert (found.deviation, found.degrees_of_freedom) == (np.std([4.0, 4.03, 3.98], ddof=1), 2)
        assert (
            "the losses of 3 runs with different seeds have a standard deviation of 0.0252 nats per token"
            in found.source
        )


# --- what is compared with ---------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """A project folder as `dvc repro` leaves it."""
    return inputs.make_place(tmp_path)


@pytest.fixture
def present(place):
    return references.read_present(place)


def train_again(place, monkeypatch, loss):
    """Write the reports and sums of another run."""
    monkeypatch.setitem(inputs.LOSSES, "compact", loss)
    inputs.write_score(place, "compact", "evaluation")


def test_an_accepted_reference_is_read_back_as_it_was(tmp_path, present):
    path = tmp_path / "reports/accepted.json"
    references.accept(present, " a better recipe ", path, 2000)
    then = references.read_reference("reports/accepted.json", tmp_path)
    assert then.reason == "a better recipe"
    content = path.read_bytes()
    references.accept(then, then.reason, path, 2000)
    assert path.read_bytes() == content


def test_a_reference_keeps_a_bounded_sample_that_order_does_not_change(tmp_path, present):
    backwards = replace(present, documents=present.documents.select(present.documents.ids[::-1]))
    samples = []
    for state in (backwards, present):
        references.accept(state, "why", tmp_path / "accepted.json", 10)
        samples.append(references.read_accepted(tmp_path / "accepted.json"))
    assert set(samples[0].documents.ids) == set(samples[1].documents.ids)
    verdict = gate.run_gate(samples[1], present, SETTINGS, NOISE)
    assert (verdict.failures, verdict.metrics[0].says) == ([], f"10 documents of {inputs.DOCUMENTS}")


def test_a_reference_wants_a_reason_and_a_damaged_one_is_refused(tmp_path, present):
    path = tmp_path / "accepted.json"
    with pytest.raises(BadConfig, match="reason"):
        references.accept(present, "  ", path, 10)
    with pytest.raises(MissingInput, match="--accept"):
        references.read_accepted(path)
    references.accept(present, "why", path, 10)
    content = read_json(path)
    for damage in ({"documents": {**content["documents"], "rows": ["a b"]}}, {"version": 9}):
        write_json(path, {**content, **damage})
        with pytest.raises(BadData, match="git checkout"):
            references.read_accepted(path)


def with_dvc(folder, locked, **stage):
    """Write what DVC keeps of a project: its lock, and the outs in its cache."""
    for path in locked:
        tracking_store.cache_out(folder, path)
    tracking_store.save_lock(folder, {"evaluation": locked})
    write_json(folder / "dvc.yaml", {"stages": {"evaluation": {"cmd": "x", **stage}}})


def test_any_revision_is_a_reference_while_dvc_has_its_sums(tmp_path, place, monkeypatch):
    outs = ["data/evaluation", "reports/evaluation.json", "reports/training.json"]
    with_dvc(place, outs, outs=outs)
    (tmp_path / ".gitignore").write_text("/data/\n/.dvc/\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a run"]):
        tracking_store.git(tmp_path, *words)
    train_again(place, monkeypatch, inputs.LOSSES["compact"] + 0.2)  # a later run, not committed
    then, now = references.read_reference("HEAD", tmp_path), references.read_present(tmp_path)
    verdict = gate.run_gate(then, now, SETTINGS, NOISE)
    assert verdict.metrics[0].change == pytest.approx(math.exp(0.2) - 1)
    with pytest.raises(BadConfig, match="no commit"):
        references.read_reference("nothing-of-that-name", tmp_path)
    shutil.rmtree(tmp_path / ".dvc/cache")
    with pytest.raises(MissingInput, match="dvc fetch"):
        references.read_reference("HEAD", tmp_path)


def test_the_champion_is_a_reference_with_the_files_of_its_run(tmp_path, monkeypatch, empty_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    with pytest.raises(MissingInput, match="no model is champion"):
        references.read_reference("champion", tmp_path)
    with pytest.raises(MissingInput, match="models/compact"):
        references.promote(tmp_path)
    shutil.rmtree(inputs.make_place(tmp_path) / "models")
    encoding = save_tokenizer(tmp_path / "data/tokenizer")
    save_model(tiny_gpt(encoding.n_vocab), tmp_path / "models/compact")
    outs = ["data/evaluation", "data/tokenizer", "models/compact"]
    outs += [str(path.relative_to(tmp_path)) for path in (tmp_path / "reports").rglob("*.json")]
    with_dvc(tmp_path, outs)
    with pytest.raises(MissingInput, match="no model with these weights"):
        references.promote(tmp_path)
    sync(tmp_path)
    assert references.promote(tmp_path) == "1"
    shutil.rmtree(tmp_path / "data")
    champion = references.read_reference("champion", tmp_path)
    assert champion.name == "champion, version 1"
    assert len(champion.documents.ids) == inputs.DOCUMENTS
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("alter table logged_models rename to damaged")
    with pytest.raises(Unreachable, match=r"^MLflow at sqlite:///mlflow\.db failed \(.*logged_models"):
        references.promote(tmp_path)


# --- what is said ------------------------------------------------------------------------------------------

ODD_TEXT = "50% of <b>\r\nit \x00 is `odd` | @you"
ODD = Check("odd|name: a, b", "fail", ODD_TEXT, 1.0, 2.0, 0.5, (0.4, 0.6), 0.01)
ODD_VERDICT = Verdict("then", "why | not", [ODD], [replace(ODD, status="warn"), replace(ODD, status="pass")])


def test_a_comment_survives_odd_text_and_folds_what_does_not_fit_one_screen():
    points = ((1, 10.0, 9.0), (2, 9.5, None), (11, 8.0, 8.0), (41, 5.0, 6.0))
    curve = [dict(zip(("step", "train_loss", "val_loss"), point, strict=True)) for point in points]
    text = formats.render_markdown(replace(ODD_VERDICT, curve=curve))
    assert text.startswith("### ❌ Gate: failed (odd\\|name: a, b)\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert not re.search("<b>|@you", text)
    assert "  line [10.0, 7.0, 5.0]\n  line [9.0, 7.333, 6.0]\n" in text  # at steps 1, 21, 41
    warnings = [Check(f"metric{row}", "warn", "a sentence") for row in range(30)]
    shown, folded = formats.render_markdown(Verdict("then", "", warnings)).split("<details>")
    assert len([line for line in shown.splitlines() if line.strip()]) < 12
    assert "- and 25 more, below" in shown
    assert folded.count("a sentence") == 30


def test_the_files_of_ci_keep_odd_text_and_the_summary_grows(tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("of another step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    formats.publish(ODD_VERDICT, tmp_path / "gate.md", tmp_path / "gate.xml")
    assert summary.read_text() == "of another step\n" + (tmp_path / "gate.md").read_text()
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert [suite.get(key) for key in ("tests", "failures")] == ["3", "1"]
    assert len(suite.findall("testcase")) == 3
    assert "50% of <b>" in suite.find("testcase/failure").get("message")


def run(*words):
    return CliRunner().invoke(app, ["gate", *map(str, words)], catch_exceptions=False)


def test_the_command_accepts_passes_and_fails(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert run().exit_code == MissingInput.exit_code
    assert run("--accept", "the first").exit_code == 0
    done = run()
    assert done.exit_code == 0
    assert "accepted because: the first" in done.output
    assert "gate: passed" in done.output
    write_json(Path("bench.json"), {"engines": {}})
    done = run("--bench", "bench.json")
    assert done.exit_code == BadData.exit_code
    assert "bench.json has no engines.ours.ratio" in done.output
    train_again(place, monkeypatch, inputs.LOSSES["compact"] + 0.3)
    done = run("--markdown", "gate.md", "--junit", "gate.xml")
    assert done.exit_code == 3
    assert "gate: failed (perplexity" in done.output
    assert "| ❌ | perplexity |" in Path("gate.md").read_text()
    done = run("--json")
    assert done.exit_code == 3
    verdict = json.loads(done.stdout)
    assert not verdict["passed"]
    assert "fail" in {check["status"] for check in verdict["metrics"]}
    Path("reports/training.json").unlink()
    assert "reports/training.json is missing: run `dvc repro`" in run().output


@pytest.mark.parametrize(("loss", "shown"), [(700.0, "e+304 %"), (3_075_166.123, "infinite")])
def test_a_diverged_model_fails_in_every_format(place, monkeypatch, loss, shown):
    """A rise by 710 nats per token or more is too large for a float."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert run("--accept", "the first").exit_code == 0
    train_again(place, monkeypatch, loss)
    rounded = {"value": inputs.nats_of("compact").sum() / inputs.TOKENS.sum() * (1 + 1e-15)}
    inputs.edit(Path("reports/evaluation.json"), lambda report: report["loss"].update(rounded))
    done = run("--markdown", "gate.md", "--junit", "gate.xml")
    assert done.exit_code == 3
    assert "gate: failed (perplexity" in done.output
    assert shown in done.output
    rows = [line for line in Path("gate.md").read_text().splitlines() if "| perplexity |" in line]
    assert [shown in row for row in rows] == [True]
    assert max(map(len, done.output.splitlines())) < 250  # no number of 300 digits
    case = ElementTree.parse("gate.xml").getroot().find("testcase[@name='perplexity']/failure")
    assert f"{shown}; chance" in case.get("message")
    as_json = run("--json")
    assert as_json.exit_code == 3
    check, *_ = json.loads(as_json.stdout, parse_constant=pytest.fail)["metrics"]
    assert (check["name"], check["status"]) == ("perplexity", "fail")
    assert (check["change"] is None) == (shown == "infinite")
    assert run("--accept", "a diverged one").exit_code == 0
    assert "gate: passed" in run().output
