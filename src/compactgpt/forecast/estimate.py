"""What a run will be, from params.yaml alone: size, tokens, arithmetic, memory, time, and the loss expected.

Nothing here has seen data, and nothing imports torch: the numbers are written down before the training
that they are judged by. Beside the frozen rule's expectation stand two others that learn from finished runs:
the same rule calibrated (compactgpt.calibration) and our own law (compactgpt.ladder).
"""

import math
from dataclasses import asdict
from typing import Any

from compactgpt.config import Estimate, ExpectedLoss, Machine, Model, Params, Training
from compactgpt.forecast.calibration import calibrate
from compactgpt.forecast.model_size import counts, flops_per_token
from compactgpt.forecast.scaling_laws import LAWS, Law, Run, expect
from compactgpt.forecast.sweep import Ladder, corpus_of, ladder_report

FP32_BYTES = 4
ADAM_MOMENTS = 2
# Values of width C that a block keeps for the backward pass, a token: what goes into its norms (2), out of
# them (2), queries, keys and values (3), what attention gives (1), and 4 C before and behind the GELU (8).
# The matrix of attention is not kept.
KEPT_WIDTHS = 16


def estimate(params: Params, ladder: Ladder | None = None) -> dict[str, Any]:
    """Estimate the run of params.yaml and the note's.

    Args:
        params: all of params.yaml.
        ladder: the finished small runs, where there are any.

    Returns:
        The report: `compact` and `note`, each as `forecast` makes it; the laws; `calibration`, how often
        the rule held; `ladder`, our own law, null without one.
    """
    training, note, settings = params.training, params.estimate.note, params.estimate
    run = configured_run(params)
    seen, size = corpus_tokens(params, ladder), training.micro_batch_size
    own = forecast(params.model, run, size, seen, expected(params), settings, training)
    note_run = _run(note, note.max_steps, note.tokens_per_step)
    theirs = forecast(note, note_run, note.micro_batch_size, note.corpus_tokens, note.expected_loss, settings)
    checks = calibrate(settings.anchors, ladder.rungs if ladder else (), params.model.vocab_size)
    calibrated = checks.widened(run, training.optimizer, params.model.vocab_size)
    return {
        "compact": own
        | {
            "calibrated_loss": calibrated.model_dump(),
            "corpus": params.download.corpus,
            "notes": _notes(params),
        },
        "note": theirs,
        "laws": {law.name: _published(law) for law in LAWS},
        "machines": {name: machine.model_dump() for name, machine in settings.machines.items()},
        "calibration": checks.report(),
        "ladder": ladder_report(ladder, params, run) if ladder else None,
    }


def configured_run(params: Params) -> Run:
    """The run of params.yaml as the laws see it."""
    return _run(params.model, params.training.max_steps, params.training.tokens_per_step)


def expected(params: Params) -> ExpectedLoss:
    """The loss expected of the run of params.yaml by the frozen rule."""
    anchors = tuple(anchor for anchor in params.estimate.anchors if not anchor.assumed_budget)
    return expect(configured_run(params), params.training.optimizer, params.model.vocab_size, anchors)


def _run(model: Model, max_steps: int, tokens_per_step: int) -> Run:
    sizes = counts(model)
    return Run(sizes.nanogpt, sizes.non_embedding, max_steps, tokens_per_step)


def corpus_tokens(params: Params, ladder: Ladder | None) -> int | None:
    """Tokens of the training split, where somebody has counted them: a ladder, or the stated set's maker."""
    if ladder and ladder.corpus == corpus_of(params):
        return ladder.train_tokens
    download = params.download
    whole = download.max_documents is None and download.max_bytes is None
    name = download.hub.name if download.corpus == "hub" else download.corpus
    stated = params.estimate.corpus_tokens.get(name) if whole else None
    return round(stated * (1 - params.tokenization.val_fraction)) if stated else None


def _notes(params: Params) -> list[str]:
    """What a reader of the demo's estimate must know."""
    notes = ["the laws are extrapolated far below the sizes and budgets that they were fitted on"]
    if all(law.inside(configured_run(params)) for law in LAWS):
        notes = []
    if params.download.corpus == "docstrings":
        notes.append("the corpus is docstrings, for which no law is calibrated")
    elif params.download.corpus == "files":
        notes.append("the corpus is the user's own: its size is unknown here and no law is calibrated for it")
    return notes


def forecast(
    model: Model,
    run: Run,
    micro_batch_size: int,
    train_tokens: int | None,
    expected_loss: ExpectedLoss,
    settings: Estimate,
    training: Training | None = None,
) -> dict[str, Any]:
    """One run's estimate.

    Args:
        model: the shape.
        run: the budget.
        micro_batch_size: sequences in one forward pass.
        train_tokens: tokens of the training split, where known.
        expected_loss: the loss expected.
        settings: of the stage, for its machines.
        training: the recipe, where its softmax may be sampled.

    Returns:
        Numbers with their units in the keys; `epochs` is null where the corpus' size is not known.
    """
    each = flops_per_token(model, training)
    flops = {key: value * run.tokens for key, value in each.items()}
    machines = settings.machines.items()
    return {
        "model": model.model_dump(include=set(Model.model_fields)),
        "parameters": asdict(counts(model)),
        "steps": run.max_steps,
        "tokens_per_step": run.tokens_per_step,
        "sequences_per_step": run.tokens_per_step // model.block_size,
        "tokens": run.tokens,
        "epochs": None if train_tokens is None else run.tokens / train_tokens,
        "flops_per_token": each,
        "flops": flops,
        "memory_bytes": _memory(model, micro_batch_size),
        "minutes": {name: _minutes(flops["with_attention"], machine) for name, machine in machines},
        "laws": {law.name: _law_facts(law, run, model.vocab_size) for law in LAWS},
        "expected_loss": expected_loss.model_dump(),
    }


def _memory(model: Model, micro_batch_size: int) -> dict[str, int]:
    """fp32 bytes that training holds; the logits as if all were held at once, which ours never are."""
    weights = counts(model).all_tensors * FP32_BYTES
    tokens = micro_batch_size * model.block_size
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": ADAM_MOMENTS * weights,
        "activations": KEPT_WIDTHS * model.n_layer * tokens * model.n_embd * FP32_BYTES,  # (L, B, T, 16 C)
        "logits_if_held_at_once": tokens * model.padded_vocab_size * FP32_BYTES,  # (B, T, vocabulary)
    }


def _minutes(flops: int, machine: Machine) -> float:
    return flops / (machine.peak_teraflops * 1e12 * machine.utilisation) / 60


def _law_facts(law: Law, run: Run, vocab_size: int) -> dict[str, Any]:
    """A law's raw loss, and whether it is usable: a model that only guesses has ln(vocabulary)."""
    loss = law.loss(run)
    return {
        "loss": loss,
        "better_than_guessing": loss < math.log(vocab_size),
        "inside_validity": law.inside(run),
    }


def _published(law: Law) -> dict[str, Any]:
    return {
        "source": law.source,
        "validity": law.validity,
        "formula": law.formula,
        "constants": dict(law.constants),
        "counted": law.counts,
        "parameters_from": law.fitted.parameters[0],
        "parameters_to": law.fitted.parameters[1],
        "tokens_from": law.fitted.tokens[0],
        "tokens_to": law.fitted.tokens[1],
    }
