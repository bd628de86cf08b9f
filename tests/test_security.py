"""No pickle, no foreign code, no open port, no logged secret, no shell, no file outside of its folder."""

import ast
import io
import json
import logging
import pickle
import pickletools
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from compactgpt.common.errors import BadData, MissingInput, UserError
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import sha256_file, write_json
from compactgpt.config import load_params
from compactgpt.data import hub, wheels
from compactgpt.evaluation import baselines
from compactgpt.model.huggingface import save_hf
from compactgpt.tracking.journal import PasswordFilter, without_password
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.store import open_store
from compactgpt.training.checkpoint import save_state
from compactgpt.training.optim import Optimizers
from stages import _runner
from tests.support.tiny_models import save_tokenizer, tiny_gpt
from tests.support.tracking_store import copy, git, runs
from tests.support.trained_project import register

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("src", "stages", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]
SECRET = "planted-7f3a9c"
PARAMS = load_params(ROOT / "params.yaml")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle of any protocol, or a zip that holds one (torch.save, numpy's objects)."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(is_pickle(archive.read(name)) for name in archive.namelist())
    if content.startswith(b"\x93NUMPY"):
        return b"'|O'" in content[:200]
    try:
        last = None
        for opcode, _, _ in pickletools.genops(content):
            last = opcode.name
    except (ValueError, UnicodeDecodeError):
        return False
    return last == "STOP"


def test_the_check_for_pickles_finds_them_in_every_form():
    buffers = [io.BytesIO() for _ in range(3)]
    torch.save({"w": torch.ones(2)}, buffers[0])
    torch.save({"w": torch.ones(2)}, buffers[1], _use_new_zipfile_serialization=False)
    np.save(buffers[2], np.array([object], dtype=object), allow_pickle=True)
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    pickles = [pickle.dumps({"a": [1, 2.5, "x"]}, protocol) for protocol in protocols]
    assert all(map(is_pickle, [*pickles, *(buffer.getvalue() for buffer in buffers)]))
    assert not any(map(is_pickle, (b"", b"{}\n", b"words.", b"PAR1", b"[0, 1, 2]")))


def test_no_source_reads_or_writes_pickle_or_uses_a_shell():
    modules = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
    calls = {"torch.load", "torch.save", "os.system", "os.popen", "subprocess.getoutput", "eval", "exec",
             "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "tempfile.mktemp"}  # fmt: skip
    for path in SOURCES:
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & modules, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, path
                flags = {word.arg: word.value for word in node.keywords}
                for flag in ("allow_pickle", "trust_remote_code", "shell"):
                    value = flags.get(flag)
                    assert value is None or ast.literal_eval(value) is False, f"{path}: {flag}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("/tmp"), path


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


@pytest.fixture
def foreign_model(tmp_path):
    """A folder that offers a pickle and modeling code next to a valid model; neither may run."""
    encoding = save_tokenizer(tmp_path / "tokenizer")
    folder, trace = tmp_path / "offered", tmp_path / "ran"
    save_hf(tiny_gpt(encoding.n_vocab), folder, tmp_path / "tokenizer")

    class Trap:
        def __reduce__(self):
            return Path.write_text, (trace, "ran")

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    code = f"from pathlib import Path\nPath({str(trace)!r}).write_text('ran')\n"
    (folder / "modeling_x.py").write_text(code)
    yield folder
    assert not trace.exists()


def test_pickled_weights_are_never_opened(foreign_model):
    assert baselines.read_folder(foreign_model).model is not None  # from its safetensors
    (foreign_model / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no \\*\\.safetensors"):
        baselines.read_folder(foreign_model)


def test_code_that_comes_with_a_model_is_never_run(foreign_model):
    facts = json.loads((foreign_model / "config.json").read_bytes())
    classes = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    write_json(foreign_model / "config.json", {**facts, "model_type": "x", "auto_map": classes})
    with pytest.raises(BadData, match="can't be read as a causal language model"):
        baselines.read_folder(foreign_model)


def test_downloads_are_pinned_and_only_safetensors_and_text_are_fetched_from_a_hub():
    def is_fetched(name):
        return any(fnmatch(name, pattern) for pattern in hub.MODEL_FILES)

    assert is_fetched("model.safetensors")
    assert is_fetched("config.json")
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "modeling_x.py", "x.sh", "x.ckpt"):
        assert not is_fetched(name)
    for spec in read_yaml(ROOT / "params.yaml")["baseline"]["specs"].values():
        if spec["kind"] == "hub":
            assert re.fullmatch("[0-9a-f]{40}", spec["revision"])
        if spec["kind"] == "gguf":
            assert re.fullmatch("[0-9a-f]{64}", spec["sha256"])
    for path in (ROOT / "Makefile", *(ROOT / ".github/workflows").iterdir()):
        for command in re.findall(r"pip install [^|&;]*", path.read_text()):
            assert re.search(r"==|requirements\.lock|/dev/stdin| -e \.|\$\(", command), f"{path}: {command}"


def test_every_package_but_torch_has_hashes():
    """There are several builds of one version of torch."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    assert len(entries) > 200
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").split("\n")
        assert re.match(r"[a-z0-9-]+==[\w.+]+( ;|\s*$)", first), first
        assert bool(hashes) != first.startswith("torch=="), first
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes), first


def make_wheel(folder, name, code):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        wheel.writestr(
            f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}-1.dist-info/RECORD", f"{name}.py,,\n")
    return path


def test_a_package_that_is_not_the_one_of_the_lock_is_not_installed(tmp_path):
    """By uv, as `make setup` calls it: some have hashes, torch has none."""
    links, lock, site = tmp_path / "links", tmp_path / "requirements.lock", tmp_path / "site"
    wheel, _ = make_wheel(links, "good", "x = 1"), make_wheel(links, "torch", "x = 1")
    lock.write_text(f"good==1 \\\n    --hash=sha256:{sha256_file(wheel)}\ntorch==1\n")
    words = ["--no-index", "--find-links", str(links), "--target", str(site), "-r", str(lock), "--no-cache"]

    def install():
        command = [sys.executable, "-m", "uv", "pip", "install", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = install()
    assert done.returncode == 0, done.stderr
    assert {path.read_text() for path in site.glob("*.py")} == {"x = 1"}
    shutil.rmtree(site)
    make_wheel(links, "good", "x = 2")
    done = install()
    assert done.returncode == 1
    assert "Hash mismatch for `good==1`" in done.stderr
    assert not (site / "good.py").exists()


def test_servers_listen_on_this_machine_only():
    """tests/tracking/test_server.py asks the real server, tests/training/test_launch.py the processes."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (started,) = [line for line in makefile.splitlines() if "mlflow server" in line]
    assert "--host 127.0.0.1" in started
    assert '--allowed-hosts "localhost:$(PORT),127.0.0.1:$(PORT)"' in started
    for path in [ROOT / "Makefile", *SOURCES, ROOT / ".ci/run"]:
        assert "0.0.0.0" not in path.read_text(), path


def test_temporary_files_are_private(tmp_path, monkeypatch):
    seen = []

    class Tracker:
        def artifact(self, path, folder):
            seen.append(stat.S_IMODE(path.parent.stat().st_mode))

    _runner.Stage("training", PARAMS, Tracker()).text("x.txt", "words", "")
    assert seen == [0o700]
    for path in SOURCES:  # all of these are private
        used = set(re.findall(r"tempfile\.(\w+)", path.read_text()))
        assert used <= {"TemporaryDirectory", "TemporaryFile", "NamedTemporaryFile", "mkdtemp"}, path


@pytest.mark.parametrize("member", ["../../evil", "/evil", "a/link"])
def test_a_wheel_with_paths_or_links_out_of_it_writes_no_file(tmp_path, monkeypatch, member):
    archive = tmp_path / "a-1-py3-none-any.whl"
    link = zipfile.ZipInfo("a/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("../../evil", "evil")
        wheel.writestr("/evil", "evil")
        wheel.writestr(link, "/etc/passwd")
    monkeypatch.setattr(wheels, "_download", lambda wheel, folder: archive)
    with pytest.raises(UserError):
        wheels.fetch_wheel_member("a==1", member, "0" * 64, tmp_path / "x/y/cache")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


@pytest.fixture
def project(tmp_path, empty_store, monkeypatch):
    """A repository with secrets in the environment, in its remote's address and in a file."""
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
                 "GITHUB_TOKEN", "DVC_REMOTE"):  # fmt: skip
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "params.yaml")
    git(tmp_path, "commit", "-q", "-m", "x")
    git(tmp_path, "remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/new.py").write_text("x = 1\n")
    (tmp_path / ".env").write_text(SECRET)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return tmp_path


def run_a_stage():
    with _runner.open_stage("training", Path("params.yaml"), "mlflow", ("training", "runtime")) as stage:
        stage.report(Path("reports/training.json"), {"loss": 2.0})
        stage.text("x.txt", "words", "texts")


def test_a_secret_is_in_no_file_and_no_message(project, monkeypatch, capsys):
    """A stage writes its journal, an MLflow server refuses it, and mlflow.db takes it."""
    import mlflow

    run_a_stage()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PasswordFilter("%(message)s"))
    try:
        copy(project)
    except Exception:
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "refused", (), sys.exc_info()))
    assert "127.0.0.1:9" in stream.getvalue()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run_a_stage()
    with pytest.raises(UserError):
        sync(project)  # the first run is for the server
    (run,) = runs(project)
    mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(project / "artifacts"))
    files = [path for path in project.rglob("*") if path.is_file() and ".git" not in path.parts]
    expected = {"mlflow.db", "journal.jsonl", "training.json", "uncommitted.diff"}
    assert expected <= {path.name for path in files}
    for path in files:
        assert path.name == ".env" or SECRET.encode() not in path.read_bytes(), path
    printed = capsys.readouterr()
    assert SECRET not in stream.getvalue() + printed.out + printed.err


def test_params_have_no_key_for_a_secret():
    """MLflow gets all of params.yaml."""
    for name in ("params.yaml", "dvc.yaml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"(?i)password|secret|api_key|access_key|://[^/\s]+@", text)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://user:pa/ss@host/db", "postgresql://***@host/db"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_addresses_are_shown_without_passwords(address, shown):
    assert without_password(address) == shown
