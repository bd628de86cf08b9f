"""Small runs give each claim a direction, with an interval that includes the noise between seeds."""

import math
import shutil

import numpy as np
import pytest

from compactgpt.common.sections import load_section
from compactgpt.common.storage import write_json
from compactgpt.evaluation.metrics import Interval
from compactgpt.experiments import find_experiment
from compactgpt.forecast.sweep import ScoredDocuments, Sweep, SweepRun
from compactgpt.reporting.claims import Claims
from compactgpt.reporting.small_scale import find_directions, seed_margin, text_difference, widen
from tests.support.comparison_inputs import ROOT

SHIPPED = find_experiment("small-scale", ROOT / "conf")
TOKENS = (100, 0, 200, 300, 400)
SOURCES = ("torch", "torch", "torch", "numpy", "numpy")


def make_run(name, torch, other):
    nats = [n * (torch if source == "torch" else other) for source, n in zip(SOURCES, TOKENS, strict=True)]
    return SweepRun(
        name=name, group=name.rpartition("-")[0], params={}, seed=1, num_params=1, num_params_non_embedding=1,
        max_steps=1, tokens_per_step=1, optimizer="muon", loss=sum(nats) / 1000, nats=tuple(nats),
    )  # fmt: skip


def make_sweep(losses):
    """Return a sweep with these losses per token: for the documents from torch, and for the others."""
    return Sweep(
        corpus={}, settings={}, data_sha256="b" * 64, train_tokens=1, val_tokens=1000,
        documents=ScoredDocuments(ids_sha256="a" * 64, tokens=TOKENS, sources=SOURCES),
        runs=tuple(make_run(name, *pair) for name, pair in losses.items()),
    )  # fmt: skip


SEEDS = {f"demo-{seed}": (5 + 0.01 * (seed % 2),) * 2 for seed in range(8)}  # mean 5.005, deviation 0.0053
SMALL = {
    "context-64-1": (5.2, 5.2), "context-64-2": (5.2, 5.2), "context-256-1": (4.9, 4.9),  # as the note says
    "size-4x-1": (5.1, 5.1),  # a larger model is worse: the other way
    "steps-half-1": (5.0, 5.0),  # the demo's mean is within the noise
    "general-1": (5.0, 5.0), "tuned-1": (4.5, 5.5),  # only torch's documents are compared
}  # fmt: skip


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name, losses in (("seeds", SEEDS), ("small-scale", SMALL)):
        write_json(tmp_path / f"results/{name}.json", make_sweep(losses).model_dump(mode="json"))
    return tmp_path


def test_each_claim_has_a_direction_with_interval_and_number_of_runs(project):
    found = find_directions(project)
    outcomes = [(one["claim"], one["outcome"], one["runs"]) for one in found]
    assert outcomes == [
        ("L14", "same way", (2, 8)), ("L14", "same way", (8, 1)),
        ("R5", "no effect found", (8, 1)), ("L15", "no effect found", (8, 1)),
        ("R3", "other way", (1, 1)), ("R4", "same way", (1, 1)), ("C11", "same way", (1, 1)),
    ]  # fmt: skip
    ratio, tuned = found[0], found[-1]
    assert ratio["value"] == pytest.approx(math.exp(0.195))
    # t(0.975, 7) = 2.3646 times the deviation 0.005345, for two runs and eight
    expected = 2.3646 * 0.005345 * math.sqrt(1 / 2 + 1 / 8)
    assert math.log(ratio["high"] / ratio["value"]) == pytest.approx(expected, rel=1e-3)
    assert tuned["value"] == pytest.approx(math.exp(-0.5))
    assert (ratio["otherwise"], found[2]["otherwise"]) == ("", SHIPPED.comparisons[2].otherwise)


def test_runs_on_other_documents_are_not_compared(project):
    other = make_sweep(SMALL).model_copy(update={"documents": None})
    write_json(project / "results/small-scale.json", other.model_dump(mode="json"))
    assert find_directions(project) == []


@pytest.mark.parametrize(
    ("sweep", "losses", "run", "claims"),
    [
        ("small-scale", SMALL, "size-4x-1", {"L14", "R5", "L15", "R4", "C11"}),  # its ratio is infinite
        ("small-scale", SMALL, "steps-half-1", {"L14", "R4", "C11"}),  # the other model's ratio to it is 0
        ("seeds", SEEDS, "demo-1", set()),  # the noise between seeds is too large for every comparison
    ],
)
def test_a_run_that_diverged_gives_no_direction(project, sweep, losses, run, claims):
    found = make_sweep(losses | {run: (3e6, 3e6)})
    write_json(project / f"results/{sweep}.json", found.model_dump(mode="json"))
    assert {one["claim"] for one in find_directions(project)} == claims


def test_the_seed_widens_an_interval_as_an_independent_error():
    assert seed_margin(np.array([1.0, 2.0]), 1, 1) == pytest.approx(12.7062 * 0.70711 * 1.41421, rel=1e-4)
    wide = widen(Interval(1.0, math.exp(-0.03), math.exp(0.03)), 0.04)
    assert (wide.low, wide.high) == pytest.approx((math.exp(-0.05), math.exp(0.05)))


def test_texts_are_compared_by_prompt(project):
    texts = [("a b c d a b c d", "a b c d e f g h"), ("a b c d e", "a b c d e"), ("a", "a b c d e")]
    pairs = [[{"text": text, "tokens": len(text)} for text in pair] for pair in texts]
    found = text_difference(pairs, "seq_rep_4")  # the last pair has no 4-grams
    assert (found.value, found.high) == (pytest.approx(0.1), pytest.approx(0.1 + 12.7062 * 0.1, rel=1e-4))
    assert text_difference(pairs, "tokens").value == pytest.approx((15 - 15 + 9 - 9 + 1 - 9) / 3)
    assert text_difference(pairs[1:], "seq_rep_4") is None
    ours, theirs = (
        [{"document": str(n), "greedy": {"text": text, "tokens": 1}} for n in range(3)] for text in "ab"
    )
    write_json(project / "reports/samples.json", {"samples": ours})
    report = {"text": {"samples": theirs}}
    write_json(project / f"reports/baseline/{SHIPPED.texts[0].baseline}.json", report)
    last = find_directions(project)[-1]
    assert (last["claim"], last["unit"], last["outcome"]) == ("C9", "difference", "no effect found")


def test_the_shipped_file_names_known_claims_and_groups():
    known = {claim.id for claim in load_section(ROOT / "claims.yaml", Claims).claims}
    compared = [*SHIPPED.comparisons, *SHIPPED.texts]
    assert {claim for one in compared for claim in one.claims} <= known
    groups = {*SHIPPED.sweep, *find_experiment("seeds", ROOT / "conf").sweep}
    assert {name for one in SHIPPED.comparisons for name in (one.ours, one.theirs)} <= groups
