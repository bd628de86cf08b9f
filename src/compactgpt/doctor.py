"""Report what this machine can do: hardware, hub, stores, baselines, and how long the pipeline takes.

The hub and a tracking server are asked at the same time, for at most `WAIT_SECONDS`. Times are estimated from
the speed of matrix products on this processor, which is measured for a second.
"""

import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import read_json
from compactgpt.config import BaselineSpec, Folder, Gguf, Hub, Params, load_params
from compactgpt.data.hub import cached_model
from compactgpt.experiments import configurations, dvc_environment
from compactgpt.forecast.estimate import format_minutes, measure_flops, training_minutes
from compactgpt.tracking import dvc_files, state_folder
from compactgpt.tracking.journal import machine_facts, tracking_store

WAIT_SECONDS = 2.0
GIGABYTE = 10**9
EXPERIMENTS = ("gpt2", "note")  # whose time is estimated besides that of `make repro`
TOKENIZATION = Path("reports/tokenization.json")
LAMBADA_TOKENS = 450_000  # about, of its test split
WIKITEXT_TOKENS = 290_000  # the same of WikiText-2's


def examine(params_file: Path) -> dict[str, Any]:
    """Return what this machine can do. Nothing is written.

    Returns:
        `machine` (name -> text), `baselines` of baseline.names and `other_baselines` (name -> what it needs),
        and `minutes` (command -> minutes of each part on the processor, or why the command can't run).

    Raises:
        MissingInput, BadConfig: params.yaml is missing or not valid.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    params = load_params(params_file)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    store = _or_reason(lambda: tracking_store()["uri"])
    servers = [] if HF_HUB_OFFLINE else [endpoint]
    answers = _ask([*servers, *([f"{store}/health"] if store.startswith("http") else [])])
    hub = answers.pop(endpoint, "not asked: HF_HUB_OFFLINE is set")
    speed = measure_flops()
    baselines = {name: _readiness(spec, hub == "answers") for name, spec in params.baseline.specs.items()}
    minutes: dict[str, Any] = {"make repro": _minutes([params], speed)}
    for name in EXPERIMENTS:
        minutes[f"experiment run {name}"] = _or_reason(
            lambda name: _minutes(configurations(name, params_file), speed), name
        )
    return {
        "machine": _hardware()
        | {
            "speed": f"{speed / 1e9:.0f} GFLOP/s in matrix products, measured now",
            "hub": f"{endpoint}: {hub}",
            "git": _or_reason(_git),
            "DVC": _or_reason(_dvc),
            "MLflow": ": ".join([store, *answers.values()]),
        },
        "baselines": {name: baselines.pop(name) for name in params.baseline.names},
        "other_baselines": baselines,
        "minutes": minutes,
    }


def format_report(found: Mapping[str, Any]) -> str:
    """Return the result of `examine` as one screen of text."""
    times = {}
    for command, parts in found["minutes"].items():
        if isinstance(parts, str):
            times[command] = parts
            continue
        detail = ", ".join(f"{name} {format_minutes(minutes)}" for name, minutes in parts.items())
        times[command] = f"about {format_minutes(sum(parts.values()))} ({detail})"
    groups = {
        "this machine": found["machine"],
        "baselines in baseline.names": found["baselines"],
        "other baselines": found["other_baselines"],
        "time on this processor at the speed above": times,
    }
    lines = []
    for title, rows in groups.items():
        width = max(map(len, rows), default=0)
        lines += [title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]
    return "\n".join(lines)


def _or_reason(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function, or the message of the error that it raises."""
    try:
        return work(*arguments)
    except UserError as error:
        return " ".join(str(error).split())


def _ask(addresses: Sequence[str]) -> dict[str, str]:
    """Return for each address whether the server answers, with any status."""
    found = dict.fromkeys(addresses, f"no answer within {WAIT_SECONDS:.0f} s")

    def ask(address: str) -> None:
        try:
            urllib.request.urlopen(address, timeout=WAIT_SECONDS).close()  # noqa: S310 (the user's setting)
            found[address] = "answers"
        except urllib.error.HTTPError:
            found[address] = "answers"
        except (OSError, ValueError) as error:
            found[address] = f"does not answer ({getattr(error, 'reason', error)})"

    # A name server may take longer than the time-out, so that no thread is waited for longer.
    threads = [threading.Thread(target=ask, args=[address], daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    return dict(found)


# --- the machine


def _hardware() -> dict[str, str]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = machine_facts().get("cpu") or "unknown"
    return {
        "processor": f"{cpu}, {usable} cores usable, load average {os.getloadavg()[0]:.1f}",
        "memory": f"{memory.total / GIGABYTE:.1f} GB, {memory.available / GIGABYTE:.1f} GB available",
        "disk": f"{disk.free / GIGABYTE:,.0f} GB free in this folder",
        "GPU": _gpu(metadata.version("torch")),
    }


def _gpu(version: str) -> str:
    """Return the GPUs that this version of torch can use, or why there is none."""
    if version.endswith("+cpu"):  # torch is not imported here: its import takes longer than all else
        advice = "`UV_TORCH_BACKEND=auto make setup` in a new .venv installs one that has"
        return f"none: torch {version} has no CUDA; {advice}"
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return ", ".join(f"{each.name} ({each.total_memory / GIGABYTE:.0f} GB)" for each in devices)
    if torch.backends.mps.is_available():
        return "mps (Apple)"
    return f"none: torch {version} finds no CUDA device; does `nvidia-smi` list one?"


def _git() -> str:
    changed = len(git_text(Path(), "status", "--porcelain").splitlines())
    return f"commit {git_text(Path(), 'rev-parse', '--short', 'HEAD')}, {changed or 'no'} changed files"


def _dvc() -> str:
    dvc_environment()  # raises MissingInput without DVC
    chain = dvc_files.read_chain(dvc_files.Folder(Path()))
    have = sum(stage in chain.entries for stage in chain.stages)
    return f"{metadata.version('dvc')}; dvc.lock has {have} of {len(chain.stages)} stages"


# --- baselines


def _readiness(spec: BaselineSpec, hub_answers: bool) -> str:
    """Return whether a baseline can run here, or what it needs."""
    if isinstance(spec, Hub):
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE, f"models--{spec.repo.replace('/', '--')}")
        # `cached_model` imports the hub's client, which takes long.
        if folder.is_dir() and cached_model(spec.repo, spec.revision):
            return "ready: in the hub's cache"
        if hub_answers:
            return "can be downloaded from the hub"
        return "needs the hub; or a copy of its files: {kind: folder, path: /a/folder}"
    if isinstance(spec, Gguf):
        if (state_folder() / "wheels" / spec.sha256).is_file():
            return "ready: downloaded"
        return f"needs the package index once ({spec.wheel})"
    if isinstance(spec, Folder) and not Path(spec.path).is_dir():
        return f"{spec.path} is not a folder: correct its path in params.yaml"
    return "ready"


# --- times


def _minutes(runs: Sequence[Params], speed: float) -> dict[str, float]:
    """Return the estimated minutes of the training, and of measuring each neural baseline."""
    params = runs[0]
    parts = {"training": sum(training_minutes(each, speed) for each in runs)}
    for name in params.baseline.names:
        if size := _num_params(name, params):  # two operations per parameter and token
            flops = 2 * size * _measured_tokens(params)
            parts[name] = flops / (speed * params.estimate.utilisation_of_products) / 60
    return parts


def _measured_tokens(params: Params) -> float:
    """Return about how many tokens a neural model reads in its measurement."""
    likelihood, tasks = params.evaluation.likelihood, params.evaluation.tasks
    val = read_json(TOKENIZATION)["val"] if TOKENIZATION.exists() else {"documents": 0, "tokens": 0}
    scored = min(val["tokens"], val["documents"] * (likelihood.document_tokens or val["tokens"]))
    # Matched windows; and the views: of overlapping windows each token is read several times.
    passes = 1 + sum(1 if view == "own" else 1 / likelihood.stride_share for view in likelihood.views)
    lambada = LAMBADA_TOKENS * sum(source is not None for source in (tasks.lambada, tasks.lambada_original))
    wikitext = WIKITEXT_TOKENS * len(tasks.wikitext) * (1 + tasks.wikitext_context / tasks.wikitext_stride)
    return scored * passes + lambada + wikitext


def _num_params(name: str, params: Params) -> float:
    """Return about how many parameters a neural baseline has; 0 for others, and if no name states it."""
    spec = params.baseline.specs[name]
    if spec.kind not in ("gguf", "folder", "hub"):
        return 0.0
    label = {"gguf": getattr(spec, "file", ""), "folder": name, "hub": getattr(spec, "repo", "")}[spec.kind]
    for anchor in params.estimate.anchors:
        if anchor.name == label.rpartition("/")[2]:
            return float(anchor.num_params)
    stated = re.search(r"(\d+(?:\.\d+)?)([MB])\b", label, re.IGNORECASE)
    return float(stated[1]) * {"M": 1e6, "B": 1e9}[stated[2].upper()] if stated else 0.0
