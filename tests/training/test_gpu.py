"""Tests that need a GPU.

python -m pytest tests/training/test_gpu.py   # needs an Nvidia GPU (docs/benchmarks.md)
"""

import importlib.util

import pytest
import torch

from compactgpt.common.errors import Busy
from compactgpt.model.cross_entropy import CAP, exponentials
from compactgpt.model.gpt import GPT
from compactgpt.training import trainer
from tests.support.tiny_training import assert_same_bits, make_tokens, params_of, stop_after

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no Nvidia GPU here")

NOTE = {"block_size": 512, "n_layer": 6, "n_head": 6, "n_embd": 384, "padded_vocab_size": 50304}


@pytest.mark.parametrize(("rows", "columns", "width"), [(300, 1000, 64), (8192, 50304, 384), (77, 264, 72)])
def test_exponentials_and_their_sums_are_those_of_float64(rows, columns, width):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, width, generator=generator, device="cuda").bfloat16()
    weight = (0.1 * torch.randn(columns, width, generator=generator, device="cuda")).bfloat16()
    x[5] = torch.nan
    x[6] *= 100  # beyond the cap
    targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
    out = torch.full((rows, columns), 9.0, dtype=torch.bfloat16, device="cuda")
    total = exponentials(x, weight, targets, out)
    again = torch.empty_like(out)
    assert torch.equal(exponentials(x, weight, targets, again).nan_to_num(), total.nan_to_num())
    assert torch.equal(again.nan_to_num(), out.nan_to_num())
    logits = x.double() @ weight.double().T
    exact = (logits - logits[:, :1]).clamp(max=CAP).exp()
    assert out[5].isnan().all()
    assert total[5].isnan()
    kept = torch.arange(rows, device="cuda") != 5
    # An exponent of 60 has 4e-6 in fp32's last place; bfloat16 has 8 bits.
    torch.testing.assert_close(total[kept].double(), exact[kept].sum(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(out[kept].double(), exact[kept], rtol=5e-3, atol=1e-30)


def test_loss_and_gradients_in_bfloat16_are_near_those_of_float32():
    model = GPT(params_of(model=NOTE).model, seed=1).cuda()
    tokens = torch.randint(0, 40, (4, 513), generator=torch.Generator().manual_seed(0)).cuda()
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    for exact, rounded in zip(*grads, strict=True):
        assert (exact - rounded).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("compiles", [False, True])
def test_a_gpu_gives_the_same_bits_twice_and_after_a_stop(tmp_path, compiles):
    if compiles and not importlib.util.find_spec("triton"):
        pytest.skip("nothing compiles for a GPU here without Triton")
    splits = trainer.open_splits(make_tokens(tmp_path / "tokens"))
    params = params_of(
        model=NOTE, dtype="bfloat16", compile=compiles, optimizer="adamw",
        max_steps=9, tokens_per_step=8192, micro_batch_size=16, eval_interval=3, checkpoint_interval=3,
    )  # fmt: skip
    runtime = params.runtime.model_copy(update={"device": "cuda", "log_interval": 2})
    params = params.model_copy(update={"runtime": runtime})
    whole = trainer.train(params, splits, tmp_path / "whole")
    assert_same_bits(whole, trainer.train(params, splits, tmp_path / "again"))
    with pytest.raises(Busy, match="step 4 of 9"):
        trainer.train(params, splits, tmp_path / "stopped", trainer.Callbacks(should_stop=stop_after(4)))
    rest = trainer.train(params, splits, tmp_path / "stopped")
    assert rest.resumed_from == 4
    assert_same_bits(whole, rest)
