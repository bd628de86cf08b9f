"""What an experiment measured is kept under its name, and fills the claims that wait for it."""

import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from compactgpt.common.errors import BadConfig
from compactgpt.common.sections import load_section
from compactgpt.common.storage import write_json
from compactgpt.evaluation.metrics import perplexity_ratio
from compactgpt.evaluation.totals import Totals, write_totals
from compactgpt.forecast.model_size import count_parameters
from compactgpt.reporting.claims import Claims, Evidence, judge_claims
from compactgpt.reporting.results import (
    compare_results,
    document_sums,
    make_result,
    read_results,
    record_result,
)
from tests.support.comparison_inputs import PARAMS, ROOT

TOKENS = [10, 0, 30, 40]


def item(name, value, known="measured"):
    bounds = {"low": value * 0.9, "high": value * 1.1}
    return asdict(Evidence(name, value, "x", known, "m", "s", stage="evaluation", report="r", **bounds))


def record_like(loss):
    """What evidence.json holds, as far as it is read."""
    return {
        "evidence": [
            item("compact.loss", loss),
            item("compact.perplexity", math.exp(loss)),
            item("compact.text.greedy.seq_rep_4", 0.5),
            item("compact.text.nucleus.seq_rep_4", 0.2),
            item("gpt2.loss", 3.0),
            item("gpt2.text.greedy.seq_rep_4", 0.4),
            item("gpt2.text.nucleus.seq_rep_4", 0.1),
            item("gpt2-xl.loss", 2.5),
            item("ratio.compact_to_gpt2.perplexity", math.exp(loss - 3)),
            item("note.parameters.nanogpt", 1, known="computed"),
        ],
        "models": {"measured": [{"name": name} for name in ("compact", "gpt2", "gpt2-xl")]},
        "curve": [
            {"step": 1, "train_loss": 9.0, "val_loss": 9.0},
            {"step": 2, "train_loss": 4.0, "val_loss": 4.25},
        ],
    }


def result(name, loss):
    documents = document_sums("abcd", [loss * t for t in TOKENS], TOKENS)
    return make_result(name, record_like(loss), PARAMS, documents)


def test_values_are_kept_under_the_experiments_name():
    kept = {one["id"]: one for one in result("note", 4.15).evidence}
    assert set(kept) == {
        "note.loss", "note.perplexity", "note.text.greedy.seq_rep_4", "note.text.nucleus.seq_rep_4",
        "note.generalisation_gap", "gpt2.note.loss", "gpt2.note.text.greedy.seq_rep_4",
        "gpt2.note.text.nucleus.seq_rep_4", "gpt2-xl.note.loss", "ratio.note_to_gpt2.perplexity",
        "ratio.note_to_gpt2.repetition", "ratio.note_to_gpt2.sampled_repetition",
    }  # fmt: skip
    assert kept["ratio.note_to_gpt2.sampled_repetition"]["value"] == pytest.approx(2)
    assert (kept["note.loss"]["model"], kept["gpt2.note.loss"]["model"]) == ("note", "m")
    assert kept["note.loss"]["report"] == "results/note.json"
    assert kept["note.generalisation_gap"]["value"] == 0.25
    repetition = kept["ratio.note_to_gpt2.repetition"]
    bounds = [repetition[key] for key in ("low", "value", "high")]
    assert bounds == pytest.approx([0.45 / 0.44, 1.25, 0.55 / 0.36])


def test_two_experiments_are_compared_in_pairs():
    note, longer = result("note", 4.15), result("context-1024", 4.05)
    (ratio,) = compare_results([note, longer])
    tokens = np.array([10.0, 30.0, 40.0])  # without the document that has none
    expected = perplexity_ratio(4.15 * tokens, 4.05 * tokens, tokens)
    assert ratio["id"] == "ratio.context_512_to_1024.perplexity"
    assert ratio["value"] == pytest.approx(math.exp(0.1), rel=1e-5)
    assert (ratio["low"], ratio["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    other = longer.model_copy(update={"documents": document_sums("abce", [1.0] * 4, TOKENS)})
    assert list(compare_results([note, other])) == []


def test_a_kept_result_fills_the_rows_that_wait(tmp_path):
    write_json(tmp_path / "note.json", result("note", 4.15).model_dump(mode="json"))
    write_json(tmp_path / "ladder.json", {})  # is something else
    kept = read_results(tmp_path)
    evidence = {one["id"]: Evidence(**one) for found in kept for one in found.evidence}
    claims = load_section(ROOT / "claims.yaml", Claims).claims
    judged = judge_claims(claims, evidence)
    verdicts = {claim.id: one.verdict for claim, one in zip(claims, judged, strict=True)}
    assert verdicts["L1"] == "contradicted"  # exp(4.15) is 63
    assert verdicts["C7"] == "supported"
    assert verdicts["L12"] != "not yet measured"
    assert verdicts["R4"] == "not yet measured"
    assert read_results(tmp_path / "none") == ()


def save_run(project, tokens=PARAMS.training.max_steps * PARAMS.training.tokens_per_step):
    """Write params.yaml and the reports of a run."""
    shutil.copy(ROOT / "params.yaml", project / "params.yaml")
    sizes = {"compact.parameters.all_tensors": count_parameters(PARAMS.model).all_tensors}
    sizes["compact.tokens_seen"] = tokens
    found = record_like(4.5)
    found["evidence"] += [item(name, value, known="computed") for name, value in sizes.items()]
    write_json(project / "reports/evidence.json", found)
    tokens = np.array(TOKENS)
    totals = Totals(list("abcd"), tokens, tokens, tokens, tokens.astype(float))
    write_totals(project / "data/evaluation/compact.parquet", totals)


def test_a_run_is_recorded_from_its_reports(tmp_path):
    save_run(tmp_path)
    path = record_result("demo", tmp_path, ROOT / "conf")
    (kept,) = read_results(tmp_path / "results")
    assert path == tmp_path / "results/demo.json"
    assert kept.documents == document_sums("abcd", [float(t) for t in TOKENS], TOKENS)
    assert kept.params["model"] == PARAMS.model.model_dump()
    assert "demo.loss" in {one["id"] for one in kept.evidence}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("note", r"differs from the experiment note, which sets[\s\S]*model\.n_embd: 128 -> 384"),
        ("ladder", "ladder is a sweep"),
        ("demo", r"tokens_seen is 1 in reports/evidence\.json, but params\.yaml gives \d+"),
    ],
)
def test_another_experiments_run_is_refused(tmp_path, name, said):
    save_run(tmp_path, tokens=1)
    with pytest.raises(BadConfig, match=said):
        record_result(name, tmp_path, ROOT / "conf")
