"""Baselines: other people's models give what a plain computation with their own code gives."""

import json
import lzma
import math

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
import zstandard
from huggingface_hub.errors import RevisionNotFoundError
from torch.nn import functional as F
from typer.testing import CliRunner

from compactgpt import config
from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import read_json, sha256_file
from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation import baselines
from compactgpt.evaluation.baselines import BaselineInputs, load_baseline
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import evaluate
from tests.support.tiny_models import (
    LIKELIHOOD,
    MERGES,
    TEXTS,
    save_gguf,
    save_params,
    save_split,
    tiny_gpt,
    vocabulary,
)

REVISION = "a" * 40


@pytest.fixture
def inputs(tmp_path, encoding):
    save_split(tmp_path / "train.tokens", encoding, texts=TEXTS[:2])
    runtime = config.Runtime(device="cpu", num_threads=2, num_workers=1)
    return BaselineInputs(tmp_path / "train.tokens", encoding, 3, runtime, tmp_path / ".state")


@pytest.fixture(autouse=True)
def quiet():
    baselines._silence_transformers()


def load(inputs, **spec):
    names = {"names": ["it"], "specs": {"it": spec}}
    return load_baseline("it", config.Baseline.model_validate_json(json.dumps(names)), inputs)


# -- models without a network ------------------------------------------------------------------------


def test_unigram_is_laplaces_rule_worked_by_hand(inputs, split):
    found = evaluate(load(inputs, kind="unigram"), split, inputs.encoding, LIKELIHOOD)
    train, V = open_tokens(inputs.train), inputs.encoding.n_vocab
    stream = train.tokens.tolist()
    assert stream.count(V - 1) == 2  # end-of-text is counted, one a document
    for document, nats in enumerate(found.nats):
        tokens = split.document(document).tolist()
        expected = sum(-math.log((stream.count(token) + 1) / (len(stream) + V)) for token in tokens)
        assert nats == pytest.approx(expected, rel=1e-12)


def undo_xz(content):
    return lzma.decompress(content, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])


def undo_zstd(content):
    frames = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    return frames.decompress(content, max_output_size=2**20)


@pytest.mark.parametrize(
    ("codec", "compress", "undo"),
    [("xz", baselines._xz(9), undo_xz), ("zstd", baselines._zstd(9, b""), undo_zstd)],
)
def test_a_compressors_nats_are_bits_that_can_be_undone(inputs, split, codec, compress, undo):
    model = load(inputs, kind="compressor", codec=codec, level=9, train_megabytes=0)
    found = evaluate(model, split, inputs.encoding, LIKELIHOOD)
    for text, nats in zip(TEXTS, found.nats, strict=True):
        assert undo(compress(text.encode())) == text.encode()
        assert nats == pytest.approx(len(compress(text.encode())) * 8 * math.log(2))
    assert found.own_tokens is None
    assert model.facts["num_params"] is None


def test_no_container_is_counted():
    """An .xz file carries 60 bytes or so, a zstd frame its magic number: none of it spells text."""
    text = b"the container is not the text"
    assert len(baselines._xz(9)(text)) < len(lzma.compress(text)) - 40
    assert len(baselines._zstd(19, b"")(text)) <= len(zstandard.compress(text, 19)) - 4


def test_a_primed_compressor_knows_the_train_split(inputs, split):
    spec = {"kind": "compressor", "codec": "zstd", "level": 19}
    alone = evaluate(load(inputs, **spec, train_megabytes=0), split, inputs.encoding, LIKELIHOOD)
    primed = evaluate(load(inputs, **spec, train_megabytes=1), split, inputs.encoding, LIKELIHOOD)
    assert (primed.nats[:2] < 0.6 * alone.nats[:2]).all()  # these two documents are the train split
    assert abs(primed.nats[4] - alone.nats[4]) <= 8 * 8 * math.log(2)  # "then" has little to gain


# -- spans of text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
def test_every_byte_is_in_exactly_one_span(split, encoding, window):
    for document, text in enumerate(TEXTS):
        spans = baselines.text_spans(split, encoding, document, window)
        assert "".join(spans) == text
        assert all(spans)
        assert len(spans) <= -(-len(split.document(document)) // window)


def test_a_span_never_ends_inside_a_character_worked_by_hand(tmp_path, encoding):
    """a | e with acute (2 tokens) | bc: windows of two tokens end inside the accented letter, then move."""
    split = save_split(tmp_path / "x.tokens", encoding, texts=["aébc"])
    assert len(split.document(0)) == 5
    assert baselines.text_spans(split, encoding, 0, 2) == ["aé", "b", "c"]
    assert baselines.text_spans(split, encoding, 0, 1) == ["a", "é", "b", "c"]


def byte_tokenizer(words=()):
    """A byte-level tokenizer that is not GPT-2's: other ids, no merges, other special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = {name: rank for rank, name in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(names, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *words])
    return tokenizer


def test_own_windows_are_the_spans_each_after_one_token(split, encoding):
    tokenizer = byte_tokenizer()
    windows = list(baselines.OwnTokens(tokenizer, encoding, 0).windows(split, 3))
    for document, text in enumerate(TEXTS):
        mine = [one for one in windows if one.document == document]
        spans = baselines.text_spans(split, encoding, document, 3)
        assert [tokenizer.decode(one.targets.tolist()) for one in mine] == spans
        stream = [0, *tokenizer.encode(text).ids]
        for one in mine:
            assert one.tokens.tolist() == stream[one.start : one.start + len(one.targets)]
            assert one.targets.tolist() == stream[one.start + 1 : one.start + 1 + len(one.targets)]


def test_a_tokenizer_that_loses_text_is_refused(split, encoding):
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(BadData, match="does not spell document"):
        list(baselines.OwnTokens(tokenizer, encoding, 0).windows(split, 3))


def test_the_name_of_a_special_token_in_a_document_is_text(split, encoding):
    tokenizer = byte_tokenizer(["<|endoftext|>"])
    special = tokenizer.token_to_id("<|endoftext|>")
    assert special in tokenizer.encode(TEXTS[3]).ids  # what it does unasked
    plain = baselines.plain_tokenizer(tokenizer)
    for one in baselines.OwnTokens(plain, encoding, 0).windows(split, 3):
        assert special not in one.targets


@pytest.mark.parametrize(
    ("names", "bos", "eos", "expected"),
    [({"<|endoftext|>": 7}, 1, 2, 7), ({}, 1, 2, 1), ({}, None, 2, 2)],
)
def test_documents_open_with_end_of_text_else_bos_else_eos(names, bos, eos, expected):
    assert baselines.first_token_of(names, bos, eos) == expected
    with pytest.raises(ValueError, match="neither a beginning nor an end of text"):
        baselines.first_token_of({}, None, None)


# -- models of transformers --------------------------------------------------------------------------


def save_gpt2_folder(folder):
    """A random GPT-2 with the tiny encoding's vocabulary, saved by transformers itself."""
    import transformers

    torch.manual_seed(1)
    names = vocabulary()
    shape = transformers.GPT2Config(
        vocab_size=len(names),
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.4,
        bos_token_id=names["<|endoftext|>"],
        eos_token_id=names["<|endoftext|>"],
    )
    model = transformers.GPT2LMHeadModel(shape).eval()
    merges = [tuple(merge.split()) for merge in MERGES]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(names, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    model.save_pretrained(folder)
    save_fast_tokenizer(tokenizer, folder, bos="<|endoftext|>", eos="<|endoftext|>")
    return model


def save_fast_tokenizer(tokenizer, folder, bos, eos):
    import transformers

    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    wrapped.save_pretrained(folder)


def plain_nats(model, streams, window):
    """Independent reference: one window at a time, all logits of the model's own forward pass."""
    nats = []
    for stream in streams:
        total = 0.0
        for start in range(0, len(stream) - 1, window):
            fed = torch.tensor([stream[start : start + window][: len(stream) - 1 - start]])
            targets = torch.tensor(stream[start + 1 : start + window + 1])
            with torch.no_grad():
                logits = model(input_ids=fed).logits[0].double()
            total += F.cross_entropy(logits, targets, reduction="sum").item()
        nats.append(total)
    return np.array(nats)


def test_a_gpt2_folder_reads_the_gpt2_windows_themselves(tmp_path, inputs, split):
    reference = save_gpt2_folder(tmp_path / "gpt2")
    model = load(inputs, kind="folder", path=str(tmp_path / "gpt2"))
    found = evaluate(model, split, inputs.encoding, LIKELIHOOD)
    eot = split.header.eot_token
    streams = [[eot, *split.document(index).tolist()] for index in range(len(TEXTS))]
    np.testing.assert_allclose(found.nats, plain_nats(reference, streams, 8), rtol=1e-5)
    assert found.own_tokens.tolist() == found.tokens.tolist()
    assert model.facts["tokenizer"] == "gpt2"
    assert model.facts["num_params"] == sum(p.numel() for p in reference.parameters())


def test_gpt2_weights_give_our_own_gpt_the_same_logits_and_nats(tmp_path, inputs, split):
    """The cross-check: transformers' GPT-2 and our GPT are one architecture."""
    reference = save_gpt2_folder(tmp_path / "gpt2")
    size = reference.config.vocab_size
    own = tiny_gpt(size, padded_vocab_size=size, gelu="tanh").eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D keeps them transposed
    state = reference.transformer.state_dict()
    own.load_state_dict({key: v.T if key.endswith(turned) else v for key, v in state.items()})
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            own.hidden(tokens) @ own.wte.weight.T, reference(tokens).logits, atol=1e-4, rtol=1e-5
        )
    theirs = evaluate(
        load(inputs, kind="folder", path=str(tmp_path / "gpt2")), split, inputs.encoding, LIKELIHOOD
    )
    ours = evaluate(as_neural_model(own, 3), split, inputs.encoding, LIKELIHOOD)
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5)


def save_llama_folder(folder, kind="LlamaForCausalLM", **changes):
    """A random Llama with a byte tokenizer of its own, saved by transformers itself."""
    import transformers

    kind = getattr(transformers, kind)  # which imports it
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    shape = kind.config_class(
        vocab_size=tokenizer.get_vocab_size() + 6,  # padded, as many published models are
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        **changes,
    )
    model = kind(shape).eval()
    model.save_pretrained(folder)
    save_fast_tokenizer(tokenizer, folder, bos="<s>", eos="</s>")
    return model, tokenizer


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_with_its_own_tokenizer_scores_the_same_text(tmp_path, inputs, split, batch_size):
    reference, tokenizer = save_llama_folder(tmp_path / "llama")
    inputs = BaselineInputs(**{**vars(inputs), "batch_size": batch_size})
    found = evaluate(
        load(inputs, kind="folder", path=str(tmp_path / "llama")), split, inputs.encoding, LIKELIHOOD
    )
    expected = []
    for document in range(len(TEXTS)):
        total, before = 0.0, 0  # <s>
        for span in baselines.text_spans(split, inputs.encoding, document, 8):
            ids = tokenizer.encode(span).ids
            with torch.no_grad():
                logits = reference(torch.tensor([[before, *ids[:-1]]])).logits[0].double()
            logits = logits[:, : tokenizer.get_vocab_size()]
            total += F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()
            before = ids[-1]
        expected.append(total)
    np.testing.assert_allclose(found.nats, expected, rtol=1e-5)
    assert found.own_tokens.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.tokens.sum() < found.own_tokens.sum()


def test_a_model_whose_logits_are_scaled_is_refused(tmp_path, inputs):
    save_llama_folder(tmp_path / "granite", "GraniteForCausalLM", logits_scaling=2.0)
    with pytest.raises(BadConfig, match="GraniteForCausalLM can't be measured"):
        load(inputs, kind="folder", path=str(tmp_path / "granite"))


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (["config.json"], r"gpt2 has no config\.json"),
        (["tokenizer.json", "tokenizer_config.json"], r"gpt2 has no tokenizer\*\.json"),
        (["model.safetensors"], r"gpt2 has no \*\.safetensors"),
    ],
)
def test_a_folder_that_lacks_a_file_is_named(tmp_path, inputs, gone, named):
    folder = tmp_path / "gpt2"
    save_gpt2_folder(folder)
    for name in gone:
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle is never read")
    with pytest.raises(MissingInput, match=named):
        load(inputs, kind="folder", path=str(folder))


def test_a_folder_that_is_not_there_is_named(tmp_path, inputs):
    with pytest.raises(MissingInput, match="nowhere has no config"):
        load(inputs, kind="folder", path=str(tmp_path / "nowhere"))


def test_damaged_weights_are_one_sentence(tmp_path, inputs):
    save_gpt2_folder(tmp_path / "gpt2")
    (tmp_path / "gpt2/model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BadData, match="can't be read as a causal language model"):
        load(inputs, kind="folder", path=str(tmp_path / "gpt2"))


def test_another_vocabulary_of_the_same_size_is_not_gpt2s(encoding):
    names = vocabulary()
    same = tokenizers.Tokenizer(tokenizers.models.BPE(names, []))
    assert baselines.has_vocabulary_of(same, encoding)
    swapped = {**names, "a": names["b"], "b": names["a"]}
    assert not baselines.has_vocabulary_of(tokenizers.Tokenizer(tokenizers.models.BPE(swapped, [])), encoding)
    foreign = {("▁x" if name == "er" else name): rank for name, rank in names.items()}
    assert not baselines.has_vocabulary_of(tokenizers.Tokenizer(tokenizers.models.BPE(foreign, [])), encoding)


# -- the hub -----------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_said_at_once(inputs):
    """conftest sets HF_HUB_OFFLINE, so that the hub's own client refuses."""
    with pytest.raises(Unreachable, match="the hub can't be reached for some/model"):
        load(inputs, kind="hub", repo="some/model", revision=REVISION)


def test_a_model_of_the_hub_is_measured_from_its_standard_cache(tmp_path, inputs, split, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_gpt2_folder(tmp_path / f"cache/models--some--model/snapshots/{REVISION}")
    found = load(inputs, kind="hub", repo="some/model", revision=REVISION)
    assert found.facts["repo"] == "some/model"
    assert evaluate(found, split, inputs.encoding, LIKELIHOOD).nats.sum() > 0


def test_a_revision_that_the_hub_lacks_is_a_mistake_in_params(inputs, monkeypatch):
    def lacking(*_args, **_kwargs):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lacking)
    with pytest.raises(BadConfig, match="the hub does not have some/model at aaaa"):
        load(inputs, kind="hub", repo="some/model", revision=REVISION)


# -- GGUF --------------------------------------------------------------------------------------------


def test_a_gguf_is_read_as_transformers_own_loader_reads_it(tmp_path):
    import transformers

    path = save_gguf(tmp_path / "tiny.gguf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    loaded = baselines.read_gguf(path)
    expected = reference.state_dict()
    found = loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, reference(tokens).logits)
    assert loaded.first_token == vocabulary()["<|endoftext|>"]
    assert not loaded.model.training


def test_smollms_tokenizer_keeps_digits_apart():
    tokenizer = baselines._smollm_tokenizer([*vocabulary(), "12", "Ġ1"], [*MERGES, "1 2", "Ġ 1"])
    assert tokenizer.encode("the 12").tokens == ["the", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("é 12").ids) == "é 12"


@pytest.mark.parametrize("changes", [{"pre": "qwen2"}, {"architecture": "falcon"}])
def test_a_gguf_of_another_kind_is_refused(tmp_path, changes):
    with pytest.raises(BadConfig, match="only \\('llama', 'gpt2', 'smollm'\\) can be read"):
        baselines.read_gguf(save_gguf(tmp_path / "x.gguf", **changes))


@pytest.fixture
def door(tmp_path, inputs, split, monkeypatch):
    """Run the door in a folder with tokens, a tokenizer and the tiny GGUF as fetched from its wheel."""
    from stages.baseline import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    path = save_gguf(tmp_path / "tiny.gguf")
    kept = tmp_path / ".state/wheels" / sha256_file(path)
    kept.parent.mkdir(parents=True)
    path.rename(kept)

    def change(tree):
        tree["baseline"]["specs"]["smollm2-135m"]["sha256"] = kept.name

    save_params(tmp_path / "params.yaml", change)

    def run(name):
        words = [name, "--tokens", ".", "--tokenizer", "tokenizer", "--tracker", "none"]
        return CliRunner().invoke(app, words)

    return run


@pytest.mark.parametrize("name", ["unigram", "xz", "zstd-primed", "smollm2-135m"])
def test_the_door_measures_each_kind_and_writes_the_same_bytes_twice(tmp_path, door, split, name):
    made = []
    for _ in range(2):
        result = door(name)
        assert result.exit_code == 0, result.output
        outs = tmp_path / f"data/baseline/{name}.parquet", tmp_path / f"reports/baseline/{name}.json"
        made.append([out.read_bytes() for out in outs])
    assert made[0] == made[1]
    report = read_json(outs[1])
    assert report["model"]["name"] == name
    assert report["validation"]["tokens"] == int(np.diff(split.offsets).sum()) - len(TEXTS)
    assert report["loss"]["low"] <= report["loss"]["value"] <= report["loss"]["high"]


def test_the_door_names_the_baselines_that_there_are(door):
    result = door("gpt5")
    assert result.exit_code == BadConfig.exit_code
    assert "'gpt5' is no baseline: baseline.specs of params.yaml has ['gpt2'" in result.output
