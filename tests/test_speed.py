"""The speed of training is measured with the run's own model, and the time of a run follows from it."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from compactgpt import speed
from compactgpt.common.errors import OutOfMemory
from compactgpt.experiments import load_changed_params
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.model_size import flops_per_token
from tests.support.comparison_inputs import PARAMS, ROOT

SMALL = ["model.n_layer=1", "model.n_head=1", "model.n_embd=16"]
ON_A_GPU = ["runtime.device=cuda", "training.head=full", "training.compile=true", "training.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ([], 2048),
        # A processor gets part of a large micro-batch. Settings for a GPU do not matter.
        (["training.micro_batch_size=64", "training.tokens_per_step=16384", *ON_A_GPU], 2048),
        (["model.block_size=200", "training.micro_batch_size=2", "training.tokens_per_step=2000"], 400),
    ],
)
def test_the_speed_is_that_of_training_steps_without_the_first(monkeypatch, tmp_path, settings, tokens):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    quarters = count()  # the clock: each look at it takes a quarter of a second
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(quarters) / 4))
    params = load_changed_params(ROOT / "params.yaml", [*SMALL, *settings])
    found = speed.measure_speed(params)
    flops = flops_per_token(params.model, params.training)["with_attention"]
    assert found == pytest.approx(3 * tokens * flops)  # three steps in one second
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_a_sentence_before_the_run_starts(monkeypatch):
    def fail(_trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("compactgpt.training.trainer.Trainer.make_step", fail)
    with pytest.raises(OutOfMemory, match=r"^out of memory: halve training\.micro_batch_size"):
        speed.measure_speed(load_changed_params(ROOT / "params.yaml", SMALL))


def test_the_speed_of_matrix_products_is_that_of_a_processor():
    assert 1e8 < speed.measure_products() < 1e14


def test_the_times_of_training_and_of_each_neural_baseline_are_announced(monkeypatch):
    monkeypatch.setattr(speed, "measure_speed", lambda params: 1e11)
    training, baseline = speed.announce_times([PARAMS])
    minutes = estimate(PARAMS)["compact"]["flops"]["with_attention"] / 1e11 / 60
    assert training.startswith(f"training: about {minutes:.3g} min at this machine's speed")
    assert baseline.startswith("baseline smollm2-135m-instruct-q4: scores the val split too")
    assert f"about {2 * minutes:.3g} min" in speed.announce_times([PARAMS, PARAMS])[0]
