"""A long training, watched from outside: do memory, handles and the cost of a step stay as they are?

`python bench/soak.py --minutes 30` trains params.yaml's model on real token files as the stage does it,
with its journal and its syncing process, in a scratch folder with an MLflow store of its own. Every 5
seconds it looks at both processes; at the end it stops the training as Ctrl-C does, and sees that MLflow
has every step. The first tenth of the time is held against the last. Other programs may run beside it: a
step is judged by the CPU seconds that it costs, measured in those of a fixed product of matrices at the
same time, since neighbours slow both.
"""

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from compactgpt.errors import Busy

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 5.0
STEPS = 10_000_000  # more than any soak takes; it is stopped
SIDE = 768  # of the matrices of the yardstick, whose product takes some hundredths of a second
END_SECONDS = 120.0  # for the stop, and for what is left to be told

# What may change from the first tenth to the last, and still be called flat.
MOST = {
    "trainer MB": 1.05,  # of some 800: a leak of 10 kB a step shows in half an hour of two steps a second
    "syncing MB": 1.05,  # of some 250
    "trainer handles": 1.0,  # a training opens nothing but its states, one after the other
    "syncing handles": 1.1,  # SQLite's come and go
    "threads": 1.0,
    "yardsticks a step": 1.15,  # less can't be told from neighbours
}


@dataclass(frozen=True)
class Sample:
    """What is seen at one moment."""

    seconds: float  # since the first
    step: int
    cpu_seconds: float  # of the trainer, since it began
    yardstick: float  # CPU seconds of one product
    trainer_mb: float
    large_mb: float  # of the trainer's memory, what lies in pages of 2 MB
    trainer_handles: int
    threads: int
    syncing_mb: float
    syncing_handles: int
    journal_mb: float
    behind_kb: float  # of the journal, not in MLflow yet


def prepare(folder: Path, tokens: Path, changes: list[str]) -> None:
    """Fill a scratch folder: params.yaml on one thread and without an end, and the token files."""
    yaml = YAML()
    tree = yaml.load(ROOT / "params.yaml")
    for change in ["runtime.num_threads=1", f"training.max_steps={STEPS}", *changes]:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        tree[section][name] = yaml.load(value)
    yaml.dump(tree, folder / "params.yaml")
    (folder / "data").mkdir()
    (folder / "data/tokens").symlink_to(tokens.resolve())


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the stage."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_TRACKING"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    with open(folder / "said", "ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.training", "--tracker", "mlflow"],
            cwd=folder, env=environment, stdout=said, stderr=said,
        )  # fmt: skip


def yardstick() -> float:
    """CPU seconds that a product of two matrices takes now, on one thread."""
    import numpy as np

    matrix = np.ones((SIDE, SIDE), np.float32)
    begin = time.process_time()
    for _ in range(4):
        matrix @ matrix
    return (time.process_time() - begin) / 4


class Eyes:
    """Looks at a training in a folder."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.trainer = psutil.Process(pid)
        self.syncing = next(child for child in self.trainer.children() if "--follow" in child.cmdline())
        (self.journal,) = folder.glob(".state/tracking/*-training-*/journal.jsonl")
        self.begin = time.monotonic()

    def look(self) -> Sample:
        """What is seen now."""
        with self.trainer.oneshot():
            spent = self.trainer.cpu_times()
            trained = self.trainer.memory_info().rss, self.trainer.num_fds(), self.trainer.num_threads()
        with self.syncing.oneshot():
            synced = self.syncing.memory_info().rss, self.syncing.num_fds()
        size, known = self.journal.stat().st_size, 0
        with suppress(FileNotFoundError):
            known = json.loads((self.journal.parent / "synced.json").read_bytes())["offset"]
        return Sample(
            time.monotonic() - self.begin, last_step(self.journal), spent.user + spent.system, yardstick(),
            trained[0] / 1e6, large_pages(self.trainer.pid) / 1e6, trained[1], trained[2],
            synced[0] / 1e6, synced[1],
            size / 1e6, (size - known) / 1e3,
        )  # fmt: skip


def large_pages(pid: int) -> int:
    """Bytes of a process that lie in large pages; Linux puts more there as time goes by, whole."""
    facts = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in facts.splitlines() if line.startswith("AnonHugePages"))


def last_step(journal: Path) -> int:
    """The last step that a journal tells of."""
    with open(journal, "rb") as file:
        file.seek(start := max(0, journal.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[1 if start else 0 : -1]  # whole ones
    told = [json.loads(line) for line in lines]
    return max((line["step"] for line in told if line["kind"] == "metrics"), default=0)


def rows(samples: list[Sample]) -> dict[str, tuple[list[float], list[float]]]:
    """What is judged or told, each as times in hours and values."""
    pairs = [(a, b) for a, b in pairwise(samples) if b.step > a.step]
    hours = [one.seconds / 3600 for one in samples]
    between = [b.seconds / 3600 for _, b in pairs]
    held = {
        "trainer MB": "trainer_mb", "of it in large pages": "large_mb",
        "trainer handles": "trainer_handles", "threads": "threads",
        "syncing MB": "syncing_mb", "syncing handles": "syncing_handles",
        "journal MB": "journal_mb", "journal not synced, kB": "behind_kb",
    }  # fmt: skip
    found = {name: (hours, [float(getattr(one, key)) for one in samples]) for name, key in held.items()}
    cost = [(b.cpu_seconds - a.cpu_seconds) / (b.step - a.step) for a, b in pairs]
    speed = [(b.step - a.step) / (b.seconds - a.seconds) for a, b in pairs]
    measured = [each / b.yardstick for each, (_, b) in zip(cost, pairs, strict=True)]
    return {
        "yardsticks a step": (between, measured), "CPU s a step": (between, cost),
        "steps a second (wall)": (between, speed), **found,
    }  # fmt: skip


def judge(samples: list[Sample]) -> bool:
    """Print the table; whether all that must is flat."""
    flat = True
    print(f"| {'':22} | first tenth | last tenth | slope an hour | at most | |\n|---|---|---|---|---|---|")
    for name, (hours, values) in rows(samples).items():
        tenth = max(1, len(values) // 10)
        first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
        slope = statistics.linear_regression(hours, values).slope
        limit, good = MOST.get(name), ""
        if limit is not None:
            good = "flat" if last <= limit * first else "GROWS"
            flat = flat and good == "flat"
        most = f"x {limit}" if limit else ""
        print(f"| {name:22} | {first:.4g} | {last:.4g} | {slope:+.3g} | {most} | {good} |")
    return flat


def stop(folder: Path, trainer: subprocess.Popen[bytes], eyes: Eyes) -> bool:
    """Stop the training as Ctrl-C does, wait until all is told; whether MLflow has what the journal has."""
    trainer.send_signal(signal.SIGINT)
    code = trainer.wait(END_SECONDS)
    psutil.wait_procs([eyes.syncing], timeout=END_SECONDS)
    (journal,) = folder.glob(".state/tracking/done/*/journal.jsonl")  # it moves there when all of it is told
    last = last_step(journal)
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        told = store.execute("select count(*), max(step) from metrics where key = 'train/loss'").fetchone()
    print(f"\nstopped with exit code {code}; steps in the journal {last:,}, in MLflow {told[0]:,}")
    return code == Busy.exit_code and not eyes.syncing.is_running() and told == (last, last)


def soak(folder: Path, seconds: float, trainer: subprocess.Popen[bytes]) -> tuple[Eyes, list[Sample]]:
    """Look until the time is over, from the first state that was saved: by then all has been done once."""
    states = folder / ".state/training"
    while trainer.poll() is None and not list(states.glob("*/step-*")):
        time.sleep(1)
    with suppress(psutil.NoSuchProcess):
        eyes = Eyes(folder, trainer.pid)
        samples = [eyes.look()]
        while trainer.poll() is None:
            if samples[-1].seconds >= seconds:
                return eyes, samples
            time.sleep(SAMPLE_SECONDS)
            samples.append(eyes.look())
    raise SystemExit("it ended by itself:\n" + (folder / "said").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--tokens", type=Path, default=ROOT / "data/tokens", help="folder of token files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of params.yaml")
    parser.add_argument("--json", type=Path, help="keep what was seen")
    words = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy is imported
    with tempfile.TemporaryDirectory(prefix="compactgpt-soak-") as scratch:
        folder = Path(scratch)
        prepare(folder, words.tokens, words.set)
        trainer = start(folder)
        try:
            eyes, samples = soak(folder, 60 * words.minutes, trainer)
            minutes = samples[-1].seconds / 60
            steps = samples[-1].step - samples[0].step
            print(f"{steps:,} steps in {minutes:.1f} minutes, {len(samples)} looks\n")
            flat = judge(samples)
            whole = stop(folder, trainer, eyes)
        finally:
            if trainer.poll() is None:
                trainer.kill()
    if words.json:
        words.json.write_text(json.dumps([asdict(one) for one in samples]))
    if not (flat and whole):
        raise SystemExit("not flat" if whole else "MLflow does not have what the journal has")
    print("flat, and nothing is lost")


if __name__ == "__main__":
    main()
