"""Nobody is let in: no pickle, no foreign code, no open port, no secret told, no shell, no archive climbs."""

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
from compactgpt.tracking.mlflow_logger import PasswordFilter, sync
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
    """The syntax tree of a source."""
    return list(ast.walk(ast.parse(path.read_text())))


# --- no pickle


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


def saved(value, **how) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def test_a_pickle_is_known_whatever_its_dress():
    tensors = {"w": torch.ones(2)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": [1, 2.5, "x"]}, protocol))
    assert is_pickle(saved(tensors))
    assert is_pickle(saved(tensors, _use_new_zipfile_serialization=False))
    buffer = io.BytesIO()
    np.save(buffer, np.array([object], dtype=object), allow_pickle=True)
    assert is_pickle(buffer.getvalue())
    for innocent in (b"", b"{}\n", b"words.", b"PAR1", json.dumps(list(range(9))).encode()):
        assert not is_pickle(innocent)


def test_no_source_reads_or_writes_pickle():
    """By its syntax tree: imports, calls and flags, whatever they are called."""
    banned = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
    for path in SOURCES:
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & banned, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "torch.save"), path
                flags = {word.arg: word.value for word in node.keywords}
                for flag in ("allow_pickle", "trust_remote_code", "shell"):
                    value = flags.get(flag)
                    assert value is None or ast.literal_eval(value) is False, f"{path}: {flag}"


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


# --- nothing foreign runs


CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\nraise SystemExit('it ran')\n"


@pytest.fixture
def offered(tmp_path):
    """A folder that offers a pickle and modeling code beside a good model."""
    encoding = save_tokenizer(tmp_path / "tokenizer")
    folder, ran = tmp_path / "offered", tmp_path / "ran"
    save_hf(tiny_gpt(encoding.n_vocab), folder, tmp_path / "tokenizer")

    class Trap:
        def __reduce__(self):
            return Path.write_text, (ran, "ran")

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "modeling_x.py").write_text(CODE.format(str(ran)))
    return folder, ran


def test_pickled_weights_are_never_opened(offered):
    folder, ran = offered
    assert baselines.read_folder(folder).model is not None  # by its safetensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no \\*\\.safetensors"):
        baselines.read_folder(folder)
    assert not ran.exists()


def test_code_that_comes_with_a_model_is_never_run(offered):
    folder, ran = offered
    facts = json.loads((folder / "config.json").read_bytes())
    classes = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    write_json(folder / "config.json", {**facts, "model_type": "x", "auto_map": classes})
    with pytest.raises(BadData, match="can't be read as a causal language model"):
        baselines.read_folder(folder)
    assert not ran.exists()


def test_only_safetensors_and_words_are_fetched_from_a_hub():
    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in hub.MODEL_FILES)

    assert fetched("model.safetensors")
    assert fetched("config.json")
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pkl",
        "modeling_x.py",
        "x.sh",
        "tf_model.h5",
        "x.ckpt",
    ):
        assert not fetched(name)


def test_what_comes_from_elsewhere_is_pinned():
    tree = read_yaml(ROOT / "params.yaml")
    specs = tree["baseline"]["specs"].values()
    for spec in specs:
        if spec["kind"] == "hub":
            assert re.fullmatch("[0-9a-f]{40}", spec["revision"])
        if spec["kind"] == "gguf":
            assert re.fullmatch("[0-9a-f]{64}", spec["sha256"])
            assert "==" in spec["wheel"]
    assert {"hub", "gguf"} <= {spec["kind"] for spec in specs}
    for place in ("Makefile", *(path.relative_to(ROOT) for path in (ROOT / ".github/workflows").iterdir())):
        for word in re.findall(r"pip install [^|&;]*", (ROOT / place).read_text()):
            assert re.search(r"==|requirements\.lock|/dev/stdin| -e \.|\$\(", word), f"{place}: {word}"


def test_every_package_but_torch_has_hashes():
    """torch is built in several ways under one version, one of them for the machine at hand."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    assert len(entries) > 200
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").split("\n")
        assert re.match(r"[a-z0-9-]+==[\w.+]+( ;|\s*$)", first), first
        assert bool(hashes) != first.startswith("torch=="), first
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes), first
    assert "verify-hashes" not in (ROOT / "Makefile").read_text()


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


# --- servers, processes, files


def test_servers_listen_to_this_machine_alone():
    """The real server: test_server.py. Processes that train together: test_launch.py."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    started = [line for line in makefile.splitlines() if "mlflow server" in line]
    assert started
    for line in started:
        assert "--host 127.0.0.1" in line
        assert '--allowed-hosts "localhost:$(PORT),127.0.0.1:$(PORT)"' in line
    for path in [ROOT / "Makefile", *SOURCES, *(ROOT / ".ci").iterdir()]:
        text = path.read_text() if path.is_file() else ""
        assert "0.0.0.0" not in text, path
        assert "disable-security-middleware" not in text, path


def test_no_process_goes_through_a_shell_and_no_text_is_run_as_code():
    banned = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec",
              "asyncio.create_subprocess_shell", "tempfile.mktemp"}  # fmt: skip
    started = 0
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in banned, f"{path}: {name}"
                started += name.startswith("subprocess.")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("/tmp"), path
    assert started > 5


def test_temporary_files_are_private(tmp_path, monkeypatch):
    seen = []

    class Seen:
        def artifact(self, path, folder):
            seen.append(stat.S_IMODE(path.parent.stat().st_mode))

    _runner.Stage("training", PARAMS, Seen()).text("x.txt", "words", "")
    assert seen == [0o700]
    found = []
    monkeypatch.setattr(
        wheels, "_download", lambda wheel, folder: found.append(folder) or (_ for _ in ()).throw(BadData("x"))
    )
    with pytest.raises(BadData):
        wheels.fetch_wheel_member("a==1", "a/x", "0" * 64, tmp_path / "cache")
    assert not found[0].exists()
    for path in SOURCES:  # all of these are private, mktemp is not
        used = set(re.findall(r"tempfile\.(\w+)", path.read_text()))
        assert used <= {"TemporaryDirectory", "TemporaryFile", "NamedTemporaryFile", "mkdtemp"}, path


def test_a_wheel_whose_members_climb_out_or_are_links_writes_nothing_else(tmp_path, monkeypatch):
    archive = tmp_path / "index" / "a-1-py3-none-any.whl"
    archive.parent.mkdir()
    link = zipfile.ZipInfo("a/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("../../evil", "evil")
        made.writestr("/evil", "evil")
        made.writestr(link, "/etc/passwd")
        made.writestr("a/good", "good")
    monkeypatch.setattr(wheels, "_download", lambda wheel, folder: archive)
    for member in ("../../evil", "/evil", "a/link"):
        with pytest.raises(UserError):
            wheels.fetch_wheel_member("a==1", member, "0" * 64, tmp_path / "x/y/cache")
    assert [path for path in (tmp_path / "x").rglob("*") if path.is_file()] == []
    assert not list(tmp_path.rglob("evil"))


# --- secrets


SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "GITHUB_TOKEN",
)


@pytest.fixture
def project(tmp_path, empty_store, monkeypatch):
    """A repository with secrets all around it: in the environment, its remote, beside its files."""
    for name in (*SECRETS, "DVC_REMOTE"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/new.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "params.yaml")
    git(tmp_path, "commit", "-q", "-m", "x")
    git(tmp_path, "remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git")
    (tmp_path / ".env").write_text(SECRET)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return tmp_path


def test_a_secret_is_told_nowhere(project, monkeypatch, capsys):
    import mlflow

    """A door tells its facts, the journal is copied to MLflow, a server refuses: it is in no file of them."""
    with _runner.open_stage("training", Path("params.yaml"), "mlflow", ("training", "runtime")) as stage:
        stage.report(Path("reports/training.json"), {"loss": 2.0})
        stage.text("x.txt", "words", "texts")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PasswordFilter("%(message)s"))
    try:
        copy(project)
    except Exception:
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "not taken", (), sys.exc_info()))
    assert "127.0.0.1:9" in stream.getvalue()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with _runner.open_stage("training", Path("params.yaml"), "mlflow", ("training", "runtime")) as stage:
        stage.report(Path("reports/training.json"), {"loss": 2.0})
    with pytest.raises(UserError):
        sync(project)  # the first run is meant for the server
    (run,) = runs(project)
    mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(project / "artifacts"))
    assert run.data.tags["git.dirty"] == "true"
    held = [
        path
        for path in project.rglob("*")
        if path.is_file() and ".git" not in path.parts and path.name != ".env"
    ]
    assert {"mlflow.db", "journal.jsonl", "training.json", "uncommitted.diff"} <= {path.name for path in held}
    for path in held:
        assert SECRET.encode() not in path.read_bytes(), path
    said = capsys.readouterr()
    assert SECRET not in stream.getvalue() + said.out + said.err


def test_params_have_no_place_for_a_secret():
    """A run logs all of params.yaml: whoever wants to give a password or an address with one is refused."""
    text = (ROOT / "params.yaml").read_text()
    for line in (text, (ROOT / "dvc.yaml").read_text()):
        assert not re.search(r"(?i)password|secret|api_key|access_key|://[^/\s]+@", line)
