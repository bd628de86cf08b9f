"""What an experiment measured is kept under its name, and fills the claims that wait for it."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from compactgpt.common.errors import BadConfig
from compactgpt.common.sections import load_section
from compactgpt.common.storage import write_json
from compactgpt.config import load_params
from compactgpt.evaluation.metrics import perplexity_ratio
from compactgpt.forecast.model_size import count_parameters
from compactgpt.reporting.claims import Claims, Evidence, judge_claims
from compactgpt.reporting.results import (
    compare_results,
    document_sums,
    make_result,
    read_results,
    record_result,
)

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
TOKENS = [10, 0, 30, 40]


def item(name, value, **more):
    made = {"unit": "x", "known": "measured", "model": "m", "source": "s", "stage": "evaluation"}
    made |= {"report": "r", "code_sha256": "c" * 64, "low": value * 0.9, "high": value * 1.1}
    return {"id": name, "value": value, **made, **more}


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
    names = "note.loss note.perplexity note.text.greedy.seq_rep_4 note.generalisation_gap gpt2-xl.note.loss "
    names += "gpt2.note.loss gpt2.note.text.greedy.seq_rep_4 ratio.note_to_gpt2.perplexity "
    names += "note.text.nucleus.seq_rep_4 gpt2.note.text.nucleus.seq_rep_4 "
    assert set(kept) == {
        *names.split(), "ratio.note_to_gpt2.repetition", "ratio.note_to_gpt2.sampled_repetition",
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


@pytest.fixture
def project(tmp_path):
    """A folder with the project's params.yaml and the reports of its last run."""
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "reports").mkdir()
    return tmp_path


def save_run(project, **changes):
    found = record_like(4.5)
    tokens = PARAMS.training.max_steps * PARAMS.training.tokens_per_step
    sizes = {"compact.parameters.all_tensors": count_parameters(PARAMS.model).all_tensors}
    sizes |= {"compact.tokens_seen": tokens} | changes
    found["evidence"] += [item(name, value, known="computed") for name, value in sizes.items()]
    write_json(project / "reports/evidence.json", found)
    path = project / "data/evaluation/compact.parquet"
    path.parent.mkdir(parents=True)
    sums = {"id": list("abcd"), "nats": [float(t) for t in TOKENS]}
    sums |= dict.fromkeys(("bytes", "tokens", "own_tokens"), TOKENS)
    pyarrow.parquet.write_table(pyarrow.table(sums), path)


def test_a_run_is_recorded_from_its_reports(project):
    save_run(project)
    path = record_result("demo", project, ROOT / "conf")
    (kept,) = read_results(project / "results")
    assert path == project / "results/demo.json"
    assert kept.documents == document_sums("abcd", [float(t) for t in TOKENS], TOKENS)
    assert kept.params["model"] == PARAMS.model.model_dump()
    assert "demo.loss" in {one["id"] for one in kept.evidence}


def test_a_run_that_is_not_the_experiment_is_refused(project):
    with pytest.raises(
        BadConfig, match=r"differs from the experiment note, which sets[\s\S]*model\.n_embd: 128 -> 384"
    ):
        record_result("note", project, ROOT / "conf")
    with pytest.raises(BadConfig, match="ladder is a sweep"):
        record_result("ladder", project, ROOT / "conf")


def test_reports_of_another_run_are_refused(project):
    save_run(project, **{"compact.tokens_seen": 1})
    with pytest.raises(BadConfig, match=r"tokens_seen is 1 in reports/evidence\.json and \d+ by params"):
        record_result("demo", project, ROOT / "conf")
