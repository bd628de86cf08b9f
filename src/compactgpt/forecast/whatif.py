"""What-if questions: an estimate of params.yaml with some of its values changed, told as a table.

Nothing is written, and no torch is loaded: an answer takes a second.
"""

import json
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from compactgpt.common.sections import read_yaml
from compactgpt.config import Params, parse_params
from compactgpt.experiments import set_values
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.sweep import read_ladder

GEMM_SIZE = 1536  # rows and columns: large enough for full speed, small enough for a slow core
GEMM_SECONDS = 1.0

Lines = Iterator[tuple[str, str]]


def changed(params_file: Path, settings: Sequence[str]) -> Params:
    """The configuration of params.yaml with `key=value` settings.

    Raises:
        MissingInput, BadConfig: a key is unknown, or the whole is impossible.
    """
    tree = read_yaml(params_file)
    set_values(tree, settings)
    return parse_params(tree, " ".join([str(params_file), *(f"-S {setting}" for setting in settings)]))


def answer(params: Params, ladder: Path, *, measure: bool = False) -> dict[str, Any]:
    """Estimate one configuration; with `measure`, also the minutes on this machine by its own speed."""
    report = estimate(params, read_ladder(ladder))
    own: dict[str, Any] = {**report["compact"], "ladder": report["ladder"]}
    own |= {key: report[key] for key in ("machines", "calibration")}
    own["laws"] = {name: facts | report["laws"][name] for name, facts in own["laws"].items()}
    if measure:
        speed, share = measured_flops(), params.estimate.utilisation_of_products
        own["measured_here"] = {
            "products_flops_per_second": speed,
            "utilisation": share,
            "minutes": own["flops"]["with_attention"] / (speed * share) / 60,
        }
    return own


def announcement(runs: Sequence[Params], root: Path) -> list[str]:
    """Return how long a run will take on this machine: its training, and each neural baseline.

    Args:
        runs: the configuration of each run, one after the other.
        root: the project: the journals in it say how long a baseline took here the last time.
    """
    speed = measured_flops()
    training = sum(
        answer(params, root / "results/ladder.json")["flops"]["with_attention"]
        / (speed * params.estimate.utilisation_of_products)
        for params in runs
    )
    lines = [
        f"training: about {_duration(training / 60)} at this machine's speed, measured just now; the "
        "progress bar corrects it after the first steps"
    ]
    last = last_durations(root)
    for name in dict.fromkeys(name for params in runs for name in params.baseline.names):
        if runs[0].baseline.specs[name].kind not in ("gguf", "folder", "hub"):
            continue  # a compressor takes seconds
        took = (
            f"{_duration(last[name] / 60)} when it last ran here" if name in last else "not measured here yet"
        )
        lines.append(
            f"baseline {name}: {took}. It scores the val split too, and may take as long as the training; "
            "baseline.names without it leaves it out"
        )
    return lines


def last_durations(root: Path) -> dict[str, float]:
    """Return the seconds that each baseline took when it last finished here, as the journals of runs say."""
    found: dict[str, tuple[int, float]] = {}
    for path in (root / ".state/tracking").rglob("journal.jsonl"):
        lines = path.read_bytes().splitlines()
        with suppress(ValueError, KeyError, IndexError, TypeError):  # a journal that a kill cut short
            start, end = json.loads(lines[0]), json.loads(lines[-1])
            stage, _, name = start["stage"].partition("@")
            if stage == "baseline" and end["kind"] == "end" and end["status"] == "FINISHED":
                took = (end["time_ms"] - start["time_ms"]) / 1000
                found[name] = max(found.get(name, (0, 0.0)), (start["time_ms"], took))
    return {name: took for name, (_, took) in found.items()}


def measured_flops() -> float:
    """Floating-point operations a second of this machine's products of float32 matrices (numpy's BLAS)."""
    import numpy as np

    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((GEMM_SIZE, GEMM_SIZE), np.float32) for _ in range(2))
    product = a @ b
    quickest, end = float("inf"), time.monotonic() + GEMM_SECONDS
    while time.monotonic() < end:
        begin = time.monotonic()
        np.matmul(a, b, out=product)
        quickest = min(quickest, time.monotonic() - begin)
    return float(2 * GEMM_SIZE**3 / quickest)


def table(own: Mapping[str, Any]) -> str:
    """Render an answer for a terminal."""
    rows = [*_size(own), *_budget(own), *_memory(own), *_time(own), *_laws(own), *_expected(own)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() if name else value for name, value in rows)


def _size(own: Mapping[str, Any]) -> Lines:
    sizes = own["parameters"]
    yield "parameters", ""
    yield "  all tensors", f"{sizes['all_tensors']:,}"
    yield "  nanoGPT's convention", f"{sizes['nanogpt']:,}  (without the position embedding)"
    yield "  non-embedding", f"{sizes['non_embedding']:,}"


def _budget(own: Mapping[str, Any]) -> Lines:
    yield "steps", f"{own['steps']:,} of {own['tokens_per_step']:,} tokens"
    yield "tokens", f"{own['tokens']:,}"
    epochs = own["epochs"]
    yield "epochs", f"{own['corpus']}: size unknown before it is read" if epochs is None else f"{epochs:.4g}"
    yield "FLOPs", f"{own['flops']['six_n']:.3g} (6 N), {own['flops']['with_attention']:.3g} with attention"


def _memory(own: Mapping[str, Any]) -> Lines:
    memory = own["memory_bytes"]
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    yield "memory, float32", ""
    yield "  weights, gradients, optimizer", _mebibytes(state)
    yield "  kept for the backward pass", f"{_mebibytes(memory['activations'])} of one micro-batch"
    yield "  logits, were they held at once", _mebibytes(memory["logits_if_held_at_once"])


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _time(own: Mapping[str, Any]) -> Lines:
    yield "time", ""
    for name, minutes in own["minutes"].items():
        machine = own["machines"][name]
        rate = f"{machine['utilisation']:.0%} of {machine['peak_teraflops']:g} TFLOP/s"
        yield f"  {name}", f"{_duration(minutes)}  ({rate})"
    if here := own.get("measured_here"):
        rate = f"{here['utilisation']:.0%} of {here['products_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        yield "  this machine", f"{_duration(here['minutes'])}  ({rate}, measured just now: no report has it)"


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{minutes * 60:.3g} s"
    if minutes < 120:
        return f"{minutes:.3g} min"
    hours = minutes / 60
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:,.1f} days"


def _laws(own: Mapping[str, Any]) -> Lines:
    yield "loss by each law, unscaled", "nats per token"
    for name, law in own["laws"].items():
        where = "inside" if law["inside_validity"] else "outside"
        worth = "" if law["better_than_guessing"] else "worse than guessing, "
        yield f"  {name}", f"{law['loss']:.3f}  ({worth}{where} its range)"
        yield "", f"       {law['source']}: {law['formula']}"
        constants = ", ".join(f"{key} {value:g}" for key, value in law["constants"].items())
        yield "", f"       {constants}; fitted on {law['validity']}"


def _expected(own: Mapping[str, Any]) -> Lines:
    checks = own["calibration"]
    held = f"80 % held {checks['held_80']} of {checks['of']}, 95 % held {checks['held_95']}"
    yield "loss expected", "nats per token"
    yield from _interval("the frozen rule", own["expected_loss"])
    yield "", f"       of measured runs, each told by the others: {held}"
    yield from _interval("the rule calibrated", own["calibrated_loss"])
    if ladder := own["ladder"]:
        if told := ladder["expected_loss"]:
            yield from _interval("our ladder's law", told)
        else:
            yield "  our ladder's law", f"tells nothing here: other {', '.join(ladder['differs'])}"


def _interval(name: str, told: Mapping[str, Any]) -> Lines:
    eighty = f"80 %: {told['low_80']:.2f} to {told['high_80']:.2f}"
    yield f"  {name}", f"{told['value']:.2f}  ({eighty}, 95 %: {told['low_95']:.2f} to {told['high_95']:.2f})"
    for line in textwrap.wrap(told["basis"], 84):
        yield "", f"      {line}"
