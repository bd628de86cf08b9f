import copy
import math

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from compactgpt.common.errors import BadData
from compactgpt.config import load_params
from compactgpt.model.gpt import GPT
from compactgpt.training.optim import Optimizers, lr_multiplier, muon_step, orthogonal
from tests.support.tiny_gpt import tiny, tokens_of
from tests.support.tiny_models import ROOT
from tests.support.training_recipe import recipe


def nanogpt_lr(step, warmup, decay_steps, peak, floor):
    """nanoGPT's schedule (train.py, get_lr), in its own terms."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    ratio = (step - warmup) / (decay_steps - warmup)
    return floor + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - floor)


def test_cosine_is_nanogpts_schedule():
    training = recipe()
    for step in range(100):
        assert 3e-4 * lr_multiplier(training, step) == pytest.approx(nanogpt_lr(step, 10, 100, 3e-4, 3e-5))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # steps 0 and 9 warm up; 10, 55, 80, 90 and 99 by hand, with floor 0.1
        (
            "linear",
            [1 / 11, 10 / 11, 1.0, 0.55, 0.1 + 0.9 * 20 / 90, 0.1 + 0.9 * 10 / 90, 0.1 + 0.9 * 1 / 90],
        ),
        ("wsd", [1 / 11, 10 / 11, 1.0, 1.0, 1.0, 0.55, 0.1 + 0.9 * 1 / 20]),
        ("constant", [1 / 11, 10 / 11, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_pass_through_hand_worked_points(schedule, expected):
    training = recipe(schedule=schedule)
    assert [lr_multiplier(training, step) for step in (0, 9, 10, 55, 80, 90, 99)] == pytest.approx(expected)


def test_without_warmup_the_first_step_is_at_the_peak():
    assert lr_multiplier(recipe(warmup_steps=0), 0) == 1.0


def gradients(model, seed):
    loss = model(*tokens_of(2, 8, seed=seed))
    loss.backward()


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1000.0])
def test_adamw_with_clipping_is_torchs_own(grad_clip):
    training = recipe(schedule="constant", warmup_steps=0, grad_clip=grad_clip)
    ours = GPT(tiny(), seed=1)  # without biases: that of the keys has no gradient but rounding
    theirs = copy.deepcopy(ours)
    optimizers = Optimizers(ours, training)
    embeddings = [theirs.wte.weight, theirs.wpe.weight]
    matrices = [p for p in theirs.h.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": 2e-2},
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        foreach=False,
        fused=False,
    )
    for step in range(3):
        gradients(ours, step)
        optimizers.update(step, optimizers.grad_norm())
        reference.zero_grad()
        gradients(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or math.inf)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5, msg=name)


def nanogpts_groups(model):
    """nanoGPT's configure_optimizers (model.py): what is at least two-dimensional decays."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {name for name, p in named.items() if p.dim() >= 2},
        {name for name, p in named.items() if p.dim() < 2},
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_with_its_recipe_parameters_are_grouped_as_nanogpt_groups_them(bias):
    settings = YAML(typ="safe").load(ROOT / "conf/parts/nanogpt.yaml")["params"]["training"]
    training = recipe(**settings)
    with torch.device("meta"):
        model = GPT(load_params(ROOT / "params.yaml").estimate.note.model_copy(update={"bias": bias}))
    optimizers = Optimizers(model, training)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizers.adamw.param_groups
    found = [
        {names[id(p)] for group in groups if group["weight_decay"] == decay for p in group["params"]}
        for decay in (0.1, 0.0)
    ]
    assert found == nanogpts_groups(model)
    assert (len(found[0]), len(found[1])) == ((26, 13) if not bias else (26, 50))
    assert {group["lr"] for group in groups} == {3e-4}
    assert {group["betas"] for group in groups} == {(0.9, 0.99)}
    assert {group["eps"] for group in groups} == {1e-8}
    assert optimizers.muon is None


def test_muon_owns_the_hidden_matrices_and_nothing_else():
    model = GPT(tiny(bias=True), seed=1)
    optimizers = Optimizers(model, recipe(optimizer="muon"))
    muon = {id(p) for group in optimizers.muon.param_groups for p in group["params"]}
    assert muon == {id(p) for p in model.h.parameters() if p.dim() == 2}
    adamw = {id(p) for group in optimizers.adamw.param_groups for p in group["params"]}
    assert adamw == {id(p) for p in model.parameters()} - muon


def muon_by_hand(weight, grads, rate, decay):
    """Jordan et al. 2024 in float64: momentum, a look ahead, Newton-Schulz, decay, the shape's factor."""
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


def test_muon_makes_the_papers_steps_and_torchs_own_within_bfloat16():
    """Two tall, two square and one wide matrix; an update's size is that of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 8), (8, 24), (24, 8), (8, 8)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for _ in range(3)] for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [torch.optim.Muon(own, lr=0.02, weight_decay=0.1) for own in (ours, theirs)]
    for step in range(3):
        for a, b, grad in zip(ours, theirs, grads, strict=True):
            a.grad, b.grad = grad[step].clone(), grad[step].clone()
        muon_step(optimizers[0])
        optimizers[1].step()
    for a, b, first, grad in zip(ours, theirs, start, grads, strict=True):
        exact = muon_by_hand(first.double().numpy(), [g.double().numpy() for g in grad], 0.02, 0.1)
        np.testing.assert_allclose(a.detach().numpy(), exact, atol=0.02 * 1e-4, rtol=0)
        np.testing.assert_allclose(b.detach().numpy(), exact, atol=0.02 * 0.05, rtol=0)
        buffers = [o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (a, b), strict=True)]
        torch.testing.assert_close(*buffers)


def test_orthogonal_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for each in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonal(each, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_clipping_reaches_muon_too():
    """With momentum, one huge gradient that is not clipped would decide the next updates as well."""
    model = GPT(tiny(), seed=1)
    optimizers = Optimizers(model, recipe(optimizer="muon", grad_clip=0.5))
    gradients(model, 0)
    grad = model.h[0].mlp.c_fc.weight.grad.clone()
    norm = optimizers.grad_norm()
    optimizers.update(0, norm)
    buffer = optimizers.muon.state[model.h[0].mlp.c_fc.weight]["momentum_buffer"]
    assert norm > 0.5
    torch.testing.assert_close(buffer, grad * (0.5 / norm) * (1 - 0.95), atol=1e-7, rtol=1e-4)


def test_every_group_follows_the_schedule_from_its_own_peak():
    model = GPT(tiny(), seed=1)
    optimizers = Optimizers(model, recipe(optimizer="muon"))
    gradients(model, 0)
    optimizers.update(4, torch.tensor(0.1))
    rates = [group["lr"] for group in optimizers.adamw.param_groups + optimizers.muon.param_groups]
    assert rates == pytest.approx([2e-2 * 5 / 11, 1e-2 * 5 / 11, 5e-2 * 5 / 11])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_restored_state_makes_the_same_next_update(optimizer):
    training = recipe(optimizer=optimizer)
    model = GPT(tiny(), seed=1)
    optimizers = Optimizers(model, training)
    for step in range(2):
        gradients(model, step)
        optimizers.update(step, optimizers.grad_norm())
    twin = copy.deepcopy(model)
    restored = Optimizers(twin, training)
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    restored.load_state_tensors(saved)
    for each, own in ((model, optimizers), (twin, restored)):
        gradients(each, 2)
        own.update(2, own.grad_norm())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_state_that_does_not_fit_is_refused(damage):
    model = GPT(tiny(), seed=1)
    optimizers = Optimizers(model, recipe())
    gradients(model, 0)
    optimizers.update(0, torch.tensor(1.0))
    state = dict(optimizers.state_tensors())
    name = "adamw.exp_avg.wpe.weight"
    if damage == "missing":
        del state[name]
    else:
        state[name if damage == "shape" else "adamw.exp_avg.extra"] = torch.zeros(3)
    with pytest.raises(BadData, match="extra" if damage == "extra" else name):
        Optimizers(model, recipe()).load_state_tensors(state)
