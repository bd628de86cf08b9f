"""Each reader of a file accepts damaged content or refuses it with a message: no traceback, no hang.

Hypothesis changes bytes, keys and types. `make test` tries the same examples every time; BAD_INPUTS says how
many of each property to draw instead (`make test-robustness`: 50).
"""

import copy
import gzip
import io
import json
import os
import resource
import signal
import zipfile
from functools import partial
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compactgpt.common.errors import BadData, UserError
from compactgpt.common.sections import check_section, read_yaml
from compactgpt.common.storage import MANIFEST, atomic_folder, json_bytes, verified_manifest
from compactgpt.config import load_params, parse_params
from compactgpt.data import wheels
from compactgpt.data.text_files import read_file
from compactgpt.data.token_files import evaluation_windows, open_tokens
from compactgpt.data.tokenizer import load_encoding
from compactgpt.evaluation import baselines
from compactgpt.gate import gate, references
from compactgpt.model.huggingface import load_hf, save_hf
from compactgpt.model.weights import load_model, save_model
from compactgpt.reporting import claims, evidence, pages, schemas, verify
from compactgpt.tracking.dvc_files import entries_of, outs
from compactgpt.tracking.journal import journal_lines
from compactgpt.training.checkpoint import load_newest_state, save_state
from tests.support.comparison_inputs import PARAMS, ROOT, make_place
from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt

EXAMPLES = int(os.environ.get("BAD_INPUTS", "0"))
MEMORY_BYTES = 2**31  # that a reader may take in addition to the tests
SECONDS = 5  # that a reader may take, on a busy machine

POSITIONS = st.floats(0, 1, exclude_max=True)
EDITS = st.sampled_from(["change", "cut", "insert"])
DAMAGE = st.lists(st.tuples(EDITS, POSITIONS, st.binary(min_size=1, max_size=6)), min_size=1, max_size=3)
DROP = "a value that means: delete the key"
NUMBERS = [True, -1, 0, 1, 10**30, 1e308, -0.5, 2**63, 2**31]
OTHERS = [None, "", "x", "../../etc/passwd", "\x00", "1e3", "nan", "漢" * 99, [], {}, [[]], {"": {}}, [None]]
CHANGE = st.tuples(POSITIONS, st.sampled_from([DROP, *NUMBERS, *OTHERS]))
CHANGES = st.lists(CHANGE, min_size=1, max_size=3)


def examples(number):
    """Settings of a property: how many examples `make test` tries."""
    return settings(
        max_examples=EXAMPLES or number, derandomize=not EXAMPLES, deadline=None, database=None,
        phases=[Phase.generate],  # the damage is small as it is drawn
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def damage_bytes(content: bytes, damage) -> bytes:
    for edit, position, new in damage:
        at = int(position * len(content))
        rest = {"change": new + content[at + len(new) :], "cut": b"", "insert": new + content[at:]}
        content = content[:at] + rest[edit]
    return content


def change_tree(tree, changes):
    """Return a tree of JSON where some values are deleted or have another type."""
    tree = copy.deepcopy(tree)
    for position, value in changes:
        if nodes := list(_nodes(tree)):
            parent, key = nodes[int(position * len(nodes))]
            if value == DROP:
                del parent[key]
            else:
                parent[key] = copy.deepcopy(value)
    return tree


def _nodes(tree):
    for key, child in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(child, dict | list):
            yield from _nodes(child)


def change_json(content, changes):
    return json.dumps(change_tree(json.loads(content), changes)).encode()


def is_refused(read, *arguments) -> bool:
    """Return whether a reader raises a UserError; any other exception fails the test."""
    message = None
    signal.alarm(SECONDS)
    try:
        read(*arguments)
    except UserError as error:
        message = str(error).strip()
    finally:
        signal.alarm(0)
    assert message is None or 0 < len(message) < 20_000
    return message is not None


@pytest.fixture(scope="module", autouse=True)
def _bounds():
    """A reader that hangs or takes too much memory fails."""

    def fail(_signal, _frame):
        raise AssertionError("it hangs")

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, fail)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


# --- YAML and JSON

LOCK = {"schema": "2.0", "stages": {"a": {"cmd": "b", "outs": [{"path": "c", "md5": "d" * 32}]}}}
ACCEPTED = ROOT / "reports/accepted.json"


def read_claims(tree, _folder):
    claims.judge_claims(check_section(tree, claims.Claims, "claims.yaml").claims, {})


def read_lock(tree, _folder):
    for entry in entries_of(json_bytes(tree)).values():
        outs(entry)


def read_reference(tree, folder):
    (folder / "accepted.json").write_text(json.dumps(tree))
    accepted = references.read_reference("accepted.json", folder)
    noise = gate.Noise(0.01, 7, "eight seeds")
    gate.run_gate(accepted, references.read_accepted(ACCEPTED), PARAMS.regression, noise)


@pytest.mark.parametrize(
    ("tree", "read"),
    [
        pytest.param(read_yaml(ROOT / "params.yaml"), lambda tree, _: parse_params(tree), id="params.yaml"),
        pytest.param(read_yaml(ROOT / "claims.yaml"), read_claims, id="claims.yaml"),
        pytest.param(LOCK, read_lock, id="dvc.lock"),
        pytest.param(json.loads(ACCEPTED.read_bytes()), read_reference, id="accepted.json"),
    ],
)
@examples(50)
@given(changes=CHANGES)
def test_files_with_other_keys_and_types(scratch, tree, read, changes):
    is_refused(read, change_tree(tree, changes), scratch)


@pytest.mark.parametrize(
    "text",
    [
        *("a: 2001-99-99\n", "a: !!int word\n", "a: !!binary é\n", "a: " + "9" * 5000 + "\n"),
        *("[" * 500, "{a: " * 500, "\x00", "a: !!python/name:os.system\n", "<<: 1\n", "&a [*a, *a]\n"),
    ],
)
def test_yaml_that_is_made_to_break_its_reader(scratch, text):
    (scratch / "odd.yaml").write_text(text)
    assert is_refused(load_params, scratch / "odd.yaml")


# --- texts, wheels, journals

LINES = b'{"text": "one"}\n{"text": "\\u00e4"}\n'


def parquet_bytes():
    table = pyarrow.table({"n": [1, 2, 3], "text": ["a", "b" * 99, "ä"]})
    pyarrow.parquet.write_table(table, file := io.BytesIO(), data_page_size=64)
    return file.getvalue()


def wheel_bytes():
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x", b"content" * 9)
    return file.getvalue()


FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.txt": "\ufeffone\ntwo ä".encode(),
    "a.parquet": parquet_bytes(),
    "a.whl": wheel_bytes(),
}


@pytest.mark.parametrize("name", FILES)
@examples(20)
@given(damage=DAMAGE)
def test_files_with_other_bytes(scratch, name, damage):
    (scratch / name).write_bytes(damage_bytes(FILES[name], damage))
    if name == "a.whl":
        is_refused(wheels.read_member, scratch / name, "a==1", "a/x")
    else:
        is_refused(lambda: list(read_file(scratch, name, PARAMS.download)))


@examples(60)
@given(damage=DAMAGE)
def test_damaged_lines_of_a_journal_are_left_out(damage):
    lines = [{"kind": "start", "pid": 1}, {"kind": "metrics", "step": 1, "values": {"a": 1.5}}]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    assert not is_refused(journal_lines, damage_bytes(content, damage))


# --- folders with a manifest: token files, tokenizers, checkpoints, states, other people's models


class Folder:
    """A folder whose original files are known, and the function that reads it."""

    def __init__(self, path: Path, read) -> None:
        self.path, self.read = path, partial(read, path)
        self.files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}

    def write(self, name: str, content: bytes, *, new_manifest: bool) -> None:
        """Restore all files but one, which gets other content.

        With `new_manifest` the manifest has its new hash, as an attacker would write it.
        """
        changed = self.files | {name: content}
        if new_manifest and MANIFEST in self.files and name != MANIFEST:
            manifest = json.loads(self.files[MANIFEST])
            manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
            changed[MANIFEST] = json_bytes(manifest)
        for each, written in changed.items():
            (self.path / each).write_bytes(written)


def read_tokens(path):
    verified_manifest(path)
    list(evaluation_windows(open_tokens(path / "val.tokens"), 8))


def read_state(path):
    if load_newest_state(path.parent, "key", {"weight": torch.ones(3)}) is None:
        raise BadData("passed over")


def read_foreign(path):
    """Read what transformers makes of a model, and what our own reader of GPT-2 makes of it."""
    refused = [is_refused(read, path) for read in (baselines.read_folder, load_hf)]
    if all(refused):
        raise BadData("refused by both")


@pytest.fixture(scope="module")
def folders(scratch):
    encoding = save_tokenizer(scratch / "tokenizer")
    with atomic_folder(scratch / "tokens") as temporary:
        save_split(temporary / "val.tokens", encoding)
    save_model(tiny_gpt(40, n_layer=1, n_embd=4), scratch / "model")
    save_state(scratch / "states", "key", 2, {"weight": torch.ones(3)}, {"rows": []})
    save_hf(tiny_gpt(encoding.n_vocab, n_layer=1, n_embd=4), scratch / "foreign", scratch / "tokenizer")
    baselines.read_folder(scratch / "foreign")  # imports take more time than a reader may take
    readers = {"tokens": read_tokens, "tokenizer": load_encoding, "model": load_model}
    readers |= {"states/step-00000002": read_state, "foreign": read_foreign}
    return {name: Folder(scratch / name, read) for name, read in readers.items()}


@pytest.mark.parametrize("name", ["tokens", "tokenizer", "model", "states/step-00000002", "foreign"])
@examples(30)
@given(data=st.data())
def test_folders_with_files_of_other_bytes(folders, name, data):
    """With the manifest that was written any change is refused; with another one it may be read."""
    folder = folders[name]
    file = data.draw(st.sampled_from(sorted(folder.files)))
    new_manifest = data.draw(st.booleans())
    content = damage_bytes(folder.files[file], data.draw(DAMAGE))
    folder.write(file, content, new_manifest=new_manifest)
    may_be_read = new_manifest or file == MANIFEST or name == "foreign" or content == folder.files[file]
    assert is_refused(folder.read) or may_be_read


def change_safetensors(content, changes):
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], changes)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def change_token_file(content, changes):
    header = change_json(content[8:1024], changes)
    return content[:8] + header.ljust(1015)[:1015] + b"\n" + content[1024:]


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("tokens", "val.tokens", change_token_file),
        ("tokens", MANIFEST, change_json),
        ("tokenizer", MANIFEST, change_json),
        ("model", "config.json", change_json),  # among others shapes that no memory holds
        ("model", "model.safetensors", change_safetensors),
        pytest.param("foreign", "config.json", change_json, marks=pytest.mark.slow),
    ],
)
@examples(30)
@given(changes=CHANGES)
def test_folders_with_headers_of_other_keys_and_types(folders, name, file, change, changes):
    folder = folders[name]
    folder.write(file, change(folder.files[file], changes), new_manifest=True)
    is_refused(folder.read)


def test_a_model_of_more_layers_than_it_has_tensors_is_refused_before_it_is_built(folders):
    folder = folders["foreign"]
    config = json.loads(folder.files["config.json"]) | {"n_layer": 10**12}
    folder.write("config.json", json_bytes(config), new_manifest=False)
    with pytest.raises(BadData, match="has 1,000,000,000,000 layers, but the weight files have only 16"):
        baselines.read_folder(folder.path)


# --- reports

REPORTS = ["evaluation", "baseline/xz", "estimate", "training", "inspection", "download", "tokenization"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("project"))


def sources(project):
    return schemas.read_sources(project, project / "reports", project / "data", project / "models", PARAMS)


@examples(40)
@given(name=st.sampled_from(REPORTS), changes=CHANGES)
def test_a_changed_report_is_a_difference_for_verify_and_no_bug_for_the_comparison(project, name, changes):
    path = project / f"reports/{name}.json"
    content = path.read_bytes()
    found = verify.Verification()
    path.write_bytes(change_json(content, changes))
    try:
        is_refused(lambda: pages.render_comparison(evidence.build_record(sources(project))))
        if name in REPORTS[:2]:
            assert not is_refused(verify.run_check, verify.check_numbers, project, PARAMS, found)
            assert any(f"reports/{name}.json" in line for line in found.differences)
    finally:
        path.write_bytes(content)


def test_different_numbers_of_answers_to_the_same_questions_are_refused(project):
    report = json.loads((project / "reports/evaluation.json").read_bytes())
    del report["tasks"]["cloze"]["hits"]
    (project / "reports/evaluation.json").write_bytes(json_bytes(report))
    with pytest.raises(BadData, match="different numbers of questions in the task cloze"):
        sources(project)
