"""Say what this machine can do: hardware, network, baselines, stores, and how long the pipeline takes.

No check waits longer than `WAIT_SECONDS`, and the checks that need a network run at the same time. Times are
estimated from the speed of matrix products on this processor, which is measured for a second.
"""

import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import read_json
from compactgpt.config import BaselineSpec, Folder, Gguf, Hub, Params, load_params
from compactgpt.data.hub import cached_model
from compactgpt.experiments import configurations, load_experiments
from compactgpt.forecast.estimate import format_minutes, measure_flops, training_minutes
from compactgpt.tracking import dvc_files, state_folder
from compactgpt.tracking.journal import machine_facts, tracking_store

WAIT_SECONDS = 2.0
GIGABYTE = 10**9
EXPERIMENTS = ("gpt2", "note")  # whose time is estimated besides that of `make repro`
TOKENIZATION = Path("reports/tokenization.json")


def examine(params_file: Path) -> dict[str, Any]:
    """Return what this machine can do. Nothing is written.

    Returns:
        `machine`, `network`, `baselines` (name -> what it needs), `stores` (each name -> text), and `minutes`
        (what runs -> estimated minutes of its parts, on the processor).

    Raises:
        MissingInput, BadConfig: params.yaml is missing or not valid.
    """
    params, root = load_params(params_file), params_file.absolute().parent
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    store, ask_store = _store(root)
    ask_hub = (lambda: "not asked: HF_HUB_OFFLINE is set") if _is_offline() else lambda: _ask(endpoint)
    # Both at once: a name server that does not answer takes as long as a server that does not.
    wait_hub, wait_store = _start(ask_hub), _start(ask_store)
    machine = _machine()
    speed = measure_flops()
    hub = wait_hub()
    return {
        "machine": machine,
        "network": {"hub": f"{endpoint}: {hub}"},
        "baselines": {
            name: _readiness(spec, hub == "answers") for name, spec in params.baseline.specs.items()
        },
        "in_names": list(params.baseline.names),
        "stores": {"git": _git(root), "DVC": _dvc(root), "MLflow": f"{store}: {wait_store()}"},
        "gigaflops": speed / 1e9,
        "minutes": dict(_minutes(params, params_file, speed)),
    }


def format_report(found: Mapping[str, Any]) -> str:
    """Return the result of `examine` as one screen of text."""
    rows = [*found["machine"].items(), *found["network"].items(), *found["stores"].items()]
    rows.append(("baselines", "* is in baseline.names"))
    marks = {True: "* ", False: "  "}
    rows += [(f"{marks[name in found['in_names']]}{name}", text) for name, text in found["baselines"].items()]
    rows.append(
        ("time", f"estimated from {found['gigaflops']:.0f} GFLOP/s of this processor, measured just now")
    )
    for what, parts in found["minutes"].items():
        detail = ", ".join(f"{name} {format_minutes(minutes)}" for name, minutes in parts.items() if minutes)
        rows.append((f"  {what}", f"about {format_minutes(sum(parts.values()))} ({detail})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _start(work: Callable[[], str]) -> Callable[[], str]:
    """Start work in a thread; return a function that waits for its result, but not longer than allowed."""
    found = [f"no answer within {WAIT_SECONDS:.0f} s"]
    thread = threading.Thread(target=lambda: found.insert(0, work()), daemon=True)
    thread.start()

    def wait() -> str:
        thread.join(WAIT_SECONDS)
        return found[0]

    return wait


def _ask(address: str) -> str:
    """Return whether a server answers, whatever its answer is."""
    try:
        urllib.request.urlopen(address, timeout=WAIT_SECONDS).close()  # noqa: S310 (the user's own setting)
    except urllib.error.HTTPError:
        return "answers"
    except (OSError, ValueError) as error:
        return f"does not answer ({getattr(error, 'reason', error)})"
    return "answers"


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# --- the machine


def _machine() -> dict[str, str]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": f"{machine_facts().get('cpu') or 'unknown'}, {usable} cores usable, "
        f"{os.getloadavg()[0]:.1f} in use by running programs",
        "memory": f"{memory.total / GIGABYTE:.1f} GB, {memory.available / GIGABYTE:.1f} GB available",
        "disk": f"{disk.free / GIGABYTE:,.0f} GB free in this folder",
        "GPU": _gpu(),
    }


def _gpu() -> str:
    """Return the GPUs that torch can use, or why there is none."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return ", ".join(f"{each.name} ({each.total_memory / GIGABYTE:.0f} GB)" for each in devices)
    if torch.backends.mps.is_available():
        return "mps (Apple)"
    if torch.version.cuda is None:
        built = "has no CUDA; `UV_TORCH_BACKEND=auto make setup` in a new .venv installs one that has"
        return f"none: torch {torch.__version__} {built}"
    return f"none: torch {torch.__version__} finds no CUDA device; does `nvidia-smi` list one?"


# --- baselines


def _readiness(spec: BaselineSpec, hub_answers: bool) -> str:
    """Return whether a baseline can run here, and what it needs."""
    if isinstance(spec, Hub):
        if cached_model(spec.repo, spec.revision):
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


# --- git, DVC, MLflow


def _git(root: Path) -> str:
    try:
        commit = git_text(root, "rev-parse", "--short", "HEAD")
        changed = len(git_text(root, "status", "--porcelain").splitlines())
    except UserError as error:
        return str(error)
    return f"commit {commit}, {changed or 'no'} changed files"


def _dvc(root: Path) -> str:
    try:
        version = metadata.version("dvc")
        chain = dvc_files.read_chain(dvc_files.Folder(root))
    except metadata.PackageNotFoundError:
        return "not installed: `make setup` installs it"
    except UserError as error:
        return str(error)
    have = sum(stage in chain.entries for stage in chain.stages)
    return f"{version}; dvc.lock has {have} of {len(chain.stages)} stages"


def _store(root: Path) -> tuple[str, Callable[[], str]]:
    """Return the address of MLflow's store without its password, and a function that asks the store."""
    try:
        uri = tracking_store()["uri"]
    except UserError as error:
        return "no store", lambda message=str(error): message
    if uri.startswith("http"):
        return uri, lambda: _ask(f"{uri}/health")
    path = root / uri.removeprefix("sqlite:///")
    if uri.startswith("sqlite"):
        size = f"{path.stat().st_size / 1e6:.1f} MB" if path.exists() else "the first run creates it"
        return uri, lambda: size
    return uri, lambda: "a database, which was not asked"


# --- times


def _minutes(params: Params, params_file: Path, speed: float) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what can be run, and the estimated minutes of its training and of scoring each neural model."""
    yield "make repro", _parts([params], speed)
    known = load_experiments() if Path("conf/experiments").is_dir() else {}
    for name in [name for name in EXPERIMENTS if name in known]:
        with suppress(UserError):
            yield f"experiment run {name}", _parts(configurations(name, params_file), speed)


def _parts(runs: list[Params], speed: float) -> dict[str, float]:
    parts = {"training": sum(training_minutes(params, speed) for params in runs)}
    params = runs[0]
    with suppress(UserError, KeyError, TypeError):
        val = read_json(TOKENIZATION)["val"]
        longest = params.evaluation.likelihood.document_tokens or val["tokens"]
        tokens = min(val["tokens"], val["documents"] * longest)
        for name in params.baseline.names:
            size = _parameters(name, params)
            # Two operations per parameter and token, in windows, in the model's own context, and strided.
            passes = 1 + len(params.evaluation.likelihood.views) / params.evaluation.likelihood.stride_share
            flops = 2 * size * tokens * passes
            parts[name] = flops / (speed * params.estimate.utilisation_of_products) / 60
    return parts


def _parameters(name: str, params: Params) -> float:
    """Return about how many parameters a neural baseline has; 0 for others, and if no name states it."""
    spec = params.baseline.specs[name]
    if isinstance(spec, Hub):
        for anchor in params.estimate.anchors:
            if anchor.name == spec.repo.rpartition("/")[2]:
                return float(anchor.num_params)
    said = re.search(r"(\d+(?:\.\d+)?)([MB])\b", spec.file if isinstance(spec, Gguf) else name, re.IGNORECASE)
    return float(said[1]) * {"M": 1e6, "B": 1e9}[said[2].upper()] if said else 0.0
