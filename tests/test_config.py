"""params.yaml is read once, strictly: a message names every mistake by the path of its key."""

import copy
import re
from pathlib import Path

import pytest

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.sections import read_yaml
from compactgpt.config import Params, load_params, parse_params
from compactgpt.experiments import set_values

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "params.yaml").read_text()
TREE = read_yaml(ROOT / "params.yaml")


def params_with(*settings: str) -> Params:
    tree = copy.deepcopy(TREE)
    set_values(tree, settings)
    return parse_params(tree)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.max_stepz=5", "training.max_stepz: unknown key; did you mean max_steps?"),
        ("model.zzz=1", "model.zzz: unknown key; allowed: bias, block_size, dropout"),
        ('training.max_steps="800"', 'training.max_steps: found "800"; input should be a valid integer'),
        ("training.max_steps=0", "training.max_steps: found 0; input should be greater than 0"),
        ("validation.max_rows=999", "validation.max_rows: found 999; input should be greater than or equal"),
        ("training.max_steps.x=1", "training.max_steps: Input should be a valid integer"),
        ("training.optimizer=sgd", "training.optimizer: found \"sgd\"; input should be 'adamw' or 'muon'"),
        ("model=[]", "model: Input should be an object"),
        ("download.docstrings.distributions={a/b: '1'}", 'distributions.a/b: found "a/b"; a name has'),
        # rules between several keys
        ("evaluation.text.prompts=['${a}']", "found '${a}': `dvc exp run -S` would read `${...}`"),
        ("model.n_embd=130", "model: n_embd (130) must be a multiple of n_head (4)"),
        ("model.padded_vocab_size=50000", "model: padded_vocab_size (50000) must be at least vocab_size"),
        ("training.tokens_per_step=500", "training.tokens_per_step (500) must be a multiple of"),
        ("evaluation.likelihood.window=256", "evaluation.likelihood.window (256) must be at most"),
        ("baseline.names=[xz, gpt9]", "baseline: names ['gpt9'] have no entry in specs"),
        ("baseline.names=[xz, xz]", "baseline: names ['xz', 'xz'] must be different"),
        ("download.hub.name=c4", "download.hub: name 'c4' has no entry in sets; sets has ['fineweb"),
        ("inspection.permutations=100", "inspection: permutations (100) must be a multiple of bands (16)"),
        (f"evaluation.tasks.lambada={{repo: b/c, sha256: {'a' * 64}}}", "tasks.lambada: give either path"),
        ("baseline.specs.zstd.level=23", "baseline.specs.zstd: level (23) must be at most 22 for zstd"),
        # pydantic adds the kind to the path of a baseline's key (specs.xz.compressor.level)
        ("baseline.specs.xz.levle=9", "baseline.specs.xz.levle: unknown key; did you mean level?"),
        ("baseline.specs.xz.kind=zip", "baseline.specs.xz: Input tag 'zip' found using 'kind'"),
    ],
)
def test_a_mistake_is_named_with_what_was_found_and_what_is_allowed(setting, message):
    with pytest.raises(BadConfig, match=re.escape(message)):
        params_with(setting)


def test_every_mistake_is_named_at_once_also_inside_a_list():
    with pytest.raises(BadConfig) as refused:
        params_with("model.n_layer=-1", "runtime.device=tpu", "estimate.anchors=[{losss: 1.0}]")
    for key in ("model.n_layer", "runtime.device", "estimate.anchors.0.losss"):
        assert f"\n  {key}: " in str(refused.value)
    assert "estimate.anchors.0.loss: missing key" in str(refused.value)


def test_values_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SOURCE.replace("learning_rate: 2.0e-3", "learning_rate: 3e-4", 1))  # text in YAML 1.1
    assert load_params(path).training.learning_rate == 3e-4
    path.write_text(SOURCE.replace("bias: false", "bias: no", 1))  # a boolean in YAML 1.1
    with pytest.raises(BadConfig, match='found "no"'):
        load_params(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", "duplicate key"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: \xff\xfe\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        (b"", "the file: found null"),
        (b"a: &x [*x]\n", "no value may hold its own alias"),
    ],
)
def test_a_file_that_is_not_a_params_yaml_is_refused_in_one_message(tmp_path, content, message):
    path = tmp_path / "params.yaml"
    with pytest.raises(MissingInput, match=r"params\.yaml is missing"):
        load_params(path)
    path.write_bytes(content)
    with pytest.raises(BadConfig, match=rf"(?s)params\.yaml.*{message}"):
        load_params(path)


NO_START = ("training.init_unigram=0.0", "training.init_positions=0.0")  # required with init_from


@pytest.mark.parametrize(
    "settings",
    [
        ("download.hub.mirror=~/a",),
        ("download.hub.sets.tiny-shakespeare.file=~/a",),
        ("training.init_from=~/a", f"training.init_sha256={'a' * 64}", *NO_START),
        (f"evaluation.tasks.lambada={{path: ~/a, sha256: {'a' * 64}}}",),
        (f"evaluation.tasks.lambada_original={{path: ~/a, sha256: {'a' * 64}}}",),
        (f"evaluation.tasks.wikitext.mine={{path: ~/a, sha256: {'a' * 64}}}",),
        ("baseline.specs.mine={kind: folder, path: ~/a}",),
    ],
)
def test_the_home_folder_is_expanded_in_each_setting_that_is_a_path(monkeypatch, settings):
    monkeypatch.setenv("HOME", "/home/me")
    found = params_with(*settings).model_dump_json()
    assert '"/home/me/a"' in found
    assert "~" not in found


def test_params_are_frozen_and_survive_a_round_trip():
    params = params_with()
    with pytest.raises(ValueError, match="frozen"):
        params.training.max_steps = 5
    assert Params.model_validate_json(params.model_dump_json()) == params
