"""The sampled softmax against the full one, in float64 on a small vocabulary; lazy rows against AdamW."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compactgpt.model.cross_entropy import LinearCrossEntropy
from compactgpt.model.gpt import GPT
from compactgpt.model.sampled_softmax import Sample, draw_sample, inclusion_probabilities, token_counts
from compactgpt.training.initialization import set_sinusoids, start_at_unigram
from compactgpt.training.optim import Optimizers
from tests.support.tiny_training import random_batch, recipe, tiny_shape

V, C, N = 60, 8, 12
COUNTS = (1000 / np.arange(1, V + 1)).astype(np.int64)  # Zipf's law, as text has it


def problem(scale=1.0):
    """Hidden states, head and targets. (N, C), (V, C), (N,)."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(V, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 10, (N,), generator=generator)
    return x, weight, targets


def full(x, weight, targets):
    """Loss and both gradients of the plain softmax."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = F.cross_entropy(x @ weight.T, targets)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def sampled(x, weight, targets, inclusion, step):
    """Loss and both gradients on one sample, the head's laid into all rows."""
    sample = draw_sample(inclusion, targets.numpy(), seed=3, step=step)
    x, rows = x.clone().requires_grad_(), weight[sample.ids].clone().requires_grad_()
    correction = torch.from_numpy(-sample.log_inclusion).to(weight.dtype)
    positions = torch.from_numpy(sample.positions(targets.numpy()))
    loss = LinearCrossEntropy.apply(x, rows, positions, x.dtype, correction)
    loss.backward()
    whole = torch.zeros_like(weight)
    whole[sample.ids] = rows.grad
    return loss.detach(), x.grad, whole


def test_the_expected_sample_has_the_size_asked_for_and_frequent_tokens_always():
    inclusion = inclusion_probabilities(COUNTS, 20, 0.75)
    assert inclusion.sum() == pytest.approx(20)
    assert inclusion[0] == 1 > inclusion[-1] > 0
    below = inclusion < 1
    ratio = inclusion[below] / (COUNTS[below] + 1) ** 0.75
    assert np.ptp(ratio) < 1e-12
    assert (inclusion_probabilities(COUNTS, V, 0.75) == 1).all()
    assert inclusion_probabilities(COUNTS, 20, 0.0) == pytest.approx(np.full(V, 20 / V))


def test_tokens_are_counted_in_pieces_of_the_split(monkeypatch):
    monkeypatch.setattr("compactgpt.model.sampled_softmax.COUNTED_AT_ONCE", 3)
    assert token_counts(np.array([1, 1, 4, 0, 1, 4, 4], np.uint16), 6).tolist() == [1, 3, 0, 0, 3, 0]


def test_a_sample_is_a_function_of_seed_and_step_and_holds_the_batch():
    inclusion = inclusion_probabilities(COUNTS, 20, 0.75)
    batch = np.array([[57, 58], [58, 59]])
    a, b = (draw_sample(inclusion, batch, seed=1, step=7) for _ in range(2))
    assert a.ids.tolist() == b.ids.tolist()
    others = [draw_sample(inclusion, batch, seed=1, step=step).ids.tolist() for step in range(50)]
    assert len({tuple(ids) for ids in others}) > 40
    assert (a.ids[a.positions(batch)] == batch).all()
    assert (a.log_inclusion[a.positions(batch)] == 0).all()
    outside = ~np.isin(a.ids, batch)
    assert a.log_inclusion[outside] == pytest.approx(np.log(inclusion[a.ids[outside]]), abs=1e-6)
    drawn = np.bincount(np.concatenate(others), minlength=V)[: V - 3] / 50
    assert drawn == pytest.approx(inclusion[: V - 3], abs=5 * 0.5 / math.sqrt(50))


def test_a_sample_of_everything_is_the_full_softmax():
    exact, found = full(*problem()), sampled(*problem(), np.ones(V), 0)
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_the_estimate_of_the_softmax_sum_and_of_its_gradient_is_unbiased():
    """Horvitz and Thompson: the mean over draws is the sum over all tokens within the error of the mean."""
    x, weight, targets = problem(0.5)
    inclusion = inclusion_probabilities(COUNTS, 20, 0.75)
    logits = x @ weight.T
    exact = torch.stack([logits.exp().sum(1), (logits.exp() @ weight)[:, 0]])  # Z and part of its gradient
    draws = []
    for step in range(4000):
        sample = draw_sample(inclusion, targets.numpy(), seed=3, step=step)
        e = (logits[:, sample.ids] - torch.from_numpy(sample.log_inclusion)).exp()
        draws.append(torch.stack([e.sum(1), (e @ weight[sample.ids])[:, 0]]))
    drawn = torch.stack(draws)  # (draws, 2, N)
    error_of_mean = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - exact).abs() < 4.5 * error_of_mean).all()
    assert (error_of_mean[0] < 0.03 * exact[0]).all()


def measured_bias(size, draws):
    """Mean over draws less the full softmax's, with its error: loss, and the head's whole gradient."""
    data = problem(0.5)
    inclusion = inclusion_probabilities(COUNTS, size, 0.75)
    exact = full(*data)
    found = [sampled(*data, inclusion, step) for step in range(draws)]
    losses = torch.stack([loss for loss, _, _ in found]) - exact[0]
    gradients = torch.stack([dw for _, _, dw in found]) - exact[2]  # (draws, V, C)
    bias = gradients.mean(0)
    error = gradients.std(0) / math.sqrt(draws)
    return losses.mean(), losses.std() / math.sqrt(draws), bias, error


def predicted_bias(size):
    """-Var(Z') / (2 Z^2), the mean over rows: the loss's bias to the first order (the module's docstring)."""
    x, weight, targets = problem(0.5)
    inclusion = inclusion_probabilities(COUNTS, size, 0.75)
    inclusion[targets.numpy()] = 1
    e = (x @ weight.T).exp().numpy()
    variance = (e**2 * (1 - inclusion) / inclusion).sum(1)
    return -(variance / (2 * e.sum(1) ** 2)).mean()


def test_the_loss_is_too_low_by_half_the_relative_variance_and_the_bias_falls_with_the_sample():
    """Of a finite sample (Bengio and Senecal 2008, Jean et al. 2015): stated in the module, measured here."""
    gradient_bias = {}
    for size in (20, 45):
        loss, loss_error, bias, error = measured_bias(size, 4000)
        assert loss.item() == pytest.approx(predicted_bias(size), rel=0.25, abs=4 * loss_error.item())
        assert loss < -4 * loss_error  # it is there, and it is seen
        gradient_bias[size] = (bias.square().sum() - error.square().sum()).clamp(min=0).sqrt().item()
    exact = full(*problem(0.5))[2].norm().item()
    assert gradient_bias[20] < 0.1 * exact
    assert gradient_bias[45] < 0.4 * gradient_bias[20]


def test_rows_left_out_keep_weights_and_moments_and_those_taken_get_adamws_step():
    """Against torch's dense AdamW with the same gradient, row by row."""
    training = recipe(schedule="constant", warmup_steps=0, grad_clip=0.5)
    model = GPT(tiny_shape(), seed=1)
    optimizers = Optimizers(model, training)
    wte = model.wte.weight
    ids = torch.tensor([3, 7, 11, 40])
    for step in range(3):
        weights = wte.detach().clone()
        before = {key: tensor.clone() for key, tensor in optimizers.adamw.state[wte].items()}
        values = optimizers.select_rows(ids)
        gradient = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        (values * gradient).sum().backward()
        norm = optimizers.grad_norm()
        assert norm.item() == pytest.approx(gradient.norm().item())
        twin = weights[ids].clone().requires_grad_()
        dense = torch.optim.AdamW([twin], 2e-2, (0.9, 0.95), weight_decay=0.1)
        if step:
            state = {k: before[k][ids] for k in ("exp_avg", "exp_avg_sq")}
            dense.state[twin] = {"step": before["step"], **state}
        twin.grad = gradient * (0.5 / (norm + 1e-6))
        dense.step()
        optimizers.update(step, norm)
        torch.testing.assert_close(wte.detach()[ids], twin.detach(), atol=1e-6, rtol=1e-5)
        rest = torch.ones(len(wte), dtype=torch.bool)
        rest[ids] = False
        assert torch.equal(wte.detach()[rest], weights[rest])
        after = optimizers.adamw.state[wte]
        assert not after["exp_avg"][rest].any()
        assert not after["exp_avg_sq"][rest].any()
        assert after["step"] == step + 1
    ids = torch.tensor([7, 8])  # row 3 is left out now: its moments stay, and do not decay
    kept = {k: after[k][3].clone() for k in ("exp_avg", "exp_avg_sq")}
    (optimizers.select_rows(ids) * 1.0).sum().backward()
    optimizers.update(3, optimizers.grad_norm())
    assert all(torch.equal(kept[k], optimizers.adamw.state[wte][k][3]) for k in kept)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_rows_are_the_dense_step_to_the_bit(optimizer):
    training = recipe(optimizer=optimizer, schedule="constant", warmup_steps=0)
    shape = tiny_shape(vocab_size=64)
    models = [GPT(shape, seed=1) for _ in range(2)]
    dense, lazy = (Optimizers(model, training) for model in models)
    for step in range(3):
        batch = random_batch(2, 8, seed=step)
        models[0](*batch).backward()
        table = lazy.select_rows(torch.arange(64))
        models[1](*batch, table).backward()
        for each in (dense, lazy):
            each.update(step, each.grad_norm())
    pairs = zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    states = dense.state, lazy.state
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("amplitude", [0.0, 0.1])
def test_a_model_begins_at_the_log_frequencies_and_stays_gpt2s_form(amplitude):
    shape = tiny_shape(n_embd=64, vocab_size=50)
    counts = (1000 / np.arange(1, 51)).astype(np.int64)
    plain, model = GPT(shape, seed=1), GPT(shape, seed=1)
    if amplitude:
        set_sinusoids(model, amplitude)
    start_at_unigram(model, counts, 4.0)
    generator = np.random.default_rng(0)
    p = (counts + 1) / (counts + 1).sum()
    drawn = torch.from_numpy(generator.choice(50, (200, 9), p=p))
    tokens, targets = drawn[:, :-1], drawn[:, 1:]
    entropy = -(p * np.log(p)).sum()
    assert plain(tokens, targets).item() > math.log(64) - 0.05
    assert model(tokens, targets).item() == pytest.approx(entropy, abs=0.1)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_sinusoids_turn_by_the_same_angles_from_one_position_to_the_next():
    model = GPT(tiny_shape(n_embd=16), seed=1)
    set_sinusoids(model, 0.5)
    waves = torch.view_as_complex(model.wpe.weight.detach().view(8, 8, 2))  # (T, C / 2)
    torch.testing.assert_close(waves.abs(), torch.full((8, 8), 0.5))
    turns = waves[1:] / waves[:-1]
    torch.testing.assert_close(turns, turns[:1].expand(7, 8))
    frequencies = 1000.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(turns[0].angle().abs(), frequencies)


def test_position_embeddings_have_a_learning_rate_of_their_own():
    model = GPT(tiny_shape(), seed=1)
    optimizers = Optimizers(model, recipe(position_learning_rate=3e-3, warmup_steps=0))
    rates = {id(p): group["lr"] for group in optimizers.adamw.param_groups for p in group["params"]}
    assert rates[id(model.wpe.weight)] == 3e-3
    assert rates[id(model.wte.weight)] == 2e-2
    assert len(rates) == len(list(model.parameters()))


def test_positions_are_found_in_any_shape():
    sample = Sample(np.array([2, 5, 9]), np.zeros(3, np.float32))
    assert sample.positions(np.array([[9, 2], [5, 5]])).tolist() == [[2, 0], [1, 1]]
