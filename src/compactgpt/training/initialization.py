"""What training starts from: drawn weights, a model of ours, or a GPT-2 in Hugging Face form.

params.yaml names the folder and the hash of its content, so that DVC sees when the weights change and
nobody trains from others than they think. Contexts are cropped and vocabularies padded to the model's.
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
from compactgpt.training.checkpoint import load_model

SINUSOID_BASE = (
    1000.0  # the longest wave is about so many radians' positions: some times a context of 128 to 512
)
_WEIGHTS = "model.safetensors"
_FILES = ("config.json", _WEIGHTS)


def folder_sha256(folder: Path) -> str:
    """Hash the files that weights are read from: their names and their own SHA-256.

    Raises:
        MissingInput: one is not there.
    """
    for name in _FILES:
        if not (folder / name).is_file():
            raise MissingInput(
                f"training.init_from: {folder} has no {name}; note that DVC empties models/compact before it "
                "trains: start from a copy of it"
            )
    return hashlib.sha256(json_bytes({name: sha256_file(folder / name) for name in _FILES})).hexdigest()


def check_initial(training: Training) -> None:
    """See that the folder to start from holds what params.yaml says.

    Raises:
        MissingInput, BadConfig: it is not there, or holds something else.
    """
    if training.init_from == SCRATCH:
        return
    found = folder_sha256(Path(training.init_from))
    if found != training.init_sha256:
        raise BadConfig(
            f"training.init_sha256: found {training.init_sha256}, but {training.init_from} holds {found}: "
            "write that into params.yaml if these are the weights you mean"
        )


def initial_model(shape: Model, training: Training) -> GPT:
    """The model that training starts from, on the CPU.

    Raises:
        MissingInput, BadConfig, BadData: what it should start from is missing, another, damaged, or of
            another shape.
    """
    model = GPT(shape, training.seed)
    if training.init_from != SCRATCH:
        check_initial(training)
        _take(model, _load(Path(training.init_from)), training.init_from)
    return model


@torch.no_grad()
def set_sinusoids(model: GPT, amplitude: float) -> None:
    """Replace the position embeddings by sinusoids (Vaswani et al. 2017, section 3.5).

    Positions at a distance then differ by a rotation that is the same everywhere, so that attention to the
    token before, or to the one a few before, is one linear map. Where all positions are drawn at random,
    training has to find it for each.

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
    """Change a model that was just drawn so that its first logits are the log frequencies of the tokens.

    GPT-2's form has no bias at its head. So one direction u of the residual stream carries a constant, which
    the position embeddings add, and each token's row gets a component along u. With a the length of the
    constant and r that of the rest of the stream, the last norm makes sqrt(C) a / sqrt(a^2 + r^2) of a.

    Args:
        model: with random weights.
        counts: of each token in the training split. (vocab_size,)
        strength: a / r.
    """
    width = model.shape.n_embd
    u = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(width // 4 + 1)[:width]  # (C,)
    u = u - u.mean()  # the norm subtracts the mean, so u must have none
    u /= u.norm()
    squares = [table.weight.square().sum(1).mean() for table in (model.wte, model.wpe)]
    rest = math.sqrt(float(sum(squares)))
    model.wpe.weight += strength * rest * u
    smooth = np.full(model.shape.padded_vocab_size, SMOOTHING)
    smooth[: len(counts)] += counts
    logs = np.log(smooth / smooth.sum())
    logs -= (logs * smooth).sum() / smooth.sum()  # the average token of the text is moved by nothing
    carried = math.sqrt(width) * strength / math.sqrt(1 + strength**2)
    model.wte.weight += torch.from_numpy(logs / carried).float()[:, None] * u


def _load(folder: Path) -> GPT:
    return load_model(folder) if (folder / MANIFEST).is_file() and _is_ours(folder) else load_hf(folder)


def _is_ours(folder: Path) -> bool:
    return b'"model_type"' not in (folder / "config.json").read_bytes()


def _take(model: GPT, source: GPT, name: str) -> None:
    """Copy weights from a model with at least our context and at most our rows of the vocabulary."""
    _check_shapes(model.shape, source.shape, name)
    tensors: dict[str, Tensor] = dict(source.state_dict())
    for key in tensors.keys() - model.state_dict().keys():  # Hugging Face's form always has biases
        if tensors[key].any():
            raise BadConfig(f"model.bias: found false, but {name} has biases: set it to true")
        del tensors[key]
    for key in model.state_dict().keys() - tensors.keys():  # our form may have none; absent means zero
        tensors[key] = torch.zeros_like(model.state_dict()[key])
    tensors["wpe.weight"] = tensors["wpe.weight"][: model.shape.block_size]
    tensors["wte.weight"] = _padded(tensors["wte.weight"], source.shape.vocab_size, model.wte.weight)
    model.load_state_dict(tensors)


def _padded(rows: Tensor, real: int, like: Tensor) -> Tensor:
    """Fill the vocabulary's padding rows with the mean of the real ones.

    GPT-2's logits lie far below zero, so that rows of zeros would win the softmax. The mean row's logit is
    the mean logit, and by Jensen's inequality its share of the softmax is at most that of an average token.
    """
    padded = rows[:real].mean(0).repeat(len(like), 1)  # (V, C)
    padded[:real] = rows[:real]
    return padded


def _check_shapes(wanted: Model, found: Model, name: str) -> None:
    wrong = [
        f"model.{key}: found {ours}, {name} has {theirs}"
        for key in ("n_layer", "n_head", "n_embd", "vocab_size", "gelu")
        if (ours := getattr(wanted, key)) != (theirs := getattr(found, key))
    ]
    if wanted.block_size > found.block_size:
        wrong.append(f"model.block_size: found {wanted.block_size}, {name} has only {found.block_size}")
    if wrong:
        raise BadConfig("the model can't start from these weights:\n  " + "\n  ".join(wrong))
