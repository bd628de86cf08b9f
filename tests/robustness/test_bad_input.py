"""Each reader of a file accepts damaged content or refuses it in a sentence: no traceback, no hang.

Hypothesis changes bytes, keys and types. `make test` tries the same examples every time; BAD_INPUTS says how
many of each property to draw instead (`make test-robustness`: 50).
"""

import copy
import gzip
import hashlib
import io
import json
import os
import resource
import signal
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compactgpt.common.errors import BadData, UserError
from compactgpt.common.sections import check_section, load_section, read_yaml
from compactgpt.common.storage import (
    MANIFEST,
    atomic_folder,
    json_bytes,
    read_json,
    verified_manifest,
    write_json,
)
from compactgpt.config import Training, load_params, parse_params
from compactgpt.data import wheels
from compactgpt.data.text_files import read_file
from compactgpt.data.token_files import evaluation_windows, open_tokens
from compactgpt.data.tokenizer import load_encoding
from compactgpt.evaluation import baselines
from compactgpt.gate import gate, references
from compactgpt.model.huggingface import load_hf, save_hf
from compactgpt.model.weights import load_model, save_model
from compactgpt.reporting.claims import Claims, judge_claims
from compactgpt.reporting.evidence import build_record
from compactgpt.reporting.markdown import render_comparison
from compactgpt.reporting.schemas import read_sources
from compactgpt.reporting.verify import Verification, check_numbers, run_check
from compactgpt.tracking.dvc_files import entries_of, outs
from compactgpt.tracking.journal import journal_lines
from compactgpt.training.checkpoint import load_newest_state, save_state
from compactgpt.training.optim import Optimizers
from tests.support.comparison_inputs import LIKELIHOOD, PARAMS, ROOT, make_place
from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt

EXAMPLES = int(os.environ.get("BAD_INPUTS", "0"))
MEMORY_BYTES = 2**30  # that one reader may take beside what the tests have
SECONDS = 5  # that one reader may take, on a busy machine

PLACES = st.floats(0, 1, exclude_max=True)
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["change", "cut", "insert", "repeat"]), PLACES, st.binary(min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=3,
)
ODD = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 1, 10**30, 1e308, -0.5, "", "x", "../../etc/passwd", "\x00", "1e3", [], {}]
    ),
    st.sampled_from([[[]], {"": {}}, [None], {"value": "x"}, "nan", "漢" * 99, 2**63, 2**31]),
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["drop", "rename", "replace", "add"]), PLACES, ODD), min_size=1, max_size=3
)


def few(at_most):
    """Settings of a property: so many examples in `make test`, BAD_INPUTS where that is set."""
    return settings(
        max_examples=EXAMPLES or at_most,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the damage is small as it is drawn
        suppress_health_check=list(HealthCheck),
    )


def damaged(content: bytes, damage) -> bytes:
    """Bytes, changed at some places."""
    for how, where, new in damage:
        place = int(where * len(content))
        if how == "change":
            content = content[:place] + new + content[place + len(new) :]
        elif how == "cut":
            content = content[:place]
        elif how == "insert":
            content = content[:place] + new + content[place:]
        else:
            content = content[:place] + content[: min(place, 4096)] + content[place:]
    return content


def changed(tree, changes):
    """A tree of JSON, changed at some places."""
    tree = copy.deepcopy(tree)
    for how, where, value in changes:
        nodes, value = list(_nodes(tree)), copy.deepcopy(value)
        if not nodes:
            break
        parent, key = nodes[int(where * len(nodes))]
        if how == "drop":
            del parent[key]
        elif how == "replace" or isinstance(parent, list):
            parent[key] = value
        elif how == "rename":
            parent[key + "x"] = parent.pop(key)
        else:
            parent["unknown"] = value
    return tree


def _nodes(tree):
    for key, child in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(child, dict | list):
            yield from _nodes(child)


def is_refused(read) -> bool:
    """Whether a reader refuses in a sentence. Anything else that it raises is a bug of ours."""
    signal.alarm(SECONDS)
    try:
        read()
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert len(message) < 20_000
        return True
    finally:
        signal.alarm(0)
    return False


def _hangs(_signal, _frame):
    raise AssertionError("it hangs")


@pytest.fixture(scope="module", autouse=True)
def bounded():
    """A reader that hangs or takes too much memory fails."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, _hangs)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.signal(signal.SIGALRM, handler)


# --- YAML


TREE = read_yaml(ROOT / "params.yaml")


@few(60)
@given(CHANGES)
def test_params_with_other_keys_and_types(changes):
    is_refused(lambda: parse_params(changed(TREE, changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@few(40)
@given(damage=DAMAGE)
def test_yaml_with_other_bytes(folder, damage):
    """One section by itself: the YAML reader that DVC has takes its time."""
    lines = (ROOT / "params.yaml").read_bytes().split(b"\ntraining:\n")[1].split(b"\n\n")[0].splitlines()
    content = b"\n".join(line[2:] for line in lines)
    (folder / "training.yaml").write_bytes(damaged(content, damage))
    is_refused(lambda: load_section(folder / "training.yaml", Training))


@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99\n",
        "a: !!int word\n",
        "a: !!float x\n",
        "a: !!timestamp x\n",
        "a: !!binary é\n",
        "a: " + "9" * 5000 + "\n",
        "[" * 500,
        "{a: " * 500,
        "a: !!python/name:os.system\n",
        "<<: 1\n",
        "&a [*a, *a]\n",
        "\x00",
    ],
)
def test_yaml_that_is_made_to_break_its_reader(folder, text):
    (folder / "odd.yaml").write_text(text)
    assert is_refused(lambda: load_params(folder / "odd.yaml"))


CLAIMS = read_yaml(ROOT / "claims.yaml")


@few(40)
@given(CHANGES)
def test_claims_with_other_keys_and_types(changes):
    is_refused(
        lambda: judge_claims(check_section(changed(CLAIMS, changes), Claims, "claims.yaml").claims, {})
    )


# --- files of the user's corpus, wheels, dvc.lock, journals


LINES = b'{"text": "one"}\n{"text": "\\u00e4"}\n'


def parquet_bytes():
    table = pyarrow.table({"n": [1, 2, 3], "text": ["a", "b" * 99, "ä"]})
    pyarrow.parquet.write_table(table, file := io.BytesIO(), data_page_size=64)
    return file.getvalue()


TEXTS = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.txt": "\ufeffone\ntwo ä".encode(),
    "a.parquet": parquet_bytes(),
}


@few(80)
@given(name=st.sampled_from(sorted(TEXTS)), damage=DAMAGE)
def test_files_of_a_corpus(folder, name, damage):
    (folder / name).write_bytes(damaged(TEXTS[name], damage))
    is_refused(lambda: list(read_file(folder, name, PARAMS.download)))


@few(40)
@given(how=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]), damage=DAMAGE)
def test_wheels(folder, how, damage):
    with zipfile.ZipFile(file := io.BytesIO(), "w", how) as archive:
        archive.writestr("a/x", b"content" * 9)
    (folder / "a.whl").write_bytes(damaged(file.getvalue(), damage))
    is_refused(lambda: wheels.read_member(folder / "a.whl", "a==1", "a/x"))


LOCK = {"schema": "2.0", "stages": {"a": {"cmd": "b", "outs": [{"path": "c", "md5": "d" * 32}]}}}


@few(60)
@given(changes=CHANGES)
def test_dvc_lock(changes):
    is_refused(lambda: [outs(entry) for entry in entries_of(json_bytes(changed(LOCK, changes))).values()])


@few(60)
@given(damage=DAMAGE)
def test_journals_of_runs(damage):
    """Damaged lines are left out: nothing is raised."""
    lines = [{"kind": "start", "pid": 1}, {"kind": "metrics", "step": 1, "values": {"a": 1.5}}]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    assert not is_refused(lambda: journal_lines(damaged(content, damage)))


# --- token files, tokenizers, checkpoints


def resealed(place: Path) -> None:
    """Write a folder's manifest anew, as one who means harm would."""
    manifest = json.loads((place / MANIFEST).read_bytes())
    for name in manifest["files"]:
        content = (place / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (place / MANIFEST).write_text(json.dumps(manifest))


class Folder:
    """A folder with a manifest, its content remembered."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}

    def with_damage(self, name: str, damage) -> bool:
        """Damage one file, the others being whole; whether that changed it."""
        for each, content in self.files.items():
            path = self.place / each
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        other = damaged(self.files[name], damage)
        (self.place / name).write_bytes(other)
        return other != self.files[name]


@pytest.fixture(scope="module")
def tokens(folder):
    encoding = save_tokenizer(folder / "tokenizer")
    with atomic_folder(folder / "tokens") as temporary:
        save_split(temporary / "val.tokens", encoding)
    return Folder(folder / "tokens")


def read_tokens(place):
    split = open_tokens(place / "val.tokens")
    for document in range(split.header.documents):
        split.document(document).tolist()
    assert split.document_ids is not None
    list(evaluation_windows(split, 8))


TOKEN_FILES = st.sampled_from(["val.tokens", "val.index.safetensors"])


@few(60)
@given(name=TOKEN_FILES, damage=DAMAGE, sealed=st.booleans())
def test_token_files(tokens, name, damage, sealed):
    """With the manifest that was written any change is refused; with another one it may be read."""
    altered = tokens.with_damage(name, damage)
    if not sealed:
        resealed(tokens.place)
    refused = is_refused(lambda: read_tokens(tokens.place))
    assert refused or not (altered and sealed)


@few(60)
@given(changes=CHANGES)
def test_the_header_of_a_token_file(tokens, changes):
    tokens.with_damage("val.tokens", [])
    path = tokens.place / "val.tokens"
    content = path.read_bytes()
    header = json.dumps(changed(json.loads(content[8:1024]), changes)).encode()
    path.write_bytes(content[:8] + header.ljust(1015)[:1015] + b"\n" + content[1024:])
    resealed(tokens.place)
    is_refused(lambda: read_tokens(tokens.place))


@few(40)
@given(changes=CHANGES)
def test_manifests(tokens, changes):
    tokens.with_damage("val.tokens", [])
    tree = changed(read_json(tokens.place / MANIFEST), changes)
    write_json(tokens.place / MANIFEST, tree)
    is_refused(lambda: verified_manifest(tokens.place))
    is_refused(lambda: read_tokens(tokens.place))


@pytest.fixture(scope="module")
def tokenizer(tokens, folder):
    return Folder(folder / "tokenizer")


@few(40)
@given(name=st.sampled_from(["vocab.bpe", "encoder.json", MANIFEST]), damage=DAMAGE)
def test_tokenizers(tokenizer, name, damage):
    tokenizer.with_damage(name, damage)
    if name != MANIFEST:
        resealed(tokenizer.place)
    is_refused(lambda: load_encoding(tokenizer.place))


@pytest.mark.parametrize("fact", ["encoding", "pattern", "special_tokens", "tokenizer_sha256"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_a_fact_of_a_tokenizers_manifest_that_is_another(tokenizer, fact, value):
    tokenizer.with_damage(MANIFEST, [])
    if fact == "encoding" and value == "x":
        value = 1  # any name will do
    write_json(tokenizer.place / MANIFEST, read_json(tokenizer.place / MANIFEST) | {fact: value})
    with pytest.raises(BadData, match="is not the tokenizer that was saved"):
        load_encoding(tokenizer.place)


@pytest.fixture(scope="module")
def model(folder):
    save_model(tiny_gpt(40, n_layer=1, n_embd=4), folder / "model", {"steps": 1})
    return Folder(folder / "model")


@few(60)
@given(name=st.sampled_from(["model.safetensors", "config.json"]), damage=DAMAGE, sealed=st.booleans())
def test_checkpoints(model, name, damage, sealed):
    altered = model.with_damage(name, damage)
    if not sealed:
        resealed(model.place)
    refused = is_refused(lambda: load_model(model.place))
    assert refused or not (altered and sealed)


@few(60)
@given(changes=CHANGES)
def test_the_shape_of_a_checkpoint(model, changes):
    """Among them shapes that no memory holds."""
    model.with_damage("config.json", [])
    write_json(model.place / "config.json", changed(json.loads(model.files["config.json"]), changes))
    resealed(model.place)
    is_refused(lambda: load_model(model.place))


@few(60)
@given(changes=CHANGES)
def test_the_header_of_safetensors(model, changes):
    model.with_damage("config.json", [])
    content = model.files["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(changed(json.loads(content[8 : 8 + length]), changes)).encode()
    new = len(header).to_bytes(8, "little") + header + content[8 + length :]
    (model.place / "model.safetensors").write_bytes(new)
    resealed(model.place)
    is_refused(lambda: load_model(model.place))


@pytest.fixture(scope="module")
def state(folder):
    network = tiny_gpt(40, n_layer=1, n_embd=4)
    optimizers = Optimizers(network, PARAMS.training)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizers.update(1, torch.tensor(0.5))
    tensors = {**network.state_dict(), **optimizers.state}
    save_state(folder / "states", "key", 2, tensors, {"rows": []})
    return Folder(folder / "states/step-00000002"), tensors


@few(40)
@given(
    name=st.sampled_from(["state.safetensors", "progress.json", MANIFEST]),
    damage=DAMAGE,
    sealed=st.booleans(),
)
def test_training_states_are_passed_over(state, name, damage, sealed):
    """A state that is not whole is as good as none: nothing is raised."""
    place, tensors = state
    altered = place.with_damage(name, damage)
    if not sealed and name != MANIFEST:
        resealed(place.place)
    found = []
    read = lambda: found.append(load_newest_state(place.place.parent, "key", tensors))  # noqa: E731
    assert not is_refused(read)
    assert found == [None] or not (altered and sealed) or name == MANIFEST


@pytest.fixture(scope="module")
def foreign(tokenizer, folder):
    """A model in Hugging Face form, as somebody else may give it."""
    tokenizer.with_damage("vocab.bpe", [])
    network = tiny_gpt(load_encoding(folder / "tokenizer").n_vocab, n_layer=1, n_embd=4)
    save_hf(network, folder / "foreign", folder / "tokenizer")
    baselines.read_folder(folder / "foreign")  # what it imports is no part of what a reader may take
    return Folder(folder / "foreign")


FOREIGN = st.sampled_from(
    ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"]
)


@few(12)
@given(name=FOREIGN, damage=DAMAGE)
def test_folders_of_other_peoples_models(foreign, name, damage):
    """What transformers makes of it, and what our own reader of GPT-2 makes of it."""
    foreign.with_damage(name, damage)
    is_refused(lambda: baselines.read_folder(foreign.place))
    is_refused(lambda: load_hf(foreign.place))


@few(12)
@given(changes=CHANGES)
def test_the_config_of_other_peoples_models(foreign, changes):
    foreign.with_damage("config.json", [])
    (foreign.place / "config.json").write_text(
        json.dumps(changed(json.loads(foreign.files["config.json"]), changes))
    )
    is_refused(lambda: load_hf(foreign.place))
    is_refused(lambda: baselines.read_folder(foreign.place))


def test_a_model_of_more_layers_than_it_has_tensors_is_refused_before_it_is_built(foreign):
    foreign.with_damage("config.json", [])
    write_json(foreign.place / "config.json", read_json(foreign.place / "config.json") | {"n_layer": 10**12})
    read = partial(baselines.read_folder, foreign.place)
    assert is_refused(read)
    with pytest.raises(BadData, match="has 1,000,000,000,000 layers, the files 16 tensors"):
        read()


# --- reports


@pytest.fixture(scope="module")
def place(folder):
    (folder / "place").mkdir()
    return make_place(folder / "place")


@contextmanager
def replaced(path, content):
    """A file with other content, for the length of a block."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def sources(place):
    return read_sources(place, place / "reports", place / "data", place / "models", PARAMS.baseline.names)


REPORTS = [
    "evaluation", "baseline/xz", "baseline/smollm2-135m", "estimate", "training", "samples",
    "validation", "inspection", "download", "tokenization",
]  # fmt: skip


@few(12)
@given(name=st.sampled_from(REPORTS), changes=CHANGES)
def test_reports_given_to_the_comparison(place, name, changes):
    path = place / f"reports/{name}.json"

    def read():
        render_comparison(json.loads(json.dumps(build_record(sources(place), LIKELIHOOD))))

    with replaced(path, json.dumps(changed(read_json(path), changes)).encode()):
        is_refused(read)


def test_answers_to_the_same_questions_in_another_number(place):
    report = read_json(path := place / "reports/evaluation.json")
    del report["tasks"]["cloze"]["hits"]
    with (
        replaced(path, json_bytes(report)),
        pytest.raises(BadData, match="different numbers of items of cloze"),
    ):
        sources(place)


FILES = [
    "reports/evaluation.json", "reports/loss.csv", "reports/estimate.json", "models/compact/manifest.json",
    "data/evaluation/compact.parquet", "data/baseline/xz.parquet",
]  # fmt: skip


@few(12)
@given(name=st.sampled_from(FILES), damage=DAMAGE)
def test_files_given_to_the_comparison(place, name, damage):
    path = place / name
    with replaced(path, damaged(path.read_bytes(), damage)):
        is_refused(lambda: sources(place))


@few(40)
@given(name=st.sampled_from(REPORTS[:3]), changes=CHANGES)
def test_reports_given_to_verify(place, name, changes):
    """What can't be made sense of is a difference."""
    path = place / f"reports/{name}.json"
    params, found = PARAMS, Verification()
    params = params.model_copy(
        update={"evaluation": params.evaluation.model_copy(update={"likelihood": LIKELIHOOD})}
    )
    with replaced(path, json.dumps(changed(read_json(path), changes)).encode()):
        assert not is_refused(lambda: run_check(check_numbers, place, params, found))
    assert found.differences


ACCEPTED = json.loads((ROOT / "reports/accepted.json").read_bytes())
SETTINGS = PARAMS.regression.model_copy(update={"resamples": 20})


@few(80)
@given(changes=CHANGES)
def test_references_given_to_the_gate(folder, changes):
    now = references.read_accepted(ROOT / "reports/accepted.json")
    (folder / "accepted.json").write_text(json.dumps(changed(ACCEPTED, changes)))
    is_refused(lambda: gate.run_gate(references.read_reference("accepted.json", folder), now, SETTINGS))
