"""params.yaml is read once, strictly: every mistake is named by its key's path, all of them at once."""

import copy
from pathlib import Path

import pytest

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.config import Params, load_params, parse_params, read_yaml

ROOT = Path(__file__).parents[1]
TREE = read_yaml(ROOT / "params.yaml")
SHAKESPEARE = "download.hub.sets.tiny-shakespeare"


def changed(path: str, value) -> dict:
    """The repository's params with one key set (or, for KeyError, removed)."""
    tree = copy.deepcopy(TREE)
    *folders, last = path.split(".")
    node = tree
    for part in folders:
        node = node[part]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return tree


def refusal(tree) -> str:
    with pytest.raises(BadConfig) as caught:
        parse_params(tree)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_the_repositorys_own_params_are_good():
    params = load_params(ROOT / "params.yaml")
    assert params.model.n_embd == TREE["model"]["n_embd"]
    assert params.baseline.names == tuple(TREE["baseline"]["names"])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("training.max_stepz", 5, "training.max_stepz: unknown key; did you mean max_steps?"),
        ("modle", {}, "modle: unknown key; did you mean model?"),
        ("model.zzz", 1, "model.zzz: unknown key; allowed: bias, block_size, dropout"),
        ("training.max_steps", KeyError, "training.max_steps: missing key"),
        ("tokenization", KeyError, "tokenization: missing key"),
        ("training.max_steps", "800", 'training.max_steps: found "800"; input should be a valid integer'),
        ("training.max_steps", 800.5, "training.max_steps: found 800.5; input should be a valid integer"),
        ("training.max_steps", True, "training.max_steps: found true; input should be a valid integer"),
        ("model.bias", 1, "model.bias: found 1; input should be a valid boolean"),
        ("model.bias", "no", 'model.bias: found "no"'),
        ("training.max_steps", None, "training.max_steps: found null"),
        ("training.max_steps", 0, "training.max_steps: found 0; input should be greater than 0"),
        (
            "training.learning_rate",
            float("nan"),
            "training.learning_rate: found NaN; input should be a finite",
        ),
        ("training.learning_rate", float("inf"), "training.learning_rate: found Infinity; input should be a"),
        ("training.optimizer", "sgd", "training.optimizer: found \"sgd\"; input should be 'adamw' or 'muon'"),
        ("training.beta2", 1.0, "training.beta2: found 1.0; input should be less than 1"),
        ("tokenization.val_fraction", 0, "tokenization.val_fraction: found 0"),
        ("model.n_embd", 130, "model: n_embd (130) must be a multiple of n_head (4)"),
        ("model.padded_vocab_size", 50000, "model: padded_vocab_size (50000) must be at least vocab_size"),
        ("training.tokens_per_step", 500, "training.tokens_per_step (500) must be a multiple of"),
        ("evaluation.likelihood.window", 256, "evaluation.likelihood.window (256) must be at most"),
        ("model", [], "model: Input should be an object"),
        ("download.tokenizer.vocab_bpe_sha256", "abc", 'download.tokenizer.vocab_bpe_sha256: found "abc"'),
        ("baseline.names", ["xz", "gpt9"], "baseline: names ['gpt9'] have no entry in specs"),
        ("baseline.names", ["xz", "xz"], "baseline: names ['xz', 'xz'] repeat themselves"),
        ("estimate.note.expected_loss.low_80", 4.1, "estimate.note.expected_loss: low_95, low_80, value"),
        ("estimate.machines.h100.utilisation", 1.5, "estimate.machines.h100.utilisation: found 1.5"),
        ("download.docstrings.max_characters", 100, "max_characters (100) must be at least min_characters"),
        ("download.hub.name", "c4", "download.hub: name 'c4' has no entry in sets; it has ['fineweb"),
        (
            f"{SHAKESPEARE}.opens_document",
            "x",
            f"{SHAKESPEARE}: opens_document joins rows and separator cuts",
        ),
        (f"{SHAKESPEARE}.sha256", None, f"{SHAKESPEARE}: revision is a branch, which moves"),
        ("download.hub.sets.wikitext-103.opens_document", "(", "opens_document is no regular expression"),
        ("inspection.permutations", 100, "inspection: permutations (100) must be a multiple of bands (16)"),
        ("evaluation.tasks.lambada", {"path": "a", "repo": "b", "sha256": "0" * 64}, "give either path, or"),
        (
            "evaluation.tasks.lambada",
            {"repo": "b", "sha256": "0" * 64},
            "evaluation.tasks.lambada: give either",
        ),
        ("baseline.specs.zstd.level", 23, "baseline.specs.zstd: level (23) must be at most 22 for zstd"),
        ("baseline.specs.xz.train_megabytes", 8, "train_megabytes must be 0 for xz"),
        ("training.launcher.mode", "strict", "found \"strict\"; input should be 'fast' or 'fsdp'"),
    ],
)
def test_a_mistake_is_named_with_what_was_found_and_what_is_allowed(path, value, said):
    assert said in refusal(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("baseline.specs.xz.level", "9", 'baseline.specs.xz.level: found "9"'),
        ("baseline.specs.xz.levle", 9, "baseline.specs.xz.levle: unknown key; did you mean level?"),
        ("baseline.specs.xz.level", KeyError, "baseline.specs.xz.level: missing key"),
        ("baseline.specs.xz.kind", "zip", "baseline.specs.xz: Input tag 'zip' found using 'kind'"),
        ("baseline.specs.xz.kind", KeyError, "baseline.specs.xz: Unable to extract tag"),
        ("baseline.specs.gpt2.revision", "main", 'baseline.specs.gpt2.revision: found "main"'),
    ],
)
def test_the_path_of_a_baselines_key_is_the_files_own(path, value, said):
    """pydantic puts the kind into the location (specs.xz.compressor.level); the file has no such key."""
    assert said in refusal(changed(path, value))


def test_a_key_of_a_list_is_named_by_its_place():
    tree = changed("estimate.anchors", [{**TREE["estimate"]["anchors"][0], "losss": 1.0}])
    assert "estimate.anchors.0.losss: unknown key; did you mean loss?" in refusal(tree)


def test_every_mistake_is_named_at_once():
    tree = changed("training.max_stepz", 5)
    tree["model"]["n_layer"] = -1
    tree["runtime"]["device"] = "tpu"
    message = refusal(tree)
    for path in ("training.max_stepz", "model.n_layer", "runtime.device"):
        assert f"\n  {path}: " in message


@pytest.mark.parametrize(("text", "number"), [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1E-3", 1e-3), ("1", 1.0)])
def test_numbers_are_yaml_1_2s(tmp_path, text, number):
    """PyYAML reads 3e-4 as a word; DVC and we read a number."""
    source = (ROOT / "params.yaml").read_text()
    path = written(tmp_path, source.replace("learning_rate: 2.0e-3", f"learning_rate: {text}", 1))
    params = load_params(path)
    assert params.training.learning_rate == number
    assert isinstance(params.training.learning_rate, float)


def test_no_is_a_word_and_not_false(tmp_path):
    source = (ROOT / "params.yaml").read_text()
    with pytest.raises(BadConfig, match='found "no"'):
        load_params(written(tmp_path, source.replace("bias: false", "bias: no", 1)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [1\n", "no valid YAML"),
        ("a: .nan\n", "can't be used"),
        ("", "can't be used"),
        ("just words\n", "can't be used"),
        ("? [a, b]\n: 1\n", "keys must be words"),
        ("a: &x [*x]\n", "can't be used"),
        ("a: !!python/object/apply:os.system [ls]\n", "no valid YAML"),
    ],
)
def test_what_is_no_params_file_is_refused_in_one_message(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(BadConfig) as caught:
        load_params(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(BadConfig, match="no valid YAML"):
        load_params(path)


def test_nan_in_the_file_is_refused(tmp_path):
    source = (ROOT / "params.yaml").read_text()
    path = written(tmp_path, source.replace("weight_decay: 0.0", "weight_decay: .nan", 1))
    with pytest.raises(BadConfig, match=r"training\.weight_decay: found NaN"):
        load_params(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingInput, match=r"params\.yaml is missing"):
        load_params(tmp_path / "params.yaml")


def test_params_cannot_be_changed_after_reading():
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.training.max_steps = 5


def test_params_survive_a_round_trip():
    params = load_params(ROOT / "params.yaml")
    assert Params.model_validate_json(params.model_dump_json()) == params
