"""`dvc repro` of the tiny chain, killed at random moments or asked to stop, ends with the same results.

This takes minutes: `make test-robustness`. KILL_SEED decides the moments; a failure names it.
"""

import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.dvc_projects import ENVIRONMENT, git
from tests.support.tiny_pipeline import ROOT, make_place, params_tree, write_inputs

pytestmark = pytest.mark.robustness

KILLS = 4
SEED = int(os.environ.get("KILL_SEED", "1"))
STEPS = 600  # enough that there is time to stop the training after its first state
PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git would commit now, as a repository with the tiny chain's parameters and inputs."""
    target = tmp_path_factory.mktemp("a clone")
    for name in git(ROOT, "ls-files", "-z").split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    git(target, "init", "-q")
    shutil.move(make_place(target / "inputs") / ".state", target / ".state")
    shutil.rmtree(target / "inputs")
    write_inputs(target, 1)
    tree = params_tree(1)
    tree["training"] |= {"max_steps": STEPS, "eval_interval": 50, "checkpoint_interval": 20}
    (target / "params.yaml").write_text(json.dumps(tree))  # JSON is YAML
    return target


class Repro:
    """A `dvc repro` in a process group of its own, as a terminal starts it."""

    def __init__(self, clone, *words, tracker="none"):
        foreign = ("DVC_", "MLFLOW_TRACKING_URI")
        self.environment = {name: ENVIRONMENT[name] for name in ENVIRONMENT if not name.startswith(foreign)}
        python_path = os.pathsep.join([str(clone / "src"), str(clone)])
        self.environment |= {"PYTHONPATH": python_path, "COMPACTGPT_TRACKER": tracker}
        self.environment["DVC_NO_ANALYTICS"] = "1"
        self.clone = clone
        self.run("repair")  # as `make repro` begins
        self.states = set(clone.glob(".state/training/*/step-*"))
        self.dvc = subprocess.Popen(
            [PYTHON, "-m", "dvc", "repro", *words],
            cwd=clone, env=self.environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, command):
        """Run a command of compactgpt."""
        code = f"from compactgpt.cli import app; app(['{command}'])"
        subprocess.run([PYTHON, "-c", code], cwd=self.clone, env=self.environment, check=True, timeout=600)

    def stages(self):
        """The processes of this clone that run a stage."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                stage = any(word.startswith("stages.") for word in process.cmdline())
                if process.cwd() == str(self.clone) and stage:
                    found.append(process)
        return found

    def kill(self, victim):
        """SIGKILL the stage, dvc or both; dvc alone may not have started a stage yet."""
        stages = self.stages()
        for process in stages if victim in ("stage", "both") else []:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if victim in ("dvc", "both") or not stages:
            self.dvc.kill()

    def wait_for_state(self):
        """Wait until this training has saved a state. Returns its process."""
        while not set(self.clone.glob(".state/training/*/step-*")) - self.states:
            assert self.dvc.poll() is None, self.dvc.communicate()
            time.sleep(0.01)
        (trainer,) = self.stages()
        return trainer

    def end(self, *, succeeds=False):
        """Wait for its end, and for that of all its stages. Returns what it printed."""
        text, _ = self.dvc.communicate(timeout=900)
        _, alive = psutil.wait_procs(self.stages(), timeout=60)
        assert not alive, "a stage still runs"
        if succeeds:
            assert self.dvc.returncode == 0, text
            assert "error" not in text, text
        return text


def results(clone):
    """The reports and the model."""
    files = [*(clone / "reports").rglob("*"), *(clone / "models").rglob("*")]
    return {path.relative_to(clone).as_posix(): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(clone):
    """The results of the chain, and its seconds."""
    begin = time.monotonic()
    Repro(clone).end(succeeds=True)
    return results(clone), time.monotonic() - begin


def test_a_chain_killed_at_random_moments_ends_with_the_same_results(clone, uninterrupted):
    expected, seconds = uninterrupted
    chance = random.Random(SEED)
    shutil.rmtree(clone / ".dvc/cache", ignore_errors=True)
    for name in ("data", "models", "dvc.lock"):
        path = clone / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(KILLS):
        run = Repro(clone)
        with suppress(subprocess.TimeoutExpired):
            run.dvc.wait(chance.uniform(0.1, 0.5) * seconds)
        if run.dvc.poll() is None:
            run.kill(chance.choice(["stage", "dvc", "both"]))
        run.end()
    Repro(clone).end(succeeds=True)
    assert results(clone) == expected, f"KILL_SEED={SEED}"


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM to the stage", "SIGTERM to dvc"])
def test_a_training_that_is_asked_to_stop_saves_and_resumes(clone, uninterrupted, how):
    run = Repro(clone, "-s", "training", "-f")
    trainer = run.wait_for_state()
    if how == "Ctrl-C":
        os.killpg(run.dvc.pid, signal.SIGINT)
    else:
        (trainer if how == "SIGTERM to the stage" else run.dvc).terminate()
    text = run.end()
    assert run.dvc.returncode != 0, text
    assert text.count("error: stopped at step") == 1, text
    assert "which is saved: run `dvc repro` again" in text
    assert "Traceback" not in text
    stopped_at = int(text.split("stopped at step ")[1].split()[0])
    rest = Repro(clone, "-s", "training", "-f").end(succeeds=True)
    assert f"training: {stopped_at + 1} of {STEPS} steps" in rest
    assert results(clone) == uninterrupted[0]


def test_the_run_that_resumes_a_killed_run_has_the_whole_curve_once(clone, uninterrupted):
    words = ("-s", "training", "-f")
    run = Repro(clone, *words, tracker="mlflow")
    run.wait_for_state().kill()
    run.end()
    (run := Repro(clone, *words, tracker="mlflow")).end(succeeds=True)
    run.run("sync")
    with closing(sqlite3.connect(clone / "mlflow.db")) as store:
        found = store.execute("select status, run_uuid from runs where name = 'training'").fetchall()
        run_id = dict(found)["FINISHED"]
        rows = store.execute("select key, step, value from metrics where run_uuid = ?", (run_id,)).fetchall()
    assert sorted(status for status, _ in found) == ["FINISHED", "KILLED"]
    with open(clone / "reports/loss.csv") as file:
        curve = {int(row["step"]): float(row["val_loss"]) for row in csv.DictReader(file)}
    assert {step: value for key, step, value in rows if key == "val/loss"} == curve
