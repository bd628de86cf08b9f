"""Measure what a model gains from its context: the loss of the same targets after 1, 2, 4 ... tokens.

    python -m benchmarks.context --model models/compact

The loss by position in the reports compares different targets. Here, every context length predicts the same
targets, so their difficulty cancels out. The interval is paired by document.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compactgpt.data.token_files import TokenFile, Window, document_streams, open_tokens
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import NeuralModel, target_nats
from compactgpt.evaluation.metrics import ratio_interval
from compactgpt.model.weights import load_model

REFERENCE = 2  # tokens of context; the other lengths are compared with this one


def windows(split: TokenFile, length: int, longest: int, step: int) -> Iterator[Window]:
    """Yield a window of `length` tokens before each `step`-th target that has `longest` tokens before it."""
    for document, stream in document_streams(split):
        for target in range(longest, len(stream), step):
            yield Window(document, stream[target - length : target], stream[target : target + 1])


def sums(
    model: NeuralModel, split: TokenFile, length: int, longest: int, step: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the nats and the number of targets of each document, both (documents,)."""
    nats, targets = np.zeros(split.header.documents), np.zeros(split.header.documents)
    for window, losses in target_nats(model, windows(split, length, longest, step)):
        nats[window.document] += losses.sum()
        targets[window.document] += len(losses)
    return nats, targets


def main() -> None:
    """Print a line for each context length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/compact"))
    parser.add_argument("--split", type=Path, default=Path("data/tokens/val.tokens"))
    parser.add_argument("--step", type=int, default=8, help="tokens between two targets")
    options = parser.parse_args()
    split = open_tokens(options.split)
    model = as_neural_model(load_model(options.model, "cpu"), batch_size=64)
    lengths = [2**power for power in range(8) if 2**power <= model.block_size]
    by_length = {length: sums(model, split, length, lengths[-1], options.step) for length in lengths}
    reference, targets = by_length[REFERENCE]
    measured = targets > 0  # documents that are long enough
    print(f"{int(targets.sum()):,} targets of {int(measured.sum())} documents, nats per token")
    print(f"{'context':>8} {'loss':>7}  gain over {REFERENCE} tokens (95 %)")
    for length, (nats, _) in by_length.items():
        gain = ratio_interval((reference - nats)[measured], targets[measured])
        loss = nats.sum() / targets.sum()
        print(f"{length:>8} {loss:>7.3f}  {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")


if __name__ == "__main__":
    main()
