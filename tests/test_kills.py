"""`dvc repro training`, killed and interrupted as machines and people do it: it ends as if it never was.

Real processes take minutes: `make test-faults` runs these (TEST_FAULTS=1), `make test` does not. KILLS and
KILL_SEED say how often and when; a failure names both.
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
from test_training import make_tokens, tree_of

from compactgpt.lineage import restore_lock
from compactgpt.storage import sha256_file
from tests.tiny_chain import make_place, write_inputs

pytestmark = pytest.mark.skipif("TEST_FAULTS" not in os.environ, reason="minutes: make test-faults")

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "8"))
SEED = int(os.environ.get("KILL_SEED", "1"))
STEPS = 800  # after the first state there is time to strike, on a busy core too
PYTHON = Path(sys.executable)


def copy_code(target):
    """What git would commit now, as a repository."""
    named = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, named.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)


def copy_repository(target):
    """A clone with two small token files and a tiny configuration."""
    copy_code(target)
    params = tree_of(max_steps=STEPS, eval_interval=50, checkpoint_interval=20)
    (target / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
    make_tokens(target / "data/tokens")
    (target / "data/inspection.json").write_text("{}")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a clone")
    copy_repository(folder)
    return folder


class Repro:
    """A `dvc repro` in a process group of its own, as a terminal starts it.

    Forced: the same model was made before, and DVC would take it from its cache.
    """

    def __init__(self, here, tracker="none", words=("-s", "training", "-f")):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
        environment |= {
            "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
            "COMPACTGPT_TRACKER": tracker,
            "DVC_NO_ANALYTICS": "1",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        restore_lock(here)  # as `make repro` begins
        self.here, self.environment = here, environment
        self.states = set(here.glob(".state/training/*/step-*"))
        self.dvc = subprocess.Popen(
            [PYTHON, "-m", "dvc", "repro", *words],
            cwd=here, env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def trainers(self):
        """The processes of this folder that run a stage, whoever started them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                stage = any(word.startswith("stages.") for word in process.cmdline())
                if process.cwd() == str(self.here) and stage:
                    found.append(process)
        return found

    def wait_for_state(self):
        """Wait until this training has saved a state, and return its trainer."""
        before = self.states
        while not set(self.here.glob(".state/training/*/step-*")) - before:
            assert self.dvc.poll() is None, self.dvc.communicate()
            time.sleep(0.01)
        (trainer,) = self.trainers()
        return trainer

    def said(self):
        """What it said until its end; nobody may be left who still writes."""
        text, _ = self.dvc.communicate(timeout=900)
        _, alive = psutil.wait_procs(self.trainers(), timeout=60)
        assert not alive, "an orphan works on"
        return text

    def succeeds(self):
        """Wait for its good end, and return what it said."""
        text = self.said()
        assert self.dvc.returncode == 0, text
        assert "error" not in text, text
        return text


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Two clones of the whole tiny chain; the first has been run, and nobody disturbed it."""
    clones = [tmp_path_factory.mktemp(name) for name in ("whole chain", "killed chain")]
    for clone in clones:
        copy_code(clone)
        make_place(clone / "inputs")
        shutil.move(clone / "inputs/.state", clone / ".state")
        shutil.rmtree(clone / "inputs")
        write_inputs(clone, 1)
    Repro(clones[0], words=()).succeeds()
    return clones


def reports(here):
    """All that git would keep of a run."""
    files = (path for path in (here / "reports").rglob("*") if path.is_file())
    return {path.relative_to(here).as_posix(): path.read_bytes() for path in files}


def test_a_whole_chain_killed_at_random_moments_ends_with_the_same_reports(chains, counted):
    whole, killed = chains
    chance = random.Random(SEED)
    for _ in range(KILLS // 2):
        run = Repro(killed, words=())
        with suppress(subprocess.TimeoutExpired):
            run.dvc.wait(chance.uniform(4, 20))
        if run.dvc.poll() is None:
            kill(run, chance.choice(["trainer", "dvc", "both"]))
            counted["kills of a chain under dvc repro"] += 1
        run.said()
    Repro(killed, words=()).succeeds()
    assert reports(killed) == reports(whole), f"KILL_SEED={SEED}"


def test_of_two_at_once_in_one_clone_one_ends_well_and_nothing_is_mixed(chains, counted):
    whole, here = chains
    runs = [Repro(here, words=("-f",)) for _ in range(2)]
    texts = [run.said() for run in runs]
    lost = [text for run, text in zip(runs, texts, strict=True) if run.dvc.returncode != 0]
    assert len(lost) < len(runs), texts
    assert all("ERROR: failed to reproduce" in text for text in lost), texts
    assert not [text for text in texts if "Traceback" in text]
    assert reports(here) == reports(whole)
    counted["pairs of dvc repro in one clone"] += 1


def model(here):
    return sha256_file(here / "models/compact/model.safetensors")


@pytest.fixture(scope="module")
def whole(here):
    """The model of a run that nobody disturbs, and the seconds that it took."""
    begin = time.monotonic()
    run = Repro(here)
    run.succeeds()
    return model(here), time.monotonic() - begin


def test_killed_at_random_moments_it_ends_with_the_same_bits(here, whole):
    chance = random.Random(SEED)
    expected, seconds = whole
    run, ends = Repro(here), 0
    for number in range(KILLS):
        victim, after = chance.choice(["trainer", "dvc", "both"]), chance.uniform(0, 1.2 * seconds)
        with suppress(subprocess.TimeoutExpired):
            run.dvc.wait(after)
        finished = run.dvc.poll() == 0
        if not finished:
            kill(run, victim)
        run.said()
        if finished:
            assert model(here) == expected, f"KILL_SEED={SEED}, before kill {number}"
            ends += 1
        run = Repro(here)
    run.succeeds()
    assert model(here) == expected, f"KILL_SEED={SEED}, {KILLS} kills, {ends} ends between"
    assert not list(here.glob(".state/training/*"))


def kill(run, victim):
    """SIGKILL one or both; dvc alone may not have started the trainer yet."""
    trainers = run.trainers()
    for process in trainers if victim in ("trainer", "both") else []:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if victim in ("dvc", "both") or not trainers:
        run.dvc.kill()


@pytest.fixture(autouse=True)
def no_states(here):
    """Whatever a test before left when it failed."""
    shutil.rmtree(here / ".state/training", ignore_errors=True)


@pytest.mark.parametrize("who", ["Ctrl-C", "SIGTERM to the trainer", "SIGTERM to dvc", "SIGTERM to all"])
def test_asked_to_stop_it_saves_says_so_in_one_sentence_and_goes_on(here, whole, who):
    run = Repro(here)
    trainer = run.wait_for_state()
    if who == "SIGTERM to the trainer":
        trainer.terminate()
    elif who == "SIGTERM to dvc":
        run.dvc.terminate()
    else:
        os.killpg(run.dvc.pid, signal.SIGINT if who == "Ctrl-C" else signal.SIGTERM)
    text = run.said()
    assert run.dvc.returncode != 0, text
    assert text.count("error: stopped at step") == 1, text
    assert "which is saved: run `dvc repro` again" in text
    assert "Traceback" not in text
    stopped_at = int(text.split("stopped at step ")[1].split()[0])
    assert max(path.name for path in here.glob(".state/training/*/step-*")) == f"step-{stopped_at:08d}"
    assert f"training: {stopped_at + 1} of {STEPS} steps" in Repro(here).succeeds()
    assert model(here) == whole[0]


def test_the_curve_of_a_run_that_was_killed_twice_is_in_mlflow_once(here):
    for _ in range(2):
        run = Repro(here, tracker="mlflow")
        run.wait_for_state().kill()
        run.said()
    Repro(here, tracker="mlflow").succeeds()
    copy = [PYTHON, "-c", "from compactgpt.cli import app; app(['sync'])"]
    subprocess.run(copy, cwd=here, env=run.environment, check=True, timeout=120)
    with closing(sqlite3.connect(here / "mlflow.db")) as store:
        found = store.execute("select run_uuid, status from runs where name = 'training'").fetchall()
        ((run_id, status),) = found
        pipelines = store.execute("select status from runs where name != 'training' order by start_time")
        assert [one for (one,) in pipelines] == ["KILLED", "KILLED", "FINISHED"]
        rows = store.execute("select key, step, value from metrics where run_uuid = ?", (run_id,)).fetchall()
    assert status == "FINISHED"
    for key in ("train/loss", "train/learning_rate"):
        assert sorted(step for name, step, _ in rows if name == key) == list(range(1, STEPS + 1))
    with open(here / "reports/loss.csv") as file:
        curve = {int(row["step"]): float(row["val_loss"]) for row in csv.DictReader(file)}
    assert {step: value for name, step, value in rows if name == "val/loss"} == curve
