"""Estimate a training run from params.yaml: size, tokens, FLOPs, memory, time and expected loss."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from compactgpt.config import Anchor, Estimate, ExpectedLoss, Model, NoteRun, Params, Training
from compactgpt.forecast.model_size import count_parameters, flops_per_token
from compactgpt.forecast.scaling_laws import LAWS, calibrate, expect_loss, run_of
from compactgpt.forecast.sweep import Sweep, SweepRun, corpus_settings, sweep_report

FP32_BYTES = 4
ADAM_MOMENTS = 2
# For the backward pass, a block keeps 16 vectors of n_embd numbers for each token: 4 for the layer norms;
# 3 for queries, keys and values; 1 for the attention output; 8 for GELU.
KEPT_WIDTHS = 16


def estimate(params: Params, sweep: Sweep | None = None) -> dict[str, Any]:
    """Return the content of reports/estimate.json.

    Keys: `compact` (estimate for the run of params.yaml), `note` (estimate for the run that the published
    note describes), `calibration` (how well the rule `expect_loss` predicted measured runs), `ladder` (result
    of `sweep_report`; null without a sweep).
    """
    model, training, settings = params.model, params.training, params.estimate
    shared = set(Anchor.model_fields) & set(SweepRun.model_fields)
    measured = [
        Anchor(**done.model_dump(include=shared), corpus="ours", source="results/ladder.json")
        for done in (sweep.runs if sweep else ())
    ]
    calibration = calibrate([*settings.anchors, *measured], model.vocab_size)
    run = run_of(model, training)
    compact = estimate_run(model, training, _train_tokens(params, sweep), training.optimizer, settings) | {
        "calibrated_loss": calibration.calibrated_loss(
            run, training.optimizer, model.vocab_size
        ).model_dump(),
        "corpus": params.download.corpus,
        "notes": _notes(params),
    }
    note = settings.note
    note_estimate = estimate_run(note, note, note.corpus_tokens, "adamw", settings)  # the note's optimizer
    return {
        "compact": compact,
        "note": note_estimate | {"hand_set_loss": note.hand_set_loss.model_dump()},
        "calibration": calibration.report(),
        "ladder": sweep_report(sweep, params) if sweep else None,
    }


def expected_loss(params: Params) -> ExpectedLoss:
    """Return the loss that the function `expect_loss` predicts for the run of params.yaml."""
    return _expected_loss(params.model, params.training, params.training.optimizer, params.estimate)


def _expected_loss(
    model: Model, training: Training | NoteRun, optimizer: str, settings: Estimate
) -> ExpectedLoss:
    anchors = [anchor for anchor in settings.anchors if not anchor.assumed_budget]
    return expect_loss(run_of(model, training), optimizer, model.vocab_size, anchors)


def _train_tokens(params: Params, sweep: Sweep | None) -> int | None:  # None: unknown
    if sweep and sweep.corpus == corpus_settings(params):
        return sweep.train_tokens
    download = params.download
    if download.max_documents is not None or download.max_bytes is not None:
        return None
    name = download.hub.name if download.corpus == "hub" else download.corpus
    stated = params.estimate.corpus_tokens.get(name)
    return round(stated * (1 - params.tokenization.val_fraction)) if stated else None


def _notes(params: Params) -> list[str]:
    notes = []
    if not all(law.covers(run_of(params.model, params.training)) for law in LAWS):
        notes.append("the laws are extrapolated far below the sizes and budgets that they were fitted on")
    if params.download.corpus == "docstrings":
        notes.append("the corpus is docstrings, for which no law is calibrated")
    elif params.download.corpus == "files":
        notes.append("the corpus is the user's own: its size is unknown here and no law is calibrated for it")
    return notes


def estimate_run(
    model: Model,
    training: Training | NoteRun,
    train_tokens: int | None,
    optimizer: str,
    settings: Estimate,
) -> dict[str, Any]:
    """Return the estimate of one run: key -> value. `epochs` is None if `train_tokens` is unknown."""
    run = run_of(model, training)
    flops_each = flops_per_token(model, training if isinstance(training, Training) else None)
    flops = {key: value * run.tokens for key, value in flops_each.items()}
    sizes, guess = count_parameters(model), math.log(model.vocab_size)
    weights = sizes.all_tensors * FP32_BYTES
    batch_tokens = training.micro_batch_size * model.block_size
    return {
        "model": model.model_dump(include=set(Model.model_fields)),
        "parameters": asdict(sizes),
        "steps": run.max_steps,
        "tokens_per_step": run.tokens_per_step,
        "sequences_per_step": run.tokens_per_step // model.block_size,
        "tokens": run.tokens,
        "epochs": None if train_tokens is None else run.tokens / train_tokens,
        "flops_per_token": flops_each,
        "flops": flops,
        "memory_bytes": {  # number of bytes if all tensors are float32
            "weights": weights,
            "gradients": weights,
            "optimizer": ADAM_MOMENTS * weights,
            "activations": KEPT_WIDTHS * model.n_layer * batch_tokens * model.n_embd * FP32_BYTES,
            # Training needs less memory, because our loss function computes the logits, (B, T, V), in chunks.
            "logits_if_held_at_once": batch_tokens * model.padded_vocab_size * FP32_BYTES,
        },
        "minutes": {
            name: flops["with_attention"] / (machine.peak_teraflops * 1e12 * machine.utilisation) / 60
            for name, machine in settings.machines.items()
        },
        "laws": {
            law.name: {
                "loss": law.loss(run),
                "better_than_guessing": law.loss(run) < guess,
                "inside_validity": law.covers(run),
            }
            for law in LAWS
        },
        "expected_loss": _expected_loss(model, training, optimizer, settings).model_dump(),
    }


def format_minutes(minutes: float) -> str:
    """Return a duration with its unit: seconds, minutes, hours or days."""
    if minutes < 1:
        return f"{minutes * 60:.3g} s"
    if minutes < 120:
        return f"{minutes:.3g} min"
    hours = minutes / 60
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:,.1f} days"


def format_estimate(report: Mapping[str, Any], settings: Estimate) -> str:
    """Return `report`, the result of `estimate`, as a table for a terminal."""
    rows = [*_cost_rows(report["compact"], settings), *_loss_rows(report)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() if name else value for name, value in rows)


def _cost_rows(found: Mapping[str, Any], settings: Estimate) -> Iterator[tuple[str, str]]:
    sizes, epochs = found["parameters"], found["epochs"]
    memory = {key: f"{count / 2**20:,.0f} MiB" for key, count in found["memory_bytes"].items()}
    state = sum(found["memory_bytes"][key] for key in ("weights", "gradients", "optimizer"))
    yield "parameters", ""
    yield "  all tensors", f"{sizes['all_tensors']:,}"
    yield "  nanoGPT's convention", f"{sizes['nanogpt']:,}  (without the position embedding)"
    yield "  non-embedding", f"{sizes['non_embedding']:,}"
    yield "steps", f"{found['steps']:,} of {found['tokens_per_step']:,} tokens"
    yield "tokens", f"{found['tokens']:,}"
    unknown = f"unknown: only the pipeline counts the tokens of the corpus ({found['corpus']})"
    yield "epochs", unknown if epochs is None else f"{epochs:.4g}"
    yield "FLOPs, 6 N D", f"{found['flops']['six_n']:.3g}  (6 x parameters x tokens)"
    counted = "includes attention. If training.head is sampled, only the logits of sampled tokens are counted"
    yield "FLOPs as counted", f"{found['flops']['with_attention']:.3g}  ({counted})"
    yield "memory, float32", ""
    yield "  weights, gradients, optimizer", f"{state / 2**20:,.0f} MiB"
    yield "  activations of one micro-batch", f"{memory['activations']}  (kept for the backward pass)"
    yield "  logits of one micro-batch", f"{memory['logits_if_held_at_once']}  (training holds only a chunk)"
    yield "time", ""
    for name, minutes in found["minutes"].items():
        machine = settings.machines[name]
        rate = f"{machine.utilisation:.0%} of {machine.peak_teraflops:g} TFLOP/s"
        yield f"  {name}", f"{format_minutes(minutes)}  ({rate})"
    yield "", "      for the training alone; reading the corpus, evaluation and baselines take time, too"


def _loss_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found, checks, sweep = report["compact"], report["calibration"], report["ladder"]
    yield "loss by published laws", "nats per token; the laws were fitted to text other than this corpus"
    for law in LAWS:
        estimated = found["laws"][law.name]
        where = "inside" if estimated["inside_validity"] else "outside"
        worth = "" if estimated["better_than_guessing"] else "worse than guessing, "
        yield f"  {law.name}", f"{estimated['loss']:.3f}  ({worth}{where} its range)"
        yield "", f"       {law.source}"
        yield "", f"       fitted on {law.validity}"
    of, low, high = checks["of"], checks["held_80"], checks["held_95"]
    verdict = "too narrow" if low < 0.8 * of or high < 0.95 * of else "wide enough"
    yield "loss expected", "nats per token"
    yield from _interval_rows("the fixed rule", found["expected_loss"])
    yield "", f"      checked on {of} measured runs, each predicted from the other runs: {low} losses were"
    yield "", f"      in the 80 % interval, and {high} in the 95 % interval. The intervals are {verdict}"
    yield from _interval_rows("the fixed rule, calibrated", found["calibrated_loss"])
    if sweep and sweep["expected_loss"]:
        yield from _interval_rows("the law of our sweep", sweep["expected_loss"])
    elif sweep:
        differs = ", ".join(sweep["differs"])
        yield "  the law of our sweep", f"does not apply: the sweep's runs have another {differs}"


def _interval_rows(name: str, loss: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    bounds = "80 %: {low_80:.2f} to {high_80:.2f}, 95 %: {low_95:.2f} to {high_95:.2f}".format(**loss)
    yield f"  {name}", f"{loss['value']:.2f}  ({bounds})"
    for line in textwrap.wrap(loss["basis"], 84):
        yield "", f"      {line}"
