"""The estimate is arithmetic that anyone can redo; golden numbers are from the papers and from nanoGPT."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt import config
from compactgpt.config import load_params
from compactgpt.forecast.estimate import estimate, forecast
from compactgpt.forecast.model_size import counts, flops_per_token
from compactgpt.forecast.scaling_laws import LAWS, Run, expect, kaplan, through
from stages.estimate import app

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
NOTE = PARAMS.estimate.note
LAW = {law.name: law for law in LAWS}
NOTE_RUN = Run(29_938_560, 10_621_824, 20_000, 32_768)


def shape(n_layer: int, n_embd: int, n_head: int, **more) -> config.Model:
    tree = {"block_size": 1024, "vocab_size": 50257, "padded_vocab_size": 50257, "bias": True, "dropout": 0.0}
    return config.Model(**{**tree, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, **more})


def test_the_notes_model_has_the_notes_parameters():
    sizes = counts(NOTE)
    assert (sizes.all_tensors, sizes.nanogpt, sizes.non_embedding) == (30_135_168, 29_938_560, 10_621_824)
    assert sizes.nanogpt == 6 * 1_770_240 + 384 + 50_304 * 384


@pytest.mark.parametrize(
    ("layers", "width", "heads", "all_tensors", "nanogpt"),
    [
        (12, 768, 12, 124_439_808, 123_653_376),
        (24, 1024, 16, 354_823_168, 353_774_592),
        (36, 1280, 20, 774_030_080, 772_719_360),
        (48, 1600, 25, 1_557_611_200, 1_555_972_800),
    ],
)
def test_gpt2s_sizes_are_counted_exactly(layers, width, heads, all_tensors, nanogpt):
    sizes = counts(shape(layers, width, heads))
    assert (sizes.all_tensors, sizes.nanogpt) == (all_tensors, nanogpt)


@pytest.mark.parametrize("bias", [True, False])
def test_counts_are_the_models_own(bias):
    """The same three numbers as the built model's, tensor by tensor."""
    from compactgpt.model.gpt import GPT

    small = shape(2, 16, 4, bias=bias, block_size=8, vocab_size=61, padded_vocab_size=64)
    model = GPT(small)
    sizes = counts(small)
    assert sizes.all_tensors == sum(tensor.numel() for tensor in model.parameters())
    assert sizes.nanogpt == model.num_params_nanogpt
    assert sizes.non_embedding == model.num_params_non_embedding


def test_arithmetic_of_the_notes_run():
    flops = flops_per_token(NOTE)
    assert flops["six_n"] == 6 * 29_938_560
    assert flops["with_attention"] == pytest.approx(193.8e6, rel=1e-3)
    note = estimate(PARAMS)["note"]
    assert note["tokens"] == 655_360_000
    assert note["sequences_per_step"] == 64
    assert note["epochs"] == pytest.approx(0.0725, abs=5e-5)
    assert note["flops"]["with_attention"] == pytest.approx(1.27e17, rel=1e-3)
    # 1.27e17 FLOPs at the share of 989 TFLOP/s that was measured: 1.872M tokens/s (docs/benchmarks.md)
    assert note["minutes"]["h100"] == pytest.approx(655.36 / 1.872 / 60, abs=0.05)
    assert note["memory_bytes"]["logits_if_held_at_once"] / 2**30 == pytest.approx(1.5, abs=0.05)
    memory = note["memory_bytes"]
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] / 2 == 4 * 30_135_168


def test_a_layer_keeps_what_the_memory_says():
    """Counted as autograd keeps it: the difference that two more layers make."""
    import torch

    from compactgpt.model.gpt import GPT

    kept = {}
    for layers in (1, 3):
        model = GPT(shape(layers, 64, 4, bias=False, block_size=128, vocab_size=61, padded_vocab_size=64))
        weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            model.hidden(torch.zeros(2, 128, dtype=torch.int64))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        kept[layers] = sum(size for place, size in storages.items() if place not in weights)
    memory = {
        layers: forecast_memory(shape(layers, 64, 4, bias=False, block_size=128), 2) for layers in (1, 3)
    }
    assert (kept[3] - kept[1]) == pytest.approx(memory[3] - memory[1], rel=0.02)


def forecast_memory(model: config.Model, micro_batch_size: int) -> int:
    run = Run(1, 1, 1, micro_batch_size * model.block_size)
    expected = NOTE.expected_loss
    return forecast(model, run, micro_batch_size, None, expected, PARAMS.estimate)["memory_bytes"][
        "activations"
    ]


@pytest.mark.parametrize(
    ("law", "loss"),
    [
        ("kaplan-2020", 4.20),
        ("hoffmann-2022", 4.253),
        ("hoffmann-2022-exact", 4.140),
        ("besiroglu-2024", 4.269),
    ],
)
def test_laws_at_the_notes_point(law, loss):
    assert LAW[law].loss(NOTE_RUN) == pytest.approx(loss, abs=0.0055 if law == "kaplan-2020" else 0.0005)


@pytest.mark.parametrize(
    ("law", "steps", "loss"),
    [
        ("kaplan-2020", 600_000, 2.876),  # nanoGPT's own number of steps
        ("hoffmann-2022", 610_352, 2.661),  # 300B tokens
        ("besiroglu-2024", 610_352, 2.688),
    ],
)
def test_laws_at_a_known_point(law, steps, loss):
    """124M on 300B tokens of OpenWebText, which measured 2.85."""
    known = Run(123_653_376, 85_056_000, steps, 491_520)
    assert LAW[law].loss(known) == pytest.approx(loss, abs=0.0009)


@pytest.mark.parametrize("steps", [1, 100, 20_000, 10_000_000])
def test_kaplans_loss_solves_its_own_equation(steps):
    run = Run(NOTE_RUN.num_params, NOTE_RUN.num_params_non_embedding, steps, 32_768)
    loss = kaplan(run)
    batch = 2.1e8 / loss ** (1 / 0.21)
    smallest_steps = steps / (1 + batch / run.tokens_per_step)
    size_term = (6.5e13 / run.num_params_non_embedding) ** 0.077
    assert loss == pytest.approx(size_term + (2.1e3 / smallest_steps) ** 0.76, rel=1e-9)


def anchor(**more) -> config.Anchor:
    return PARAMS.estimate.anchors[0].model_copy(update=more)


def test_a_scaled_law_passes_through_its_anchor():
    point = anchor()
    run = Run(point.num_params, point.num_params_non_embedding, point.max_steps, point.tokens_per_step)
    for law in LAWS:
        assert through(law, point, run) == pytest.approx(point.loss, rel=1e-12)


def test_the_nearest_anchor_is_taken_and_the_optimizer_breaks_a_tie():
    adamw, muon = anchor(name="a", optimizer="adamw", loss=5.5), anchor(name="m", optimizer="muon", loss=4.5)
    far = PARAMS.estimate.anchors[2]
    here = Run(muon.num_params, muon.num_params_non_embedding, muon.max_steps, muon.tokens_per_step)
    assert expect(here, "muon", 50257, (adamw, muon, far)).value == pytest.approx(4.5)
    assert expect(here, "adamw", 50257, (muon, adamw, far)).value == pytest.approx(5.5)
    there = Run(far.num_params, far.num_params_non_embedding, far.max_steps, far.tokens_per_step)
    assert expect(there, "muon", 50257, (muon, adamw, far)).value == pytest.approx(2.85)


def test_the_interval_is_the_laws_spread_widened_by_their_miss():
    """By hand: at the anchor itself the spread is zero, so the width is the miss alone."""
    far = PARAMS.estimate.anchors[2]
    there = Run(far.num_params, far.num_params_non_embedding, far.max_steps, far.tokens_per_step)
    miss = max(abs(law.loss(there) - 2.85) for law in LAWS)
    found = expect(there, "adamw", 50257, (far,))
    assert (found.low_80, found.high_80) == (pytest.approx(2.85 - miss), pytest.approx(2.85 + miss))
    assert (found.low_95, found.high_95) == (pytest.approx(2.85 - 2 * miss), pytest.approx(2.85 + 2 * miss))
    # a hundred times the tokens: two decades away, twice the width beside the spread
    further = Run(far.num_params, far.num_params_non_embedding, far.max_steps * 100, far.tokens_per_step)
    wide = expect(further, "adamw", 50257, (far,))
    losses = [through(law, far, further) for law in LAWS]
    assert wide.low_80 == pytest.approx(min(losses) - 2 * miss)
    assert wide.high_80 == pytest.approx(max(losses) + 2 * miss)


def test_no_bound_is_above_guessing_or_below_nothing():
    for steps in (1, 10**9):
        found = expect(Run(100, 50, steps, 512), "muon", 50257, PARAMS.estimate.anchors)
        assert 0 < found.low_95 < found.low_80 < found.value <= found.high_80 <= found.high_95
        assert found.high_95 <= math.log(50257)


def test_the_notes_interval_is_the_one_written_down_before():
    expected = estimate(PARAMS)["note"]["expected_loss"]
    assert [expected[key] for key in ("low_95", "low_80", "value", "high_80", "high_95")] == [
        3.82,
        3.90,
        4.00,
        4.12,
        4.20,
    ]


def test_the_demos_estimate_says_what_it_is_worth():
    own = estimate(PARAMS)["compact"]
    assert own["epochs"] is None
    assert any("extrapolated far below" in note for note in own["notes"])
    assert any("docstrings, for which no law is calibrated" in note for note in own["notes"])
    worse = {name for name, law in own["laws"].items() if not law["better_than_guessing"]}
    assert worse == {"besiroglu-2024"}
    assert all(law["better_than_guessing"] for law in estimate(PARAMS)["note"]["laws"].values())


def test_the_estimate_needs_neither_torch_nor_numpy():
    code = "import sys, compactgpt.estimate; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_door_writes_the_estimate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {}\n")  # the stage checks the files that DVC reads
    words = ["--params", str(ROOT / "params.yaml"), "--report", "reports/estimate.json", "--tracker", "none"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "reports/estimate.json").read_text()) == estimate(PARAMS)


def test_what_is_known_of_the_corpus_is_noted():
    files = PARAMS.model_copy(update={"download": PARAMS.download.model_copy(update={"corpus": "files"})})
    assert any("the corpus is docstrings" in note for note in estimate(PARAMS)["compact"]["notes"])
    assert any("the corpus is the user's own" in note for note in estimate(files)["compact"]["notes"])
