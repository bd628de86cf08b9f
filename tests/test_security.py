"""No pickle, no foreign code, no open port, no logged secret, no shell."""

import ast
import json
import pickle
import pickletools
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from compactgpt.common.errors import BadData, MissingInput, UserError
from compactgpt.common.storage import write_json
from compactgpt.config import load_params
from compactgpt.data import hub
from compactgpt.evaluation import baselines
from compactgpt.model.huggingface import save_hf
from compactgpt.tracking import mlflow_logger
from compactgpt.tracking.journal import without_password
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.pipeline_run import run_folders
from compactgpt.tracking.store import open_store
from compactgpt.training.checkpoint import save_state
from compactgpt.training.optim import Optimizers
from stages import _runner
from tests.support.tiny_models import save_tokenizer, tiny_gpt
from tests.support.tracking_store import git, runs
from tests.support.trained_project import register

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("src", "stages", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]
SECRET = "planted-7f3a9c"
PARAMS = load_params(ROOT / "params.yaml")


def is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle of any protocol, or a file of torch.save or np.save, which may hold one."""
    if content.startswith((b"PK", b"\x93NUMPY")):
        return True
    try:
        return [opcode.name for opcode, _, _ in pickletools.genops(content)][-1:] == ["STOP"]
    except (ValueError, UnicodeDecodeError):
        return False


def test_no_source_uses_pickle_a_shell_an_open_port_or_a_shared_temporary_file():
    modules = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
    calls = {"torch.load", "torch.save", "os.system", "os.popen", "subprocess.getoutput", "eval", "exec",
             "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "tempfile.mktemp"}  # fmt: skip
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & modules, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, path
                flags = {word.arg: ast.unparse(word.value) for word in node.keywords}
                for flag in ("allow_pickle", "trust_remote_code", "shell"):
                    assert flags.get(flag, "False") == "False", f"{path}: {flag}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/tmp", "0.0.0.0")), path
    (started,) = re.findall(r"mlflow server(?:.*\\\n)*.*", (ROOT / "Makefile").read_text())
    assert "--host 127.0.0.1" in started
    assert '--allowed-hosts "localhost:$(PORT),127.0.0.1:$(PORT)"' in started


def test_no_checkpoint_and_no_artifact_of_mlflow_is_a_pickle(trained_project):
    import mlflow

    network = tiny_gpt(40, n_layer=1)
    optimizers = Optimizers(network, PARAMS.training)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizers.update(1, torch.tensor(0.5))
    tensors = {**network.state_dict(), **optimizers.state}
    save_state(trained_project / ".state/training", "key", 1, tensors, {"rows": []})
    save_hf(network, trained_project / "exported")
    register(trained_project)
    (model,) = open_store(trained_project).client.search_logged_models(["1"])
    (trained_project / "artifacts").mkdir()
    mlflow.artifacts.download_artifacts(model.model_uri, dst_path=str(trained_project / "artifacts"))
    files = [path for path in trained_project.rglob("*") if path.is_file()]
    assert len([path for path in files if "artifacts" in path.parts]) > 10
    assert len([path for path in files if path.suffix == ".safetensors"]) > 4
    assert [path for path in files if is_pickle(path.read_bytes())] == []
    assert all(is_pickle(pickle.dumps([1, "x"], protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1))


def test_a_pickle_and_code_that_come_with_a_model_are_never_run(tmp_path):
    encoding = save_tokenizer(tmp_path / "tokenizer")
    folder, trace = tmp_path / "offered", tmp_path / "ran"
    save_hf(tiny_gpt(encoding.n_vocab), folder, tmp_path / "tokenizer")

    class Trap:
        def __reduce__(self):
            return Path.write_text, (trace, "ran")

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "modeling_x.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    assert baselines.read_folder(folder).model is not None  # from its safetensors
    facts = json.loads((folder / "config.json").read_bytes())
    classes = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    write_json(folder / "config.json", {**facts, "model_type": "x", "auto_map": classes})
    with pytest.raises(BadData, match="can't be read as a causal language model"):
        baselines.read_folder(folder)
    write_json(folder / "config.json", facts)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no \\*\\.safetensors"):
        baselines.read_folder(folder)
    assert not trace.exists()


def test_only_safetensors_and_text_are_fetched_from_a_hub():
    names = ["pytorch_model.bin", "model.pt", "model.pkl", "modeling_x.py", "x.sh", "x.ckpt", "config.json"]
    fetched = [name for name in names if any(fnmatch(name, pattern) for pattern in hub.MODEL_FILES)]
    assert fetched == ["config.json"]


def test_packages_are_pinned_and_every_one_but_torch_has_hashes():
    """There are several builds of one version of torch."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    assert len(entries) > 200
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").split("\n")
        assert re.match(r"[a-z0-9-]+==[\w.+]+( ;|\s*$)", first), first
        assert bool(hashes) != first.startswith("torch=="), first
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes), first
    for path in (ROOT / "Makefile", *(ROOT / ".github/workflows").iterdir()):
        for command in re.findall(r"pip install [^|&;]*", path.read_text()):
            assert re.search(r"==|requirements\.lock|/dev/stdin| -e \.|\$\(", command), f"{path}: {command}"


def run_a_stage():
    with _runner.open_stage("training", "mlflow", ("training", "runtime")) as stage:
        stage.report(Path("reports/training.json"), {"loss": 2.0})
        stage.text("x.txt", "words", "texts")


def test_a_secret_is_in_no_file_and_no_message(tmp_path, empty_store, monkeypatch, capsys, caplog):
    """Secrets are in the environment, in git's remote and in a file."""
    import mlflow

    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "DVC_REMOTE"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda _: None)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path("dvc.yaml").write_text("stages: {}")
    Path(".env").write_text(SECRET)
    Path("mlflow.db").write_bytes(empty_store)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "params.yaml")
    git(tmp_path, "commit", "-q", "-m", "x")
    git(tmp_path, "remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git")
    Path("src").mkdir()
    Path("src/new.py").write_text("x = 1\n")
    run_a_stage()
    monkeypatch.setattr(mlflow_logger, "PATIENCE_SECONDS", 0.1)
    mlflow_logger.follow(run_folders(tmp_path)[0])
    assert "127.0.0.1:9" in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run_a_stage()
    with pytest.raises(UserError):
        sync(tmp_path)  # the first run is for the server
    (run,) = runs(tmp_path)
    mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "artifacts"))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and ".git" not in path.parts]
    expected = {"mlflow.db", "journal.jsonl", "training.json", "uncommitted.diff"}
    assert expected <= {path.name for path in files}
    assert {path.name for path in files if SECRET.encode() in path.read_bytes()} == {".env"}
    printed = capsys.readouterr()
    assert SECRET not in caplog.text + printed.out + printed.err


def test_addresses_are_shown_without_passwords():
    assert without_password("postgresql://user:pa/ss@host/db") == "postgresql://***@host/db"
    shown = without_password("postgresql://host/db?user=me&password=secret&x=1")
    assert shown == "postgresql://host/db?user=me&password=***&x=1"
