"""`compactgpt doctor` reports in one screen what this machine can do, and waits for no server."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt import doctor
from compactgpt.cli import app
from compactgpt.config import load_params
from compactgpt.speed import training_minutes
from tests.support.fake_hub import FakeHub, fill_model_cache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the project's params.yaml and experiments, and an empty cache of the hub."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/tokenization.json").write_text('{"val": {"documents": 100, "tokens": 90000}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "measure_speed", lambda params: 1e11)
    monkeypatch.setattr(doctor, "measure_products", lambda: 3e11)
    return tmp_path


def run(*options):
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_screen_answers_each_question(project):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("    gpt2:\n", "    gpt-2:\n"))
    lines = {line[2:].split("  ")[0]: line for line in run().splitlines() if line.startswith("  ")}
    assert "cores usable" in lines["processor"]
    assert "not asked: HF_HUB_OFFLINE is set" in lines["hub"]
    assert "sqlite:///mlflow.db" in lines["MLflow"]
    assert {"memory", "disk", "GPU", "zstd", "gpt2-xl", "make repro", "experiment run note"} <= lines.keys()
    assert "names ['gpt2'] have no entry in specs" in lines["experiment run gpt2"]  # in place of a time
    assert len(lines) < 40


def test_baselines_say_what_they_need_and_times_are_those_of_the_forecast(project):
    found, params = json.loads(run("--json")), load_params(Path("params.yaml"))
    assert found["baselines"].keys() == params.baseline.specs.keys()
    assert found["baselines"]["xz"] == "ready"
    assert found["baselines"]["gpt2"].startswith("needs the hub, or a local copy")
    minutes = found["minutes"]["make repro"]
    assert minutes["training"] == pytest.approx(training_minutes(params, 1e11))
    gguf = params.baseline.names[-1]
    # 135M parameters, two operations each; 100 documents of 512 tokens, in matched and in own windows.
    assert minutes[gguf] == pytest.approx(2 * 135e6 * 100 * 512 * 2 / 3e11 / 60)
    tasks = found["minutes"]["experiment run gpt2"]  # also LAMBADA and WikiText-2, which are longer than val
    assert tasks["gpt2"] > 1e6 * 2 * 124e6 / 3e11 / 60


def test_a_baseline_is_in_the_cache_of_the_hub_or_can_be_downloaded(project, monkeypatch):
    folder = fill_model_cache(project / "cache", load_params(Path("params.yaml")), "gpt2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = FakeHub({})  # answers "not found", as the hub does for an unknown page
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    found = json.loads(run("--json"))
    server.close()
    assert found["machine"]["hub"] == f"{server.url}: answers"
    assert found["baselines"]["gpt2"] == "ready: in the hub's cache"
    assert found["baselines"]["gpt2-medium"] == "can be downloaded from the hub"
    (folder / "model.safetensors").unlink()
    assert json.loads(run("--json"))["baselines"]["gpt2"].startswith("needs the hub, or a local copy")


def test_servers_that_never_answer_and_wrong_addresses_delay_nothing(project, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and sends nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("HF_ENDPOINT", address)
        begin = time.monotonic()
        machine = json.loads(run("--json"))["machine"]
        assert time.monotonic() - begin < 8
    assert "does not answer (" in machine["MLflow"]
    assert "does not answer (" in machine["hub"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert "MLFLOW_TRACKING_URI is" in json.loads(run("--json"))["machine"]["MLflow"]
