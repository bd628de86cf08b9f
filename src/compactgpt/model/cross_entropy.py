"""Cross-entropy of a linear head over a large vocabulary, without ever holding all logits.

The gradients are computed in the forward pass, while the logits of a chunk of rows are at hand. With p the
softmax of a row's logits z and t its target, d loss / d z_j = (p_j - [j = t]) / N.

Products in bfloat16 need no pass for the softmax: the product that makes the logits writes exponentials.
With e_j = exp(z_j - z_t) and s = sum of e, a token's cross-entropy is log(s), and the gradient of its logits
is (e_j - s [j = t]) / s. The end of that product subtracts, exponentiates, sums in fp32 and rounds to
bfloat16. On Nvidia's Hopper this is one kernel (`cross_entropy_triton`), elsewhere a product and a pass.

Shapes: N rows in all, R rows of a chunk, C channels, V rows of the head.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

# Rows of logits that exist at once: 512 x 50,304 in fp32 are 103 MB. A GPU needs more work at a time: 8,192
# rows in bfloat16 are 0.8 GB.
LOSS_ROWS = 512
GPU_LOSS_ROWS = 8192
# Largest exponent: 50,304 times exp(60) is far from fp32's limit. So a token costs at most 60 nats.
CAP = 60.0


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, correction: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of logits x weight^T; products are in autocast's dtype where it is on.

    Args:
        x: hidden states. (N, C)
        weight: the head. (V, C)
        targets: row numbers of the head. (N,) int64
        correction: added to the logits of each row. (V,)

    Returns:
        (), in nats per token
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    loss = LinearCrossEntropy.apply(x, weight, targets, dtype, correction)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


class LinearCrossEntropy(torch.autograd.Function):
    """The loss of `linear_cross_entropy` with both gradients.

    Exact up to rounding: products are in `dtype`, the softmax and all sums over chunks in fp32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        correction: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss and both gradients. (N, C), (V, C), (N,), dtype, (V,) or None -> ()."""
        if dtype == weight.dtype:
            add_chunk = partial(_add_chunk, correction=correction)
        elif correction is None:
            add_chunk = partial(_add_rounded_chunk)
        else:
            raise ValueError("a correction of the logits needs products in the weights' own precision")
        N = len(x)
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        x, weight = x.to(dtype), weight.to(dtype)
        size = LOSS_ROWS if x.device.type == "cpu" else GPU_LOSS_ROWS
        buffer = x.new_empty(min(size, N), len(weight))  # the logits of one chunk after the other
        nats = []
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, N, size):
                rows = slice(start, start + size)
                logits = buffer[: len(x[rows])]
                chunk = add_chunk(x[rows], weight, targets[rows], logits, dx[rows], dw, start == 0, N)
                nats.append(chunk.sum())
        ctx.gradients = dx, dw
        return torch.stack(nats).sum() / N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scale the gradients of the forward pass by the loss's own gradient; works once."""
        dx, dw = ctx.gradients
        del ctx.gradients
        # A CPU avoids a pass over the vocabulary's gradient, a GPU avoids reading the value.
        if grads[0].device.type != "cpu" or grads[0].item() != 1:
            dx, dw = dx.mul_(grads[0]), dw.mul_(grads[0])
        return dx, dw, None, None, None


def _add_chunk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    logits: Tensor,
    dx: Tensor,
    dw: Tensor,
    first: bool,
    N: int,
    correction: Tensor | None,
) -> Tensor:
    """Write a chunk's dx, add its part to dw, and return its cross-entropies in nats. (R,).

    A token costs at most 87.3 nats, where its probability underflows in fp32; its gradient has no such limit.

    Args:
        x: a chunk of hidden states. (R, C)
        weight: the head. (V, C)
        targets: (R,) int64
        logits: memory for the logits, which then holds the softmax and then the logits' gradient. (R, V)
        dx: memory for the gradient of x. (R, C)
        dw: gradient of the head so far. (V, C)
        first: dw holds nothing yet.
        N: rows of all chunks.
        correction: added to the logits of each row. (V,)
    """
    if correction is None:
        torch.mm(x, weight.T, out=logits)
    else:
        torch.addmm(correction, x, weight.T, out=logits)
    p = torch.softmax(logits, 1, out=logits)  # in place, (R, V)
    p_target = p.gather(1, targets[:, None])  # (R, 1)
    p.scatter_(1, targets[:, None], p_target - 1)  # p - onehot(t)
    torch.mm(p, weight, out=dx)
    dx.div_(N)
    dw.addmm_(p.T, x, beta=0 if first else 1, alpha=1 / N)  # with beta 0, what dw holds is not read
    return p_target.clamp_min(torch.finfo(p.dtype).tiny).log().neg()


def _add_rounded_chunk(
    x: Tensor, weight: Tensor, targets: Tensor, e: Tensor, dx: Tensor, dw: Tensor, first: bool, N: int
) -> Tensor:
    """Do the same with products in bfloat16; `e` is memory for the exponentials. (R, V).

    The exponentials are rounded once, and never divided by their sum s: it divides the narrow sides of both
    products instead, (R, C) in place of (R, V).
    """
    target_logits = (x.float() * weight[targets].float()).sum(1)  # (R,)
    s = exponentials(x, weight, target_logits, e)  # (R,)
    target_gradients = 1 - s  # e_t is 1, and s is subtracted from it
    e.scatter_(1, targets[:, None], target_gradients.to(e.dtype)[:, None])
    scale = (1 / (s * N))[:, None]  # (R, 1)
    dx.copy_(_product_in_fp32(e, weight).mul_(scale))
    scaled_x = (x * scale).to(x.dtype)  # (R, C)
    if x.is_cuda:
        torch.addmm(dw, e.T, scaled_x, out_dtype=torch.float32, beta=0 if first else 1, out=dw)
    elif first:
        dw.copy_(_product_in_fp32(e.T, scaled_x))
    else:
        dw.add_(_product_in_fp32(e.T, scaled_x))
    return s.log()


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply bfloat16 matrices. A GPU keeps the sums in fp32; a CPU rounds them to bfloat16 in between."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def exponentials(x: Tensor, weight: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Write exp(x weight^T - shift), and return the sum of each row before rounding.

    Args:
        x: (R, C) bfloat16
        weight: (V, C) bfloat16
        shift: subtracted from the logits of each row. (R,) fp32
        out: (R, V) bfloat16

    Returns:
        (R,) fp32
    """
    if x.is_cuda and importlib.util.find_spec("triton"):
        from compactgpt.model.cross_entropy_triton import is_supported, run_kernel

        if is_supported(x, weight):
            return run_kernel(x, weight, shift, out, CAP)
        return _compiled_pass()(torch.mm(x, weight.T, out=out), shift)
    return _exponentials_pass(torch.mm(x, weight.T, out=out), shift)


def _exponentials_pass(logits: Tensor, shift: Tensor) -> Tensor:
    """Replace logits by exponentials, and return the sums. (R, V), (R,) -> (R,)."""
    e = (logits.float() - shift[:, None]).clamp(max=CAP).exp()
    logits.copy_(e)
    return e.sum(1)


@cache
def _compiled_pass() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_exponentials_pass)


@torch.no_grad()
def token_nats(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token in nats, for evaluation.

    Args:
        x: what `GPT.hidden` returned, flattened. (N, C)
        weight: the head; `wte.weight[:vocab_size]` leaves the padding rows out. (V, C)
        targets: ids below V. (N,) int64

    Returns:
        (N,)
    """
    buffer = x.new_empty(min(LOSS_ROWS, len(x)), len(weight))  # the logits of every chunk
    nats = []
    for chunk, chunk_targets in zip(torch.split(x, LOSS_ROWS), torch.split(targets, LOSS_ROWS), strict=True):
        logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])  # (R, V)
        log_p = torch.log_softmax(logits, 1, out=logits)
        nats.append(log_p.gather(1, chunk_targets[:, None])[:, 0].neg())
    return torch.cat(nats)
