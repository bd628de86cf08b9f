import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from compactgpt.common.device import prepare_process, stop_requests
from compactgpt.common.errors import BadConfig, BadData, Busy, NotFinite, OutOfMemory
from compactgpt.common.storage import write_text
from compactgpt.common.torchrun import DistInfo
from compactgpt.config import ExpectedLoss, parse_params
from compactgpt.data.token_files import open_tokens
from compactgpt.model.huggingface import save_hf
from compactgpt.tracking import training_callbacks as callbacks
from compactgpt.training import trainer
from compactgpt.training.checkpoint import load_model, save_model
from compactgpt.training.distributed import Group
from compactgpt.training.initialization import folder_sha256, initial_model
from tests.support import processes
from tests.support.tiny_corpus import write_token_file
from tests.support.tiny_training import EOT, VOCAB, contents, door, make_tokens, params_of, same_bits, tree_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return trainer.open_splits(make_tokens(tmp_path_factory.mktemp("data") / "tokens"))


@pytest.fixture
def default_ctrl_c():
    """Python's own answer to Ctrl-C, also where the tests were started in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def one_thread():
    """As the configuration of these tests says."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns(splits, tmp_path):
    params = params_of(max_steps=150, eval_interval=50, checkpoint_interval=50)
    rows = trainer.train(params, splits, tmp_path).rows
    assert [row.step for row in rows] == [1, 50, 100, 150]
    assert rows[0].val_loss > 3.5
    assert rows[-1].val_loss < 2.5


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "full"},
        {"head": "full", "optimizer": "adamw", "schedule": "cosine", "model": {"dropout": 0.3}},
        {"head": "sampled", "sample_tokens": 12, "init_unigram": 2.0},
    ],
    ids=["muon", "adamw-dropout", "sampled"],
)
def test_a_run_stopped_after_any_step_ends_with_the_bits_of_one_never_stopped(splits, tmp_path, changes):
    params = params_of(**changes)
    whole = trainer.train(params, splits, tmp_path / "whole")
    assert same_bits(whole, trainer.train(params, splits, tmp_path / "again"))
    for last in (1, 2, 3, 5):
        state = tmp_path / str(last)
        steps = []
        with pytest.raises(Busy, match=f"step {last} of 6"):
            trainer.train(
                params,
                splits,
                state,
                on_metrics=lambda step, _, steps=steps: steps.append(step),
                stopping=lambda steps=steps, last=last: steps[-1] == last,
            )
        resumed = trainer.train(params, splits, state)
        assert resumed.resumed_from == last
        assert same_bits(whole, resumed)


def test_a_run_that_failed_between_checkpoints_goes_on_from_the_last_one(splits, tmp_path):
    def fail(done, _total, _figures=None):
        if done == 5:
            raise ZeroDivisionError

    params = params_of()
    with pytest.raises(ZeroDivisionError):
        trainer.train(params, splits, tmp_path / "broken", progress=fail)
    resumed = trainer.train(params, splits, tmp_path / "broken")
    assert resumed.resumed_from == 4
    assert same_bits(resumed, trainer.train(params, splits, tmp_path / "whole"))


def _killed_at_fsync(number, tokens, state):
    """Train, and die in an fsync, counted from 1."""
    real, left = os.fsync, [number]

    def fsync(handle):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    prepare_process(params_of().runtime.num_threads)
    trainer.train(params_of(eval_interval=6), trainer.open_splits(tokens), state)


def test_sigkill_in_the_middle_of_writing_a_checkpoint_changes_no_bit_of_the_result(tmp_path):
    tokens = make_tokens(tmp_path / "tokens")
    # The best model takes seven, a state eight.
    assert processes.run(_killed_at_fsync, 19, tokens, tmp_path / "state") == -signal.SIGKILL
    left = sorted(
        path.name.split(".")[1 if path.name[0] == "." else 0] for path in (tmp_path / "state").iterdir()
    )
    assert left == ["best", "step-00000002", "step-00000004"]
    assert not (tmp_path / "state" / "step-00000004").exists()
    splits = trainer.open_splits(tokens)
    resumed = trainer.train(params_of(eval_interval=6), splits, tmp_path / "state")
    assert resumed.resumed_from == 2
    assert same_bits(resumed, trainer.train(params_of(eval_interval=6), splits, tmp_path / "whole"))


def test_sigterm_ends_the_step_saves_and_says_how_to_go_on(splits, tmp_path):
    def terminate(done, _total, _figures=None):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stopping, pytest.raises(Busy, match=r"step 4 of 6.*dvc repro"):
        trainer.train(params_of(), splits, tmp_path, progress=terminate, stopping=stopping)
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.train(params_of(), splits, tmp_path).resumed_from == 4


def test_the_second_ctrl_c_acts_at_once_unless_it_is_the_first_ones_echo(default_ctrl_c):
    with stop_requests(same_seconds=0.05) as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_sampled_softmax_learns_without_the_padding_and_what_the_full_one_learns(splits, tmp_path):
    """The validation loss is always the full softmax's; rows of the padding are never touched."""
    budget = {"max_steps": 150, "eval_interval": 50, "checkpoint_interval": 50}
    full = trainer.train(params_of(**budget, head="full", init_unigram=0.0), splits, tmp_path / "full")
    params = params_of(**budget, head="sampled", sample_tokens=12, init_unigram=0.0)
    sampled = trainer.train(params, splits, tmp_path / "sampled")
    assert sampled.rows[-1].val_loss == pytest.approx(full.rows[-1].val_loss, abs=0.2)
    drawn = initial_model(params.model, params.training)
    assert torch.equal(sampled.model.wte.weight[VOCAB:], drawn.wte.weight[VOCAB:])
    assert not torch.equal(full.model.wte.weight[VOCAB:], drawn.wte.weight[VOCAB:])


def test_a_sample_is_of_the_whole_step_however_it_is_cut_into_micro_batches(splits, tmp_path):
    sampled = {"head": "sampled", "sample_tokens": 12, "eval_interval": 6}
    small = trainer.train(params_of(micro_batch_size=1, **sampled), splits, tmp_path / "a")
    large = trainer.train(params_of(micro_batch_size=4, **sampled), splits, tmp_path / "b")
    assert small.rows[-1].val_loss == pytest.approx(large.rows[-1].val_loss, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, r"head \(sampled\) needs dtype float32"),
        ({"launcher": {"mode": "fsdp"}}, r"head \(sampled\) needs launcher.mode fast"),
        (
            {"init_unigram": 1.0, "init_from": "gpt2", "init_sha256": "0" * 64},
            "init_unigram and init_positions must be 0.0 unless",
        ),
    ],
)
def test_what_a_sampled_softmax_cannot_be_combined_with_is_refused(changes, message):
    with pytest.raises(BadConfig, match=message):
        params_of(head="sampled", **{"init_unigram": 0.0, **changes})


def test_how_often_is_measured_never_changes_the_model(splits, tmp_path):
    often = trainer.train(params_of(eval_interval=1, eval_windows=2), splits, tmp_path / "a")
    seldom = trainer.train(params_of(eval_interval=6, checkpoint_interval=1), splits, tmp_path / "b")
    assert torch.equal(often.model.wte.weight, seldom.model.wte.weight)


def test_micro_batches_are_a_matter_of_memory_only(splits, tmp_path):
    small = trainer.train(params_of(micro_batch_size=1), splits, tmp_path / "a")
    large = trainer.train(params_of(micro_batch_size=4), splits, tmp_path / "b")
    assert small.rows[-1].val_loss == pytest.approx(large.rows[-1].val_loss, abs=1e-4)


def test_validation_loss_is_the_mean_over_the_tokens_of_every_document(splits, tmp_path):
    """Window by window, all logits in float64, padding rows left out."""
    model = trainer.train(params_of(), splits, tmp_path).model
    windows = trainer._chosen_windows(splits.val, 8, 10**6)
    nats, scored = 0.0, 0
    for window in windows:
        x = model.hidden(torch.from_numpy(window.tokens)[None])[0]
        logits = (x @ model.wte.weight[:VOCAB].T).double()
        nats -= logits.log_softmax(1)[torch.arange(len(x)), torch.from_numpy(window.targets)].sum().item()
        scored += len(window.targets)
    assert scored == splits.val.header.tokens - splits.val.header.documents
    for batch_size in (1, 3):
        assert trainer.validation_loss(model, windows, batch_size) == pytest.approx(nats / scored, abs=1e-6)


def test_fewer_windows_are_spread_over_the_whole_split(splits):
    every = trainer._chosen_windows(splits.val, 8, 10**6)
    some = trainer._chosen_windows(splits.val, 8, 3)
    assert [some[0].document, some[-1].document] == [every[0].document, every[-1].document]
    assert len(some) == 3


def test_a_row_holds_the_mean_loss_of_the_steps_since_the_row_before(splits, tmp_path):
    losses = {}
    trained = trainer.train(
        params_of(eval_interval=4),
        splits,
        tmp_path,
        on_metrics=lambda step, values: losses.update({step: values.get("train/loss", losses.get(step))}),
    )
    assert [row.step for row in trained.rows] == [1, 4, 6]
    assert trained.rows[1].train_loss == pytest.approx(sum(losses[step] for step in (2, 3, 4)) / 3)


def test_a_loss_that_explodes_stops_the_run_before_its_step_is_kept(splits, tmp_path):
    params = params_of(learning_rate=1e38, embedding_learning_rate=1e38, schedule="constant")
    with pytest.raises(NotFinite, match=r"step \d of 6: the .* loss is .*lower training.learning_rate"):
        trainer.train(params, splits, tmp_path)
    run = trainer._Run(params, splits, tmp_path, Group(DistInfo(), "fast"))
    weights = []

    def go_on_for_ever():
        while True:
            weights.append(run.model.wte.weight.detach().clone())
            run.make_step()

    with pytest.raises(NotFinite):
        go_on_for_ever()
    assert torch.equal(weights[-1], run.model.wte.weight)


def test_a_gradient_that_is_not_finite_stops_with_step_batch_and_way_and_leaves_the_best_as_it_was(
    splits, tmp_path, monkeypatch
):
    """The loss is good, a number of its gradient is not; the next run, without that, goes on."""
    params = params_of(eval_interval=1)
    whole = trainer.train(params, splits, tmp_path / "whole")
    real = trainer._Run._gradient

    def poisoned(run, *batch):
        loss = real(run, *batch)
        if run.step == 4:
            run.model.h[0].mlp.c_fc.weight.grad[3, 3] = math.inf
        return loss

    with monkeypatch.context() as broken:
        broken.setattr(trainer._Run, "_gradient", poisoned)
        with pytest.raises(NotFinite) as caught:
            trainer.train(params, splits, tmp_path / "s")
    told = str(caught.value)
    assert told.startswith("step 5 of 6: the training loss is ")
    assert "norm of its gradient is inf" in told
    assert "batch (seed 1337, step 4 from 0)" in told
    assert "lower training.learning_rate" in told
    assert "run `dvc repro`" in told
    best = trainer.best_row(whole.rows[:4])
    facts = json.loads((tmp_path / "s/best/config.json").read_text())["facts"]
    assert facts == {"step": best.step, "val_loss": best.val_loss}
    load_model(tmp_path / "s/best")
    resumed = trainer.train(params, splits, tmp_path / "s")
    assert resumed.resumed_from == 4
    assert same_bits(whole, resumed)


def test_a_gpu_that_works_behind_us_gives_the_same_run_and_news_of_every_step(splits, tmp_path, monkeypatch):
    """On the CPU, told to defer: losses are looked at now and then, and nothing else changes."""
    news, late = [], []
    whole = trainer.train(params_of(), splits, tmp_path / "a", on_metrics=lambda *told: news.append(told))
    make = trainer._Run.__init__

    def defer(run, *args):
        make(run, *args)
        run.defers = True

    monkeypatch.setattr(trainer._Run, "__init__", defer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    params = params_of(eval_interval=2)
    run = trainer.train(params, splits, tmp_path / "b", on_metrics=lambda *told: late.append(told))
    assert same_bits(whole, run)
    losses = [
        [(step, values["train/loss"]) for step, values in told if "train/loss" in values]
        for told in (news, late)
    ]
    assert losses[0] == losses[1]
    params = params_of(learning_rate=1e38, embedding_learning_rate=1e38, schedule="constant", eval_interval=6)
    with pytest.raises(NotFinite, match=r"step \d of 6: the .* loss is"):
        trainer.train(params, splits, tmp_path / "c")


def test_bfloat16_learns_what_float32_learns_and_keeps_its_weights_in_float32(splits, tmp_path):
    budget = {"max_steps": 60, "eval_interval": 30, "checkpoint_interval": 30}
    exact = trainer.train(params_of(**budget), splits, tmp_path / "a")
    short = params_of(**budget, dtype="bfloat16")
    rounded = trainer.train(short, splits, tmp_path / "b")
    assert rounded.model.wte.weight.dtype == torch.float32
    assert not same_bits(exact, rounded)
    assert rounded.rows[-1].val_loss == pytest.approx(exact.rows[-1].val_loss, abs=0.1)
    assert same_bits(rounded, trainer.train(short, splits, tmp_path / "c"))


def test_the_best_model_is_kept_when_the_last_is_worse(splits, tmp_path, monkeypatch):
    """The validation loss falls to step 4 and rises after it."""
    params = params_of()
    told = {1: 5.0, 2: 4.0, 4: 3.0, 6: 3.5}
    monkeypatch.setattr(trainer, "validation_loss", lambda *_: next(losses))
    losses, weights = iter(told.values()), {}
    states = tmp_path / "states"
    trained = trainer.train(
        params,
        splits,
        states,
        watch=lambda step, model: weights.update({step: model.wte.weight.detach().clone()}),
    )
    facts = trainer.save_results(
        params, splits, trained, states, tmp_path / "models/compact", tmp_path / "loss.csv"
    )
    assert (facts["best_val_step"], facts["best_val_loss"], facts["val_loss"]) == (4, 3.0, 3.5)
    assert torch.equal(load_model(tmp_path / "models/compact").wte.weight, weights[6])
    assert torch.equal(load_model(tmp_path / "models/compact/best").wte.weight, weights[4])


def test_a_last_model_that_is_the_best_is_kept_once(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "validation_loss", lambda *_: next(losses))
    losses = iter([5.0, 4.0, 3.0, 2.0])
    trained = trainer.train(params_of(), splits, tmp_path / "states")
    trainer.save_results(
        params_of(), splits, trained, tmp_path / "states", tmp_path / "compact", tmp_path / "c"
    )
    assert not (tmp_path / "compact/best").exists()


def test_a_step_is_said_in_sequences_tokens_micro_batches_and_processes():
    said = trainer.budget(params_of(tokens_per_step=64, micro_batch_size=2), 2)
    assert said == (
        "tokens_per_step 64 = 2 sequences x 8 tokens x 2 micro-batches x 2 processes; 6 steps, 384 tokens"
    )
    with pytest.raises(BadConfig, match=r"8 sequences can't be shared out .* among 3 processes"):
        trainer.budget(params_of(tokens_per_step=64, micro_batch_size=2), 3)


def test_training_goes_on_from_a_model_of_ours(splits, tmp_path):
    first = trainer.train(params_of(), splits, tmp_path / "a")
    save_model(first.model, tmp_path / "base", {})
    again = params_of(init_from=str(tmp_path / "base"), init_sha256=folder_sha256(tmp_path / "base"))
    assert trainer.train(again, splits, tmp_path / "b").rows[0].val_loss < first.rows[0].val_loss
    assert trainer.run_key(again, splits) != trainer.run_key(params_of(), splits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own making
def test_a_compiled_trunk_learns_the_same_within_rounding(splits, tmp_path):
    plain = trainer.train(params_of(model={"n_layer": 1}), splits, tmp_path / "a")
    compiled = trainer.train(params_of(compile=True, model={"n_layer": 1}), splits, tmp_path / "b")
    for mine, theirs in zip(plain.rows, compiled.rows, strict=True):
        assert (mine.train_loss, mine.val_loss) == pytest.approx(
            (theirs.train_loss, theirs.val_loss), abs=1e-4
        )


def test_no_memory_says_which_number_to_lower(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer._Run, "_gradient", lambda *_: torch.empty(2**58))
    with pytest.raises(OutOfMemory, match="micro_batch_size"):
        trainer.train(params_of(), splits, tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError()])
def test_no_memory_on_a_gpu_or_for_python_says_the_same(splits, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(trainer._Run, "_gradient", fail)
    with pytest.raises(OutOfMemory, match=r"halve training\.micro_batch_size in params\.yaml"):
        trainer.train(params_of(), splits, tmp_path)


def test_other_runtime_errors_stay_what_they_are(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer._Run, "_gradient", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.train(params_of(), splits, tmp_path)


def test_tokens_of_a_larger_vocabulary_are_refused(splits, tmp_path):
    with pytest.raises(BadConfig, match=r"model.vocab_size: found 30, .* 40"):
        trainer.train(params_of(model={"vocab_size": 30}), splits, tmp_path)


def test_an_empty_val_split_is_refused(splits, tmp_path):
    write_token_file(tmp_path / "val.tokens", iter([]), vocab_size=40, eot_token=EOT, tokenizer_sha256="")
    empty = trainer.Splits(splits.train, open_tokens(tmp_path / "val.tokens"), "")
    with pytest.raises(BadData, match="val_fraction"):
        trainer.train(params_of(), empty, tmp_path / "state")


def test_the_run_key_names_what_the_result_depends_on(splits):
    key = trainer.run_key(params_of(), splits)
    other_data = trainer.Splits(splits.train, splits.val, "f" * 64)
    assert key == trainer.run_key(params_of(), splits)
    assert key != trainer.run_key(params_of(seed=2), splits)
    assert key != trainer.run_key(params_of(model={"bias": True}), splits)
    assert key != trainer.run_key(params_of(), other_data)
    assert key != trainer.run_key(params_of(compile=True), splits)
    assert key != trainer.run_key(params_of(dtype="bfloat16"), splits)
    threads = tree_of()
    threads["runtime"]["num_threads"] = 2
    assert key != trainer.run_key(parse_params(threads), splits)
    unrelated = tree_of()
    unrelated["evaluation"]["likelihood"]["window"] = 4
    assert key == trainer.run_key(parse_params(unrelated), splits)


def test_altered_tokens_are_refused(tmp_path):
    folder = make_tokens(tmp_path / "tokens")
    content = bytearray((folder / "train.tokens").read_bytes())
    content[-1] ^= 1
    (folder / "train.tokens").write_bytes(content)
    with pytest.raises(BadData, match=r"train\.tokens was altered"):
        trainer.open_splits(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository folder with tiny params.yaml and tokens, not under DVC."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    write_text(Path("params.yaml"), json.dumps(tree_of()))  # JSON is YAML
    make_tokens(Path("data/tokens"))
    return tmp_path


def test_the_door_writes_model_curve_and_report_the_same_each_time(here):
    first = door()
    assert (first.exit_code, first.exception) == (0, None)
    written = contents()
    report = json.loads(Path("reports/training.json").read_text())
    assert report["tokens"] == 6 * 32
    assert report["gradient_accumulation_steps"] == 2
    assert report["train_loss_steps"] == 2
    curve = Path("reports/loss.csv").read_text().splitlines()
    assert curve[0] == "step,train_loss,val_loss"
    assert curve[-1] == f"6,{report['train_loss']!r},{report['val_loss']!r}"
    assert [int(line.split(",")[0]) for line in curve[1:]] == [1, 2, 4, 6]
    assert not list(Path(".state/training").iterdir())
    assert door().exit_code == 0
    assert contents() == written


def test_after_the_first_steps_the_time_left_is_announced_with_what_follows(here, monkeypatch):
    monkeypatch.setattr("stages.training.MEASURED_STEPS", 2)
    done = door()
    assert done.exit_code == 0
    assert done.output.count("left at the speed of this machine's first steps; then the evaluation") == 1
    assert "the baselines (unigram" in done.output


def test_the_curve_is_written_as_it_grows_and_from_its_first_row_after_a_stop(here, monkeypatch):
    """Each validation leaves a complete file; the last one is what an uninterrupted run writes."""
    from stages import training as stage

    assert door().exit_code == 0
    whole = Path("reports/loss.csv").read_text()
    seen, write = [], stage.write_text

    def watched(path, content):
        write(path, content)
        seen.append(path.read_text())

    monkeypatch.setattr(stage, "write_text", watched)
    Path("reports/loss.csv").unlink()
    assert door().exit_code == 0
    assert [text.count("\n") - 1 for text in seen] == [1, 2, 3, 4]
    assert all(whole.startswith(text) for text in seen)
    assert Path("reports/loss.csv").read_text() == whole


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tokens_per_step": 40}, "tokens_per_step (40) must be a multiple of"),
        ({"micro_batch_size": 3}, "training.launcher.processes (24)"),
        ({"tokens_per_step": 16, "launcher": {"processes": 2}}, "training.launcher.processes (32)"),
    ],
)
def test_tokens_per_step_that_do_not_divide_are_refused_before_any_work(here, budget, message):
    write_text(Path("params.yaml"), json.dumps(tree_of(**budget)))
    result = door()
    assert result.exit_code == 78
    assert message in result.output
    assert not Path(".state/training").exists()


def test_who_waits_sees_step_loss_speed_use_time_left_and_whether_the_curve_leaves_the_band(
    here, monkeypatch
):
    told = ExpectedLoss(value=3.2, low_80=3.1, high_80=3.3, low_95=3.0, high_95=3.4, basis="")
    monkeypatch.setattr(callbacks, "expected_band", lambda _: callbacks.Band(told, 100))
    tree = tree_of(max_steps=100, eval_interval=20, checkpoint_interval=50)
    write_text(Path("params.yaml"), json.dumps(tree))
    lines = door().output.splitlines()
    assert lines[0].startswith("training: tokens_per_step 32 = 2 sequences x 8 tokens x 2 micro-batches x 1")
    assert re.fullmatch(
        r"training: 100 of 100 steps, loss \d\.\d+, tokens/s [\d,]+, left 0:00, of peak \d+%, "
        r"expected 3\.00-3\.40 at the end",
        lines[-1],
    )
    (told,) = [line for line in lines if "95 % interval" in line]
    assert re.match(r"training: val loss 2\.\d+ at step \d+ of 100 is already below the 95 % interval", told)


def test_fine_tuning_a_gpt2_in_hugging_faces_form_through_the_door(here, splits):
    """Refused until its hash is told, then better from the first row on than from scratch."""
    shape = {"bias": True, "gelu": "tanh"}
    budget = {"max_steps": 60, "eval_interval": 30, "checkpoint_interval": 30}
    base = trainer.train(params_of(**budget, model=shape), splits, here / "base")
    save_hf(base.model, here / "gpt2")
    tuned = {"init_from": "gpt2", "init_sha256": "0" * 64, "model": shape}
    write_text(Path("params.yaml"), json.dumps(tree_of(**tuned)))
    refused = door()
    assert refused.exit_code == 78
    assert folder_sha256(Path("gpt2")) in refused.output
    tuned["init_sha256"] = folder_sha256(Path("gpt2"))
    write_text(Path("params.yaml"), json.dumps(tree_of(**tuned)))
    assert door().exit_code == 0
    first = float(Path("reports/loss.csv").read_text().splitlines()[1].split(",")[2])
    assert abs(first - base.rows[-1].val_loss) < 0.3 < base.rows[0].val_loss - first
    assert load_model(Path("models/compact")).shape.bias


def test_the_door_says_in_one_sentence_that_there_are_no_tokens(here):
    (here / "data/tokens/manifest.json").unlink()
    result = door()
    assert result.exit_code == 66
    assert result.output.startswith("error: data/tokens/manifest.json is missing")
