"""The training loop resumes to the same bits, and refuses what can't be trained."""

import math
import os
import re
import signal

import pytest
import torch

from compactgpt.common.device import prepare_process
from compactgpt.common.errors import BadConfig, BadData, Busy, NotFinite, OutOfMemory
from compactgpt.config import parse_params
from compactgpt.data.token_files import open_tokens
from compactgpt.model.weights import load_model
from compactgpt.training import loss_curve, trainer
from compactgpt.training.initialization import initial_model
from tests.support import processes
from tests.support.tiny_corpus import write_token_file
from tests.support.tiny_training import EOT, VOCAB, assert_same_bits, params_of, params_tree, stop_after

SAMPLED = {"head": "sampled", "sample_tokens": 12}
DIVERGING = {"learning_rate": 1e38, "embedding_learning_rate": 1e38, "schedule": "constant"}


@pytest.fixture(scope="module")
def splits(tokens):
    return trainer.open_splits(tokens)


@pytest.fixture
def train(splits, tmp_path):
    """A function that trains in a folder of states of its own unless one is named."""
    folders = iter(range(100))

    def run(params, folder="", **callbacks):
        state = tmp_path / (folder or str(next(folders)))
        return trainer.train(params, splits, state, trainer.Callbacks(**callbacks))

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in params.yaml's runtime of these tests
    yield run
    torch.set_num_threads(before)


def test_both_heads_learn_and_the_sampled_one_leaves_padding_rows_as_they_were(train):
    budget = {"max_steps": 150, "eval_interval": 50, "checkpoint_interval": 50}
    params = params_of(**budget)
    full, sampled = train(params), train(params_of(**budget, **SAMPLED))
    assert [row.step for row in full.rows] == [1, 50, 100, 150]
    assert full.rows[0].val_loss > 3.5
    assert full.rows[-1].val_loss < 2.5
    assert sampled.rows[-1].val_loss == pytest.approx(full.rows[-1].val_loss, abs=0.2)
    start = initial_model(params.model, params.training).wte.weight[VOCAB:]
    assert torch.equal(sampled.model.wte.weight[VOCAB:], start)
    assert not torch.equal(full.model.wte.weight[VOCAB:], start)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw", "model": {"dropout": 0.3}}, {**SAMPLED, "init_unigram": 2.0}],
    ids=["muon", "adamw-dropout", "sampled"],
)
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(train, changes):
    params = params_of(**changes)
    uninterrupted = train(params)
    for last in (1, 2, 5):
        with pytest.raises(Busy, match=rf"step {last} of 6.*run `dvc repro` again"):
            train(params, f"stopped-{last}", should_stop=stop_after(last))
        resumed = train(params, f"stopped-{last}")
        assert resumed.resumed_from == last
        assert_same_bits(uninterrupted, resumed)


def _killed_at_fsync(number, tokens, folder):
    """Train, and die in an fsync, counted from 1."""
    real, left = os.fsync, [number]

    def fsync(handle):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    prepare_process(1)
    trainer.train(params_of(eval_interval=6), trainer.open_splits(tokens), folder)


def test_a_run_killed_while_it_writes_a_state_resumes_from_the_one_before_to_the_same_bits(
    train, tmp_path, tokens
):
    # The best model takes seven, a state seven.
    assert processes.run(_killed_at_fsync, 18, tokens, tmp_path / "killed") == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert names[0].startswith(".step-00000004.")
    assert names[1:] == ["best", "step-00000002"]
    resumed = train(params_of(eval_interval=6), "killed")
    assert resumed.resumed_from == 2
    assert_same_bits(resumed, train(params_of(eval_interval=6)))


@pytest.mark.parametrize("head", [{}, SAMPLED])
def test_validating_often_changes_no_weight(train, head):
    often = train(params_of(eval_interval=1, eval_windows=2, **head))
    seldom = train(params_of(eval_interval=6, checkpoint_interval=1, **head))
    assert torch.equal(often.model.wte.weight, seldom.model.wte.weight)


BUDGET = {"max_steps": 60, "eval_interval": 30, "checkpoint_interval": 30}
# torch.compile warns of its own code.
COMPILE = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("base", "changes", "tolerance"),
    [
        ({"micro_batch_size": 1}, {"micro_batch_size": 4}, 1e-4),
        ({"micro_batch_size": 1, **SAMPLED}, {"micro_batch_size": 4}, 1e-4),
        (BUDGET, {"dtype": "bfloat16"}, 0.1),
        pytest.param({"model": {"n_layer": 1}}, {"compile": True}, 1e-4, marks=COMPILE),
    ],
)
def test_another_way_to_compute_changes_rounding_only(train, base, changes, tolerance):
    one, other = train(params_of(**base)), train(params_of(**{**base, **changes}))
    assert other.model.wte.weight.dtype == torch.float32
    assert not torch.equal(one.model.wte.weight, other.model.wte.weight)
    for row, other_row in zip(one.rows, other.rows, strict=True):
        assert row == pytest.approx(other_row, abs=tolerance)


def test_losses_that_are_read_late_as_on_a_gpu_are_the_same(train, monkeypatch):
    at_once, late = [], []
    first = train(params_of(), on_losses=at_once.extend)
    monkeypatch.setattr(trainer.Trainer, "is_report_due", trainer.Trainer.is_row_due)
    assert_same_bits(first, train(params_of(), on_losses=late.extend))
    assert late == at_once
    with pytest.raises(NotFinite, match=r"step \d of 6: the .* loss is"):
        train(params_of(**DIVERGING, eval_interval=6))


def test_validation_loss_is_the_mean_over_all_tokens_without_padding_rows(splits, train):
    """Window by window, all logits in float64."""
    losses = []
    trained = train(params_of(eval_interval=4, eval_windows=10**6), on_losses=losses.extend)
    model, rows = trained.model, trained.rows
    nats, scored = 0.0, 0
    for window in loss_curve.select_windows(splits.val, 8, 10**6):
        x = model.hidden(torch.from_numpy(window.tokens)[None])[0]
        logits = (x @ model.wte.weight[:VOCAB].T).double()
        nats -= logits.log_softmax(1)[torch.arange(len(x)), torch.from_numpy(window.targets)].sum().item()
        scored += len(window.targets)
    assert scored == splits.val.header.tokens - splits.val.header.documents
    assert rows[-1].val_loss == pytest.approx(nats / scored, abs=1e-6)
    # A row has the mean training loss since the last row.
    assert [row.step for row in rows] == [1, 4, 6]
    assert rows[1].train_loss == pytest.approx(sum(dict(losses)[step] for step in (2, 3, 4)) / 3)


@pytest.mark.parametrize(("val_losses", "best"), [([5.0, 4.0, 3.0, 3.5], 4), ([5.0, 4.0, 3.0, 2.0], None)])
def test_the_best_model_is_kept_if_the_last_is_worse(train, tmp_path, monkeypatch, val_losses, best):
    remaining, weights, folder = iter(val_losses), {}, tmp_path / "compact"
    monkeypatch.setattr(trainer, "validation_loss", lambda *_: next(remaining))

    def keep(step, model):
        weights[step] = model.wte.weight.detach().clone()

    trained = train(params_of(), "states", on_step=keep)
    report = trainer.save_results(params_of(), trained, tmp_path / "states", folder, tmp_path / "loss.csv")
    assert (report["best_val_step"], report["best_val_loss"]) == (best or 6, min(val_losses))
    assert torch.equal(load_model(folder).wte.weight, weights[6])
    assert (folder / "best").exists() == bool(best)
    if best:
        assert torch.equal(load_model(folder / "best").wte.weight, weights[best])


@pytest.mark.parametrize(
    ("curve", "limit"),
    [
        ([(1, 3.6), (2, 9.0)], None),  # during the warm-up
        ([(1, 3.6), (4, 4.1)], None),  # within the margin
        ([(1, 3.6), (4, 4.2)], "step 1 is 3.600"),
        ([(1, 9.0), (4, 4.2)], "a uniform guess is 3.689"),  # ln(40)
    ],
)
def test_divergence_is_a_loss_above_guessing_or_above_the_first_after_the_warm_up(curve, limit):
    rows = [loss_curve.Row(step, loss, loss) for step, loss in curve]
    warning = loss_curve.divergence_warning(rows, params_of().training, VOCAB)
    assert (limit in warning) if limit else warning is None


def test_a_gradient_that_is_not_finite_stops_the_run_which_resumes_before_that_step(train, monkeypatch):
    params, real = params_of(eval_interval=1), trainer.Trainer._accumulate_gradient
    uninterrupted = train(params)

    def poison(run, *batch):
        loss = real(run, *batch)
        if run.step == 4:
            run.model.h[0].mlp.c_fc.weight.grad[3, 3] = math.inf
        return loss

    with monkeypatch.context() as broken:
        broken.setattr(trainer.Trainer, "_accumulate_gradient", poison)
        with pytest.raises(NotFinite) as caught:
            train(params, "poisoned")
    message = r"step 5 of 6: .* gradient is inf.* \(seed 1337, step index 4\) .* lower training.learning_rate"
    assert re.match(message, str(caught.value))
    resumed = train(params, "poisoned")
    assert resumed.resumed_from == 4
    assert_same_bits(uninterrupted, resumed)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda: torch.empty(2**58), OutOfMemory, "halve training.micro_batch_size in params.yaml"),
        (torch.OutOfMemoryError, OutOfMemory, "micro_batch_size"),  # on a GPU
        (lambda: torch.ones(2) @ torch.ones(3), RuntimeError, "inconsistent tensor size"),
    ],
)
def test_memory_that_runs_out_names_the_number_to_lower(train, monkeypatch, step, error, message):
    def fail(*_):
        if isinstance(found := step(), Exception):
            raise found

    monkeypatch.setattr(trainer.Trainer, "_accumulate_gradient", fail)
    with pytest.raises(error, match=message):
        train(params_of())


def test_tokens_that_do_not_fit_the_model_are_refused(splits, train, tmp_path):
    with pytest.raises(BadConfig, match=r"model.vocab_size: found 30, .* 40"):
        train(params_of(model={"vocab_size": 30}))
    write_token_file(tmp_path / "val.tokens", iter([]), vocab_size=40, eot_token=EOT, tokenizer_sha256="")
    empty = trainer.Splits(splits.train, open_tokens(tmp_path / "val.tokens"), "")
    with pytest.raises(BadData, match="val_fraction"):
        trainer.train(params_of(), empty, tmp_path / "state")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**SAMPLED, "dtype": "bfloat16"}, "head is sampled: set dtype float32 or tfloat32"),
        ({**SAMPLED, "launcher": {"mode": "fsdp"}}, r"and launcher.mode fast"),
        ({"launcher": {"processes": 3}}, "tokens_per_step .32. must .* training.launcher.processes .48."),
        ({"init_unigram": 1.0, "init_from": "gpt2", "init_sha256": "0" * 64}, "init_unigram and init_pos"),
    ],
)
def test_impossible_combinations_of_params_are_refused(changes, message):
    with pytest.raises(BadConfig, match=message):
        params_of(**changes)


def test_the_run_key_changes_with_what_the_result_depends_on(splits):
    key = trainer.run_key(params_of(), splits)
    assert key == trainer.run_key(params_of(launcher={"max_restarts": 9}), splits)
    for change in ({"seed": 2}, {"model": {"bias": True}}, {"compile": True}, {"dtype": "bfloat16"}):
        assert key != trainer.run_key(params_of(**change), splits)
    assert key != trainer.run_key(params_of(), trainer.Splits(splits.train, splits.val, "f" * 64))
    tree = params_tree()
    tree["evaluation"]["likelihood"]["window"] = 4
    assert key == trainer.run_key(parse_params(tree), splits)
    tree["runtime"]["num_threads"] = 2
    assert key != trainer.run_key(parse_params(tree), splits)
