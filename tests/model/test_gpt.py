"""The GPT against transformers' GPT-2, and its loss against the plain cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from compactgpt.model.cross_entropy import LOSS_ROWS, LinearCrossEntropy, linear_cross_entropy, token_nats
from compactgpt.model.gpt import GPT
from compactgpt.model.huggingface import save_hf
from tests.support.tiny_training import random_batch, tiny_shape


@pytest.mark.parametrize(("bias", "gelu"), [(False, "erf"), (True, "tanh")])
def test_loss_and_gradients_are_those_of_transformers_gpt2(tmp_path, bias, gelu):
    from transformers import GPT2LMHeadModel

    model = GPT(tiny_shape(bias=bias, gelu=gelu, vocab_size=64), seed=1)
    with torch.no_grad():  # large weights, so that the two GELUs differ
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    save_hf(model, tmp_path / "hf")
    copy = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    tokens, targets = random_batch(3, 8)
    expected = F.cross_entropy(copy(tokens).logits.flatten(0, 1), targets.flatten())
    loss = model(tokens, targets)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    for own, theirs in (
        (model.wte.weight.grad, copy.transformer.wte.weight.grad),
        (model.h[0].mlp.c_fc.weight.grad, copy.transformer.h[0].mlp.c_fc.weight.grad.T),
    ):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, LOSS_ROWS, 2 * LOSS_ROWS + 7])
def test_the_loss_in_chunks_equals_the_plain_one_with_its_gradients(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    plain = F.cross_entropy(x @ weight.T, targets)
    expected = torch.autograd.grad(plain / 3, (x, weight))
    chunked = LinearCrossEntropy.apply(x, weight, targets, x.dtype)
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(torch.autograd.grad(chunked / 3, (x, weight)), expected)
    nats = token_nats(x, weight, targets)
    torch.testing.assert_close(nats, F.cross_entropy(x @ weight.T, targets, reduction="none"))


def test_the_embeddings_gradient_is_added_to_the_heads_without_a_copy():
    model = GPT(tiny_shape())
    loss = model(*random_batch(2, 6))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    matrix = list(model.wte.weight.shape)
    names = [event.name for event in seen.events() if event.input_shapes[:1] == [matrix]]
    assert "aten::add_" in names
    assert "aten::copy_" not in names


@pytest.mark.parametrize("deviation", [4.0, 8.0])
def test_gradients_in_bfloat16_are_as_exact_as_those_of_autocast(deviation):
    """The deviation is that of the logits. The model is right about its targets, as after training.

    The reference is float64 without any rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LOSS_ROWS + 9, 64, generator=generator).requires_grad_()
    weight = (torch.randn(1000, 64, generator=generator) * deviation / 8).requires_grad_()
    targets = torch.multinomial((x @ weight.T).detach().softmax(1), 1, generator=generator)[:, 0]
    plain = F.cross_entropy(x.double() @ weight.double().T, targets)
    exact = torch.autograd.grad(plain, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        losses = F.cross_entropy(x @ weight.T, targets), linear_cross_entropy(x, weight, targets)
    assert losses[1].item() == pytest.approx(plain.item(), rel=1e-3)
    errors = [
        [float((found - true).norm() / true.norm()) for found, true in zip(grads, exact, strict=True)]
        for grads in (torch.autograd.grad(loss, (x, weight)) for loss in losses)
    ]
    for autocast, ours in zip(*errors, strict=True):
        assert ours <= 1.1 * autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_is_refused_as_torch_refuses_it(dtype):
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    loss = LinearCrossEntropy.apply(x, weight, torch.tensor([1, 4]), dtype)
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize(("dtype", "cap"), [(torch.float32, 87.3), (torch.bfloat16, 60.0)])
def test_an_impossible_token_costs_a_finite_loss_and_nan_stays_nan(dtype, cap):
    weight = torch.tensor([[1000.0], [-1000.0]])
    x = torch.ones(1, 1, requires_grad=True)
    loss = LinearCrossEntropy.apply(x, weight, torch.tensor([1]), dtype)
    assert loss.item() == pytest.approx(cap, abs=0.1)
    assert torch.autograd.grad(loss, x)[0].item() == pytest.approx(2000, rel=0.01)
    nan = torch.full((1, 1), math.nan)
    assert LinearCrossEntropy.apply(nan, weight, torch.tensor([0]), dtype).isnan()


def test_weights_are_drawn_as_nanogpt_draws_them_and_the_seed_alone_decides_them():
    shape = tiny_shape(n_embd=128, padded_vocab_size=512, bias=True)
    model = GPT(shape, seed=5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(4) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.ln_f.weight.eq(1).all()
    assert model.h[1].attn.c_attn.bias.eq(0).all()
    torch.manual_seed(2)
    assert torch.equal(model.wte.weight, GPT(shape, seed=5).wte.weight)
    assert not torch.equal(model.wte.weight, GPT(shape, seed=6).wte.weight)


def test_no_position_depends_on_later_ones_and_a_longer_context_is_refused():
    model = GPT(tiny_shape(dropout=0.5), seed=1).eval()  # dropout acts in training only
    tokens, _ = random_batch(2, 8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model.hidden(tokens), model.hidden(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before, model.train().hidden(tokens))
    with pytest.raises(ValueError, match=r"got 9 tokens.*at most 8"):
        model.hidden(torch.zeros(1, 9, dtype=torch.int64))
