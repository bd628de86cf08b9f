"""The training stage starts several processes, or runs under the user's own torchrun."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.processes import run_ranks
from tests.support.tiny_training import make_tokens, outputs, run_stage, write_params

ROOT = Path(__file__).parents[2]
STEPS = 90
STAGE = ["-m", "stages.training", "--tracker", "none"]


def write_launch_params(folder=Path(), max_restarts=1):
    launcher = {"processes": 2, "max_restarts": max_restarts, "timeout_seconds": 60}
    write_params(folder, max_steps=STEPS, eval_interval=30, checkpoint_interval=3, launcher=launcher)


def start(*command, cwd=Path()):
    """Start `python command` as `dvc repro` starts a stage."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return psutil.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def newest_state():
    return max((int(path.name[5:]) for path in Path(".state/training").glob("*/step-*")), default=0)


def wait_for_state_after(step, launcher):
    deadline = time.monotonic() + 180
    while newest_state() <= step:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start_until_a_state_after(step):
    """Start the stage. Returns its launcher and its two processes, after they saved a state past `step`."""
    launcher = start(*STAGE)
    wait_for_state_after(step, launcher)
    return launcher, launcher.children()


def end_of(process):
    """Wait for a process. Returns its exit code and its error messages."""
    _, stderr = process.communicate(timeout=120)
    assert not re.search("Traceback|frame #", stderr)
    return process.returncode, [line for line in stderr.splitlines() if line.startswith("error")]


def outputs_of_two_processes(project):
    """What two processes write from here on, uninterrupted."""
    assert run_ranks(2, _run_stage_in, project) == [0, 0]
    return outputs()


def _run_stage_in(project):
    os.chdir(project)
    assert run_stage().exit_code == 0


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_result_is_that_of_an_uninterrupted_run(project):
    write_launch_params()
    uninterrupted = outputs_of_two_processes(project)
    launcher, before = start_until_a_state_after(0)
    before[1].kill()  # both are started again
    psutil.wait_procs(before, timeout=30)
    wait_for_state_after(newest_state(), launcher)
    after = launcher.children()
    for process in (launcher, *after):
        connections = process.net_connections("inet")
        assert {one.laddr.ip for one in connections if one.status == "LISTEN"} <= {"127.0.0.1", "::1"}
    launcher.terminate()
    code, messages = end_of(launcher)
    assert code == 75
    assert f"error: stopped at step {newest_state()} of {STEPS}, which is saved:" in "".join(messages)
    assert not any(worker.is_running() for worker in after)
    assert newest_state() < STEPS
    assert outputs_of_two_processes(project) == uninterrupted


@pytest.mark.robustness
def test_processes_end_with_their_launcher_and_a_run_that_lost_its_processes_too_often_fails(project):
    write_launch_params(max_restarts=0)
    launcher, workers = start_until_a_state_after(0)
    launcher.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    launcher.communicate()
    assert not alive
    launcher, workers = start_until_a_state_after(newest_state())
    for worker in workers:
        worker.kill()
    assert end_of(launcher)[0] == 1
    assert not Path("models").exists()


def test_a_mistake_that_the_processes_find_is_one_sentence_and_is_not_tried_again(project):
    write_launch_params(max_restarts=3)
    (project / "data/tokens/train.tokens").unlink()
    code, messages = end_of(start(*STAGE))
    (message,) = set(messages)  # each process reads the file for itself
    assert "data/tokens/train.tokens is missing" in message
    assert len(messages) <= 2
    assert code == 65


@pytest.mark.robustness
def test_two_machines_train_one_model_with_torchruns_own_command(project):
    """Two torchruns in folders of their own, as docs/scale.md starts them on two machines."""
    write_launch_params()
    of_one_machine = outputs_of_two_processes(project)
    command = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:29517", "--local-addr=127.0.0.1", *STAGE]
    machines = [project / "node0", project / "node1"]
    for machine in machines:
        make_tokens(machine / "data/tokens")
        write_launch_params(machine)
    agents = [start(*command, cwd=machine) for machine in machines]
    assert [end_of(agent) for agent in agents] == [(0, []), (0, [])]
    (main,) = [machine for machine in machines if (machine / "models").exists()]
    os.chdir(main)
    assert outputs() == of_one_machine
