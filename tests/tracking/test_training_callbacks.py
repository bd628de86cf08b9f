from unittest.mock import Mock

import pytest
import torch

from compactgpt.config import load_params
from compactgpt.tracking import training_callbacks
from compactgpt.training.loss_curve import Row
from tests.support.tiny_models import ROOT, save_tokenizer, tiny_gpt

PARAMS = load_params(ROOT / "params.yaml")


@pytest.fixture
def callbacks_of(tmp_path):
    """A function that builds callbacks with a stage that records its calls."""
    save_tokenizer(tmp_path / "tokenizer")

    def build(**sections):
        stage = Mock(params=PARAMS.model_copy(update=sections))
        return training_callbacks.TrainingCallbacks(stage, tmp_path / "tokenizer", tmp_path / "loss.csv")

    return build


@pytest.mark.parametrize(
    ("train_loss", "val_loss", "warned"),
    [(1.4, 7.5, True), (1.4, 5.05, False), (6.0, 7.5, False)],  # overfits; varies; both losses rise
)
def test_a_model_that_overfits_is_reported_once(callbacks_of, train_loss, val_loss, warned):
    callbacks = callbacks_of()
    rows = [Row(1, 7.0, 6.95), Row(350, 5.0, 5.03), Row(700, train_loss, val_loss)]
    for _ in range(2):
        callbacks.on_row(rows)
    messages = "".join(call.args[0] for call in callbacks.stage.print_message.call_args_list)
    assert messages.count("since step 350 the val loss has risen from 5.030 to 7.500") == warned


def test_the_speed_is_that_of_the_steps_since_the_last_report(callbacks_of, monkeypatch):
    callbacks = callbacks_of()
    times = iter([100.0, 102.0])
    monkeypatch.setattr(training_callbacks.time, "monotonic", lambda: next(times))
    callbacks.on_losses([(1, 9.0)])
    callbacks.on_losses([(2, 8.5), (3, 8.0)])
    values, step = callbacks.stage.tracker.metrics.call_args.args
    speed = PARAMS.training.tokens_per_step  # two steps in two seconds
    assert (step, values["train/loss"], values["train/tokens_per_second"]) == (3, 8.0, speed)


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
