"""torchrun started by the stage's own door: whoever is killed, the result is that of one process unbroken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_training import contents, door, make_tokens, tree_of

from compactgpt.errors import BadConfig, PeerLost
from compactgpt.launching import Place, final_exit_code, own_place

ROOT = Path(__file__).parents[1]
STEPS = 90


def params(processes, mode="strict"):
    launcher = {"processes": processes, "mode": mode, "max_restarts": 1, "timeout_seconds": 60}
    return json.dumps(
        tree_of(max_steps=STEPS, eval_interval=30, checkpoint_interval=3, launcher=launcher)
    )  # JSON is YAML


class Launched:
    """The door as `dvc repro` runs it, and the processes that it started."""

    def __init__(self):
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self.agent = psutil.Popen(
            [sys.executable, "-m", "stages.training", "--tracker", "none"],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def workers(self):
        """Wait for both processes; process 0 first."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = [child for child in self.agent.children() if "RANK" in child.environ()]
            if len(found) == 2:
                return sorted(found, key=lambda child: int(child.environ()["RANK"]))
            assert self.agent.poll() is None, self.agent.communicate()
            time.sleep(0.05)
        raise AssertionError("they were not started")

    def wait_for_state_after(self, step):
        """Wait for a training state past a step, and return its step."""
        return state_after(step, self.agent)


def state_after(step, run):
    """Wait until a training has written a state past a step, and return its step."""
    deadline = time.monotonic() + 60
    while (newest := newest_state()) <= step:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return newest


def listens_at(process):
    """The addresses of the sockets on which a process listens, as the kernel has them."""
    return {one.laddr.ip for one in process.net_connections("inet") if one.status == "LISTEN"}


def newest_state():
    names = [path.name for path in Path(".state/training").glob("*/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository folder with tiny params.yaml and tokens, not under DVC."""
    for name in ("DVC_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    make_tokens(Path("data/tokens"))
    return tmp_path


@pytest.fixture
def whole(here):
    """What one process makes that nobody stops."""
    Path("params.yaml").write_text(params(1))
    assert door().exit_code == 0
    made = contents()
    Path("params.yaml").write_text(params(2))
    return made


def goes_on_alone():
    assert newest_state() < STEPS
    Path("params.yaml").write_text(params(1))
    assert door().exit_code == 0
    return contents()


@pytest.mark.slow
def test_who_is_killed_is_started_again_and_the_result_is_that_of_one_process_unbroken(whole):
    run = Launched()
    before = run.workers()
    step = run.wait_for_state_after(0)
    before[1].kill()  # torchrun starts both again
    psutil.wait_procs(before, timeout=30)
    after = run.workers()
    step = run.wait_for_state_after(step)
    for process in (run.agent, *after):
        assert listens_at(process) <= {"127.0.0.1", "::1"}
    assert all(map(listens_at, after))  # gloo's own
    run.agent.terminate()
    _, said = run.agent.communicate(timeout=60)
    assert run.agent.returncode == 75
    assert said.count("error: stopped at step") == 1
    assert "Traceback" not in said
    assert not any(worker.is_running() for worker in after)
    assert goes_on_alone() == whole


@pytest.mark.skipif("TEST_FAULTS" not in os.environ, reason="half a minute: make test-faults")
def test_processes_whose_agent_is_killed_end_themselves(whole):
    run = Launched()
    workers = run.workers()
    run.wait_for_state_after(0)
    run.agent.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    run.agent.communicate()
    assert not alive
    assert goes_on_alone() == whole


@pytest.mark.skipif("TEST_FAULTS" not in os.environ, reason="a minute: make test-faults")
def test_a_spread_model_whose_process_is_killed_ends_with_the_bits_of_the_unbroken_run(here):
    Path("params.yaml").write_text(params(2, "fsdp"))
    run = Launched()
    assert run.agent.communicate(timeout=120)[1].count("error") == 0
    whole = contents()
    assert whole
    run = Launched()
    workers = run.workers()
    run.wait_for_state_after(0)
    workers[0].kill()  # the one that writes; torchrun starts both again
    _, said = run.agent.communicate(timeout=120)
    assert run.agent.returncode == 0, said
    assert "Traceback" not in said
    assert contents() == whole


@pytest.mark.skipif("TEST_FAULTS" not in os.environ, reason="ten seconds: make test-faults")
def test_one_that_died_too_often_is_no_success(here):
    Path("params.yaml").write_text(params(2).replace('"max_restarts": 1', '"max_restarts": 0'))
    run = Launched()
    workers = run.workers()
    run.wait_for_state_after(0)
    for worker in workers:  # none is left to tell why
        worker.kill()
    run.agent.communicate(timeout=60)
    assert run.agent.returncode == 1
    assert not Path("models").exists()


@pytest.mark.parametrize("rendezvous", ["", "node0", "node0:http", ":29500"])
def test_where_machines_meet_must_be_an_address(here, rendezvous, monkeypatch):
    Path("params.yaml").write_text(params(1))
    monkeypatch.setenv("COMPACTGPT_NODES", "2")
    monkeypatch.setenv("COMPACTGPT_RENDEZVOUS", rendezvous)
    ended = door()
    assert ended.exit_code == 78
    assert f"--rendezvous {rendezvous!r}: give host:port of one of the machines" in ended.stderr


def test_a_process_finds_its_place_in_what_torchrun_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert own_place() == Place(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    assert own_place() == Place(5, 8, 1)
    assert not own_place().leads


def test_only_a_lost_process_makes_torchrun_start_again(monkeypatch, tmp_path):
    assert final_exit_code(BadConfig("x"), 78) == 78
    monkeypatch.setenv("COMPACTGPT_OUTCOME", str(tmp_path / "code"))
    assert final_exit_code(PeerLost("x"), 75) == 75
    assert not (tmp_path / "code").exists()
    assert final_exit_code(BadConfig("x"), 78) == 0
    assert (tmp_path / "code").read_text() == "78"
