"""Build the model that training starts from: with random weights, or with those of a saved model."""

import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.storage import MANIFEST, json_bytes, sha256_file
from compactgpt.config import SCRATCH, Model, Training
from compactgpt.model.gpt import GPT
from compactgpt.model.huggingface import load_hf
from compactgpt.model.sampled_softmax import SMOOTHING
from compactgpt.model.weights import load_model

SINUSOID_BASE = 1000.0  # Vaswani et al. use 10,000. In 1000 positions, the slowest wave turns about 1 radian
# Files of a saved model that decide the initial weights; training.init_sha256 is their hash.
FILES = ("config.json", "model.safetensors")


def folder_sha256(folder: Path) -> str:
    """Return a SHA-256 hash of the FILES of a model folder. Raises MissingInput if a file is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise MissingInput(
                f"training.init_from: {folder} has no {name}. DVC empties models/compact before the "
                "training: start from a copy of models/compact in another folder"
            )
    return hashlib.sha256(json_bytes({name: sha256_file(folder / name) for name in FILES})).hexdigest()


def initial_model(shape: Model, training: Training, counts: npt.NDArray[np.int64] | None = None) -> GPT:
    """Return the model that training starts from, on the CPU.

    `counts`, (vocab_size,), is how often each token occurs in the train split. Raises BadConfig if saved
    weights do not fit training.init_sha256 or `shape`.
    """
    model = GPT(shape, training.seed)
    if training.init_positions:
        set_sinusoids(model, training.init_positions)
    if training.init_unigram and counts is not None:
        start_at_unigram(model, counts, training.init_unigram)
    if training.init_from == SCRATCH:
        return model
    folder = Path(training.init_from)
    sha256 = folder_sha256(folder)
    if sha256 != training.init_sha256:
        raise BadConfig(
            f"training.init_sha256 is {training.init_sha256}, but the hash of {folder} is {sha256}: "
            "if these are the weights to start from, write the hash of the folder into params.yaml"
        )
    is_ours = (folder / MANIFEST).is_file() and b'"model_type"' not in (folder / "config.json").read_bytes()
    _copy_weights(model, load_model(folder) if is_ours else load_hf(folder), training.init_from)
    return model


def _copy_weights(model: GPT, source: GPT, name: str) -> None:
    """Copy the weights of `source` to `model`.

    Raises BadConfig if the weights do not fit `model`. In the message, `source` is called `name`.
    """
    wanted, found = model.shape, source.shape
    wrong = [
        f"model.{key}: found {getattr(wanted, key)}, {name} has {getattr(found, key)}"
        for key in ("n_layer", "n_head", "n_embd", "vocab_size", "gelu")
        if getattr(wanted, key) != getattr(found, key)
    ]
    if wanted.block_size > found.block_size:
        wrong.append(f"model.block_size: found {wanted.block_size}, {name} has only {found.block_size}")
    if wrong:
        raise BadConfig("the model can't start from these weights:\n  " + "\n  ".join(wrong))
    own = model.state_dict()
    tensors: dict[str, Tensor] = dict(source.state_dict())
    # Hugging Face's format always has biases. A model without biases can drop them only if all are 0.
    for key in tensors.keys() - own.keys():
        if tensors[key].any():
            raise BadConfig(f"model.bias is false, but {name} has nonzero biases: set model.bias to true")
        del tensors[key]
    for key in own.keys() - tensors.keys():  # zeros replace the biases that `source` lacks
        tensors[key] = torch.zeros_like(own[key])
    tensors["wpe.weight"] = tensors["wpe.weight"][: wanted.block_size]
    # Padding rows, which belong to no token, get the mean of the token rows. A row of zeros would have the
    # logit 0. That is far above GPT-2's other logits, so padding rows would get almost all probability.
    token_rows = tensors["wte.weight"][: found.vocab_size]
    padded = token_rows.mean(0).repeat(wanted.padded_vocab_size, 1)  # (V, C)
    padded[: len(token_rows)] = token_rows
    tensors["wte.weight"] = padded
    model.load_state_dict(tensors)


@torch.no_grad()
def set_sinusoids(model: GPT, amplitude: float) -> None:
    """Replace the position embeddings by sinusoids of this amplitude (Vaswani et al. 2017, section 3.5)."""
    positions, width = model.wpe.weight.shape  # (T, C)
    pairs = torch.arange((width + 1) // 2)
    angles = torch.arange(positions)[:, None] * SINUSOID_BASE ** (-pairs / len(pairs))  # (T, C / 2)
    waves = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]  # (T, C)
    model.wpe.weight.copy_(amplitude * waves)


@torch.no_grad()
def start_at_unigram(model: GPT, counts: npt.NDArray[np.int64], strength: float) -> None:
    """Change random weights so that, before training, the logits are near the tokens' log frequencies.

    `counts`, (vocab_size,), has the number of occurrences of each token. The function adds one vector to all
    position embeddings. The norm of this vector is `strength` times the root mean square, over tokens and
    positions, of norm(token embedding + position embedding).
    """
    C = model.shape.n_embd
    direction = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(C // 4 + 1)[:C]
    direction = direction - direction.mean()  # mean 0, because the layer norm subtracts the mean
    direction /= direction.norm()  # (C,), a unit vector: the direction of the vector that is added below
    mean_squares = [table.weight.square().sum(1).mean() for table in (model.wte, model.wpe)]
    norm = math.sqrt(float(sum(mean_squares)))  # root mean square of norm(token + position embedding)
    model.wpe.weight += strength * norm * direction
    smooth = np.full(model.shape.padded_vocab_size, SMOOTHING)
    smooth[: len(counts)] += counts
    logs = np.log(smooth / smooth.sum())  # (V,)
    logs -= (logs * smooth).sum() / smooth.sum()  # subtract the mean of `logs`, weighted by frequency
    # The last layer norm gets about r + a: r is random, and a = strength * norm * direction was added above.
    # norm(a) = strength * norm(r), and a is nearly orthogonal to r, so norm(r + a)^2 = norm(r)^2 + norm(a)^2.
    # The layer norm multiplies r + a by sqrt(C) / norm(r + a). So a becomes a vector b with the norm:
    scaled_norm = math.sqrt(C) * strength / math.sqrt(1 + strength**2)
    # `wte` is also the weight of the head. So a vector that is added to a token's row changes the token's
    # logit by the product of this vector and b. This product must be the token's log frequency.
    model.wte.weight += torch.from_numpy(logs / scaled_norm).float()[:, None] * direction
