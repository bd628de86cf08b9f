"""The model that training starts from: random weights, a model of ours, or a GPT-2 in Hugging Face's form.

params.yaml names the folder and the hash of its content, so that DVC sees when the weights change and
training never starts from other weights than the user means.
"""

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

# The longest wave changes by one radian over this many positions: a few times a context of 128 to 512.
SINUSOID_BASE = 1000.0
FILES = ("config.json", "model.safetensors")


def folder_sha256(folder: Path) -> str:
    """Hash the files that weights are read from: their names and SHA-256.

    Raises:
        MissingInput: one is missing.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise MissingInput(
                f"training.init_from: {folder} has no {name}; note that DVC empties models/compact before it "
                "trains: start from a copy of it"
            )
    return hashlib.sha256(json_bytes({name: sha256_file(folder / name) for name in FILES})).hexdigest()


def initial_model(shape: Model, training: Training) -> GPT:
    """Return the model that training starts from, on the CPU.

    Raises:
        MissingInput: training.init_from is missing.
        BadConfig: it has another hash than training.init_sha256, or another shape.
        BadData: it is damaged.
    """
    model = GPT(shape, training.seed)
    if training.init_from == SCRATCH:
        return model
    folder = Path(training.init_from)
    sha256 = folder_sha256(folder)
    if sha256 != training.init_sha256:
        raise BadConfig(
            f"training.init_sha256: found {training.init_sha256}, but {folder} holds {sha256}: "
            "write that into params.yaml if these are the weights you mean"
        )
    is_ours = (folder / MANIFEST).is_file() and b'"model_type"' not in (folder / "config.json").read_bytes()
    _copy_weights(model, load_model(folder) if is_ours else load_hf(folder), training.init_from)
    return model


def _copy_weights(model: GPT, source: GPT, name: str) -> None:
    """Copy weights from a model whose context may be longer and whose vocabulary may be padded less."""
    _check_shapes(model.shape, source.shape, name)
    own = model.state_dict()
    tensors: dict[str, Tensor] = dict(source.state_dict())
    for key in tensors.keys() - own.keys():  # Hugging Face's form always has biases
        if tensors[key].any():
            raise BadConfig(f"model.bias: found false, but {name} has biases: set it to true")
        del tensors[key]
    for key in own.keys() - tensors.keys():  # a model of ours may have none, which is the same as zeros
        tensors[key] = torch.zeros_like(own[key])
    tensors["wpe.weight"] = tensors["wpe.weight"][: model.shape.block_size]
    # GPT-2's logits are far below zero, so padding rows of zeros would win the softmax. The mean row's logit
    # is the mean logit, and by Jensen's inequality its probability is at most that of an average token.
    real = tensors["wte.weight"][: source.shape.vocab_size]
    padded = real.mean(0).repeat(model.shape.padded_vocab_size, 1)  # (V, C)
    padded[: len(real)] = real
    tensors["wte.weight"] = padded
    model.load_state_dict(tensors)


def _check_shapes(wanted: Model, found: Model, name: str) -> None:
    wrong = [
        f"model.{key}: found {getattr(wanted, key)}, {name} has {getattr(found, key)}"
        for key in ("n_layer", "n_head", "n_embd", "vocab_size", "gelu")
        if getattr(wanted, key) != getattr(found, key)
    ]
    if wanted.block_size > found.block_size:
        wrong.append(f"model.block_size: found {wanted.block_size}, {name} has only {found.block_size}")
    if wrong:
        raise BadConfig("the model can't start from these weights:\n  " + "\n  ".join(wrong))


@torch.no_grad()
def set_sinusoids(model: GPT, amplitude: float) -> None:
    """Replace the position embeddings by sinusoids (Vaswani et al. 2017, section 3.5).

    Positions at a distance then differ by the same rotation everywhere, so that attention to a token a few
    positions before is one linear map. With random embeddings, training has to find it for each position.

    Args:
        model: with random weights.
        amplitude: of each sinusoid.
    """
    positions, width = model.wpe.weight.shape  # (T, C)
    pairs = torch.arange((width + 1) // 2)
    angles = torch.arange(positions)[:, None] * SINUSOID_BASE ** (-pairs / len(pairs))  # (T, C / 2)
    waves = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]  # (T, C)
    model.wpe.weight.copy_(amplitude * waves)


@torch.no_grad()
def start_at_unigram(model: GPT, counts: npt.NDArray[np.int64], strength: float) -> None:
    """Change a model with random weights so that its first logits are the log frequencies of the tokens.

    GPT-2's form has no bias at its head. So one direction u of the residual stream carries a constant, which
    the position embeddings add, and each token's row gets a component along u. With a the length of the
    constant and r that of the rest of the stream, the last norm makes sqrt(C) a / sqrt(a^2 + r^2) of a.

    Args:
        model: with random weights.
        counts: of each token in the training split. (vocab_size,)
        strength: a / r.
    """
    C = model.shape.n_embd
    u = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(C // 4 + 1)[:C]  # (C,)
    u = u - u.mean()  # the norm subtracts the mean, so u must have none
    u /= u.norm()
    mean_squares = [table.weight.square().sum(1).mean() for table in (model.wte, model.wpe)]
    r = math.sqrt(float(sum(mean_squares)))
    model.wpe.weight += strength * r * u  # the constant a
    smooth = np.full(model.shape.padded_vocab_size, SMOOTHING)
    smooth[: len(counts)] += counts
    logs = np.log(smooth / smooth.sum())  # (V,)
    logs -= (logs * smooth).sum() / smooth.sum()  # the average token of the text does not move
    after_norm = math.sqrt(C) * strength / math.sqrt(1 + strength**2)
    model.wte.weight += torch.from_numpy(logs / after_norm).float()[:, None] * u
