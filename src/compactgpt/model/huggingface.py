"""Our GPT <-> Hugging Face's form of GPT-2: a folder with config.json and model.safetensors.

Both are one architecture. Theirs keeps four matrices of a layer transposed (Conv1D), always has biases,
and names the GELU: `gelu` is ours with erf, `gelu_new` the tanh approximation that OpenAI's weights were
made with. Neither way needs transformers installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import atomic_folder, read_json, write_bytes, write_json, write_text
from compactgpt.config import Model
from compactgpt.data.tokenizer import ENCODER_JSON, END_OF_TEXT, VOCAB_BPE
from compactgpt.model.gpt import GPT
from compactgpt.training.checkpoint import check_size

# Conv1D of transformers (pytorch_utils.py) multiplies x @ W where Linear multiplies x @ W.T.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GELUS = {"erf": "gelu", "tanh": "gelu_new"}
_PREFIX = "transformer."
_EPSILON = 1e-5  # of torch's LayerNorm, and of GPT-2


def to_hf_state(model: GPT) -> dict[str, Tensor]:
    """Name and turn our tensors as transformers keeps them: padding rows left out, absent biases zero."""
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    own["wte.weight"] = own["wte.weight"][: model.shape.vocab_size]
    state = {}
    for name, tensor in own.items():
        turned = tensor.T if name.endswith(TRANSPOSED) else tensor
        state[_PREFIX + name] = turned.contiguous().clone()
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and not name.startswith(("wte", "wpe")) and bias not in own:
            state[_PREFIX + bias] = torch.zeros(len(tensor))
    return state


def to_hf_config(shape: Model) -> dict[str, Any]:
    """Describe our shape as transformers' GPT2Config."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "activation_function": GELUS[shape.gelu],
        "layer_norm_epsilon": _EPSILON,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "bos_token_id": shape.vocab_size - 1,  # end-of-text is GPT-2's last token
        "eos_token_id": shape.vocab_size - 1,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def to_generation_config(shape: Model) -> dict[str, Any]:
    """Describe how transformers generates: until end-of-text, or until the context is full.

    Without `max_length` a pipeline asks for 256 new tokens, and runs out of position embeddings.
    """
    end_of_text = shape.vocab_size - 1
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    return {**tokens, "max_length": shape.block_size}


def save_hf(
    model: GPT, folder: Path, tokenizer: Path | None = None, card: str = "", *, overwrite: bool = False
) -> None:
    """Write a folder that `from_pretrained` and `pipeline("text-generation")` load; its logits equal ours.

    Args:
        model: ours.
        folder: new, empty, or an earlier export, which is replaced as a whole.
        tokenizer: folder of GPT-2's tokenizer as `download` keeps it, to go along; `AutoTokenizer` loads it.
        card: the model card, which becomes README.md.
        overwrite: replace an earlier export also where its files have changed since.

    Raises:
        NotAllowed: the folder has other files.
        MissingInput: the tokenizer's folder has no GPT-2 files.
    """
    facts = {"format": "hugging-face-gpt2"}
    with atomic_folder(folder, facts, kind="export", overwrite=overwrite) as temporary:
        write_bytes(temporary / "model.safetensors", save(to_hf_state(model), metadata={"format": "pt"}))
        write_json(temporary / "config.json", to_hf_config(model.shape))
        write_json(temporary / "generation_config.json", to_generation_config(model.shape))
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, temporary, model.shape.block_size)
        if card:
            write_text(temporary / "README.md", card)


def _copy_tokenizer(tokenizer: Path, folder: Path, block_size: int) -> None:
    for ours, theirs in ((ENCODER_JSON, "vocab.json"), (VOCAB_BPE, "merges.txt")):
        if not (tokenizer / ours).is_file():
            raise MissingInput(f"{tokenizer} has no {ours}: only GPT-2's tokenizer can be exported")
        write_bytes(folder / theirs, (tokenizer / ours).read_bytes())
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    facts = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "truncation_side": "left",  # the end of a long prompt is what is continued
        **special,
    }
    write_json(folder / "tokenizer_config.json", facts)


def from_hf_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and turn transformers' GPT-2 tensors as our GPT keeps them.

    Takes the published files, whose names have no prefix and which hold attention masks, as well as those
    that transformers writes today. The tied head is left out: it is `wte.weight`.
    """
    own = {}
    for key, tensor in state.items():
        name = key.removeprefix(_PREFIX)
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        own[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return own


def from_hf_config(facts: Mapping[str, Any], source: str) -> Model:
    """Read the shape that a GPT2Config describes; the vocabulary is not padded.

    Raises:
        BadConfig: another architecture, or a variant of GPT-2 that our GPT does not compute.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("n_embd"), int):
        raise BadConfig(f"{source} describes no GPT-2: n_embd is missing")
    gelus = {theirs: ours for ours, theirs in GELUS.items()}
    wanted: dict[str, list[Any]] = {
        "model_type": ["gpt2"],
        "activation_function": sorted(gelus),
        "layer_norm_epsilon": [_EPSILON],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "tie_word_embeddings": [True],
        "n_inner": [None, 4 * facts["n_embd"]],
    }
    defaults = {"activation_function": "gelu_new", "layer_norm_epsilon": _EPSILON, "n_inner": None}
    defaults |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    found = {**defaults, "tie_word_embeddings": True, **facts}
    for key, allowed in wanted.items():
        if found.get(key) not in allowed:
            raise BadConfig(f"{source}: {key} is {found.get(key)!r}, our GPT computes only {allowed}")
    try:
        return Model(
            block_size=found["n_positions"],
            n_layer=found["n_layer"],
            n_head=found["n_head"],
            n_embd=found["n_embd"],
            vocab_size=found["vocab_size"],
            padded_vocab_size=found["vocab_size"],
            bias=True,
            dropout=0.0,
            gelu=gelus[found["activation_function"]],  # type: ignore[arg-type]
        )
    except (KeyError, ValidationError) as error:
        raise BadConfig(f"{source} describes no GPT-2: {' '.join(str(error).split())}") from error


def load_hf(folder: Path) -> GPT:
    """Read a GPT-2 in Hugging Face form (safetensors, in one file) into our own GPT, in float32.

    Raises:
        MissingInput: the folder lacks config.json or model.safetensors.
        BadConfig: it is no GPT-2, or a variant that our GPT does not compute.
        BadData: tensors are missing, unknown or of another shape.
    """
    path = folder / "model.safetensors"
    shape = from_hf_config(read_json(folder / "config.json"), str(folder / "config.json"))
    try:
        state = from_hf_state(load_file(path))
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: save a GPT-2 there in Hugging Face form") from error
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise BadData(f"{path} is no safetensors file of a GPT-2: {error}") from error
    check_size(shape, path)
    model = GPT(shape)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise BadData(
            f"{path} does not hold what its config.json says: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval()
