import pytest
import torch

from compactgpt.config import ExpectedLoss, load_params
from compactgpt.forecast.estimate import expected_loss
from compactgpt.model.gpt import GPT
from compactgpt.tracking.training_callbacks import Band, Sampler, Utilisation, expected_band, peak_flops
from tests.support.tiny_models import ROOT, save_tokenizer, tiny_gpt

EXPECTED = ExpectedLoss(value=4.0, low_80=3.9, high_80=4.1, low_95=3.8, high_95=4.2, basis="")


@pytest.mark.parametrize(
    ("curve", "told_at"),
    [
        ([(10, 6.0), (20, 5.0), (100, 4.1)], None),  # above while it learns, inside at the end
        ([(10, 6.0), (100, 4.21)], 100),
        ([(10, 3.7), (20, 3.6), (100, 3.5)], 10),  # below is said at once, and once
    ],
)
def test_the_user_is_told_once_when_the_curve_ends_outside_the_band(curve, told_at):
    band = Band(EXPECTED, 100)
    told = [step for step, loss in curve if band.judge(step, loss)]
    assert told == ([told_at] if told_at else [])


@pytest.mark.parametrize(
    ("loss", "inside"), [(4.0, ("true", "true")), (4.15, ("false", "true")), (4.3, ("false", "false"))]
)
def test_the_end_is_scored_against_what_was_written_down(loss, inside):
    band = Band(EXPECTED, 100)
    assert band.frozen() == {"expected_loss": EXPECTED.model_dump()}
    assert tuple(band.score(loss).values()) == inside


def test_the_band_is_that_of_the_estimate():
    params = load_params(ROOT / "params.yaml")
    told = expected_loss(params)
    band = expected_band(params)
    assert (band.low, band.high) == (told.low_95, told.high_95)
    assert str(band) == f"{band.low:.2f}-{band.high:.2f} at the end"


@pytest.mark.parametrize(("head", "rows"), [("full", 50_304), ("sampled", 1_000)])
def test_utilisation_is_the_models_arithmetic_over_the_machines_own_speed(monkeypatch, head, rows):
    shipped = load_params(ROOT / "params.yaml")
    training = shipped.training.model_copy(update={"head": head, "sample_tokens": 1_000})
    params = shipped.model_copy(update={"training": training})
    monkeypatch.setattr("compactgpt.tracking.training_callbacks.peak_flops", lambda *_: 2e9)
    used = Utilisation(params, 3)
    shape = params.model  # 6 N + 12 L H Q T, nanoGPT's estimate_mfu
    multiplied = GPT(shape).num_params_non_embedding + rows * shape.n_embd
    flops = 6 * multiplied + 12 * shape.n_layer * shape.n_embd * shape.block_size
    told = used.added({"train/loss": 1.0, "train/tokens_per_second": 100.0})
    assert told == {
        "train/loss": 1.0,
        "train/tokens_per_second": 100.0,
        "train/utilisation": pytest.approx(100 * flops / 6e9),
    }
    assert used.added({"val/loss": 2.0}) == {"val/loss": 2.0}
    assert str(used) == f"{100 * flops / 6e9:.0%}"


def test_this_machine_makes_products():
    assert 1e8 < peak_flops("cpu", "float32") < 1e14


def test_a_sample_is_the_most_likely_continuation_and_touches_no_random_stream(tmp_path):
    encoding = save_tokenizer(tmp_path / "tokenizer")
    model = tiny_gpt(encoding.n_vocab, bias=False)
    told = []
    runtime = load_params(ROOT / "params.yaml").runtime.model_copy(
        update={"sample_interval": 2, "sample_prompt": "the cat"}
    )
    sampler = Sampler(runtime, tmp_path / "tokenizer", lambda step, text: told.append((step, text)))
    before = torch.random.get_rng_state()
    for step in (1, 2, 3, 4):
        sampler(step, model.train())
    assert torch.equal(before, torch.random.get_rng_state())
    assert [step for step, _ in told] == [2, 4]
    text = told[0][1]
    assert text == told[1][1]
    assert text.startswith("the cat")
    tokens = [encoding.eot_token, *encoding.encode_ordinary("the cat")]
    first = int((model.eval().hidden(torch.tensor([tokens]))[0, -1] @ model.wte.weight[:-9].T).argmax())
    assert text.startswith("the cat" + encoding.decode([first]))


def test_without_an_interval_nothing_is_written_and_no_tokenizer_is_needed(tmp_path):
    sampler = Sampler(
        load_params(ROOT / "params.yaml").runtime, tmp_path / "gone", lambda *_: pytest.fail("told")
    )
    sampler(1, tiny_gpt(50))
