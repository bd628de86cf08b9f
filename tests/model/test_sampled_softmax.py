"""The sampled softmax against the full one, in float64 on a small vocabulary; lazy rows against AdamW."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compactgpt.model.cross_entropy import LinearCrossEntropy
from compactgpt.model.gpt import GPT
from compactgpt.model.sampled_softmax import draw_sample, inclusion_probabilities, token_counts
from compactgpt.training.optim import Optimizers
from tests.support.tiny_training import random_batch, recipe, tiny_shape

V, C, N = 60, 8, 12
COUNTS = (1000 / np.arange(1, V + 1)).astype(np.int64)  # Zipf's law, as text has it


def problem():
    """Hidden states, head and targets. (N, C), (V, C), (N,)."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(V, C, generator=generator, dtype=torch.float64)
    return x, weight, torch.randint(0, 10, (N,), generator=generator)


def full(x, weight, targets):
    """Loss and both gradients of the plain softmax."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = F.cross_entropy(x @ weight.T, targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def sampled(x, weight, targets, inclusion, step):
    """Loss and both gradients on one sample; the head's gradient is zero outside of it."""
    sample = draw_sample(inclusion, targets.numpy(), seed=3, step=step)
    x, rows = x.clone().requires_grad_(), weight[sample.ids].clone().requires_grad_()
    correction = torch.from_numpy(-sample.log_inclusion).to(weight.dtype)
    positions = torch.from_numpy(sample.positions(targets.numpy()))
    loss = LinearCrossEntropy.apply(x, rows, positions, x.dtype, correction)
    loss.backward()
    dw = torch.zeros_like(weight)
    dw[sample.ids] = rows.grad
    return loss.detach(), x.grad, dw


def test_the_expected_sample_has_the_requested_size_and_always_frequent_tokens(monkeypatch):
    inclusion = inclusion_probabilities(COUNTS, 20, 0.75)
    assert inclusion.sum() == pytest.approx(20)
    assert inclusion[0] == 1 > inclusion[-1] > 0
    below = inclusion < 1
    assert np.ptp(inclusion[below] / (COUNTS[below] + 1) ** 0.75) < 1e-12
    assert (inclusion_probabilities(COUNTS, V, 0.75) == 1).all()
    assert inclusion_probabilities(COUNTS, 20, 0.0) == pytest.approx(np.full(V, 20 / V))
    monkeypatch.setattr("compactgpt.model.sampled_softmax.COUNTED_AT_ONCE", 3)
    assert token_counts(np.array([1, 1, 4, 0, 1, 4, 4], np.uint16), 6).tolist() == [1, 3, 0, 0, 3, 0]


def test_a_sample_is_a_function_of_seed_and_step_and_has_the_tokens_of_the_batch():
    inclusion = inclusion_probabilities(COUNTS, 20, 0.75)
    batch = np.array([[57, 58], [58, 59]])
    a, b = (draw_sample(inclusion, batch, seed=1, step=7) for _ in range(2))
    assert a.ids.tolist() == b.ids.tolist()
    assert (a.ids[a.positions(batch)] == batch).all()
    assert (a.log_inclusion[a.positions(batch)] == 0).all()
    others = [draw_sample(inclusion, batch, seed=1, step=step).ids for step in range(50)]
    assert len({tuple(ids) for ids in others}) > 40
    frequency = np.bincount(np.concatenate(others), minlength=V)[: V - 3] / 50
    assert frequency == pytest.approx(inclusion[: V - 3], abs=5 * 0.5 / math.sqrt(50))


def test_a_sample_of_everything_is_the_full_softmax():
    for exact, found in zip(full(*problem()), sampled(*problem(), np.ones(V), 0), strict=True):
        torch.testing.assert_close(exact, found, atol=1e-12, rtol=1e-12)


def test_the_loss_is_too_low_by_half_the_relative_variance():
    """The sample's sum of exponentials estimates Z; the bias of its log is about -Var / (2 Z^2)."""
    x, weight, targets = problem()
    draws, e = 4000, (x @ weight.T).exp().numpy()
    for size in (20, 45):
        inclusion = inclusion_probabilities(COUNTS, size, 0.75)
        losses = torch.stack([sampled(x, weight, targets, inclusion, step)[0] for step in range(draws)])
        inclusion[targets.numpy()] = 1
        variance = (e**2 * (1 - inclusion) / inclusion).sum(1)
        predicted = -(variance / (2 * e.sum(1) ** 2)).mean()
        bias = (losses - full(x, weight, targets)[0]).mean().item()
        error = (losses.std() / math.sqrt(draws)).item()
        assert bias == pytest.approx(predicted, rel=0.25, abs=4 * error)
        assert bias < -4 * error  # larger than chance


def test_rows_outside_of_a_step_keep_weights_and_moments():
    model = GPT(tiny_shape(), seed=1)
    optimizers, wte = Optimizers(model, recipe(schedule="constant", warmup_steps=0)), model.wte.weight
    moments = [optimizers.state[f"adamw.{key}.wte.weight"] for key in ("exp_avg", "exp_avg_sq")]
    for step, ids in enumerate(([3, 7, 11], [7, 8])):  # row 3 is left out later
        before = [tensor.detach().clone() for tensor in (wte, *moments)]
        values = optimizers.select_rows(torch.tensor(ids))
        (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizers.update(step, optimizers.grad_norm())
        outside = torch.ones(len(wte), dtype=torch.bool)
        outside[ids] = False
        for old, new in zip(before, (wte, *moments), strict=True):
            assert torch.equal(old[outside], new.detach()[outside])
            assert not torch.isclose(old[ids], new.detach()[ids]).all(1).any()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_all_rows_the_update_is_the_dense_one_to_the_bit(optimizer):
    training = recipe(optimizer=optimizer, schedule="constant", warmup_steps=0, grad_clip=0.5)
    models = [GPT(tiny_shape(vocab_size=64), seed=1) for _ in range(2)]
    dense, lazy = (Optimizers(model, training) for model in models)
    for step in range(3):
        batch = random_batch(2, 8, seed=step)
        models[0](*batch).backward()
        models[1](*batch, lazy.select_rows(torch.arange(64))).backward()
        for optimizers in (dense, lazy):
            optimizers.update(step, optimizers.grad_norm())
    for a, b in ((models[0].state_dict(), models[1].state_dict()), (dense.state, lazy.state)):
        assert all(torch.equal(a[name], b[name]) for name in a)
