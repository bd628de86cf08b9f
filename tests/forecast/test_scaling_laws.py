"""Parameter counts, scaling laws and the rule made from them, by golden numbers of the papers and nanoGPT."""

import math

import pytest
import torch

from compactgpt import config
from compactgpt.forecast.estimate import estimate, estimate_run
from compactgpt.forecast.model_size import count_parameters, flops_per_token
from compactgpt.forecast.scaling_laws import LAWS, Calibration, calibrate, expect_loss
from compactgpt.model.gpt import GPT
from tests.support.comparison_inputs import PARAMS

NOTE = PARAMS.estimate.note
ANCHORS = PARAMS.estimate.anchors
LAW = {law.name: law for law in LAWS}
VOCABULARY = 50257


def make_run(num_params, non_embedding, max_steps, tokens_per_step):
    sizes = {"num_params": num_params, "num_params_non_embedding": non_embedding}
    return config.Run(**sizes, max_steps=max_steps, tokens_per_step=tokens_per_step)


NOTE_RUN = make_run(29_938_560, 10_621_824, 20_000, 32_768)


def shape(n_layer, n_embd, n_head, **changes):
    tree = {"block_size": 1024, "vocab_size": 50257, "padded_vocab_size": 50257, "bias": True, "dropout": 0.0}
    return config.Model(**{**tree, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, **changes})


@pytest.mark.parametrize(
    ("model", "all_tensors", "nanogpt"),
    [
        (NOTE, 30_135_168, 29_938_560),
        (shape(12, 768, 12), 124_439_808, 123_653_376),
        (shape(24, 1024, 16), 354_823_168, 353_774_592),
        (shape(36, 1280, 20), 774_030_080, 772_719_360),
        (shape(48, 1600, 25), 1_557_611_200, 1_555_972_800),
    ],
)
def test_the_sizes_of_the_notes_model_and_of_gpt2_are_counted_exactly(model, all_tensors, nanogpt):
    sizes = count_parameters(model)
    assert (sizes.all_tensors, sizes.nanogpt) == (all_tensors, nanogpt)


@pytest.mark.parametrize("bias", [True, False])
def test_counts_are_those_of_the_built_model(bias):
    small = shape(2, 16, 4, bias=bias, block_size=8, vocab_size=61, padded_vocab_size=64)
    model, sizes = GPT(small), count_parameters(small)
    assert sizes.all_tensors == model.num_params
    assert sizes.nanogpt == model.num_params_nanogpt
    assert sizes.non_embedding == model.num_params_non_embedding


def test_arithmetic_of_the_notes_run():
    assert count_parameters(NOTE).non_embedding == 10_621_824
    assert flops_per_token(NOTE)["six_n"] == 6 * 29_938_560
    assert flops_per_token(NOTE)["with_attention"] == pytest.approx(193.8e6, rel=1e-3)
    note = estimate(PARAMS)["note"]
    assert (note["tokens"], note["sequences_per_step"]) == (655_360_000, 64)
    assert note["epochs"] == pytest.approx(0.0725, abs=5e-5)
    assert note["flops"]["with_attention"] == pytest.approx(1.27e17, rel=1e-3)
    # 1.27e17 FLOPs at the share of 989 TFLOP/s that was measured: 1.872M tokens/s
    assert note["minutes"]["h100"] == pytest.approx(655.36 / 1.872 / 60, abs=0.05)
    memory = note["memory_bytes"]
    assert memory["logits_if_held_at_once"] / 2**30 == pytest.approx(1.5, abs=0.05)
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] / 2 == 4 * 30_135_168


def test_activation_memory_is_what_autograd_keeps_for_two_more_layers():
    kept, estimated = {}, {}
    for layers in (1, 3):
        small = shape(layers, 64, 4, bias=False, block_size=128, vocab_size=61, padded_vocab_size=64)
        model, saved = GPT(small), []
        weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            model.hidden(torch.zeros(2, 128, dtype=torch.int64))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        kept[layers] = sum(size for pointer, size in storages.items() if pointer not in weights)
        training = PARAMS.training.model_copy(update={"micro_batch_size": 2})
        found = estimate_run(small, training, None, "adamw", PARAMS.estimate)
        estimated[layers] = found["memory_bytes"]["activations"]
    assert kept[3] - kept[1] == pytest.approx(estimated[3] - estimated[1], rel=0.02)


GPT2_SMALL = (123_653_376, 85_056_000)  # nanoGPT measured a loss of 2.85


@pytest.mark.parametrize(
    ("law", "run", "loss", "tolerance"),
    [
        ("kaplan-2020", NOTE_RUN, 4.20, 0.0055),
        ("hoffmann-2022", NOTE_RUN, 4.253, 0.0005),
        ("hoffmann-2022-exact", NOTE_RUN, 4.140, 0.0005),
        ("besiroglu-2024", NOTE_RUN, 4.269, 0.0005),
        ("kaplan-2020", make_run(*GPT2_SMALL, 600_000, 491_520), 2.876, 0.0009),  # nanoGPT's steps
        ("hoffmann-2022", make_run(*GPT2_SMALL, 610_352, 491_520), 2.661, 0.0009),  # 300B tokens
        ("besiroglu-2024", make_run(*GPT2_SMALL, 610_352, 491_520), 2.688, 0.0009),
    ],
)
def test_laws_at_the_notes_run_and_at_nanogpts_gpt2(law, run, loss, tolerance):
    assert LAW[law].loss(run) == pytest.approx(loss, abs=tolerance)


def test_reference_runs_are_counted_as_their_sources_built_them():
    """nanoGPT has no biases and pads its vocabulary. The head of CS336's model is not tied."""
    sizes = {anchor.name: (anchor.num_params, anchor.num_params_non_embedding) for anchor in ANCHORS}
    nanogpt = count_parameters(shape(12, 768, 12, bias=False, padded_vocab_size=50304))
    assert sizes["nanogpt-124m"] == (nanogpt.nanogpt, nanogpt.non_embedding) == (123_587_328, 84_953_856)
    assert sizes["owt-small-704m"] == (12_500_000 + 2 * 32_000 * 512, 12_500_000)


def test_the_nearest_reference_run_is_taken_and_the_optimizer_breaks_a_tie():
    adamw = ANCHORS[0].model_copy(update={"name": "a", "optimizer": "adamw", "loss": 5.5})
    muon = ANCHORS[0].model_copy(update={"name": "m", "optimizer": "muon", "loss": 4.5})
    assert expect_loss(muon, "muon", VOCABULARY, (adamw, muon, ANCHORS[2])).value == pytest.approx(4.5)
    assert expect_loss(muon, "adamw", VOCABULARY, (muon, adamw, ANCHORS[2])).value == pytest.approx(5.5)
    assert expect_loss(ANCHORS[2], "muon", VOCABULARY, (muon, adamw, ANCHORS[2])).value == pytest.approx(2.85)


def test_the_interval_is_the_laws_spread_widened_by_their_miss():
    anchor = ANCHORS[2]
    # All laws meet at the reference run, so the width of the interval is the miss alone.
    miss = max(abs(law.loss(anchor) - 2.85) for law in LAWS)
    found = expect_loss(anchor, "adamw", VOCABULARY, [anchor])
    assert (found.low_80, found.high_80) == pytest.approx((2.85 - miss, 2.85 + miss))
    assert (found.low_95, found.high_95) == pytest.approx((2.85 - 2 * miss, 2.85 + 2 * miss))
    # A hundred times the tokens: two decades away, twice the miss in addition to the spread.
    further = anchor.model_copy(update={"max_steps": anchor.max_steps * 100})
    losses = [law.loss_through(anchor, further) for law in LAWS]
    wide = expect_loss(further, "adamw", VOCABULARY, [anchor])
    assert (wide.low_80, wide.high_80) == pytest.approx((min(losses) - 2 * miss, max(losses) + 2 * miss))


@pytest.mark.parametrize("steps", [1, 10**9])
def test_no_bound_is_above_guessing_or_below_zero(steps):
    found = expect_loss(make_run(100, 50, steps, 512), "muon", VOCABULARY, ANCHORS)
    guess = math.log(VOCABULARY)
    assert 0 < found.low_95 < found.low_80 < found.value <= found.high_80 <= found.high_95 <= guess


def test_a_run_is_never_predicted_from_itself_or_from_an_assumed_budget():
    report = calibrate(ANCHORS, VOCABULARY).report()
    known = [anchor for anchor in ANCHORS if not anchor.assumed_budget]
    assert len(known) < len(ANCHORS)
    for anchor, check in zip(ANCHORS, report["checks"], strict=True):
        others = [other for other in known if other.name != anchor.name]
        rule = expect_loss(anchor, anchor.optimizer, VOCABULARY, others)
        assert (check["low_80"], check["value"], check["high_95"]) == (rule.low_80, rule.value, rule.high_95)
        assert check["inside_80"] == (rule.low_80 <= anchor.loss <= rule.high_80)
    held = sum(check["low_95"] <= check["measured"] <= check["high_95"] for check in report["checks"])
    assert (report["of"], report["held_95"]) == (len(ANCHORS), held)


@pytest.mark.parametrize(
    ("factors", "share", "factor"),
    [
        ([0.1 * n for n in range(1, 10)], 0.80, 0.8),  # ceil(0.8 x 10) = 8th of 9
        ([0.1 * n for n in range(1, 10)], 0.95, 0.9),  # the 10th of 9: the largest instead
        ([float(n) for n in range(1, 20)], 0.95, 19.0),  # 19 runs are just enough: the 19th
        ([3.0, 1.0, 2.0], 0.5, 2.0),
    ],
)
def test_the_factor_is_the_conformal_quantile_and_widens_the_interval(factors, share, factor):
    found = Calibration(ANCHORS[:3], tuple({"factor": each} for each in factors))
    assert found.factor(share) == pytest.approx(factor)
    run = ANCHORS[0]
    rule = expect_loss(run, "muon", VOCABULARY, found.anchors)
    wide = found.calibrated_loss(run, "muon", VOCABULARY)
    half = found.factor(0.80) * (rule.high_80 - rule.low_80) / 2
    middle = (rule.high_80 + rule.low_80) / 2
    bounds = max(middle - half, 0.01), min(middle + half, math.log(VOCABULARY))
    assert (wide.low_80, wide.high_80) == pytest.approx(bounds)
