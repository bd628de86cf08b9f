"""`compactgpt doctor` says in one screen what this machine can do, and waits for no server."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt import doctor
from compactgpt.cli import app
from compactgpt.config import load_params
from compactgpt.forecast.estimate import training_minutes
from tests.support.dvc_projects import git_repository

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with the project's params.yaml and experiments; no program may reach a network."""
    folder = git_repository(tmp_path / "project", {})
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    shutil.copytree(ROOT / "conf", folder / "conf")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "measure_flops", lambda: 1e11)
    return folder


def run(*options):
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_screen_has_a_line_for_each_question(project):
    lines = {line.split("  ")[0].strip("* "): line for line in run().splitlines() if line[:2] != "  "}
    assert {"processor", "memory", "disk", "GPU", "hub", "git", "DVC", "MLflow", "baselines"} <= set(lines)
    assert f"{len(os.sched_getaffinity(0))} cores usable" in lines["processor"]
    assert "HF_HUB_OFFLINE" in lines["hub"]
    assert "the first run creates it" in lines["MLflow"]
    assert "estimated from 100 GFLOP/s" in lines["time"]
    assert len(run().splitlines()) < 40


def test_baselines_say_what_they_need_and_times_are_those_of_the_forecast(project):
    (project / "reports").mkdir()
    (project / "reports/tokenization.json").write_text('{"val": {"documents": 100, "tokens": 90000}}')
    found = json.loads(run("--json"))
    params = load_params(Path("params.yaml"))
    assert found["baselines"].keys() == params.baseline.specs.keys()
    assert found["baselines"]["xz"] == "ready"
    assert found["baselines"]["gpt2"].startswith("needs the hub; or a copy")
    minutes = found["minutes"]["make repro"]
    assert minutes["training"] == pytest.approx(training_minutes(params, 1e11))
    (gguf,) = [name for name in minutes if name.startswith("smollm2")]
    # 135M parameters, two operations each, 100 documents of 512 tokens.
    assert minutes[gguf] >= 2 * 135e6 * 100 * 512 / 6e10 / 60
    assert found["minutes"]["experiment run note"]["training"] > 1000 * minutes["training"]


def test_servers_that_never_answer_and_wrong_addresses_delay_nothing(project, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        run()  # imports what it needs
        begin = time.monotonic()
        found = json.loads(run("--json"))
        assert time.monotonic() - begin < 8
    assert "answer" in found["stores"]["MLflow"]
    assert "answers" not in found["network"]["hub"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert "MLFLOW_TRACKING_URI is" in json.loads(run("--json"))["stores"]["MLflow"]
