"""The record holds what the reports say, and every rendering shows the record and nothing else."""

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from compactgpt import rendering
from compactgpt.comparison import compare, read_sources
from compactgpt.config import load_params
from compactgpt.errors import BadConfig, BadData, MissingInput
from compactgpt.estimate import estimate
from stages.comparison import app

ROOT = Path(__file__).parents[1]
PARAMS = load_params(ROOT / "params.yaml")
LIKELIHOOD = PARAMS.evaluation.likelihood.model_copy(update={"bootstrap_resamples": 200})
NAMES = PARAMS.baseline.names
DOCUMENTS = 40
TOKENS = np.random.default_rng(0).integers(20, 200, DOCUMENTS)
DIFFICULTY = np.random.default_rng(1).normal(0, 0.5, DOCUMENTS)
LOSSES = {"compact": 4.4, **{name: 3.0 + 0.7 * place for place, name in enumerate(NAMES)}}


def nats_of(name: str) -> np.ndarray:
    noise = np.random.default_rng(list(LOSSES).index(name)).normal(0, 0.05, DOCUMENTS)
    return TOKENS * (LOSSES[name] + DIFFICULTY + noise)


def write_score(reports: Path, data: Path, name: str) -> None:
    nats, bytes_ = nats_of(name), TOKENS * 4
    loss = nats.sum() / TOKENS.sum()
    bits = nats.sum() / (math.log(2) * bytes_.sum())
    report = {
        "model": {
            "name": name,
            "kind": "test",
            "num_params": None if name == "xz" else 1_234_567,
            "context": "c",
        },
        "validation": {
            "sha256": "a" * 64,
            "documents": DOCUMENTS,
            "tokens": int(TOKENS.sum()),
            "bytes": int(bytes_.sum()),
        },
        "window": LIKELIHOOD.window,
        "loss": {"value": loss, "low": loss - 0.1, "high": loss + 0.1},
        "perplexity": {"value": math.exp(loss), "low": math.exp(loss - 0.1), "high": math.exp(loss + 0.1)},
        "bits_per_byte": {"value": bits, "low": bits - 0.03, "high": bits + 0.03},
        "own_tokens": None,
        "loss_per_own_token": None,
    }
    compact = name == "compact"
    path = reports / ("evaluation.json" if compact else f"baseline/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    totals = data / ("evaluation/compact.parquet" if compact else f"baseline/{name}.parquet")
    totals.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{i:032x}" for i in range(DOCUMENTS)]
    own = pyarrow.nulls(DOCUMENTS, pyarrow.int64())
    columns = {"id": ids, "bytes": bytes_, "tokens": TOKENS, "own_tokens": own, "nats": nats}
    pyarrow.parquet.write_table(pyarrow.table(columns), totals)


@pytest.fixture
def place(tmp_path):
    """A repository's inputs, reports and sums, as the other stages leave them."""
    reports, data = tmp_path / "reports", tmp_path / "data"
    for name in ("claims.yaml", "published.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in LOSSES:
        write_score(reports, data, name)
    (reports / "estimate.json").write_text(json.dumps(estimate(PARAMS)))
    (reports / "training.json").write_text(json.dumps({"tokens": 409_600}))
    (reports / "loss.csv").write_text("step,train_loss,val_loss\n1,10.8,10.7\n400,5.5,5.0\n800,4.6,4.5\n")
    return tmp_path


def record_of(place: Path) -> dict:
    sources = read_sources(place, place / "reports", place / "data", NAMES)
    return json.loads(json.dumps(compare(sources, LIKELIHOOD)))


def edit(path: Path, change) -> None:
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def evidence_of(record: dict) -> dict:
    return {item["id"]: item for item in record["evidence"]}


def test_evidence_is_what_the_reports_say(place):
    known = evidence_of(record_of(place))
    loss = nats_of("xz").sum() / TOKENS.sum()
    assert known["xz.loss"]["value"] == loss
    assert known["xz.loss"]["low"] == loss - 0.1
    assert known["xz.loss"]["known"] == "measured"
    assert known["compact.tokens_seen"]["value"] == 409_600
    assert known["gpt2.openwebtext.perplexity"]["value"] == pytest.approx(22.65, abs=0.005)
    assert known["gpt2.openwebtext.bits_per_byte"]["value"] == pytest.approx(1.023, abs=0.0005)
    assert known["ratio.note_to_gpt2.parameters.all_tensors"]["value"] == pytest.approx(0.242, abs=0.0005)
    assert known["ratio.note_to_gpt2.parameters.non_embedding"]["value"] == pytest.approx(0.125, abs=0.0005)
    assert known["ratio.note_to_gpt2.flops_per_token"]["value"] == pytest.approx(0.227, abs=0.0005)


def test_every_value_has_a_unit_a_source_and_a_way_it_is_known(place):
    for item in record_of(place)["evidence"]:
        assert item["unit"]
        assert item["source"]
        assert item["known"] in {"measured", "computed", "published", "estimated", "reported"}


def test_the_ratio_of_perplexities_is_paired(place):
    """Documents differ by much more than models do: unpaired, the interval would be many times as wide."""
    known = evidence_of(record_of(place))
    ratio = known["ratio.compact_to_unigram.perplexity"]
    difference = nats_of("compact") - nats_of("unigram")
    assert ratio["value"] == pytest.approx(math.exp(difference.sum() / TOKENS.sum()), rel=1e-12)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    draw = np.random.default_rng(7).integers(0, DOCUMENTS, (4000, DOCUMENTS))
    losses = difference[draw].sum(1) / TOKENS[draw].sum(1)
    assert math.log(ratio["high"] / ratio["low"]) == pytest.approx(
        np.quantile(losses, 0.975) - np.quantile(losses, 0.025), rel=0.25
    )


def test_the_demo_never_decides_a_claim_about_the_notes_model(place):
    record = record_of(place)
    claims = {claim["id"]: claim for claim in record["claims"]}
    for name in ("L1", "L2", "L12", "L14", "C2", "C3", "C7"):
        assert claims[name]["verdict"] == "not yet measured", name
    deciding = {d["source"] for claim in record["claims"] for d in claim["decisions"]}
    assert not {name for name in deciding if name.startswith("compact.")}
    assert "measured demo: " in rendering.markdown(record)


# Claims that wait for an experiment which the embedded default does not run.
AWAITED = {
    "note.perplexity",
    "note.loss",
    "note.lambada_accuracy",
    "note.generalisation_gap",
    "ratio.compact_to_gpt2.perplexity",
    "ratio.note_to_gpt2.perplexity",
    "ratio.note_to_gpt2.repetition",
    "ratio.context_512_to_1024.perplexity",
}


def test_every_value_that_a_claim_names_exists_or_is_awaited(place):
    sources = read_sources(place, place / "reports", place / "data", NAMES)
    known = evidence_of(compare(sources, LIKELIHOOD))
    named = {name for claim in sources.claims.claims for name in claim.beside}
    named |= {name for claim in sources.claims.claims for name in getattr(claim.judged, "ids", ())}
    assert named - set(known) == AWAITED


def test_two_values_of_one_name_are_refused(place):
    """A baseline must not pass for the note's model."""
    (place / "data/baseline/xz.parquet").rename(place / "data/baseline/reported.parquet")
    (place / "reports/baseline/xz.json").rename(place / "reports/baseline/reported.json")
    sources = read_sources(place, place / "reports", place / "data", ["reported"])
    with pytest.raises(BadConfig, match=r"two values are called reported\.loss"):
        compare(sources, LIKELIHOOD)


def test_the_loss_is_held_against_the_interval_written_down_before(place):
    high = estimate(PARAMS)["compact"]["expected_loss"]["high_80"]
    for loss, inside in ((high - 0.001, True), (high + 0.001, False)):
        measured = dict.fromkeys(("value", "low", "high"), loss)
        edit(place / "reports/evaluation.json", lambda r, measured=measured: r.update(loss=measured))
        assert record_of(place)["forecast"]["inside_80"] is inside


@pytest.mark.parametrize(
    ("report", "change", "shown"),
    [
        ("evaluation.json", lambda r: r["loss"].update(value=4.56789, high=5), "4.568"),
        ("baseline/xz.json", lambda r: r["bits_per_byte"].update(value=7.65432, high=8), "7.654"),
        ("baseline/zstd.json", lambda r: r["perplexity"].update(high=98765.4), "98,765.40"),
        ("estimate.json", lambda r: r["note"].update(tokens=655_360_001), "655,360,001"),
        ("estimate.json", lambda r: r["compact"]["parameters"].update(non_embedding=787_585), "787,585"),
    ],
)
def test_altering_a_report_changes_every_rendering(place, report, change, shown):
    before = record_of(place)
    edit(place / "reports" / report, change)
    after = record_of(place)
    for render in (rendering.markdown, rendering.csv_text):
        assert render(before) != render(after)
    texts = (rendering.markdown, lambda r: rendering.terminal(r, width=200, colour=False))
    for render in texts:
        assert shown not in render(before)
        assert shown in render(after)


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:[,.]\d+)*%?", text))


def test_every_number_of_the_markdown_tables_is_in_the_record(place):
    record = record_of(place)
    texts = []
    for item in record["evidence"]:
        texts += [rendering.show_evidence(item), item["id"]]
    for claim in record["claims"]:
        texts += [claim[key] for key in ("id", "quote", "reason", "verdict")]
        texts.append(rendering.show_interval(claim["low"], claim["high"], claim["unit"]))
        for decision in claim["decisions"]:
            texts.append(rendering.show_interval(decision["low"], decision["high"], claim["unit"]))
            texts.append(decision["source"].replace(" and ", ", "))
    texts += [name for model in record["models"]["measured"] for name in (model["name"], model["context"])]
    texts += [*record["models"]["published"], *(str(number) for _, number in record["tally"])]
    allowed = set().union(*(numbers_in(text) for text in [*texts, *rendering.TEXT.values()]))
    rows = [line for line in rendering.markdown(record).splitlines() if line.startswith("|")]
    assert len(rows) > 60
    assert numbers_in("\n".join(rows)) <= allowed


def test_every_cell_of_the_notes_table_stands_in_every_rendering(place):
    record = record_of(place)
    claims = {claim["id"]: claim for claim in record["claims"]}
    text, lines = rendering.markdown(record), list(csv.DictReader(io.StringIO(rendering.csv_text(record))))
    for row in record["table"]:
        for column in rendering.COLUMNS:
            claim = claims[row[column]]
            assert f"**{claim['quote']}**" in text
            found = [line for line in lines if (line["row"], line["column"]) == (row["id"], column)]
            assert {line["verdict"] for line in found} == {claim["verdict"]}


def test_csv_values_are_the_records_to_the_last_digit(place):
    record = record_of(place)
    known = evidence_of(record)
    lines = [line for line in csv.DictReader(io.StringIO(rendering.csv_text(record))) if line["evidence"]]
    assert {line["evidence"] for line in lines} >= {"xz.loss", "note.tokens", "compact.bits_per_byte"}
    for line in lines:
        assert float(line["value"]) == known[line["evidence"]]["value"]


def test_a_measured_row_has_its_ratio_and_a_published_row_none(place):
    record = record_of(place)
    view = rendering.View(record)
    rows = {
        (row[0], row[-1]): row[rendering.MEASURED_HEAD.index("Perplexity ratio")]
        for row in view.measured_table()
    }
    assert rows["xz", "measured"] == view.value("ratio.compact_to_xz.perplexity") != "-"
    assert rows["gpt2", "published"] == "-"


def test_markdown_tables_have_one_width(place):
    width = 0
    for line in rendering.markdown(record_of(place)).splitlines():
        bars = line.count("|") - line.count("\\|") if line.startswith("|") else 0
        assert bars == width or not bars or not width, line
        width = bars


def test_the_same_record_gives_the_same_bytes(place):
    record = record_of(place)
    assert record == record_of(place)
    for draw in (rendering.bits_per_byte_png, rendering.loss_png):
        picture = draw(record)
        assert picture.startswith(b"\x89PNG")
        assert b"Software" not in picture
        assert picture == draw(record)


def test_pictures_change_with_the_record(place):
    record = record_of(place)
    bars, curve = rendering.bits_per_byte_png(record), rendering.loss_png(record)
    for bound in ("value", "low", "high"):
        evidence_of(record)["xz.bits_per_byte"][bound] += 1
    record["curve"][1]["val_loss"] += 1
    assert rendering.bits_per_byte_png(record) != bars
    assert rendering.loss_png(record) != curve


def test_the_terminal_never_breaks_a_number(place):
    text = rendering.terminal(record_of(place), width=120, colour=False)
    for word in ("1,557,611,200", "124,439,808", "655,360,000", "published\n"):
        assert word in text.replace(" \n", "\n")
    assert max(len(line) for line in text.splitlines()) <= 120


def test_brackets_in_a_quote_reach_the_terminal(place):
    record = record_of(place)
    record["claims"][0]["quote"] = "29 […] [bold]M[/bold]"
    assert "29 […] [bold]M[/bold]" in rendering.terminal(record, width=200, colour=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["validation"].update(sha256="b" * 64), "different val splits"),
        (lambda r: r.update(window=7), "windows of 7 tokens"),
        (lambda r: r.pop("loss"), "loss: Field required"),
        (lambda r: r["loss"].update(value="low"), "loss.value"),
        (lambda r: r["loss"].update(high=0.5), "is above high"),
    ],
)
def test_scores_that_do_not_compare_are_refused(place, change, said):
    edit(place / "reports/baseline/xz.json", change)
    with pytest.raises(BadData, match=said) as caught:
        record_of(place)
    assert "dvc repro" in str(caught.value)


@pytest.mark.parametrize(("report", "key"), [("estimate.json", "note"), ("training.json", "tokens")])
def test_a_report_that_lacks_something_is_named(place, report, key):
    edit(place / "reports" / report, lambda r: r.pop(key))
    with pytest.raises(BadData, match=rf"{report}: {key}: Field required; delete it and run `dvc repro`"):
        record_of(place)


def test_a_curve_that_is_none_is_named(place):
    for text in ("step,loss\n1,2\n", "step,train_loss,val_loss\n1,x,2\n"):
        (place / "reports/loss.csv").write_text(text)
        with pytest.raises(BadData, match=r"loss\.csv is no loss curve"):
            record_of(place)


def test_an_interval_beside_its_value_is_still_drawn(place):
    """A percentile interval of few documents may miss the value itself."""
    record = record_of(place)
    item = evidence_of(record)["xz.bits_per_byte"]
    item["low"] = item["value"] + 0.01
    assert rendering.bits_per_byte_png(record).startswith(b"\x89PNG")


@pytest.mark.parametrize("column", ["id", "tokens", "bytes"])
def test_sums_of_other_documents_are_refused(place, column):
    path = place / "data/baseline/xz.parquet"
    columns = pyarrow.parquet.read_table(path).to_pydict()
    columns["own_tokens"] = pyarrow.nulls(DOCUMENTS, pyarrow.int64())
    columns[column][0] += "0" if column == "id" else 1
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(BadData, match="documents of xz and compact differ"):
        record_of(place)


@pytest.mark.parametrize(
    "name",
    [
        "reports/baseline/zstd.json",
        "data/baseline/zstd.parquet",
        "reports/evaluation.json",
        "reports/estimate.json",
        "reports/loss.csv",
    ],
)
def test_a_missing_input_is_named_with_the_command_that_makes_it(place, name):
    (place / name).unlink()
    with pytest.raises(MissingInput, match=r"dvc repro") as caught:
        record_of(place)
    assert Path(name).name in str(caught.value)


def run_door(place: Path, *more: str):
    paths = ["--params", place / "params.yaml", "--inputs", place, "--reports", place / "reports"]
    words = [*paths, "--data", place / "data", "--tracker", "none", *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_door_writes_all_renderings_of_one_record_and_shows_it(place, monkeypatch):
    monkeypatch.chdir(place)
    done = run_door(place)
    assert done.exit_code == 0, done.output
    reports = place / "reports"
    record = json.loads((reports / "comparison.json").read_text())
    assert (reports / "comparison.md").read_text() == rendering.markdown(record)
    assert (reports / "comparison.csv").read_text() == rendering.csv_text(record)
    assert (reports / "loss.png").read_bytes() == rendering.loss_png(record)
    shutil.rmtree(place / "data")
    shown = run_door(place, "--show")
    assert shown.exit_code == 0
    assert "655,360,000" in shown.output


def test_the_door_says_what_is_missing(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "reports/baseline/xz.json").unlink()
    done = run_door(place)
    assert done.exit_code == MissingInput.exit_code
    assert "xz.json is missing: run `dvc repro`" in done.output
    assert not (place / "reports/comparison.json").exists()


def test_the_readme_quotes_the_committed_tables():
    readme, report = (ROOT / "README.md").read_text(), (ROOT / "reports/comparison.md").read_text()
    assert rendering.quote_tables(readme, report) == readme
    assert readme.count("\n| ") > 15


def test_quoting_replaces_what_stands_between_the_marks():
    page = "a\n<!-- table 2 -->\nold\n<!-- end -->\nb\n"
    report = "# t\n\n## 1. One\n\n| no |\n\n## 2. Two\n\n| yes |\n| --- |\n\nwords\n"
    assert rendering.quote_tables(page, report) == "a\n<!-- table 2 -->\n| yes |\n| --- |\n<!-- end -->\nb\n"


def add_measurements(place):
    """What the evaluation and a baseline add beside likelihood."""
    bounds = {"value": 0.25, "low": 0.1, "high": 0.5}
    statistics = {"greedy": {"distinct_2": bounds, "zipf": None}, "human": {"distinct_2": bounds}}
    for report, hits in (("evaluation.json", "1100"), ("baseline/smollm2-135m.json", "0110")):
        tasks = {"cloze": {"items_sha256": "x", "accuracy": bounds, "hits": hits}, "wikitext-2": {}}
        sample = {"prompt": "The | future", "document": None, "greedy": {"text": "| is\n| here"}}
        text = {"statistics": statistics, "samples": [sample]}
        edit(place / "reports" / report, lambda r, new=(tasks, text): r.update(tasks=new[0], text=new[1]))
    (place / "reports/samples.json").write_text(json.dumps({"samples": [sample]}))
    flagged = {"flagged": [{"id": f"{7:032x}"}, {"id": "of another split"}]}
    (place / "reports/inspection.json").write_text(json.dumps(flagged))


def test_tasks_text_and_flagged_documents_stand_beside(place):
    add_measurements(place)
    record = record_of(place)
    known = evidence_of(record)
    assert known["compact.cloze.accuracy"]["low"] == 0.1
    assert known["ratio.compact_to_smollm2-135m.cloze.p_value"]["value"] == 1  # one item each way
    assert known["smollm2-135m.text.greedy.distinct_2"]["value"] == 0.25
    assert "smollm2-135m.text.human.distinct_2" not in known
    nats, clean = nats_of("xz"), np.arange(DOCUMENTS) != 7
    assert known["xz.flagged.loss"]["value"] == pytest.approx(nats[7] / TOKENS[7])
    assert known["xz.clean.loss"]["value"] == pytest.approx(nats[clean].sum() / TOKENS[clean].sum())
    assert record["flagged"] == 1
    page = rendering.markdown(record)
    assert "compact, greedy:\n\n```text\n  | is\n  | here\n```" in page
    assert "smollm2-135m, greedy:" in page
    assert "| smollm2-135m | cloze.accuracy | 25.0% (10.0% to 50.0%) | 1 |" in page
    assert "| - | human | distinct_2 | 25.0%" in page


def test_tasks_of_other_items_are_not_paired(place):
    add_measurements(place)
    edit(place / "reports/evaluation.json", lambda r: r["tasks"]["cloze"].update(items_sha256="y"))
    assert "ratio.compact_to_smollm2-135m.cloze.p_value" not in evidence_of(record_of(place))
