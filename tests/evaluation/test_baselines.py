"""Baselines: models by others give what a plain computation with their own code gives."""

import json
import lzma
import math
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import zstandard
from torch.nn import functional as F

from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import sha256_file
from compactgpt.config import Folder
from compactgpt.data.hub import check_model_folder
from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation import baselines, document_models
from compactgpt.evaluation.baselines import OwnTokens, load_baseline, text_spans
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import Codec, evaluate
from tests.support.tiny_models import (
    LIKELIHOOD,
    MERGES,
    TEXTS,
    params_of,
    save_gguf,
    save_params,
    save_split,
    tiny_gpt,
    vocabulary,
)

REVISION = "a" * 40


@pytest.fixture
def load(tmp_path, encoding):
    """Load a baseline by its entry in params.yaml."""
    save_split(tmp_path / "train.tokens", encoding, texts=TEXTS[:2])

    def load(**spec):
        params = params_of(tmp_path / "it.yaml", spec)
        try:
            return load_baseline("it", params, encoding, tmp_path / "train.tokens", tmp_path / ".state")
        except BadConfig as error:  # as a user does: the message has the hash of a folder
            if "sha256 is empty" not in str(error):
                raise
            return load(**spec, sha256=str(error).split(" sha256: ")[1][:64])

    return load


def test_unigram_is_laplaces_rule_worked_by_hand(load, split, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(document_models, "COUNTED_AT_ONCE", 7)
    found = evaluate(load(kind="unigram"), split, encoding, LIKELIHOOD)
    stream, V = open_tokens(tmp_path / "train.tokens").tokens.tolist(), encoding.n_vocab
    assert stream.count(V - 1) == 2  # end-of-text is counted, one a document
    for document, nats in enumerate(found.nats):
        counts = [stream.count(token) for token in split.document(document).tolist()]
        assert nats == pytest.approx(sum(-math.log((n + 1) / (len(stream) + V)) for n in counts), rel=1e-12)


@pytest.mark.parametrize("codec", ["xz", "zstd"])
def test_a_compressors_nats_are_the_bits_without_the_container(load, split, encoding, codec):
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    plain = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    model = load(kind="compressor", codec=codec, level=9, train_megabytes=0)
    found = evaluate(model, split, encoding, LIKELIHOOD)
    for text, nats in zip(TEXTS, found.nats, strict=True):
        if codec == "xz":
            compressed = lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=chain)
        else:
            compressed = document_models._zstd(9, b"")(text.encode())
            assert plain.decompress(compressed, max_output_size=2**20) == text.encode()
            assert len(compressed) <= len(zstandard.ZstdCompressor(9).compress(text.encode())) - 4
        assert nats == pytest.approx(len(compressed) * 8 * math.log(2))
    assert found.own_tokens is model.facts["num_params"] is None


def test_every_byte_is_in_exactly_one_span_and_no_character_is_cut(tmp_path, split, encoding):
    for window in (1, 3, 100):
        for document, text in enumerate(TEXTS):
            spans = text_spans(split, encoding, document, window)
            assert "".join(spans) == text
            assert all(spans)
            assert len(spans) <= -(-len(split.document(document)) // window)
    split = save_split(tmp_path / "x.tokens", encoding, texts=["aébc"])  # the accented letter is two tokens
    assert text_spans(split, encoding, 0, 2) == ["aé", "b", "c"]


def byte_tokenizer(vocabulary=None, merges=()):
    """A byte-level tokenizer: by default other ids and special tokens than GPT-2's, and no merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = vocabulary or {name: rank for rank, name in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(names, list(merges)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"] if vocabulary is None else ["<|endoftext|>"])
    return tokenizer


def test_a_tokenizer_that_loses_text_is_refused(split, encoding):
    lossy = Codec(lambda text: encoding.encode_ordinary(text.lower()), encoding.decode, 0)
    with pytest.raises(BadData, match="loses text of document"):
        list(OwnTokens(lossy, encoding).streams(split))


def test_documents_begin_with_end_of_text_else_bos_else_eos():
    assert baselines.first_token_of({"<|endoftext|>": 7}, 1, 2) == 7
    assert baselines.first_token_of({}, 1, 2) == 1
    assert baselines.first_token_of({}, None, 2) == 2
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        baselines.first_token_of({}, None, None)


def save_model(folder, kind, tokenizer, bos, eos, **shape):
    """Save a random model of transformers with a tokenizer, and return it."""
    torch.manual_seed(1)
    kind = getattr(transformers, kind)
    model = kind(kind.config_class(vocab_size=tokenizer.get_vocab_size() + shape.pop("padding", 0), **shape))
    model.eval().save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.save_pretrained(folder)
    return model


def save_gpt2(folder):
    """Save a random GPT-2 with the tiny encoding's vocabulary."""
    tokenizer = byte_tokenizer(vocabulary(), [tuple(merge.split()) for merge in MERGES])
    shape = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    return save_model(folder, "GPT2LMHeadModel", tokenizer, "<|endoftext|>", "<|endoftext|>", **shape)


def save_llama(folder, kind="LlamaForCausalLM", **changes):
    """Save a random Llama with a byte tokenizer of its own and padding rows."""
    shape = {
        "padding": 6, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "tie_word_embeddings": False,
    }  # fmt: skip
    return save_model(folder, kind, byte_tokenizer(), "<s>", "</s>", **{**shape, **changes})


def test_gpt2_weights_give_our_own_gpt_the_same_logits_and_nats(tmp_path, load, split, encoding):
    reference = save_gpt2(tmp_path / "gpt2")
    model = load(kind="folder", path=str(tmp_path / "gpt2"))
    size = reference.config.vocab_size
    own = tiny_gpt(size, padded_vocab_size=size, gelu="tanh").eval()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D
    state = reference.transformer.state_dict()
    own.load_state_dict({key: v.T if key.endswith(transposed) else v for key, v in state.items()})
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        logits = own.hidden(tokens) @ own.wte.weight.T
        torch.testing.assert_close(logits, reference(tokens).logits, atol=1e-4, rtol=1e-5)
    theirs = evaluate(model, split, encoding, LIKELIHOOD)
    ours = evaluate(as_neural_model(own, 3), split, encoding, LIKELIHOOD)
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5)
    assert theirs.own_tokens.tolist() == theirs.tokens.tolist()
    assert model.facts["tokenizer"] == "gpt2"
    assert model.codec.first_token not in model.codec.encode("the <|endoftext|>")
    assert model.facts["num_params"] == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_with_its_own_tokenizer_scores_the_same_text(tmp_path, load, split, encoding, batch_size):
    """Independent reference: one span at a time, all logits of the model's own forward pass."""
    reference, tokenizer = save_llama(tmp_path / "llama"), byte_tokenizer()
    model = replace(load(kind="folder", path=str(tmp_path / "llama")), batch_size=batch_size)
    found = evaluate(model, split, encoding, LIKELIHOOD)
    for document, nats in enumerate(found.nats):
        total, before = 0.0, 0  # <s>
        for span in text_spans(split, encoding, document, 8):
            ids = tokenizer.encode(span).ids
            with torch.no_grad():
                logits = reference(torch.tensor([[before, *ids[:-1]]])).logits[0].double()
            logits = logits[:, : tokenizer.get_vocab_size()]
            total += F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()
            before = ids[-1]
        assert nats == pytest.approx(total, rel=1e-5)
    assert found.own_tokens.tolist() == [len(text.encode()) for text in TEXTS]


def test_a_model_whose_logits_are_scaled_is_refused(tmp_path, load):
    save_llama(tmp_path / "granite", "GraniteForCausalLM", logits_scaling=2.0)
    with pytest.raises(BadConfig, match="GraniteForCausalLM can't be measured"):
        load(kind="folder", path=str(tmp_path / "granite"))


def test_missing_damaged_and_other_files_of_a_folder_are_refused(tmp_path, load):
    folder = tmp_path / "gpt2"
    spec = {"kind": "folder", "path": str(folder)}
    with pytest.raises(MissingInput, match=r"gpt2 has no config\.json"):
        load(**spec)
    save_gpt2(folder)
    sha256 = load(**spec).facts["sha256"]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BadData, match="can't be read as a causal language model"):
        load(**spec)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"gpt2 has no \*\.safetensors"):
        load(**spec)
    (folder / "model.safetensors").write_bytes(weights)
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    with pytest.raises(BadConfig, match=rf"specs\.it\.sha256 is {sha256}, but the hash of .* is"):
        load(**spec, sha256=sha256)


def test_a_changed_byte_in_any_file_of_a_folder_is_noticed(tmp_path):
    folder = tmp_path / "gpt2"
    save_gpt2(folder)
    for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"):
        (folder / name).write_bytes(b"a file of a tokenizer of another kind")
    spec = Folder(kind="folder", path=str(folder))
    with pytest.raises(BadConfig) as refused:
        check_model_folder("it", spec)
    spec = spec.model_copy(update={"sha256": str(refused.value).split(" sha256: ")[1][:64]})
    check_model_folder("it", spec)
    names = {path.name for path in folder.iterdir()}
    assert names > {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BadConfig, match=rf"sha256 is {spec.sha256}, but the hash of .* is"):
            check_model_folder("it", spec)
        path.write_bytes(content)


def test_a_vocabulary_is_gpt2s_only_with_its_bytes_at_its_ids(encoding):
    names = vocabulary()
    swapped = {**names, "a": names["b"], "b": names["a"]}
    foreign = {("▁x" if name == "er" else name): rank for name, rank in names.items()}
    for words, expected in ((names, True), (swapped, False), (foreign, False)):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
        assert baselines.has_vocabulary_of(tokenizer, encoding) == expected


def test_a_model_of_the_hub_is_read_from_its_cache_or_refused_at_once(tmp_path, load, monkeypatch):
    """conftest sets HF_HUB_OFFLINE, so that the hub's own client refuses."""
    spec = {"kind": "hub", "repo": "some/model", "revision": REVISION}
    with pytest.raises(Unreachable, match="the hub can't be reached for some/model"):
        load(**spec)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_gpt2(tmp_path / f"cache/models--some--model/snapshots/{REVISION}")
    assert load(**spec).facts["repo"] == "some/model"


def test_a_gguf_of_another_kind_is_refused(tmp_path):
    for change in ({"pre": "qwen2"}, {"architecture": "falcon"}):
        with pytest.raises(BadConfig, match="Only 'llama', 'gpt2' and 'smollm' can be read"):
            baselines.read_gguf(save_gguf(tmp_path / "x.gguf", **change))


def test_the_saved_copy_of_a_gguf_file_is_the_same_model(tmp_path):
    path, folder = save_gguf(tmp_path / "x.gguf"), tmp_path / "converted/x"
    original = baselines.read_gguf(path)
    first = baselines.read_converted(path, folder)
    path.unlink()  # from now on, only the folder is read
    for model in (first, baselines.read_converted(path, folder)):
        weights = model.model.state_dict()
        assert weights.keys() == original.model.state_dict().keys()
        for name, weight in original.model.state_dict().items():
            assert torch.equal(weight, weights[name]), name
        text = "the  cat 1234 \u00e9t\u00e9 <|endoftext|>"
        assert model.tokenizer.encode(text).ids == original.tokenizer.encode(text).ids
        assert model.first_token == original.first_token
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadData, match=r"config\.json"):
        baselines.read_converted(path, folder)


@pytest.mark.parametrize("name", ["unigram", "xz", "zstd-primed", "ngram-4", "smollm2-135m-instruct-q4"])
def test_the_stage_scores_each_kind_and_writes_the_same_bytes_twice(
    tmp_path, load, run_stage, run_stage_twice, split, name
):
    from stages.baseline import app

    path = save_gguf(tmp_path / "tiny.gguf")
    sha256 = sha256_file(path)
    (tmp_path / ".state/wheels").mkdir(parents=True)
    path.rename(tmp_path / ".state/wheels" / sha256)  # as fetched from its wheel
    save_params(
        tmp_path / "params.yaml",
        lambda tree: tree["baseline"]["specs"]["smollm2-135m-instruct-q4"].update(sha256=sha256),
    )
    assert "'gpt5' is not a baseline: use one of ['gpt2'" in run_stage(app, "gpt5").output
    outs = f"reports/baseline/{name}.json", f"data/baseline/{name}.parquet"
    report = json.loads(run_stage_twice(app, name, outs=outs)[0])
    assert report["model"]["name"] == name
    assert report["validation"]["tokens"] == int(np.diff(split.offsets).sum()) - len(TEXTS)
    assert report["loss"]["low"] <= report["loss"]["value"] <= report["loss"]["high"]
