"""Simulate how often the gate is wrong: it fails without a reason, or misses a worse model.

    python benchmarks/regression.py                              # the table of both errors
    python benchmarks/regression.py --noise results/seeds.json   # how runs differ, by document

In each trial the gate compares two simulated runs. It estimates the noise from eight others.
A document's loss differs between two runs by a shift that all documents share, and by a part of its own.
The own part is normal with the variance OWN + TOKEN / tokens, as `--noise` finds it.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from compactgpt.config import Regression, load_params  # noqa: E402
from compactgpt.forecast.sweep import read_sweep  # noqa: E402
from compactgpt.gate.gate import Documents, Noise, Snapshot, run_gate  # noqa: E402

RUNS = 8  # number of runs from which the noise is estimated
OWN, TOKEN = 0.0053, 4.3  # variance between documents, found in results/seeds.json
CORRELATION = 0.9  # of the documents' own parts in the two views
FLIPS = 0.1  # probability that a right answer is lost by chance
TASKS = {"cloze": (3, 50), "lambada_word": (150, 500)}  # right answers and items; the first can't fail


def trial(
    settings: Regression, tokens: np.ndarray, rise: float, deviation: float, uneven: float,
    generator: np.random.Generator,
) -> bool:  # fmt: skip
    """Return whether the gate fails for a run whose perplexity is higher by the share `rise`.

    `tokens`: (documents,). `deviation`: true standard deviation of a run's loss, nats per token.
    `uneven`: 2 if documents change twice as unevenly as between two seeds.
    """
    share = tokens / tokens.sum()
    own = np.sqrt((OWN + TOKEN / tokens) / 2)  # of one run
    losses = deviation * generator.standard_normal(RUNS)
    losses += (own * generator.standard_normal((RUNS, len(tokens)))) @ share
    noise = Noise(float(losses.std(ddof=1)), RUNS - 1, "simulated")
    shift = math.log1p(rise) + math.sqrt(2) * deviation * generator.standard_normal()
    first, second = generator.standard_normal((2, len(tokens)))
    second = CORRELATION * first + math.sqrt(1 - CORRELATION**2) * second
    views = {"perplexity": first, "perplexity.strided": second}
    nats = {name: (shift + uneven * math.sqrt(2) * own * part) * tokens for name, part in views.items()}
    then, now = (
        _snapshot(tokens, documents, hits)
        for documents, hits in zip(
            ({name: np.zeros(len(tokens)) for name in views}, nats), _answers(generator), strict=True
        )
    )
    return bool(run_gate(then, now, settings, noise).failures)


def _snapshot(tokens: np.ndarray, nats: dict[str, np.ndarray], hits: dict[str, str]) -> Snapshot:
    ids = tuple(map(str, range(len(tokens))))
    tasks = {task: {"items_sha256": "", "hits": answers} for task, answers in hits.items()}
    return Snapshot("", {"val": ""}, {}, {}, {}, {}, tasks, Documents(ids, tokens, nats, len(ids)))


def _answers(generator: np.random.Generator) -> Iterator[dict[str, str]]:
    """Yield the answers of two runs to each task."""
    then, now = {}, {}
    for task, (right, of) in TASKS.items():
        answers = np.arange(of) < right
        # As many right answers are lost as wrong ones are won, on average.
        chance = np.where(answers, FLIPS, FLIPS * right / (of - right))
        changed = answers ^ (generator.random(of) < chance)
        then[task], now[task] = ("".join(np.where(each, "1", "0")) for each in (answers, changed))
    yield from (then, now)


def simulate(trials: int, documents: list[int]) -> None:
    """Print the table."""
    settings = load_params(ROOT / "params.yaml").regression
    sweep = read_sweep(ROOT / "results/seeds.json")
    assert sweep is not None
    assert sweep.documents is not None
    lengths = np.array(sweep.documents.tokens, float)
    print(f"{trials} trials each; the noise is estimated from {RUNS} runs in each trial.")
    print(
        f"False alarms allowed: {settings.false_alarms:.1%} over all metrics together, here two views of the"
    )
    print(f"perplexity and the tasks {TASKS} (right answers, items).\n")
    print(f"{'share of runs that fail':66}" + "".join(f"{size:>8,}" for size in documents) + "  documents")
    for rise, deviation, uneven in (
        (0.0, 0.0, 1.0), (0.0, 0.005, 1.0), (0.0, 0.012, 1.0), (0.0, 0.024, 1.0), (0.0, 0.005, 2.0),
        (0.03, 0.005, 1.0), (0.05, 0.005, 1.0), (0.07, 0.005, 1.0), (0.10, 0.005, 1.0), (0.10, 0.012, 1.0),
    ):  # fmt: skip
        generator = np.random.default_rng(1)
        shares = []
        for size in documents:
            failed = 0
            for _ in range(trials):
                tokens = generator.choice(lengths, size)
                failed += trial(settings, tokens, rise, deviation, uneven, generator)
            shares.append(failed / trials)
        says = f"{rise:4.0%} worse, shift between seeds {deviation:.3f}"
        says += ", documents twice as uneven" if uneven > 1 else ""
        print(f"{says:66}" + "".join(f"{share:8.2%}" for share in shares), flush=True)


def show_noise(path: Path) -> None:
    """Print how much of the difference between runs all documents share, and how much is of each document."""
    sweep = read_sweep(path)
    if sweep is None or sweep.documents is None:
        raise SystemExit(f"{path} has no losses by document: compactgpt experiment run seeds")
    tokens = np.array(sweep.documents.tokens, float)
    nats = np.array([run.nats for run in sweep.runs])[:, tokens > 0]  # (runs, documents)
    tokens = tokens[tokens > 0]
    losses = nats.sum(1) / tokens.sum()
    deviation = losses.std(ddof=1)
    print(f"{len(losses)} runs: standard deviation {deviation:.4f} nats per token of {losses.mean():.4f}")
    found = []
    for one, other in combinations(nats, 2):
        rest = (other - one) / tokens - (other - one).sum() / tokens.sum()
        # The variance of `rest` is own + token / tokens: least squares, weighted by tokens.
        columns = np.stack([np.sqrt(tokens), 1 / np.sqrt(tokens)], 1)
        found.append(np.linalg.lstsq(columns, rest**2 * np.sqrt(tokens), rcond=None)[0])
    own, token = np.mean(found, 0)
    print(f"variance between documents of a pair: {own:.2g} + {token:.2g} / tokens")
    documents = math.sqrt((own * tokens**2 + token * tokens).sum() / 2) / tokens.sum()
    print(f"of the standard deviation, documents make {documents:.4f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--documents", type=int, nargs="+", default=[165])
    parser.add_argument("--noise", type=Path, help="a file of runs; prints how they differ")
    options = parser.parse_args()
    if options.noise:
        show_noise(options.noise)
    else:
        simulate(options.trials, options.documents)


if __name__ == "__main__":
    main()
