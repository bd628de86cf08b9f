"""Simulate how often 95 % intervals of a loss and of a perplexity ratio contain the truth, by five methods.

    python -m benchmarks.intervals --data data

Population `as measured`: documents of the val split, with a random change of their losses.
Population `long tail`: the same, with lengths multiplied by a log-normal factor, as of uncut documents.
The truth is the ratio of the sums of 400,000 documents. The reports use the method `t, jackknife`.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri, stdtrit

from compactgpt.evaluation.metrics import perplexity_ratio, ratio_interval
from compactgpt.evaluation.totals import read_totals

Array = npt.NDArray[np.float64]
POPULATION, CHANGE, TAIL = 400_000, 0.3, 1.2  # documents; standard deviations of losses and of log lengths
TAILS = np.array([0.025, 0.975])


def linearised(nats: Array, tokens: Array) -> tuple[Array, Array]:
    """Return ratios and their standard errors by the delta method. (..., documents) -> (...), (...)"""
    n, size = nats.shape[-1], tokens.sum(-1)
    ratio = nats.sum(-1) / size
    squares = ((nats - ratio[..., None] * tokens) ** 2).sum(-1)
    return ratio, np.sqrt(squares * n / (n - 1)) / size


def intervals(nats: Array, tokens: Array, resamples: int, generator: np.random.Generator) -> dict[str, Array]:
    """Return the interval of one sample by each method: name -> (low, high)."""
    n = len(nats)
    drawn = generator.integers(0, n, (resamples, n))
    ratios, errors = linearised(nats[drawn], tokens[drawn])
    ratio, error = (float(value) for value in linearised(nats, tokens))
    without_one = (nats.sum() - nats) / (tokens.sum() - tokens)
    skew = without_one.mean() - without_one
    acceleration = (skew**3).sum() / (6 * (skew**2).sum() ** 1.5)
    bias = ndtri(np.clip((ratios < ratio).mean(), 1 / resamples, 1 - 1 / resamples))
    shifted = bias + ndtri(TAILS)
    student = ratio_interval(nats, tokens)
    return {
        "percentile": np.quantile(ratios, TAILS),
        "BCa": np.quantile(ratios, ndtr(bias + shifted / (1 - acceleration * shifted))),
        "bootstrap-t": ratio - error * np.quantile((ratios - ratio) / errors, TAILS[::-1]),
        "t, linearised": ratio + error * stdtrit(n - 1, TAILS),
        "t, jackknife": np.array([student.low, student.high]),
    }


def draw(
    nats: Array, tokens: Array, tail: float, generator: np.random.Generator, documents: int
) -> tuple[Array, Array]:
    """Return the nats and the tokens of random documents of a population, both (documents,)."""
    rows = generator.integers(0, len(tokens), documents)
    rates = nats / tokens
    rate = rates[rows] + CHANGE * rates.std() * generator.standard_normal(documents)
    length = np.maximum(20, tokens[rows] * np.exp(tail * generator.standard_normal(documents)))
    return rate * length, length


def main() -> None:
    """Print the coverage of each method, and how many documents a narrow interval needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--baseline", default="smollm2-135m-instruct-q4")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    compact = read_totals(options.data / "evaluation/compact.parquet")
    baseline = read_totals(options.data / f"baseline/{options.baseline}.parquet")
    tokens = compact.tokens.astype(float)
    ours, theirs = (totals.views.get("own", totals.nats) for totals in (compact, baseline))
    generator = np.random.default_rng(1)
    quantities = {"loss": ours, "log of the ratio": ours - theirs}
    for quantity, nats in quantities.items():
        for population, tail in {"as measured": 0.0, "long tail": TAIL}.items():
            drawn = partial(draw, nats, tokens, tail, generator)
            everything = drawn(POPULATION)
            truth = everything[0].sum() / everything[1].sum()
            for documents in sorted({27, len(tokens)}):
                found: dict[str, list[Array]] = {}
                for _ in range(options.trials):
                    for method, bounds in intervals(*drawn(documents), options.resamples, generator).items():
                        found.setdefault(method, []).append(bounds)
                print(f"{quantity}, {population}, {documents} documents: coverage, width")
                for method, pairs in found.items():
                    low, high = np.array(pairs).T
                    covered = ((low <= truth) & (truth <= high)).mean()
                    print(f"  {method:14} {covered:6.1%}  {(high - low).mean():.3f}", flush=True)
    ratio = perplexity_ratio(ours, theirs, tokens)
    half = (ratio.high - ratio.low) / 2 / ratio.value
    needed = len(tokens) * (half / 0.05) ** 2
    print(
        f"compact / {options.baseline}, own contexts: {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    )
    print(f"that is +-{half:.1%} with {len(tokens)} documents; +-5 % needs about {needed:,.0f} documents")


if __name__ == "__main__":
    main()
