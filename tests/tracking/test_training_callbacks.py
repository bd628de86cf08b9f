from unittest.mock import Mock

import pytest
import torch

from compactgpt.config import ExpectedLoss, load_params
from compactgpt.model.gpt import GPT
from compactgpt.tracking import training_callbacks
from compactgpt.training.loss_curve import Row
from tests.support.tiny_models import ROOT, save_tokenizer, tiny_gpt

EXPECTED = ExpectedLoss(value=4.0, low_80=3.9, high_80=4.1, low_95=3.8, high_95=4.2, basis="")
PARAMS = load_params(ROOT / "params.yaml")


@pytest.fixture
def callbacks_of(monkeypatch, tmp_path):
    """A function that builds callbacks on a machine of 2 GFLOP/s, with a stage that records its calls."""
    monkeypatch.setattr(training_callbacks, "peak_flops", lambda *_: 2e9)
    save_tokenizer(tmp_path / "tokenizer")

    def build(**sections):
        stage = Mock(params=PARAMS.model_copy(update=sections))
        return training_callbacks.TrainingCallbacks(stage, tmp_path / "tokenizer", tmp_path / "loss.csv")

    return build


@pytest.mark.parametrize(
    ("curve", "warned_at"),
    [
        ([(10, 6.0), (20, 5.0), (1400, 4.1)], []),  # above while it learns, inside at the end
        ([(10, 6.0), (1400, 4.21)], [1400]),
        ([(10, 3.7), (20, 3.6), (1400, 3.5)], [10]),  # below is reported at once, and once
    ],
)
def test_a_curve_that_leaves_its_expected_interval_is_reported_once(
    callbacks_of, monkeypatch, curve, warned_at
):
    monkeypatch.setattr(training_callbacks, "expected_loss", lambda _: EXPECTED)
    callbacks = callbacks_of(training=PARAMS.training.model_copy(update={"max_steps": 1400}))
    callbacks.stage.print_message.reset_mock()
    callbacks.stage.tracker.params.assert_called_once_with({"expected_loss": EXPECTED.model_dump()})
    found = []
    for step, loss in curve:
        callbacks.on_row([Row(step, loss, loss)])
        if callbacks.stage.print_message.call_count > len(found):
            found.append(step)
    assert found == warned_at


@pytest.mark.parametrize(
    ("train_loss", "val_loss", "warned"),
    [(1.4, 7.5, True), (1.4, 5.05, False), (6.0, 7.5, False)],  # overfits; varies; both losses rise
)
def test_a_model_that_overfits_is_reported(train_loss, val_loss, warned):
    rows = [Row(1, 7.0, 6.95), Row(350, 5.0, 5.03), Row(700, train_loss, val_loss)]
    warning = training_callbacks.overfitting_warning(rows)
    assert bool(warning) == warned
    if warned:
        assert "since step 350 the val loss has risen from 5.030 to 7.500" in warning


@pytest.mark.parametrize(("head", "rows"), [("full", 50_304), ("sampled", 1_000)])
def test_utilization_is_the_models_flops_over_the_machines_peak(callbacks_of, monkeypatch, head, rows):
    training = PARAMS.training.model_copy(update={"head": head, "sample_tokens": 1_000})
    callbacks, shape = callbacks_of(training=training), PARAMS.model
    times = iter([100.0, 102.0])
    monkeypatch.setattr(training_callbacks.time, "monotonic", lambda: next(times))
    callbacks.on_losses([(1, 9.0)])
    callbacks.on_losses([(2, 8.5), (3, 8.0)])
    values, step = callbacks.stage.tracker.metrics.call_args.args
    # 6 N + 12 L H Q T, nanoGPT's estimate_mfu
    multiplied = GPT(shape).num_params_non_embedding + rows * shape.n_embd
    flops = 6 * multiplied + 12 * shape.n_layer * shape.n_embd * shape.block_size
    speed = training.tokens_per_step  # two steps in two seconds
    assert (step, values["train/loss"], values["train/tokens_per_second"]) == (3, 8.0, speed)
    assert values["train/utilisation"] == pytest.approx(speed * flops / 2e9)


def test_a_sample_is_the_most_likely_continuation_and_changes_no_random_state(callbacks_of, tmp_path):
    encoding = save_tokenizer(tmp_path / "tokenizer")
    model = tiny_gpt(encoding.n_vocab, bias=False)
    sampling = {"sample_interval": 2, "sample_prompt": "the cat"}
    callbacks = callbacks_of(runtime=PARAMS.runtime.model_copy(update=sampling))
    before = torch.random.get_rng_state()
    for step in (1, 2, 3, 4):
        callbacks.on_step(step, model.train())
    assert torch.equal(before, torch.random.get_rng_state())
    names, texts, _ = zip(*(call.args for call in callbacks.stage.text.call_args_list), strict=True)
    assert names == ("step-00000002.txt", "step-00000004.txt")
    tokens = [encoding.eot_token, *encoding.encode_ordinary("the cat")]
    first = int((model.eval().hidden(torch.tensor([tokens]))[0, -1] @ model.wte.weight[:-9].T).argmax())
    assert texts[0] == texts[1]
    assert texts[0].startswith("the cat" + encoding.decode([first]))
