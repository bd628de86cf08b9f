"""Training starts from GPT-2, from a model of ours, or from weights that know token frequencies."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.model.gpt import GPT
from compactgpt.model.huggingface import save_hf
from compactgpt.model.weights import save_model
from compactgpt.training.initialization import folder_sha256, initial_model
from tests.support.tiny_models import save_random_gpt2
from tests.support.tiny_training import random_batch, recipe, tiny_shape

GPT2 = {"bias": True, "gelu": "tanh"}


def start_from(folder, shape, sha256=None):
    return initial_model(shape, recipe(init_from=str(folder), init_sha256=sha256 or folder_sha256(folder)))


@pytest.fixture
def gpt2(tmp_path):
    return save_random_gpt2(tmp_path / "gpt2", vocab_size=50, n_positions=12), tmp_path / "gpt2"


def test_training_starts_from_gpt2_with_its_logits_a_shorter_context_and_padding_rows(gpt2):
    theirs, folder = gpt2
    model = start_from(folder, tiny_shape(**GPT2))  # context 12 -> 8, vocabulary 50 -> 64 rows
    tokens, targets = random_batch(3, 8)
    expected = theirs(tokens).logits
    logits = model.hidden(tokens) @ model.wte.weight.T
    torch.testing.assert_close(logits[..., :50], expected, atol=1e-4, rtol=1e-4)
    assert logits.softmax(-1)[..., 50:].sum(-1).max() < 14 / 64
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    assert model(tokens, targets).item() == pytest.approx(loss.item(), abs=0.3)


@pytest.mark.parametrize("save", [lambda model, folder: save_model(model, folder), save_hf])
def test_training_starts_from_a_model_of_ours_in_both_formats(tmp_path, save):
    source = GPT(tiny_shape(), seed=4)
    save(source, tmp_path / "saved")
    model = start_from(tmp_path / "saved", tiny_shape(block_size=6, dropout=0.1))
    assert torch.equal(model.wte.weight[:50], source.wte.weight[:50])
    assert torch.equal(model.wpe.weight, source.wpe.weight[:6])
    assert torch.equal(model.h[1].mlp.c_fc.weight, source.h[1].mlp.c_fc.weight)


def test_other_weights_or_shapes_than_params_name_are_refused(gpt2, tmp_path):
    _, folder = gpt2
    with pytest.raises(BadConfig, match=rf"init_sha256 is 0+, but .* is {folder_sha256(folder)}"):
        start_from(folder, tiny_shape(**GPT2), sha256="0" * 64)
    with pytest.raises(MissingInput, match="start from a copy"):
        start_from(tmp_path / "gone", tiny_shape())
    with pytest.raises(ValueError, match="init_sha256"):
        recipe(init_from="models/base")
    with pytest.raises(BadConfig) as caught:
        start_from(folder, tiny_shape(bias=True, n_layer=3, block_size=16))
    for part in ("model.n_layer: found 3", "has 2", "model.gelu: found erf", "model.block_size: found 16"):
        assert part in str(caught.value)
    with pytest.raises(BadConfig, match=r"model\.bias is false"):
        start_from(folder, tiny_shape(gelu="tanh"))


@pytest.mark.parametrize("amplitude", [0.0, 0.1])
def test_a_model_starts_at_the_log_frequencies_of_the_tokens(amplitude):
    shape = tiny_shape(n_embd=64)
    counts = (1000 / np.arange(1, 51)).astype(np.int64)
    plain = GPT(shape, seed=1)
    model = initial_model(shape, recipe(init_unigram=4.0, init_positions=amplitude), counts)
    p = (counts + 1) / (counts + 1).sum()
    drawn = torch.from_numpy(np.random.default_rng(0).choice(50, (200, 9), p=p))
    tokens, targets = drawn[:, :-1], drawn[:, 1:]
    entropy = -(p * np.log(p)).sum()
    assert plain(tokens, targets).item() > math.log(64) - 0.05
    assert model(tokens, targets).item() == pytest.approx(entropy, abs=0.1)


def test_sinusoids_rotate_by_the_same_angles_from_one_position_to_the_next():
    model = initial_model(tiny_shape(), recipe(init_positions=0.5))
    waves = torch.view_as_complex(model.wpe.weight.detach().view(8, 8, 2))  # (T, C / 2)
    torch.testing.assert_close(waves.abs(), torch.full((8, 8), 0.5))
    rotations = waves[1:] / waves[:-1]
    torch.testing.assert_close(rotations, rotations[:1].expand(7, 8))
    torch.testing.assert_close(rotations[0].angle().abs(), 1000.0 ** (-torch.arange(8) / 8))
