"""Convert our GPT to and from Hugging Face's GPT-2 format, without the package transformers.

The format always has biases, and stores four matrices of each layer transposed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.storage import atomic_folder, read_json, write_bytes, write_json, write_text
from compactgpt.config import Model
from compactgpt.data.token_files import ENCODER_JSON, END_OF_TEXT, VOCAB_BPE
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import load_gpt

# Transformers stores these matrices transposed: its Conv1D computes x @ W, not x @ W.T.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Our name of a GELU -> the name in transformers.
GELUS = {"erf": "gelu", "tanh": "gelu_new"}
PREFIX = "transformer."  # start of the name of each tensor in files that transformers writes
EPSILON = 1e-5  # the default of torch's LayerNorm, as in GPT-2
# Key of a GPT2Config -> the values that our GPT supports, the default first.
SUPPORTED: dict[str, list[Any]] = {
    "activation_function": ["gelu_new", "gelu"],
    "layer_norm_epsilon": [EPSILON],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "tie_word_embeddings": [True],
}


def save_hf(
    model: GPT, folder: Path, tokenizer: Path | None = None, card: str = "", *, overwrite: bool = False
) -> None:
    """Export a model to a folder that transformers' `from_pretrained` and `pipeline` can load.

    `tokenizer` is the folder of GPT-2's tokenizer, and `card` is the text of README.md. Raises
    NotAllowed if `folder` has a file that `save_hf` did not write. Also raises NotAllowed if a file was
    changed since the last export, unless `overwrite` is true.
    """
    facts = {"format": "hugging-face-gpt2"}
    block_size, last_token = model.shape.block_size, model.shape.vocab_size - 1
    # The last token, <|endoftext|>, starts, ends and pads a text: GPT-2 has no other special token.
    special_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), last_token)
    with atomic_folder(folder, facts, kind="export", overwrite=overwrite) as temporary:
        write_bytes(temporary / "model.safetensors", save(_hf_state(model), metadata={"format": "pt"}))
        write_json(temporary / "config.json", _hf_config(model.shape))
        # Without max_length, a transformers pipeline may generate more tokens than the context can hold.
        write_json(temporary / "generation_config.json", {**special_tokens, "max_length": block_size})
        if tokenizer is not None:
            for ours, theirs in ((ENCODER_JSON, "vocab.json"), (VOCAB_BPE, "merges.txt")):
                if not (tokenizer / ours).is_file():
                    raise MissingInput(f"{tokenizer} has no {ours}: only GPT-2's tokenizer can be exported")
                write_bytes(temporary / theirs, (tokenizer / ours).read_bytes())
            settings = {
                "tokenizer_class": "GPT2Tokenizer",
                "model_max_length": block_size,
                "truncation_side": "left",  # drop the start of a prompt that is longer than block_size
                **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
            }
            write_json(temporary / "tokenizer_config.json", settings)
        if card:
            write_text(temporary / "README.md", card)


def _hf_state(model: GPT) -> dict[str, Tensor]:
    """Return the model's tensors as transformers stores them: with biases, but without padding rows."""
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    own["wte.weight"] = own["wte.weight"][: model.shape.vocab_size]
    state = {}
    for name, tensor in own.items():
        stored = tensor.T if name.endswith(TRANSPOSED) else tensor
        state[PREFIX + name] = stored.contiguous().clone()
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and not name.startswith(("wte", "wpe")) and bias not in own:
            state[PREFIX + bias] = torch.zeros(len(tensor))
    return state


def _hf_config(shape: Model) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "activation_function": GELUS[shape.gelu],
        "layer_norm_epsilon": EPSILON,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), shape.vocab_size - 1),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def load_hf(folder: Path) -> GPT:
    """Load a GPT-2 in float32 from a folder in Hugging Face's format.

    Raises MissingInput for a missing file, BadConfig for an unsupported model, and BadData if a tensor does
    not fit config.json.
    """
    config = folder / "config.json"
    shape = from_hf_config(read_json(config), str(config))
    return load_gpt(folder / "model.safetensors", shape, from_hf_state)


def from_hf_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Hugging Face GPT-2's tensors as our GPT stores them, in float32.

    Attention masks and the tied head, a copy of `wte.weight`, are dropped.
    """
    own = {}
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX)
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        own[name] = (tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor).float()
    return own


def from_hf_config(settings: Any, source: str) -> Model:
    """Return the model shape that a GPT2Config describes; error messages name the file `source`.

    Raises BadConfig if our GPT does not support the settings.
    """
    if not isinstance(settings, dict) or not isinstance(settings.get("n_embd"), int):
        raise BadConfig(f"{source} does not describe a GPT-2: n_embd is missing")
    required = {**SUPPORTED, "model_type": ["gpt2"], "n_inner": [None, 4 * settings["n_embd"]]}
    for key, allowed in required.items():
        default = None if key == "model_type" else allowed[0]
        if settings.get(key, default) not in allowed:
            raise BadConfig(f"{source}: {key} is {settings.get(key)!r}, our GPT supports only {allowed}")
    gelu = settings.get("activation_function", "gelu_new")
    try:
        return Model(
            block_size=settings["n_positions"],
            n_layer=settings["n_layer"],
            n_head=settings["n_head"],
            n_embd=settings["n_embd"],
            vocab_size=settings["vocab_size"],
            padded_vocab_size=settings["vocab_size"],
            bias=True,
            dropout=0.0,
            gelu="tanh" if gelu == GELUS["tanh"] else "erf",
        )
    except (KeyError, ValidationError) as error:
        raise BadConfig(f"{source} does not describe a GPT-2: {' '.join(str(error).split())}") from error
