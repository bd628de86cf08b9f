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
from compactgpt.reporting.pages import render_comparison, render_model_card
from compactgpt.reporting.provenance import code_hashes
from compactgpt.reporting.schemas import RECIPE_LABEL
from tests.support.comparison_inputs import (
    DOCUMENTS,
    IDS,
    LIKELIHOOD,
    PARAMS,
    ROOT,
    SMOLLM,
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


@pytest.fixture(scope="module")
def known(record):
    """The values of the record by id."""
    return evidence_of(record)


def test_evidence_is_what_the_reports_say(known):
    loss, ours = nats_of("xz").sum() / TOKENS.sum(), known["compact.loss"]
    xz = [known["xz.loss"][key] for key in ("value", "low", "known")]
    assert xz == [loss, loss - 0.1, "measured"]
    assert known["compact.tokens_seen"]["value"] == 409_600
    counted = {
        "gpt2.openwebtext.bits_per_byte": 1.023,
        "ratio.note_to_gpt2.parameters.all_tensors": 0.242,
        "ratio.note_to_gpt2.parameters.non_embedding": 0.125,
        "ratio.note_to_gpt2.flops_per_token": 0.227,
    }
    for name, value in counted.items():
        assert known[name]["value"] == pytest.approx(value, abs=0.0005), name
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
    ("name", "kind", "low", "value", "high"),
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
def test_a_published_value_has_its_kind_and_interval(known, name, kind, low, value, high):
    item = known[name]
    ends = [item["value"] if item[end] is None else item[end] for end in ("low", "value", "high")]
    assert item["known"] == kind
    assert ends == pytest.approx([low, value, high], rel=0.003)


def test_the_verdict_is_a_sentence_made_by_rule(record):
    sentences = {
        "1 holds": [["confirmed", 1]],
        "2 do not hold": [["contradicted", 1], ["misleading", 1]],
        "1 holds, 1 does not hold and 1 waits for an experiment": [
            ["supported", 1], ["misleading", 1], ["not yet measured", 1],
        ],
    }  # fmt: skip
    for sentence, tally in sentences.items():
        sums = tables.View({**record, "tally": tally}).sums()
        assert sums == f"Of the note's {len(record['claims'])} claims and citations, {sentence}."


def test_the_headline_says_what_is_claimed_known_and_measured(record, known):
    view, french = tables.View(record), tables.View(record, "fr").headline()
    measured = tables.show(known["compact.perplexity"]["value"], "perplexity")
    title = "Performance de NanoGPT Compact contre GPT-2"
    for words in (title, "80-120", "35-45", "22.65", "docstrings", measured):
        assert words in view.headline()
        assert words.replace(".", ",") in french
    held = "held in {held_95} of {of} runs".format(**record["calibration"])
    assert f"{held}, expects {view.show(known['note.expected_perplexity'])}" in view.headline()
    changed = tables.View(record)
    decision = {"source": "note.tokens", "low": 1, "high": 1, "relation": "outside"}
    changed.claims["L1"] = {**changed.claims["L1"], "decisions": [decision]}
    assert "was measured at 655,360,000" in changed.headline()


def test_numbers_have_the_marks_of_the_language_and_small_ratios_their_digits(record):
    assert tables.show(1234567.5, "perplexity", "fr") == "1\u202f234\u202f567,50"
    assert tables.show(0.256, "share", "fr") == "25,6\u202f%"
    ratios = {0.00004567: "4.57e-05", 0.01234: "0.0123", 0.2: "0.200", 4321.5: "4,321.500"}
    for ratio, shown in ratios.items():
        assert tables.show(ratio, "ratio") == shown
    page = render_comparison(record, "fr")
    assert "655\u202f360\u202f000" in page
    assert "contredit" in page
    assert "contradicted" not in page


def test_the_ratio_of_perplexities_is_paired(known):
    """Documents differ by much more than models do: unpaired, the interval would be many times as wide."""
    ratio = known["ratio.compact_to_unigram.perplexity"]
    difference = nats_of("compact") - nats_of("unigram")
    assert ratio["value"] == pytest.approx(math.exp(difference.sum() / TOKENS.sum()), rel=1e-12)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    draw = np.random.default_rng(7).integers(0, DOCUMENTS, (4000, DOCUMENTS))
    losses = difference[draw].sum(1) / TOKENS[draw].sum(1)
    width = np.quantile(losses, 0.975) - np.quantile(losses, 0.025)
    assert math.log(ratio["high"] / ratio["low"]) == pytest.approx(width, rel=0.25)


def test_the_demo_never_decides_a_claim_about_the_notes_model(record):
    shown = {decision["source"] for claim in record["claims"] for decision in claim["decisions"]}
    shown |= {name for claim in record["claims"] for name in claim["beside"]}
    assert not {name for name in shown if name.startswith(("compact.", "ratio.compact_to"))}


def test_wikitext_has_a_value_for_each_of_its_protocols(place):
    strided = {"context": 1024, "stride": 512, "perplexity": 25.17}
    per_word = {"context": 1024, "word_perplexity": 37.37}
    found = {"sha256": "f" * 64, "strided": strided, "per_word": per_word}
    edit(place / f"reports/baseline/{SMOLLM}.json", lambda r: r["tasks"].update({"wikitext-2": found}))
    record = record_of(place)
    value = evidence_of(record)[f"{SMOLLM}.wikitext-2.strided.perplexity"]
    assert (value["value"], value["context"], value["stride"]) == (25.17, 1024, 512)
    assert f"| {SMOLLM} | wikitext-2.per_word.word_perplexity | 37.37 | - |" in render_comparison(record)


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


def test_every_cell_of_the_notes_table_stands_in_every_rendering(record):
    claims = tables.View(record).claims
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
    write(place / "reports/evidence.json", record)
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


def test_the_stage_names_a_missing_report(place):
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
    readme, record = (ROOT / "README.md").read_text(), (ROOT / "reports/evidence.json").read_text()
    assert pages.replace_tables(readme, pages.render_quoted_tables(json.loads(record))) == readme
    assert readme.count("\n| ") > 5


def test_tasks_text_and_flagged_documents_stand_beside(record, known):
    accuracy = [known["compact.cloze.accuracy"][end] for end in ("low", "value", "high")]
    assert accuracy == pytest.approx([0.15, 0.5, 0.85], abs=1e-4)  # Wilson's interval of 2 in 4
    assert known[f"ratio.compact_to_{SMOLLM}.cloze.p_value"]["value"] == 1  # one item each way
    assert known[f"{SMOLLM}.text.greedy.distinct_2"]["value"] == 0.25
    assert f"{SMOLLM}.text.human.distinct_2" not in known
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
    assert f"{SMOLLM}, greedy:" in page
    assert f"| {SMOLLM} | cloze.accuracy | 50.0% (15.0% to 85.0%) | 1 |" in page
    quantities = {row[1] for row in tables.View(record).task_rows()}
    assert quantities == {"cloze.accuracy", "flagged.loss"}  # no estimate, nothing of the main table
    assert "| - | human | distinct_2 | 25.0%" in page


@pytest.mark.parametrize("render", [render_comparison, render_model_card, pages.render_page])
def test_both_views_have_a_row_with_their_ratio(record, known, render):
    """The compact model gains nothing from a longer context; the baseline gains 0.7 nats per token."""
    ratio = known[f"ratio.compact_to_{SMOLLM}.perplexity"]["value"]
    own = known[f"ratio.compact_to_{SMOLLM}.own.perplexity"]
    assert own["value"] == pytest.approx(ratio * math.exp(0.7))
    assert own["context"] == 128
    clean = [known[f"{SMOLLM}{view}.clean.loss"]["value"] for view in ("", ".own")]
    assert clean[1] == pytest.approx(clean[0] - 0.7)
    text, rows = render(record), tables.View(record).measured_rows()
    for row in rows:
        for cell in row:
            assert cell.text.split(" (")[0] in text
    contexts = [row[2].text for row in rows]
    assert contexts[0] == "same 128-token windows (its own context)"
    assert contexts[-2:] == ["same 128-token windows", "own context: 1,024 tokens"]
    assert {row[0].text for row in rows[-2:]} == {"SmolLM2 135M, Instruct, 4 bits (Q4_1)"}
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


@pytest.mark.parametrize("same", [True, False])
def test_the_row_of_nanogpts_recipe_needs_the_same_documents(place, same):
    tokens, nats = TOKENS.tolist(), (nats_of("compact") + 0.5 * TOKENS).tolist()
    run = SweepRun(
        name="r", group="r", params={}, seed=1, num_params=9, num_params_non_embedding=9, max_steps=1,
        tokens_per_step=1, optimizer="adamw", loss=sum(nats) / sum(tokens), nats=tuple(nats),
    )  # fmt: skip
    hashed = documents_sha256(IDS if same else IDS[::-1], tokens)
    sweep = Sweep(
        corpus={}, settings={}, data_sha256="a" * 64, train_tokens=1, val_tokens=1, runs=(run,),
        documents=ScoredDocuments(ids_sha256=hashed, tokens=tuple(tokens), sources=()),
    )  # fmt: skip
    write(place / "results/nanogpt-recipe.json", sweep.model_dump(mode="json"))
    record = record_of(place)
    assert (RECIPE_LABEL in [row[0].text for row in tables.View(record).measured_rows()]) is same
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


def test_the_stage_renews_the_tables_of_pages(place, record):
    page = place / "page.md"
    page.write_text("<!-- table measured -->\n<!-- end -->\n")
    write(place / "reports/evidence.json", record)
    done = run_comparison(place, "--quote", page)
    assert done.exit_code == 0, done.output
    assert pages.render_quoted_tables(record)["measured"] in page.read_text()
