"""Estimate a training run from params.yaml: size, tokens, FLOPs, memory, time and expected loss.

The module neither reads the corpus nor imports torch, because the estimate is made before training. Three
methods predict the loss: the fixed rule and the rule with calibrated intervals (`forecast.scaling_laws`), and
a law fitted to our own sweep (`forecast.sweep`).
"""

import math
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compactgpt.config import Anchor, Estimate, ExpectedLoss, Model, Params, Training
from compactgpt.forecast.model_size import count_parameters, flops_per_token
from compactgpt.forecast.scaling_laws import LAWS, Run, calibrate, configured_run, expect_loss
from compactgpt.forecast.sweep import Sweep, SweepRun, corpus_settings, read_sweep, sweep_report

FP32_BYTES = 4
ADAM_MOMENTS = 2
# For each token, a block keeps this many vectors of C channels for the backward pass: the inputs and outputs
# of both layer norms (4), queries, keys and values (3), the output of attention (1), and the 4 C channels
# before and after the GELU (8).
KEPT_WIDTHS = 16
LAW_FIELDS = (
    "source",
    "validity",
    "formula",
    "constants",
    "counted",
)  # fields of a Law that reports/estimate.json states
MATRIX_SIZE = 1536  # rows and columns of the measured product; large enough to reach full speed
MEASURE_SECONDS = 1.0  # time that the measurement of the speed takes


def estimate(params: Params, sweep: Sweep | None = None) -> dict[str, Any]:
    """Return the content of reports/estimate.json: estimates of the configured run and of the note's run.

    The note is *Performance de NanoGPT Compact contre GPT-2*. `hand_set_loss` is the loss that a person
    expected of the note's run. `ladder` is the prediction of our own sweep; it is null if `sweep` is None.
    """
    training, settings, note = params.training, params.estimate, params.estimate.note
    run, vocab_size = configured_run(params), params.model.vocab_size
    train_tokens, size = _train_tokens(params, sweep), training.micro_batch_size
    shared = set(Anchor.model_fields) & set(SweepRun.model_fields)
    measured = [
        Anchor(**done.model_dump(include=shared), corpus="ours", source="results/ladder.json")
        for done in (sweep.runs if sweep else ())
    ]
    calibration = calibrate([*settings.anchors, *measured], vocab_size)
    compact = estimate_run(
        params.model, run, size, train_tokens, expected_loss(params), settings, training=training
    )
    compact |= {
        "calibrated_loss": calibration.calibrated_loss(run, training.optimizer, vocab_size).model_dump(),
        "corpus": params.download.corpus,
        "notes": _notes(params),
    }
    sizes = count_parameters(note)
    note_run = Run(sizes.nanogpt, sizes.non_embedding, note.max_steps, note.tokens_per_step)
    # The note names AdamW as its optimizer. The fixed rule predicts the loss, as for every other run.
    note_loss = expect_loss(note_run, "adamw", note.vocab_size, _used_anchors(params))
    described = estimate_run(note, note_run, note.micro_batch_size, note.corpus_tokens, note_loss, settings)
    return {
        "compact": compact,
        "note": {**described, "hand_set_loss": note.hand_set_loss.model_dump()},
        "laws": {
            law.name: {
                **{key: getattr(law, key) for key in LAW_FIELDS},
                **dict(zip(("parameters_from", "parameters_to"), law.parameters, strict=True)),
                **dict(zip(("tokens_from", "tokens_to"), law.tokens, strict=True)),
            }
            for law in LAWS
        },
        "machines": {name: machine.model_dump() for name, machine in settings.machines.items()},
        "calibration": calibration.report(),
        "ladder": sweep_report(sweep, params) if sweep else None,
    }


def expected_loss(params: Params) -> ExpectedLoss:
    """Return the loss that the fixed rule predicts for the configured run."""
    run, vocab_size = configured_run(params), params.model.vocab_size
    return expect_loss(run, params.training.optimizer, vocab_size, _used_anchors(params))


def _used_anchors(params: Params) -> list[Anchor]:
    """Return the reference runs that laws are scaled to: those whose training budget is published."""
    return [anchor for anchor in params.estimate.anchors if not anchor.assumed_budget]


def _train_tokens(params: Params, sweep: Sweep | None) -> int | None:
    """Return the number of tokens of the train split, from a sweep or params.yaml; None if it is unknown."""
    if sweep and sweep.corpus == corpus_settings(params):
        return sweep.train_tokens
    download = params.download
    if download.max_documents is not None or download.max_bytes is not None:
        return None
    name = download.hub.name if download.corpus == "hub" else download.corpus
    stated = params.estimate.corpus_tokens.get(name)
    return round(stated * (1 - params.tokenization.val_fraction)) if stated else None


def _notes(params: Params) -> list[str]:
    """Return notes on the limits of the configured run's estimate."""
    notes = []
    if not all(law.covers(configured_run(params)) for law in LAWS):
        notes.append("the laws are extrapolated far below the sizes and budgets that they were fitted on")
    if params.download.corpus == "docstrings":
        notes.append("the corpus is docstrings, for which no law is calibrated")
    elif params.download.corpus == "files":
        notes.append("the corpus is the user's own: its size is unknown here and no law is calibrated for it")
    return notes


def estimate_run(
    model: Model,
    run: Run,
    micro_batch_size: int,
    train_tokens: int | None,
    loss: ExpectedLoss,
    settings: Estimate,
    *,
    training: Training | None = None,
) -> dict[str, Any]:
    """Return the estimate of one run; `epochs` is null if `train_tokens` is None."""
    flops_each = flops_per_token(model, training)
    flops = {key: value * run.tokens for key, value in flops_each.items()}
    sizes, guess = count_parameters(model), math.log(model.vocab_size)
    weights = sizes.all_tensors * FP32_BYTES
    batch_tokens = micro_batch_size * model.block_size
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
        "memory_bytes": {  # key: what the memory holds, all in float32; value: bytes
            "weights": weights,
            "gradients": weights,
            "optimizer": ADAM_MOMENTS * weights,
            "activations": KEPT_WIDTHS * model.n_layer * batch_tokens * model.n_embd * FP32_BYTES,
            # only for comparison: our loss computes the logits, (B, T, V), in chunks
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
        "expected_loss": loss.model_dump(),
    }


# -- the command `compactgpt estimate` -----------------------------------------------------------------


def estimate_configuration(params: Params, ladder: Path) -> dict[str, Any]:
    """Return the estimate of one configuration."""
    report = estimate(params, read_sweep(ladder))
    found: dict[str, Any] = {**report["compact"], "ladder": report["ladder"]}
    found |= {key: report[key] for key in ("machines", "calibration")}
    found["laws"] = {name: facts | report["laws"][name] for name, facts in found["laws"].items()}
    return found


def measure_flops() -> float:
    """Return the speed of this machine in FLOP/s, measured on float32 matrix products (numpy's BLAS)."""
    import numpy as np

    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((MATRIX_SIZE, MATRIX_SIZE), np.float32) for _ in range(2))
    product = a @ b
    quickest, end = float("inf"), time.monotonic() + MEASURE_SECONDS
    while time.monotonic() < end:
        begin = time.monotonic()
        np.matmul(a, b, out=product)
        quickest = min(quickest, time.monotonic() - begin)
    return float(2 * MATRIX_SIZE**3 / quickest)


def training_minutes(params: Params, speed: float) -> float:
    """Return the minutes of training on a machine whose products have `speed` in FLOP/s."""
    flops = flops_per_token(params.model, params.training)["with_attention"] * configured_run(params).tokens
    return flops / (speed * params.estimate.utilisation_of_products) / 60


def announce_times(runs: Sequence[Params]) -> list[str]:
    """Return messages on the training time of the runs on this machine, and on slow baselines."""
    speed = measure_flops()
    minutes = sum(training_minutes(params, speed) for params in runs)
    names = dict.fromkeys(name for params in runs for name in params.baseline.names)
    specs = runs[0].baseline.specs
    return [
        f"training: about {format_minutes(minutes)} at this machine's speed, measured just now; the progress "
        "bar shows a better estimate after the first steps",
        *(
            f"baseline {name}: scores the val split too, and may take as long as the training; "
            "to leave it out, remove it from baseline.names"
            for name in names
            if specs[name].kind in ("gguf", "folder", "hub")  # a compressor takes seconds
        ),
    ]


def format_minutes(minutes: float) -> str:
    """Return a duration with its unit: seconds, minutes, hours or days."""
    if minutes < 1:
        return f"{minutes * 60:.3g} s"
    if minutes < 120:
        return f"{minutes:.3g} min"
    hours = minutes / 60
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:,.1f} days"


def format_estimate(found: Mapping[str, Any]) -> str:
    """Format the result of `estimate_configuration` as a table for a terminal."""
    rows = [*_cost_rows(found), *_loss_rows(found)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() if name else value for name, value in rows)


def _cost_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sizes, epochs = found["parameters"], found["epochs"]
    memory = {key: f"{count / 2**20:,.0f} MiB" for key, count in found["memory_bytes"].items()}
    state = sum(found["memory_bytes"][key] for key in ("weights", "gradients", "optimizer"))
    yield "parameters", ""
    yield "  all tensors", f"{sizes['all_tensors']:,}"
    yield "  nanoGPT's convention", f"{sizes['nanogpt']:,}  (without the position embedding)"
    yield "  non-embedding", f"{sizes['non_embedding']:,}"
    yield "steps", f"{found['steps']:,} of {found['tokens_per_step']:,} tokens"
    yield "tokens", f"{found['tokens']:,}"
    unknown = f"unknown: the corpus ({found['corpus']}) is counted only when the pipeline reads the corpus"
    yield "epochs", unknown if epochs is None else f"{epochs:.4g}"
    simple, counted = found["flops"]["six_n"], found["flops"]["with_attention"]
    yield "FLOPs by the usual rule, 6 N D", f"{simple:.3g}  (6 x parameters x tokens)"
    why = "attention added"
    if counted < simple:
        why += "; the output layer uses only a sample of the vocabulary"
    yield "FLOPs as counted", f"{counted:.3g}  ({why})"
    yield "memory, float32", ""
    yield "  weights, gradients, optimizer", f"{state / 2**20:,.0f} MiB"
    yield "  kept for the backward pass", f"{memory['activations']} of one micro-batch"
    yield (
        "  logits, were they held at once",
        f"{memory['logits_if_held_at_once']}  (the loss holds only a part)",
    )
    yield "time", ""
    for name, minutes in found["minutes"].items():
        machine = found["machines"][name]
        rate = f"{machine['utilisation']:.0%} of {machine['peak_teraflops']:g} TFLOP/s"
        yield f"  {name}", f"{format_minutes(minutes)}  ({rate})"
    yield "", "      computing time of the training alone, at the stated share of the machine's peak speed;"
    yield "", "      the rest of the pipeline (reading the corpus, evaluation, baselines) comes on top"


def _loss_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "loss by published laws", "nats per token; each law as published, not fitted to this text"
    for name, law in found["laws"].items():
        where = "inside" if law["inside_validity"] else "outside"
        worth = "" if law["better_than_guessing"] else "worse than guessing, "
        yield f"  {name}", f"{law['loss']:.3f}  ({worth}{where} its range)"
        yield "", f"       {law['source']}: {law['formula']}"
        constants = ", ".join(f"{key} {value:g}" for key, value in law["constants"].items())
        yield "", f"       {constants}; fitted on {law['validity']}"
    checks, sweep = found["calibration"], found["ladder"]
    of, low, high = checks["of"], checks["held_80"], checks["held_95"]
    verdict = "too narrow" if low < 0.8 * of or high < 0.95 * of else "wide enough"
    yield "loss expected", "nats per token"
    yield from _interval_rows("the frozen rule", found["expected_loss"])
    yield "", f"      checked on {of} measured runs, each predicted from the others, these intervals are"
    yield "", f"      {verdict}: the 80 % interval contained {low} of {of}, the 95 % interval {high} of {of}"
    yield from _interval_rows("the rule calibrated", found["calibrated_loss"])
    if sweep and sweep["expected_loss"]:
        yield from _interval_rows("our ladder's law", sweep["expected_loss"])
    elif sweep:
        yield "  our ladder's law", f"does not apply here: other {', '.join(sweep['differs'])}"


def _interval_rows(name: str, loss: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    bounds = "80 %: {low_80:.2f} to {high_80:.2f}, 95 %: {low_95:.2f} to {high_95:.2f}".format(**loss)
    yield f"  {name}", f"{loss['value']:.2f}  ({bounds})"
    for line in textwrap.wrap(loss["basis"], 84):
        yield "", f"      {line}"
