"""Two machines that share a cable and nothing else: Linux's namespaces make them of one.

Each has its own network, host name, processes and folder, and is given the command of docs/scale.md. The
kernel kills what runs on a machine whose first process is killed.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_launching import newest_state, state_after
from test_training import contents, door, make_tokens, tree_of

ROOT = Path(__file__).parents[1]
STEPS = 240
NAMESPACES = ["--net", "--uts", "--mount", "--pid"]
NOBODY = "127.0.0.1 localhost\n"  # as /etc/hosts has it
NAMES = NOBODY + "10.77.0.1 node0\n10.77.0.2 node1\n"


def can_make_machines():
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    return subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.skipif("TEST_FAULTS" not in os.environ, reason="three minutes: make test-faults"),
    pytest.mark.skipif(not can_make_machines(), reason="needs root, and unshare, nsenter and ip"),
]


class Machine:
    """A host in a folder of its own."""

    def __init__(self, number, folder, names):
        self.number, self.folder = number, folder / f"node{number}"
        self.folder.mkdir(exist_ok=True)
        (hosts := folder / "hosts").write_text(names)
        boot = (
            f"hostname node{number}; mount --bind {hosts} /etc/hosts; ip link set lo up; echo; exec sleep 600"
        )
        self.outside = psutil.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.outside.stdout.readline()
        (self.first,) = self.outside.children()

    def start(self, *command, **options):
        """Start a command on this machine, in its folder."""
        enter = ["nsenter", "--target", str(self.first.pid), *NAMESPACES, f"--wd={self.folder}", "--"]
        return psutil.Popen([*enter, *command], text=True, stderr=subprocess.PIPE, **options)

    def do(self, *command):
        """Run a command on this machine."""
        process = self.start(*command)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said

    def die(self):
        """End, with all that runs on it."""
        self.outside.kill()
        self.outside.wait()
        self.outside.stdout.close()


class Pair:
    """Two machines with a cable, and the training that runs on them."""

    def __init__(self, folder, params, names=NAMES):
        self.folder, self.names, self.machines = folder, names, []
        for number in range(2):
            self.machines.append(machine := Machine(number, folder, names))
            make_tokens(machine.folder / "data/tokens")
            (machine.folder / "params.yaml").write_text(params)
        self.connect()

    def connect(self):
        """Lay the cable; 10.77.0.1 is the first machine, 10.77.0.2 the second."""
        first, second = (str(machine.first.pid) for machine in self.machines)
        cable = ["netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
        subprocess.run(["ip", "link", "add", "eth0", *cable], check=True)
        for machine in self.machines:
            machine.do("ip", "address", "add", f"10.77.0.{machine.number + 1}/24", "dev", "eth0")
            machine.do("ip", "link", "set", "eth0", "up")

    def replace_second(self):
        """Let the second machine lose its power, and put another in its place, with what was on its disk."""
        self.machines[0].do("ip", "link", "delete", "eth0")  # what has no power says no word
        self.machines[1].die()
        self.machines[1] = Machine(1, self.folder, self.names)
        self.connect()

    def train(self, number, rendezvous="node0:29500"):
        """Give the documented command on one of them."""
        (written,) = re.findall(
            r"    (python -m stages.training --nodes 4.*)", (ROOT / "docs/scale.md").read_text()
        )
        _, *words = shlex.split(written.replace("--nodes 4", "--nodes 2").replace("node0:29500", rendezvous))
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        return self.machines[number].start(sys.executable, *words, env=env)

    def train_on_both(self, rendezvous="node0:29500"):
        """Give it on each."""
        return [self.train(number, rendezvous) for number in range(2)]

    def train_through_a_loss_of_power(self):
        """Train on both; the second is replaced meanwhile. Returns how the first ended."""
        first, second = self.train_on_both()
        state_after(0, first)
        self.replace_second()
        second.communicate()
        assert newest_state() < STEPS
        assert ended(self.train(1)) == (0, [])
        return ended(first)


def ask_to_end(run):
    """SIGTERM, to the command and not to the program that has brought it onto the machine."""
    (command,) = run.children()
    command.send_signal(signal.SIGTERM)


def ended(run):
    """Its exit code, and its sentences."""
    _, said = run.communicate(timeout=120)
    assert "Traceback" not in said
    assert "frame #" not in said
    return run.returncode, [line for line in said.splitlines() if line.startswith("error")]


def params(mode="strict", timeout_seconds=60):
    launcher = {"mode": mode, "timeout_seconds": timeout_seconds}
    return json.dumps(  # JSON is YAML
        tree_of(max_steps=STEPS, eval_interval=80, checkpoint_interval=3, launcher=launcher)
    )


@pytest.fixture
def pair_of(tmp_path, monkeypatch):
    """Makes two machines; the current folder is the first one's."""
    pairs = []

    def make(*args):
        pairs.append(Pair(tmp_path, *args))
        monkeypatch.chdir(tmp_path / "node0")
        return pairs[0]

    yield make
    for pair in pairs:
        for machine in pair.machines:
            machine.die()


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """What one process of one machine makes in mode strict."""
    for name in ("DVC_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    make_tokens(Path("data/tokens"))
    Path("params.yaml").write_text(params())
    assert door().exit_code == 0
    return contents()


def test_a_machine_that_loses_its_power_is_waited_for(whole, pair_of):
    pair = pair_of(params(timeout_seconds=20))
    code, (said,) = pair.train_through_a_loss_of_power()
    assert "another process of this training died or fell silent" in said
    assert code == 0
    assert contents() == whole


def test_a_cut_cable_ends_both_and_the_same_command_goes_on(whole, pair_of):
    pair = pair_of(params(timeout_seconds=20), NOBODY)
    runs = pair.train_on_both("10.77.0.1:29500")
    state_after(0, runs[0])
    pair.machines[1].do("ip", "link", "set", "eth0", "down")
    # The second waits in torch's store for the rendezvous until the kernel gives up: minutes by default.
    pair.machines[1].do("sh", "-c", "echo 4 > /proc/sys/net/ipv4/tcp_retries2")
    code, (lost, alone) = ended(runs[0])
    assert "another process of this training died or fell silent" in lost
    assert "2 machines were to meet at 10.77.0.1:29500 and did not within 20 seconds" in alone
    assert code == 75
    code, (alone,) = ended(runs[1])
    assert "nothing answers at 10.77.0.1:29500" in alone
    assert code == 69
    pair.machines[1].do("ip", "link", "set", "eth0", "up")
    runs = pair.train_on_both("10.77.0.1:29500")
    assert [ended(run) for run in runs] == [(0, []), (0, [])]
    assert contents() == whole


def test_one_is_asked_to_end_and_both_do(whole, pair_of):
    pair = pair_of(params())
    runs = pair.train_on_both()
    state_after(0, runs[0])
    ask_to_end(runs[1])
    code, (said,) = ended(runs[0])
    assert (code, said.partition(" of ")[0]) == (75, f"error: stopped at step {newest_state()}")
    assert ended(runs[1]) == (75, [])
    runs = pair.train_on_both()
    assert [ended(run) for run in runs] == [(0, []), (0, [])]
    assert contents() == whole


def test_who_waits_for_the_others_can_be_asked_to_end(pair_of):
    pair = pair_of(params())
    run = pair.train(0)
    sockets = Path(f"/proc/{pair.machines[0].first.pid}/net/tcp6")
    while f":{29500:04X} " not in sockets.read_text():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    ask_to_end(run)
    assert ended(run) == (143, [])


def test_one_too_many_waits_and_leaves_when_it_was_not_needed(pair_of):
    pair = pair_of(params())
    runs = [pair.train(number) for number in (0, 1, 1)]
    codes = sorted(ended(run)[0] for run in runs)
    assert codes in ([0, 0, 0], [0, 0, 69])  # it sees the end, or that where it waits is gone


def test_where_nobody_answers_one_sentence_says_so(pair_of):
    pair = pair_of(params(timeout_seconds=3))
    code, (said,) = ended(pair.train(1))
    assert "nothing answers at node0:29500, where 2 machines are to meet" in said
    assert code == 69
    code, (said,) = ended(pair.train(1, "node7:29500"))
    assert "--rendezvous 'node7:29500': no machine of this name is known here" in said
    assert code == 69
    code, (said,) = ended(pair.train(1, "node0"))
    assert "--rendezvous 'node0': give host:port of one of the machines" in said
    assert code == 78


def test_where_they_meet_is_waited_for_by_a_name_not_known_yet_and_leads(pair_of):
    pair = pair_of(params(), NOBODY)
    first = pair.train(0, "node1:29500")
    assert "2 machines meet" in first.stderr.readline()
    (pair.folder / "hosts").write_text(NAMES)  # in place: both machines see it
    assert ended(pair.train(1, "node1:29500")) == (0, [])
    assert ended(first) == (0, [])
    models = list(pair.folder.rglob("model.safetensors"))
    assert models == [pair.machines[1].folder / "models/compact/model.safetensors"]


def test_a_mistake_is_told_once_and_not_tried_again(pair_of):
    pair = pair_of(params())
    (pair.machines[1].folder / "params.yaml").write_text(params("fast"))
    runs = pair.train_on_both()
    code, (said,) = ended(runs[0])
    assert "processes [1] have another params.yaml, data or program than process 0" in said
    assert code == 78
    assert ended(runs[1]) == (78, [])


def test_a_spread_model_is_on_both_and_its_state_on_a_disk_that_they_share(tmp_path, pair_of):
    (tmp_path / "shared").mkdir()
    pair = pair_of(params("fsdp", timeout_seconds=20))
    for machine in pair.machines:
        (machine.folder / ".state").symlink_to(tmp_path / "shared")
    runs = pair.train_on_both()
    assert [ended(run) for run in runs] == [(0, []), (0, [])]
    unbroken = contents()
    assert len(unbroken) == 5
    assert pair.train_through_a_loss_of_power()[0] == 0
    assert contents() == unbroken
