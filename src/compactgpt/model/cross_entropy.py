"""Cross-entropy of a linear head, computed in chunks of tokens.

The forward pass also computes the gradients, so the backward pass needs no logits. Therefore only one chunk's
logits are in memory at any time.
Shapes: N tokens, R tokens in a chunk, C channels, V rows of the head's weight.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

LOSS_ROWS = 512  # tokens in a chunk on a CPU: with GPT-2's vocabulary, 103 MB of fp32 logits
GPU_LOSS_ROWS = 8192  # tokens in a chunk on a GPU: with GPT-2's vocabulary, 0.8 GB of bfloat16 logits
CAP = 60.0  # maximum argument of exp: then a sum over GPT-2's vocabulary does not overflow fp32


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, correction: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the logits x weight^T + correction, in nats per token.

    `x` is (N, C), `weight` (V, C), `correction` (V,). `targets`, (N,) int64, are row numbers of `weight`.
    Raises ValueError for a `correction` under autocast.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    loss = LinearCrossEntropy.apply(x, weight, targets, dtype, correction)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


class LinearCrossEntropy(torch.autograd.Function):
    """The autograd function of `linear_cross_entropy`.

    Matrix products are in `dtype`; the softmax and sums over chunks are in fp32 or a wider type.
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
        """Return the mean loss, a scalar, and store the gradients for `backward`."""
        is_rounded = dtype != weight.dtype
        if is_rounded and correction is not None:
            raise ValueError(
                "a correction of the logits is not supported under autocast: set training.dtype to float32"
            )
        add_chunk = _add_rounded_chunk if is_rounded else partial(_add_chunk, correction=correction)
        N = len(x)
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        x, weight = x.to(dtype), weight.to(dtype)
        size = LOSS_ROWS if x.device.type == "cpu" else GPU_LOSS_ROWS
        buffer = x.new_empty(min(size, N), len(weight))  # every chunk writes its logits here
        nats = []
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, N, size):
                rows = slice(start, start + size)
                logits = buffer[: len(x[rows])]
                chunk = add_chunk(x[rows], weight, targets[rows], logits, dx[rows], dw, start == 0, N)
                nats.append(chunk.sum())
        # `backward` overwrites dx and dw. That is safe: torch raises an error if a second backward pass would
        # read the overwritten tensors.
        ctx.save_for_backward(dx, dw)
        return torch.stack(nats).sum() / N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the stored gradients, multiplied in place by the gradient with respect to the output."""
        dx, dw = ctx.saved_tensors
        # Skip a multiplication by 1, but only on a CPU: on a GPU, `item()` waits for all queued kernels.
        if grads[0].device.type != "cpu" or grads[0].item() != 1:
            dx, dw = dx.mul_(grads[0]), dw.mul_(grads[0])
        return dx, dw, None, None, None


def _add_chunk(
    x: Tensor,  # (R, C)
    weight: Tensor,  # (V, C)
    targets: Tensor,  # (R,)
    logits: Tensor,  # (R, V) buffer
    dx: Tensor,  # (R, C) buffer for the gradient of `x`
    dw: Tensor,  # (V, C) buffer for the gradient of `weight`, summed over chunks
    first: bool,  # whether this is the first chunk, which overwrites `dw`
    N: int,  # number of tokens in all chunks
    correction: Tensor | None,  # (V,) added to the logits of each token; None: nothing is added
) -> Tensor:
    """Return each token's cross-entropy in nats, (R, 1), and write the gradients to `dx` and `dw`."""
    if correction is None:
        torch.mm(x, weight.T, out=logits)
    else:
        torch.addmm(correction, x, weight.T, out=logits)
    p = torch.softmax(logits, 1, out=logits)  # in place, (R, V)
    p_target = p.gather(1, targets[:, None])  # (R, 1)
    p.scatter_(1, targets[:, None], p_target - 1)  # p - onehot(target): the gradient of the logits, times N
    torch.mm(p, weight, out=dx)
    dx.div_(N)
    dw.addmm_(p.T, x, beta=0 if first else 1, alpha=1 / N)  # beta=0 ignores dw's old content
    # The target's probability can be rounded to 0, which would give an infinite loss. The clamp limits the
    # loss to 87.3 nats (in fp32). The gradient above does not change.
    return p_target.clamp_min(torch.finfo(p.dtype).tiny).log().neg()


def _add_rounded_chunk(
    x: Tensor, weight: Tensor, targets: Tensor, e: Tensor, dx: Tensor, dw: Tensor, first: bool, N: int
) -> Tensor:
    """Do the same as `_add_chunk`, but multiply matrices in bfloat16. Return the losses in nats, (R,).

    `e`, (R, V), is a buffer. The function first fills each token's row of `e` with the values
    e_j = exp(z_j - z_t), where z_j is the logit of vocabulary entry j, and z_t is the logit of the target.
    """
    s = exponentials(x, weight, targets, e)  # (R,) each token's sum of all e_j
    # The loss of a token is log(s). Its gradient is e_j / s for each logit z_j except the target's, and
    # (1 - s) / s for the target's logit. Multiplied by s, the gradient is e_j, which `e` already contains,
    # and 1 - s, which must be written to `e`.
    target_gradients = 1 - s
    e.scatter_(1, targets[:, None], target_gradients.to(e.dtype)[:, None])
    # Do not divide `e`, (R, V), by s. Instead, divide the (R, C) matrices below, which are smaller.
    scale = (1 / (s * N))[:, None]  # (R, 1)
    dx.copy_(_product_in_fp32(e, weight).mul_(scale))
    scaled_x = (x * scale).to(x.dtype)  # (R, C)
    if x.is_cuda:
        torch.addmm(dw, e.T, scaled_x, out_dtype=torch.float32, beta=0 if first else 1, out=dw)
    elif first:
        dw.copy_(_product_in_fp32(e.T, scaled_x))
    else:
        dw.add_(_product_in_fp32(e.T, scaled_x))
    return s.log()  # the loss is -log(e_t / s), and e_t = exp(z_t - z_t) = 1


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return the fp32 product of bfloat16 matrices; a CPU first rounds the product to bfloat16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def exponentials(x: Tensor, weight: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    """Write exp(z_j - z_t) to `out`, (R, V) bfloat16, and return the row sums, (R,) fp32.

    In a token's row, z_j is the logit of vocabulary entry j, and z_t is the logit of the target. A difference
    z_j - z_t above CAP is replaced by CAP.
    """
    has_triton = x.is_cuda and importlib.util.find_spec("triton")
    if has_triton:
        from compactgpt.model.cross_entropy_triton import is_supported, run_kernel

        if is_supported(x, weight):
            # The kernel keeps its logits in fp32, so compute the target's logit in fp32, too.
            target_logits = (x.float() * weight[targets].float()).sum(1)
            return run_kernel(x, weight, target_logits, out, CAP)
    logits = torch.mm(x, weight.T, out=out)
    # Take the target's logit from the logits rounded to bfloat16: it must be rounded like the others.
    target_logits = logits.gather(1, targets[:, None]).float()  # (R, 1)
    replace_logits = _compiled_pass() if has_triton else _exponentials_pass
    return replace_logits(logits, target_logits)


def _exponentials_pass(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Replace the logits, (R, V), by exp(logit - target's logit), and return the row sums, (R,)."""
    e = (logits.float() - target_logits).clamp(max=CAP).exp()
    logits.copy_(e)  # rounds to bfloat16
    return e.sum(1)


@cache
def _compiled_pass() -> Callable[[Tensor, Tensor], Tensor]:
    """Compile `_exponentials_pass` to one kernel, for GPUs that `cross_entropy_triton` does not support."""
    return torch.compile(_exponentials_pass)


@torch.no_grad()
def token_nats(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token in nats, (N,), for evaluation.

    `x`, (N, C), has hidden states; `weight`, (vocab_size, C), is the head without padding rows.
    """
    buffer = x.new_empty(min(LOSS_ROWS, len(x)), len(weight))  # every chunk writes its logits here
    nats = []
    for chunk, chunk_targets in zip(torch.split(x, LOSS_ROWS), torch.split(targets, LOSS_ROWS), strict=True):
        logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])  # (R, V)
        log_p = torch.log_softmax(logits, 1, out=logits)
        nats.append(log_p.gather(1, chunk_targets[:, None])[:, 0].neg())
    return torch.cat(nats)
