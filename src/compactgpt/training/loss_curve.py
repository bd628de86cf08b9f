"""The loss curve of a training run, the computation of validation losses, and a check for divergence."""

import math
from typing import NamedTuple

import numpy as np
import torch

from compactgpt.common.errors import BadData
from compactgpt.config import Training
from compactgpt.data.token_files import TokenFile, Window, evaluation_windows
from compactgpt.model.cross_entropy import token_nats
from compactgpt.model.gpt import GPT
from compactgpt.training.distributed import gathered

DIVERGENCE_MARGIN = 0.5  # nats per token, more than the random changes of the val loss
# Part of several messages: the settings to change when training diverges.
LOWER_RATES = (
    "lower training.learning_rate, embedding_learning_rate or muon_learning_rate, or raise "
    "training.warmup_steps"
)


class Row(NamedTuple):
    """One point of the loss curve."""

    step: int  # number of updates made so far
    train_loss: float  # nats per token, the mean over the steps since the previous row
    val_loss: float  # nats per token, after this step


def best_row(rows: list[Row]) -> Row:
    """Return the row with the lowest validation loss; among equal losses, the earliest row."""
    return min(rows, key=lambda row: row.val_loss)


def loss_csv(rows: list[Row]) -> str:
    """Return the loss curve as CSV, in nats per token."""
    lines = [f"{row.step},{row.train_loss!r},{row.val_loss!r}" for row in rows]
    return "\n".join(["step,train_loss,val_loss", *lines]) + "\n"


def divergence_warning(rows: list[Row], training: Training, vocab_size: int) -> str | None:
    """Return a warning if the last row's val loss shows that training has diverged, otherwise None.

    Training has diverged if this val loss is more than DIVERGENCE_MARGIN above the lower of two losses: the
    first row's val loss, and the loss of a uniform guess. During the warm-up, the function returns None,
    except after the last step of the training.
    """
    first, last = rows[0], rows[-1]
    if last.step <= training.warmup_steps and last.step < training.max_steps:
        return None
    guess = math.log(vocab_size)
    limit, name = min((guess, "a uniform guess"), (first.val_loss, f"step {first.step}"))
    if last.val_loss <= limit + DIVERGENCE_MARGIN:
        return None
    return (
        f"training has diverged: the val loss at step {last.step:,} of {training.max_steps:,} is "
        f"{last.val_loss:,.3f}, the loss of {name} is {limit:.3f}: stop the training, and {LOWER_RATES}"
    )


def select_windows(val: TokenFile, block_size: int, count: int) -> list[Window]:
    """Return at most `count` windows, at regular distances in the val split.

    A window is a part of one document: at most `block_size` tokens and the next token of each. Raises BadData
    if the val split has no tokens to predict.
    """
    windows = list(evaluation_windows(val, block_size))
    if not windows:
        raise BadData(
            f"{val.path} has no tokens to validate on: raise tokenization.val_fraction, or add text"
        )
    positions = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    return [windows[position] for position in positions]


@torch.no_grad()
def validation_loss(model: GPT, windows: list[Window], batch_size: int) -> float:
    """Return the mean loss over the targets of `windows`, in nats per token."""
    model.eval()
    nats: list[float] = []
    with gathered(model):
        for start in range(0, len(windows), batch_size):
            nats += window_nats(model, windows[start : start + batch_size])
    return math.fsum(nats) / len(nats)


def window_nats(model: GPT, windows: list[Window]) -> list[float]:
    """Return the cross-entropy of each target in nats: first all targets of the first window, and so on."""
    head = model.wte.weight[: model.shape.vocab_size]  # (vocab_size, C), without padding rows
    T = max(len(window.tokens) for window in windows)
    tokens = torch.zeros(len(windows), T, dtype=torch.int64)
    # Zeros pad short windows at the end. They have no effect, because attention is causal.
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
    x = model.hidden(tokens.to(head.device))  # (B, T, C)
    unpadded = torch.cat([x[row, : len(window.targets)] for row, window in enumerate(windows)])  # (N, C)
    targets = torch.from_numpy(np.concatenate([window.targets for window in windows])).to(head.device)  # (N,)
    nats: list[float] = token_nats(unpadded, head, targets).tolist()
    return nats
