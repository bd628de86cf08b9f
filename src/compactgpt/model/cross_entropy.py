"""Products in bfloat16 for the head, whose softmax needs no pass of its own: logits leave as exponentials.

With z the logits of a row and t its target, e_j = exp(z_j - z_t) and s = sum of e: the token costs log(s)
nats, and the gradient of its logits is (e_j - s [j = t]) / s. So nothing lies between the product that makes
the logits and the two that take the gradient on: the first one's epilogue subtracts, exponentiates, sums up
in fp32 and rounds to bfloat16. On Nvidia's Hopper that is one kernel (`cross_entropy_triton`), elsewhere
a product and a pass.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Exponents above it are cut: 50,304 times exp(60) is far from fp32's end. Tokens of more nats count as 60.
CAP = 60.0


def exponentials(x: Tensor, weight: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Write exp(x weight^T - shift), and return the sum of each row before it is rounded.

    Args:
        x: (R, C) bfloat16
        weight: (V, C) bfloat16
        shift: what each row's logits are taken relative to. (R,) fp32
        out: (R, V) bfloat16

    Returns:
        (R,) fp32
    """
    if x.is_cuda and importlib.util.find_spec("triton"):
        from compactgpt.model.cross_entropy_triton import fits, launch

        if fits(x, weight):
            return launch(x, weight, shift, out, CAP)
        return _compiled_pass()(torch.mm(x, weight.T, out=out), shift)
    return _pass(torch.mm(x, weight.T, out=out), shift)


def _pass(logits: Tensor, shift: Tensor) -> Tensor:
    """Put the exponentials in the logits' place, and return the sums. (R, V), (R,) -> (R,)."""
    e = (logits.float() - shift[:, None]).clamp(max=CAP).exp()
    logits.copy_(e)
    return e.sum(1)


@cache
def _compiled_pass() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_pass)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of bfloat16, in fp32: kept as it was summed on a GPU, rounded to bfloat16 between on a CPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def add_wide_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a b to `total`, in fp32, or begin it."""
    if a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(wide_product(a, b))
    else:
        total.add_(wide_product(a, b))
