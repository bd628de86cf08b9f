"""Verdicts follow from numbers by the interval rule; what a human read is marked as such."""

import math
from pathlib import Path

import pytest

from compactgpt.common.errors import BadConfig
from compactgpt.common.sections import load_section
from compactgpt.reporting.claims import Claim, Claims, Evidence, Judgement, Published, judge_claims
from tests.support.comparison_inputs import ROOT

CLAIMS = load_section(ROOT / "claims.yaml", Claims)
BY_ID = {claim.id: claim for claim in CLAIMS.claims}


def claim(low=80.0, high=120.0, name="A", **judged) -> Claim:
    judged = judged or {"by": "evidence", "ids": ("a",)}
    about = {"quote": "q", "english": "q", "where": "w", "model": "m", "quantity": "x", "unit": "perplexity"}
    return Claim(id=name, low=low, high=high, judged=judged, **about)


def value(number, low=None, high=None, known="measured", exact=False, name="a") -> Evidence:
    return Evidence(name, number, "perplexity", known, "m", "s", low=low, high=high, exact=exact)


SEVERAL = {"by": "evidence", "ids": ("a", "b")}
PUBLISHED = {"by": "evidence", "ids": ("a",), "until_measured": ("b",)}
COPIED = {"by": "evidence", "ids": ("a",), "copied": True}
DERIVED = value(60, known="derived", name="b")


@pytest.mark.parametrize(
    ("judged", "evidence", "verdict"),
    [
        ({}, [value(100, 90, 110)], "supported"),
        ({}, [value(100, 80, 120)], "supported"),  # touching the ends is inside
        ({}, [value(60, 50, 79.9)], "contradicted"),
        ({}, [value(130, 120.1, 140)], "contradicted"),
        ({}, [value(100, 70, 110)], "inconclusive"),
        ({}, [value(100, 70, 130)], "inconclusive"),
        ({}, [value(70, 60, 80)], "inconclusive"),  # touching from outside shares a point
        ({}, [value(125, 120, 130)], "inconclusive"),
        ({}, [value(100, exact=True)], "confirmed"),
        ({}, [value(79, exact=True)], "contradicted"),
        ({}, [value(100, known="published")], "supported"),
        ({}, [value(100, known="computed")], "supported"),
        ({}, [value(100, known="derived")], "supported"),
        ({}, [value(100, known="reported")], "not yet measured"),
        ({}, [value(100, known="estimated")], "not yet measured"),
        ({}, [value(100, name="b")], "not yet measured"),
        (SEVERAL, [value(100), value(60, name="b")], "misleading"),
        (SEVERAL, [value(100), value(110, name="b")], "supported"),
        (SEVERAL, [value(130), value(60, name="b")], "contradicted"),
        (SEVERAL, [value(100)], "not yet measured"),
        (SEVERAL, [value(100), value(90, 70, 130, name="b")], "inconclusive"),
        (PUBLISHED, [], "not yet measured"),
        (PUBLISHED, [DERIVED], "contradicted"),
        (PUBLISHED, [DERIVED, value(100, 90, 110)], "supported"),
        (PUBLISHED, [DERIVED, value(100, known="estimated")], "contradicted"),
        (COPIED, [value(100, exact=True)], "restated"),  # a copied number proves nothing
        (COPIED, [value(10, exact=True)], "contradicted"),
    ],
)
def test_the_interval_rule(judged, evidence, verdict):
    (found,) = judge_claims([claim(**judged)], {item.id: item for item in evidence})
    assert (found.verdict, found.by_hand) == (verdict, False)


@pytest.mark.parametrize(
    ("through", "bounds", "verdict"),
    [
        ("logarithm", [(80, 120), (4.0, 5.0)], "consistent"),  # 4.38 to 4.79
        ("logarithm", [(35, 45), (3.0, 3.5)], "self-inconsistent"),  # 3.56 to 3.81
        ("logarithm", [(20, 35), (2.5, 3.0)], "self-inconsistent"),  # 3.00 to 3.56: they share 0.004 nats
        ("logarithm", [(15, 35), (2.5, 3.0)], "inconclusive"),  # 2.71 to 3.56
        ("logarithm", [(10, 1000), (4.0, 5.0)], "consistent"),  # the wider statement holds the narrower
        ("ratio", [(80, 120), (35, 45), (2, 3)], "consistent"),  # 1.78 to 3.43
        ("ratio", [(80, 120), (35, 45), (4, 5)], "self-inconsistent"),
    ],
)
def test_claims_about_the_same_quantity_must_agree(through, bounds, verdict):
    names = "ABC"[: len(bounds)]
    claims = [claim(*ends, name) for ends, name in zip(bounds, names, strict=True)]
    both = claim(None, None, "R", by="agreement", through=through, of=tuple(names))
    judged = judge_claims([*claims, both], {})[-1]
    (decision,) = judged.decisions
    assert (judged.verdict, judged.by_hand, judged.reason) == (verdict, False, "")
    (low, high), other = bounds[:2]
    ends = (math.log(low), math.log(high)) if through == "logarithm" else (low / other[1], high / other[0])
    assert (decision.source, decision.low, decision.high) == (" and ".join(names), *ends)


def test_a_reading_by_hand_says_so():
    judged = judge_claims([claim(by="hand", verdict="unverifiable", reason="because")], {"a": value(100)})[0]
    assert judged == Judgement("unverifiable", by_hand=True, reason="because")


# Verdicts that need no trained model, and claims that wait for one.
EXPECTED = {
    **dict.fromkeys(("P1", "P2", "P3", "P4", "P9", "P10", "P16", "P17", "X2", "X3"), "confirmed"),
    **dict.fromkeys(("P6", "P7", "X1"), "restated"),  # the note's own numbers
    **dict.fromkeys(("L3", "L13"), "consistent"),
    **dict.fromkeys(("L5", "L8", "S2"), "supported"),
    **dict.fromkeys(
        ("P8", "P13", "P15", "L4", "L7", "L10", "L11", "L16", "L18", "C6", "R1", "R3"), "contradicted"
    ),
    **dict.fromkeys(("L6", "L9", "L19", "P18", "C13"), "self-inconsistent"),
    **dict.fromkeys(("P5", "P14", "C1", "C5", "C10", "C12", "C14", "S3", "S7", "S8"), "misleading"),
    **dict.fromkeys(("P11", "P12", "P19", "L17", "C1b", "S1", "S4", "S5", "S6", "S9"), "unverifiable"),
    **dict.fromkeys(("L1", "L2", "L12", "L14", "L15", "R2", "R4", "R5"), "not yet measured"),
    **dict.fromkeys(("C2", "C3", "C4", "C7", "C8", "C9", "C11"), "not yet measured"),
}


def test_the_notes_verdicts(record):
    assert {claim["id"]: claim["verdict"] for claim in record["claims"]} == EXPECTED


@pytest.mark.parametrize(
    ("name", "evidence", "ratio", "verdict"),
    [
        ("R2", "ratio.note_to_gpt2.perplexity", (2.6, 2.5, 2.7), "supported"),
        ("R4", "ratio.finetune_to_gpt2-folder.perplexity", (0.6, 0.5, 0.7), "supported"),
        ("R5", "ratio.long_to_note.perplexity", (0.99, 0.97, 1.01), "inconclusive"),
        ("L14", "ratio.context_512_to_1024.perplexity", (1.03, 1.02, 1.04), "supported"),
        ("L2", "note.train_loss", (4.1, 4.1, 4.1), "supported"),  # the note says: training loss
    ],
)
def test_a_recommendations_row_fills_when_its_experiment_has_run(name, evidence, ratio, verdict):
    found = judge_claims([BY_ID[name]], {evidence: value(*ratio, name=evidence)})[0]
    assert (found.verdict, found.by_hand) == (verdict, False)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("quantity:", "quantitty:", r"claims\.0\.quantitty: unknown key; did you mean quantity\?"),
        ("low: 29935000", "low: 39935000", "must be at most high"),
        ("low: 29935000\n    high: 29945000", "low: null", "judged by evidence needs low, high or both"),
        ("id: P2", "id: P1", r"more than one claim has the id \['P1'\]"),
        ("of: [L1, L2]", "of: [L1, L99]", "L99"),
        ("of: [L1, L2]", "of: [L1]", "needs 2 claims in `of`, found 1"),
        ("low: 80\n", "low: 0\n", r"L3 compares the claims \['L1'\]: each needs"),
        ("of: [L1, L2]", "of: [L1, L15]", r"L3 compares the claims \['L15'\]: each needs"),
        ("compact: P1", "compact: Q1", r"no such claims: \['Q1'\]"),
        ("verdict: unverifiable", "verdict: dubious", r"claims\.\d+\.judged\.verdict: found \"dubious\""),
        ("{by: evidence, ids", "{by: magic, ids", r"claims\.0\.judged: "),
        ("ids: [note.parameters.nanogpt]", "id: note.parameters.nanogpt", r"judged\.id: unknown key"),
    ],
)
def test_a_mistake_in_claims_yaml_is_named(tmp_path, old, new, said):
    assert_refused(tmp_path / "claims.yaml", old, new, said, Claims)


def test_published_yaml_holds_what_the_comparison_needs(tmp_path):
    said = r"the comparison needs \['gpt2\.openwebtext\.loss'\]"
    assert_refused(tmp_path / "published.yaml", "gpt2.openwebtext.loss", "gpt2.owt.loss", said, Published)


def assert_refused(path: Path, old: str, new: str, said: str, section) -> None:
    text = (ROOT / path.name).read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadConfig, match=said):
        load_section(path, section)
