"""The record holds what the reports say, and every rendering shows the record and nothing else."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.sections import load_section
from compactgpt.evaluation.totals import read_totals, write_totals
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.sweep import ScoredDocuments, Sweep, SweepRun, documents_sha256
from compactgpt.reporting import pages, tables
from compactgpt.reporting.claims import Claims
from compactgpt.reporting.evidence import build_record
from compactgpt.reporting.pages import (
    render_comparison,
    render_model_card,
    render_quoted_tables,
    replace_tables,
)
from compactgpt.reporting.provenance import code_hashes
from compactgpt.reporting.schemas import RECIPE_LABEL
from tests.support.comparison_inputs import (
    DOCUMENTS,
    LIKELIHOOD,
    PARAMS,
    ROOT,
    TOKENS,
    edit,
    nats_of,
    record_of,
    run_comparison,
    sources_of,
    write,
)


def evidence_of(record: dict) -> dict:
    return {item["id"]: item for item in record["evidence"]}


def test_evidence_is_what_the_reports_say(place):
    known = evidence_of(record_of(place))
    loss = nats_of("xz").sum() / TOKENS.sum()
    assert known["xz.loss"]["value"] == loss
    assert known["xz.loss"]["low"] == loss - 0.1
    assert known["xz.loss"]["known"] == "measured"
    assert known["compact.tokens_seen"]["value"] == 409_600
    assert known["gpt2.openwebtext.bits_per_byte"]["value"] == pytest.approx(1.023, abs=0.0005)
    assert known["ratio.note_to_gpt2.parameters.all_tensors"]["value"] == pytest.approx(0.242, abs=0.0005)
    assert known["ratio.note_to_gpt2.parameters.non_embedding"]["value"] == pytest.approx(0.125, abs=0.0005)
    assert known["ratio.note_to_gpt2.flops_per_token"]["value"] == pytest.approx(0.227, abs=0.0005)
    ours = known["compact.loss"]
    sizes = (LIKELIHOOD.window, LIKELIHOOD.window, "gpt2")
    assert (ours["context"], ours["stride"], ours["tokenizer"]) == sizes
    assert (ours["data_sha256"], ours["weights_sha256"]) == ("a" * 64, "d" * 64)
    assert (ours["stage"], ours["report"]) == ("evaluation", "reports/evaluation.json")
    assert ours["code_sha256"] == code_hashes(ROOT)["evaluation"]
    for item in known.values():
        assert item["unit"]
        assert item["source"]
        assert item["report"]
        assert re.fullmatch(r"[0-9a-f]{64}", item["code_sha256"])


@pytest.mark.parametrize(
    ("name", "known", "low", "value", "high"),
    [
        ("gpt2.openwebtext.loss", "published", 3.115, 3.12, 3.125),
        ("gpt2.openwebtext.perplexity", "derived", 22.5, 22.65, 22.8),
        ("nanogpt-124m.openwebtext.perplexity", "derived", 17.2, 17.29, 17.4),
        ("gpt2.webtext_figure.perplexity", "published", 15, 16, 17),
        ("ratio.gpt2_openwebtext_to_webtext.perplexity", "derived", 1.325, 1.416, 1.52),
        ("ratio.nanogpt-124m_to_gpt2.perplexity", "derived", 0.755, 0.763, 0.772),
        ("openwebtext.bytes_per_token", "derived", 4.395, 4.40, 4.405),
        ("gpt2.lambada_accuracy_original", "published", 0.255, 0.259, 0.265),
        ("reported.perplexity", "reported", 57.64, 57.64, 57.64),
        ("reported.train.perplexity", "reported", 49.38, 49.38, 49.38),
    ],
)
def test_a_published_value_has_its_kind_and_interval(place, name, known, low, value, high):
    item = evidence_of(record_of(place))[name]
    ends = [item["value"] if item[end] is None else item[end] for end in ("low", "value", "high")]
    assert item["known"] == known
    assert ends == pytest.approx([low, value, high], rel=0.003)


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (["confirmed"], "1 holds"),
        (["contradicted", "misleading"], "2 do not hold"),
        (
            ["supported", "misleading", "not yet measured"],
            "1 holds, 1 does not hold and 1 waits for an experiment",
        ),
    ],
)
def test_the_verdict_is_a_sentence_made_by_rule(place, verdicts, sentence):
    record = record_of(place)
    record["tally"] = [[verdict, verdicts.count(verdict)] for verdict in dict.fromkeys(verdicts)]
    number = len(record["claims"])
    assert tables.View(record).sums() == f"Of the note's {number} claims and citations, {sentence}."


def test_the_headline_says_what_is_claimed_known_and_measured(place):
    record = record_of(place)
    headline, french = tables.View(record).headline(), tables.View(record, "fr").headline()
    measured = tables.show(evidence_of(record)["compact.perplexity"]["value"], "perplexity")
    title = "Performance de NanoGPT Compact contre GPT-2"
    for words in (title, "80-120", "35-45", "22.65", "docstrings", measured):
        assert words in headline
        assert words.replace(".", ",") in french
    rule = evidence_of(record)["note.expected_perplexity"]
    held = "held in {held_95} of {of} runs".format(**record["calibration"])
    assert f"{held}, expects {tables.View(record).show(rule)}" in headline
    claim = next(claim for claim in record["claims"] if claim["id"] == "L1")
    claim["decisions"] = [{"source": "note.tokens", "low": 1, "high": 1, "relation": "outside"}]
    assert "was measured at 655,360,000" in tables.View(record).headline()


def test_numbers_have_the_marks_of_the_language_and_small_ratios_their_digits(place):
    assert tables.show(1234567.5, "perplexity", "fr") == "1\u202f234\u202f567,50"
    assert tables.show(0.256, "share", "fr") == "25,6\u202f%"
    ratios = {0.00004567: "4.57e-05", 0.01234: "0.0123", 0.2: "0.200", 4321.5: "4,321.500"}
    for ratio, shown in ratios.items():
        assert tables.show(ratio, "ratio") == shown
    page = render_comparison(record_of(place), "fr")
    assert "655\u202f360\u202f000" in page
    assert "contredit" in page
    assert "contradicted" not in page


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
    shown = {name for claim in record["claims"] for name in claim["beside"]} | deciding
    assert not {name for name in shown if name.startswith(("compact.", "ratio.compact_to"))}


def test_wikitext_has_a_value_for_each_of_its_protocols(place):
    strided = {"context": 1024, "stride": 512, "perplexity": 25.17}
    per_word = {"context": 1024, "word_perplexity": 37.37}
    found = {"sha256": "f" * 64, "strided": strided, "per_word": per_word}
    name = "smollm2-135m-instruct-q4"
    edit(place / f"reports/baseline/{name}.json", lambda r: r["tasks"].update({"wikitext-2": found}))
    record = record_of(place)
    value = evidence_of(record)[f"{name}.wikitext-2.strided.perplexity"]
    assert (value["value"], value["context"], value["stride"]) == (25.17, 1024, 512)
    assert f"| {name} | wikitext-2.per_word.word_perplexity | 37.37 | - |" in render_comparison(record)


def test_two_values_of_one_name_are_refused(place):
    """A baseline must not pass for the note's model."""
    (place / "data/baseline/xz.parquet").rename(place / "data/baseline/reported.parquet")
    (place / "reports/baseline/xz.json").rename(place / "reports/baseline/reported.json")
    sources = sources_of(place, ["reported"])
    with pytest.raises(BadConfig, match=r"two values are called reported\.loss"):
        build_record(sources)


def test_the_loss_is_held_against_the_interval_predicted_before(place):
    high = estimate(PARAMS)["compact"]["expected_loss"]["high_80"]
    for loss, inside in ((high - 0.001, True), (high + 0.001, False)):
        measured = dict.fromkeys(("value", "low", "high"), loss)
        edit(place / "reports/evaluation.json", lambda r, measured=measured: r.update(loss=measured))
        assert record_of(place)["forecast"]["inside_80"] is inside


def test_every_cell_of_the_notes_table_stands_in_every_rendering(place):
    record = record_of(place)
    claims = {claim["id"]: claim for claim in record["claims"]}
    text, lines = render_comparison(record), list(csv.DictReader(io.StringIO(pages.render_csv(record))))
    for row in record["table"]:
        for column in tables.COLUMNS["note"]:
            claim = claims[row[column]]
            assert f"{claim['english']}”".replace("~", "\\~") in text
            assert claim["english"] == claim["quote"] or f"(« {claim['quote']} »)" in text
            found = [line for line in lines if (line["row"], line["column"]) == (row["id"], column)]
            assert {line["verdict"] for line in found} == {claim["verdict"]}


def test_the_terminal_shows_the_answer_and_two_tables_with_whole_numbers_in_60_lines(place):
    record = record_of(place)
    record["data"]["name"] = "[red]docstrings"
    (place / "reports/evidence.json").write_text(json.dumps(record))
    done = run_comparison(place, "--show")
    assert done.exit_code == 0, done.output
    for word in ("1,557,611,200", "124,439,808", "655,360,000", "409,600", "12.68", "80-120", "SmolLM2"):
        assert word in done.output
    view = tables.View(record)
    assert view.headline().split() == done.output.split()[: len(view.headline().split())]
    assert all(row[-1].text in done.output for row in view.measured_rows())
    assert "…" not in done.output
    lines = done.output.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["validation"].update(sha256="b" * 64), "different val splits"),
        (lambda r: r.update(window=7), r"windows \(7 and 128 tokens\)"),
        (lambda r: r.pop("loss"), "loss: Field required"),
    ],
)
def test_scores_that_do_not_compare_are_refused(place, change, said):
    edit(place / "reports/baseline/xz.json", change)
    with pytest.raises(BadData, match=said) as caught:
        record_of(place)
    assert "dvc repro" in str(caught.value)


def test_the_stage_names_a_missing_report(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "reports/baseline/xz.json").unlink()
    done = run_comparison(place)
    assert done.exit_code == MissingInput.exit_code
    assert "xz.json is missing: run `dvc repro`" in done.output
    assert not (place / "reports/evidence.json").exists()


def test_a_diverged_model_has_every_table_and_picture(place):
    """Its perplexity and its ratios are too large for a float: the cells say so."""
    edit(place / "reports/training.json", lambda report: report.update(diverged=True))
    edit(place / "reports/evaluation.json", lambda report: report.update(perplexity=None))
    path = place / "data/evaluation/compact.parquet"
    totals = read_totals(path)
    write_totals(path, replace(totals, nats=totals.nats * 1e6))
    done = run_comparison(place)
    assert done.exit_code == 0, done.output
    page = (place / "reports/comparison.md").read_text()
    assert "| not defined |" in page
    assert "This model's training diverged." in page
    assert "compact.perplexity" not in evidence_of(json.loads((place / "reports/evidence.json").read_text()))


def test_the_readme_quotes_the_committed_tables():
    readme, record = (
        (ROOT / "README.md").read_text(),
        json.loads((ROOT / "reports/evidence.json").read_text()),
    )
    assert replace_tables(readme, render_quoted_tables(record)) == readme
    assert readme.count("\n| ") > 5


def test_tasks_text_and_flagged_documents_stand_beside(place):
    record = record_of(place)
    known = evidence_of(record)
    assert known["compact.cloze.accuracy"]["low"] == 0.1
    assert known["ratio.compact_to_smollm2-135m-instruct-q4.cloze.p_value"]["value"] == 1  # one item each way
    assert known["smollm2-135m-instruct-q4.text.greedy.distinct_2"]["value"] == 0.25
    assert "smollm2-135m-instruct-q4.text.human.distinct_2" not in known
    nats, clean = nats_of("xz"), np.arange(DOCUMENTS) != 7
    assert known["xz.flagged.loss"]["value"] == pytest.approx(nats[7] / TOKENS[7])
    loss = nats[clean].sum() / TOKENS[clean].sum()
    assert known["xz.clean.loss"]["value"] == pytest.approx(loss)
    assert known["xz.clean.perplexity"]["value"] == pytest.approx(math.exp(loss))
    assert known["xz.clean.bits_per_byte"]["value"] == pytest.approx(loss / math.log(2) / 4)
    assert known["xz.clean.loss"]["low"] < loss < known["xz.clean.loss"]["high"]
    assert record["flagged"] == 1
    page = render_comparison(record)
    assert "compact, greedy:\n\n```text\n| is\n| here\n```" in page
    assert "smollm2-135m-instruct-q4, greedy:" in page
    assert "| smollm2-135m-instruct-q4 | cloze.accuracy | 25.0% (10.0% to 50.0%) | 1 |" in page
    quantities = {row[1] for row in tables.View(record).task_rows()}
    assert quantities == {"cloze.accuracy", "flagged.loss"}  # no estimate, nothing of the main table
    assert "| - | human | distinct_2 | 25.0%" in page


@pytest.mark.parametrize("render", [render_comparison, render_model_card, pages.render_page])
def test_both_views_have_a_row_with_their_ratio(place, render):
    """The compact model gains nothing from a longer context; the baseline gains 0.7 nats per token."""
    record = record_of(place)
    known, view = evidence_of(record), tables.View(record)
    name = "smollm2-135m-instruct-q4"
    ratio = known[f"ratio.compact_to_{name}.perplexity"]["value"]
    own = known[f"ratio.compact_to_{name}.own.perplexity"]
    assert own["value"] == pytest.approx(ratio * math.exp(0.7))
    assert own["context"] == 128
    assert known[f"{name}.own.clean.loss"]["value"] == pytest.approx(
        known[f"{name}.clean.loss"]["value"] - 0.7
    )
    text = render(record)
    for row in view.measured_rows():
        for cell in row:
            assert cell.text.split(" (")[0] in text
    contexts = [row[2].text for row in view.measured_rows()]
    assert contexts[0] == "same 128-token windows (its own context)"
    assert contexts[-2:] == ["same 128-token windows", "own context: 1,024 tokens"]
    assert {row[0].text for row in view.measured_rows()[-2:]} == {"SmolLM2 135M, Instruct, 4 bits (Q4_1)"}
    assert len(tables.COLUMNS["measured"]) <= 9


def test_small_runs_and_seeds_stand_beside_and_decide_nothing(place):
    sources = sources_of(place)
    line = "at demo scale: points the other way: perplexity is 1.100 (1.050 to 1.200; runs: 2 and 3); because"
    found = {"claim": "C7", "outcome": "other way", "quantity": "perplexity", "unit": "ratio", "value": 1.1}
    found |= {"low": 1.05, "high": 1.2, "runs": (2, 3), "otherwise": "because"}
    changed = replace(sources, seed_losses=(4.40, 4.42, 4.44), directions=[found])
    before, record = (json.loads(json.dumps(build_record(one))) for one in (sources, changed))
    assert [c["verdict"] for c in record["claims"]] == [c["verdict"] for c in before["claims"]]
    deviation = evidence_of(record)["compact.seed_deviation"]
    assert deviation["value"] == pytest.approx(0.02)
    assert (deviation["data_sha256"], deviation["weights_sha256"]) == ("a" * 64, "")  # val; of many runs
    for text in (render_comparison(record), pages.render_page(record)):
        assert "standard deviation between seeds: 0.020" in text
        assert line in text
    assert "à l'échelle de la démo : va dans l'autre sens" in render_comparison(record, "fr")


def test_the_row_of_nanogpts_recipe_needs_the_same_documents(place):
    ids, tokens = [f"{i:032x}" for i in range(DOCUMENTS)], TOKENS.tolist()
    nats = tuple((nats_of("compact") + 0.5 * TOKENS).tolist())
    run = SweepRun(
        name="r", group="r", params={}, seed=1, num_params=9, num_params_non_embedding=9, max_steps=1,
        tokens_per_step=1, optimizer="adamw", loss=float(sum(nats) / TOKENS.sum()), nats=nats,
    )  # fmt: skip
    for same in (True, False):
        documents = ScoredDocuments(
            ids_sha256=documents_sha256(ids if same else ids[::-1], tokens), tokens=tuple(tokens), sources=()
        )
        sweep = Sweep(
            corpus={}, settings={}, data_sha256="a" * 64, train_tokens=1, val_tokens=1, runs=(run,),
            documents=documents,
        )  # fmt: skip
        write(place / "results/nanogpt-recipe.json", sweep.model_dump(mode="json"))
        record = record_of(place)
        rows = [row[0].text for row in tables.View(record).measured_rows()]
        assert (RECIPE_LABEL in rows) is same
        if same:
            ratio = evidence_of(record)["ratio.compact_to_nanogpt-recipe.perplexity"]
            assert ratio["value"] == pytest.approx(math.exp(-0.5))


CLAIMS = load_section(ROOT / "claims.yaml", Claims).claims


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_translation_has_the_numbers_of_its_quote_with_english_marks(claim):
    quoted = [number.replace(",", ".") for number in re.findall(r"\d+(?:,\d+)?", claim.quote)]
    english = re.findall(r"\d[\d,]*(?:\.\d+)?", claim.english)
    assert [number.replace(",", "") for number in english] == quoted
    assert re.fullmatch(r"(\d{1,3}(,\d{3})*|\d{1,3})(\.\d+)?|", english[0] if english else "")


def test_the_stage_renews_the_tables_of_pages(place, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table measured -->\n<!-- end -->\n")
    (place / "reports/evidence.json").write_text(json.dumps(record_of(place)))
    done = run_comparison(place, "--quote", page)
    assert done.exit_code == 0, done.output
    record = json.loads((place / "reports/evidence.json").read_text())
    assert render_quoted_tables(record)["measured"] in page.read_text()
