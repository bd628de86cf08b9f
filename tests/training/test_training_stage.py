"""The stage script `training`: what it writes, what it prints, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch

from compactgpt.common.errors import CheckFailed
from compactgpt.config import ExpectedLoss
from compactgpt.model.huggingface import save_hf
from compactgpt.model.weights import load_model
from compactgpt.tracking import training_callbacks
from compactgpt.tracking.journal import NullTracker
from compactgpt.training import trainer
from compactgpt.training.initialization import folder_sha256
from tests.support.tiny_training import outputs, params_of, params_tree, run_stage, write_params

pytestmark = pytest.mark.usefixtures("project")


def read_report():
    return json.loads(Path("reports/training.json").read_text())


def test_the_stage_writes_model_curve_and_report_the_same_each_time():
    first = run_stage()
    assert (first.exit_code, first.exception) == (0, None)
    written = outputs()
    report = read_report()
    assert (report["tokens"], report["diverged"]) == (6 * 32, False)
    lines = Path("reports/loss.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,val_loss"
    assert lines[-1] == f"6,{report['train_loss']!r},{report['val_loss']!r}"
    assert [int(line.split(",")[0]) for line in lines[1:]] == [1, 2, 4, 6]
    assert not list(Path(".state/training").iterdir())
    assert run_stage().exit_code == 0
    assert outputs() == written


def test_a_stage_that_failed_at_its_end_resumes_from_its_last_state(monkeypatch):
    assert run_stage().exit_code == 0
    written = outputs()

    def fail(*_):
        raise CheckFailed("params.yaml changed while the stage ran")

    with monkeypatch.context() as patched:
        patched.setattr(NullTracker, "end", fail, raising=False)  # the last step of open_stage
        assert run_stage().exit_code == CheckFailed.exit_code
    monkeypatch.setattr(trainer.Trainer, "make_step", None)  # no step is left
    assert run_stage().exit_code == 0
    assert outputs() == written
    assert not list(Path(".state/training").iterdir())


def test_a_user_sees_batch_progress_time_left_and_the_expected_loss(monkeypatch):
    expected = ExpectedLoss(value=3.2, low_80=3.1, high_80=3.3, low_95=3.0, high_95=3.4, basis="")
    monkeypatch.setattr(training_callbacks, "expected_loss", lambda _: expected)
    write_params(max_steps=100, eval_interval=20, checkpoint_interval=50)
    lines = run_stage().output.splitlines()
    assert lines[0] == (
        "training: tokens_per_step 32 = 2 sequences x 8 tokens x 2 micro-batches x 1 process; "
        "100 steps, 3,200 tokens"
    )
    assert re.fullmatch(
        r"training: 100 of 100 steps, train loss \d\.\d+, val loss of \d+ windows \d\.\d+, "
        r"tokens/s [\d,]+, expected final val loss 3\.00-3\.40",
        lines[-1],
    )


def test_a_gpt2_in_hugging_faces_form_is_fine_tuned_once_its_hash_is_in_params(project):
    shape = {"bias": True, "gelu": "tanh"}
    params = params_of(max_steps=60, eval_interval=30, checkpoint_interval=30, model=shape)
    base = trainer.train(params, trainer.open_splits(project / "data/tokens"), project / "base")
    save_hf(base.model, project / "gpt2")
    write_params(init_from="gpt2", init_sha256="0" * 64, model=shape)
    refused, sha256 = run_stage(), folder_sha256(Path("gpt2"))
    assert (refused.exit_code, sha256 in refused.output) == (78, True)
    write_params(init_from="gpt2", init_sha256=sha256, model=shape)
    assert run_stage().exit_code == 0
    first = float(Path("reports/loss.csv").read_text().splitlines()[1].split(",")[2])
    assert abs(first - base.rows[-1].val_loss) < 0.3 < base.rows[0].val_loss - first
    assert load_model(Path("models/compact")).shape.bias


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        # numpy draws the same numbers from two of these seeds
        (lambda tree: tree["training"].update(seed=2**63), 78, "should be less than 9223372036854775808"),
        (lambda tree: tree["runtime"].update(device="cuda"), 78, "found cuda, .* use auto, or cpu"),
        (lambda _: Path("data/tokens/manifest.json").unlink(), 66, "error: data/tokens/manifest.json"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, make, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tree = params_tree()
    make(tree)
    Path("params.yaml").write_text(json.dumps(tree))
    result = run_stage()
    assert (result.exit_code, type(result.exception)) == (code, SystemExit)
    assert re.search(message, result.output)
    assert "Traceback" not in result.output


def test_a_diverged_training_is_reported_once_and_in_the_report():
    write_params(learning_rate=1e3, embedding_learning_rate=1e3, schedule="constant", warmup_steps=0)
    result = run_stage()
    assert result.exit_code == 0
    assert (read_report()["diverged"], read_report()["val_loss"] > 10) == (True, True)
    (warning,) = [line for line in result.output.splitlines() if "diverged" in line]
    assert re.match(r"training: .* the val loss at step \d of 6 is .* lower training.learning_rate", warning)


def test_a_warm_up_longer_than_the_training_says_what_happens():
    write_params(warmup_steps=11)
    assert "training.warmup_steps (11) is not below training.max_steps (6): the" in run_stage().output
