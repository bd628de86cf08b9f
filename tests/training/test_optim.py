"""Schedules, parameter groups and updates against nanoGPT's, torch's and the papers' own."""

import copy
import math

import numpy as np
import pytest
import torch

from compactgpt.model.gpt import GPT
from compactgpt.training.optim import Optimizers, lr_multiplier, muon_step
from tests.support.tiny_training import random_batch, recipe, tiny_shape


@pytest.mark.parametrize(
    ("schedule", "expected"),  # at steps 10, 55, 80, 90 and 99, by hand, with floor 0.1
    [
        ("linear", [1.0, 0.55, 0.1 + 0.9 * 20 / 90, 0.1 + 0.9 * 10 / 90, 0.1 + 0.9 * 1 / 90]),
        ("wsd", [1.0, 1.0, 1.0, 0.55, 0.1 + 0.9 * 1 / 20]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        # nanoGPT's schedule (train.py, get_lr)
        ("cosine", [0.1 + 0.45 * (1 + math.cos(math.pi * done / 90)) for done in (0, 45, 70, 80, 89)]),
    ],
)
def test_schedules_have_hand_worked_values_after_linear_warm_up(schedule, expected):
    training = recipe(schedule=schedule)
    found = [lr_multiplier(training, step) for step in (0, 9, 10, 55, 80, 90, 99)]
    assert found == pytest.approx([1 / 11, 10 / 11, *expected])


def add_gradients(model, seed):
    model(*random_batch(2, 8, seed=seed)).backward()


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1000.0])
def test_adamw_with_nanogpts_groups_and_clipping_is_torchs_own(grad_clip):
    """As in nanoGPT's configure_optimizers (model.py), tensors with two dimensions decay."""
    training = recipe(schedule="constant", warmup_steps=0, grad_clip=grad_clip)
    ours = GPT(tiny_shape(), seed=1)  # without biases: that of the keys has a gradient of rounding only
    theirs = copy.deepcopy(ours)
    optimizers = Optimizers(ours, training)
    groups = [
        {"params": [theirs.wte.weight, theirs.wpe.weight], "lr": 2e-2},
        {"params": [p for p in theirs.h.parameters() if p.dim() == 2]},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "foreach": False, "fused": False}
    reference = torch.optim.AdamW(groups, **settings)
    for step in range(3):
        add_gradients(ours, step)
        optimizers.update(step, optimizers.grad_norm())
        reference.zero_grad()
        add_gradients(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or math.inf)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5, msg=name)


def test_each_parameter_is_in_one_group_that_follows_the_schedule_from_its_own_peak():
    model = GPT(tiny_shape(bias=True), seed=1)
    optimizers = Optimizers(model, recipe(optimizer="muon", position_learning_rate=3e-3))
    add_gradients(model, 0)
    optimizers.update(4, torch.tensor(0.1))
    rates, decays = {}, {}
    for group in optimizers.adamw.param_groups + optimizers.muon.param_groups:
        rates |= {id(p): group["lr"] / (5 / 11) for p in group["params"]}
        decays |= {id(p): group["weight_decay"] for p in group["params"]}
    expected = {id(p): 5e-2 if p.dim() == 2 else 1e-2 for p in model.parameters()}
    expected |= {id(model.wte.weight): 2e-2, id(model.wpe.weight): 3e-3}
    assert rates == pytest.approx(expected)
    assert decays == {id(p): 0.1 if p.dim() == 2 else 0.0 for p in model.parameters()}


def muon_by_hand(weight, grads, rate, decay):
    """Jordan et al. 2024 in float64: momentum, lookahead, Newton-Schulz, decay, the shape's factor."""
    buffer = np.zeros_like(weight)
    for grad in grads:
        buffer = 0.95 * buffer + 0.05 * grad
        x = 0.05 * grad + 0.95 * buffer
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = (1 - rate * decay) * weight - rate * math.sqrt(max(1, len(x) / len(x.T))) * x
    return weight


def test_muon_makes_the_papers_steps():
    """Two tall, two square and one wide matrix; an update has the size of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 8), (8, 24), (24, 8), (8, 8)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(3, *shape, generator=generator) for shape in shapes]  # of three steps
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    for matrix in matrices:
        muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
    for step in range(3):
        for matrix, grad in zip(matrices, grads, strict=True):
            matrix.grad = grad[step].clone()
        muon_step(muon)
    for found, first, grad in zip(matrices, start, grads, strict=True):
        exact = muon_by_hand(first.double().numpy(), grad.double().numpy(), 0.02, 0.1)
        np.testing.assert_allclose(found.detach().numpy(), exact, atol=0.02 * 1e-4, rtol=0)


def test_clipping_reaches_muons_momentum():
    """Otherwise one huge gradient would decide the next updates as well."""
    model = GPT(tiny_shape(), seed=1)
    optimizers = Optimizers(model, recipe(optimizer="muon", grad_clip=0.5))
    add_gradients(model, 0)
    grad = model.h[0].mlp.c_fc.weight.grad.clone()
    norm = optimizers.grad_norm()
    optimizers.update(0, norm)
    buffer = optimizers.state["muon.momentum_buffer.h.0.mlp.c_fc.weight"]
    assert norm > 0.5
    torch.testing.assert_close(buffer, grad * (0.5 / norm) * (1 - 0.95), atol=1e-7, rtol=1e-4)
