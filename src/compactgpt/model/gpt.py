"""The GPT: nanoGPT's architecture, read top to bottom.

Learned positions, layer norm before each block's two halves, GELU, and one matrix that is both the token
embedding and the head (Press and Wolf 2017). Sources: Radford et al. 2019 (GPT-2) and
github.com/karpathy/nanoGPT, model.py, whose initialisation and parameter groups are kept to the digit.

Shapes: B sequences, T tokens of one, C = n_embd channels, nh = n_head heads, hs = C / nh channels of a
head, V = padded_vocab_size, N = B x T rows of the head.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compactgpt import config
from compactgpt.model.cross_entropy import add_wide_product, exponentials, wide_product

# Rows of logits that exist at once: 512 x 50,304 in fp32 are 103 MB. A GPU wants more work in one go: 8,192
# rows in bfloat16 are 0.8 GB.
LOSS_ROWS = 512
GPU_LOSS_ROWS = 8192
INIT_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.n_head, self.dropout = shape.n_head, shape.dropout
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each place with those before it. (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.gelu = "tanh" if shape.gelu == "tanh" else "none"
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each place by itself. (B, T, C) -> (B, T, C)."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then MLP, each behind a layer norm and beside the residual stream."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Add both halves to the stream. (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A decoder-only transformer with a tied head: the head's matrix is `wte.weight`, (V, C).

    Rows from `vocab_size` to `padded_vocab_size` of that matrix spell no token. Training includes them in
    the softmax, as nanoGPT does; whoever measures masks them by using `wte.weight[:vocab_size]`.
    """

    def __init__(self, shape: config.Model, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.padded_vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.compiled: Callable[[Tensor], Tensor] | None = None  # of `blocks`
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights anew: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                residual = name.endswith("c_proj.weight")
                std = INIT_STD / math.sqrt(2 * self.shape.n_layer) if residual else INIT_STD
                parameter.normal_(0.0, std, generator=generator)

    @property
    def num_params(self) -> int:
        """All parameters, the tied matrix once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_params_nanogpt(self) -> int:
        """nanoGPT's convention: all but position embeddings."""
        return self.num_params - self.wpe.weight.numel()

    @property
    def num_params_non_embedding(self) -> int:
        """All but token and position embeddings: N of Kaplan et al. 2020."""
        return self.num_params_nanogpt - self.wte.weight.numel()

    def hidden(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """Run the trunk, up to and with the last layer norm. (B, T) int64 -> (B, T, C).

        Args:
            tokens: rows of the table.
            table: token embeddings, those of the model unless given. (K, C)
        """
        T = tokens.shape[1]
        table = self.wte.weight if table is None else table
        if self.shape.block_size < T:
            raise ValueError(f"got {T} tokens, the model attends to at most {self.shape.block_size}")
        # On a CPU a sparse gradient adds B x T rows to the head's, where a dense one would add all V.
        # Only `forward` is differentiated: the head's dense gradient makes the sum dense.
        x = F.embedding(tokens, table, sparse=tokens.device.type == "cpu")
        x = F.dropout(x + self.wpe.weight[:T], self.shape.dropout, self.training)
        return self.compiled(x) if self.compiled and self.training else self.blocks(x)

    def blocks(self, x: Tensor) -> Tensor:
        """All layers and the last layer norm. (B, T, C) -> (B, T, C)."""
        for block in self.h:
            x = block(x)
        return cast(Tensor, self.ln_f(x))

    def forward(
        self, tokens: Tensor, targets: Tensor, table: Tensor | None = None, correction: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats per token over all V rows. (B, T) int64, (B, T) int64 -> ().

        Args:
            tokens: rows of the table.
            targets: rows of the table.
            table: some rows of the tied matrix in place of all of them: K in place of V. (K, C)
            correction: added to every row's logits. (K,)
        """
        # Autograd adds a dense gradient to a sparse one in place, but a sparse one to a dense one in a copy.
        # Named before the lookup, the head is differentiated after it.
        table = self.wte.weight if table is None else table
        head = table.expand_as(table)
        x = self.hidden(tokens, table).flatten(0, 1)  # (N, C)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        loss = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x, head, targets.flatten(), dtype, correction
        )
        return cast(Tensor, loss)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, without ever holding all logits.

    The gradients are made in the forward pass, while a chunk's logits are at hand: with p the softmax and
    t the target, d loss / d logits = (p - onehot(t)) / N. Exact up to rounding: products are made in
    `dtype`, the softmax and all sums over chunks in fp32 or wider.
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
        rows, size = len(x), LOSS_ROWS if x.device.type == "cpu" else GPU_LOSS_ROWS
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        head_gradient = _rounded_head_gradient
        if dtype == weight.dtype:
            head_gradient = partial(_head_gradient, correction=correction)
        elif correction is not None:
            raise ValueError("a correction of the logits needs products in the weights' own precision")
        x, weight = x.to(dtype), weight.to(dtype)
        logits = x.new_empty(min(size, rows), len(weight))
        nats = []
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, rows, size):
                part, target = x[start : start + size], targets[start : start + size]
                place, own_dx = logits[: len(part)], dx[start : start + size]
                nats.append(head_gradient(part, weight, target, place, own_dx, dw, start == 0, rows).sum())
        ctx.gradients = dx, dw
        return torch.stack(nats).sum() / rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scale what the forward pass made by the loss's own gradient, once."""
        dx, dw = ctx.gradients
        del ctx.gradients
        # A pass over the vocabulary's gradient is dear on a CPU, asking for the value is dear on a GPU.
        if grads[0].device.type != "cpu" or grads[0].item() != 1:
            dx, dw = dx.mul_(grads[0]), dw.mul_(grads[0])
        return dx, dw, None, None, None


def _head_gradient(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    logits: Tensor,
    dx: Tensor,
    dw: Tensor,
    first: bool,
    rows: int,
    correction: Tensor | None = None,
) -> Tensor:
    """Write a chunk's dx, add to dw (or begin it), and return the chunk's nats; softmax in the logits' place.

    A token's nats are capped at 87.3, where its probability underflows in fp32; its gradient is not.

    Args:
        x: a chunk of hidden states. (R, C)
        weight: the head. (V, C)
        targets: (R,) int64
        logits: scratch memory. (R, V)
        dx: where the chunk's part of the gradient goes. (R, C)
        dw: gradient of the head so far. (V, C)
        first: dw holds nothing yet.
        rows: N, of all chunks.
        correction: added to each row's logits. (V,)
    """
    if correction is None:
        torch.mm(x, weight.T, out=logits)
    else:
        torch.addmm(correction, x, weight.T, out=logits)
    p = torch.softmax(logits, 1, out=logits)
    picked = p.gather(1, targets[:, None])
    p.scatter_(1, targets[:, None], picked - 1)
    torch.mm(p, weight, out=dx)
    dx.div_(rows)
    dw.addmm_(p.T, x, beta=0 if first else 1, alpha=1 / rows)  # beta 0: dw is not read
    return picked.clamp_min(torch.finfo(p.dtype).tiny).log().neg()


def _rounded_head_gradient(
    x: Tensor, weight: Tensor, targets: Tensor, e: Tensor, dx: Tensor, dw: Tensor, first: bool, rows: int
) -> Tensor:
    """The same where products are made in bfloat16: the softmax is never normalised (room `exponentials`).

    With e_j = exp(z_j - z_t) and s their sum, the gradient of a row's logits is (e_j - s [j = t]) / s; e is
    rounded once, and s divides the narrow sides of both products.
    """
    shift = (x.float() * weight[targets].float()).sum(1)  # (R,)
    total = exponentials(x, weight, shift, e)  # (R,)
    e.scatter_(1, targets[:, None], (1 - total).to(e.dtype)[:, None])  # of e_t, which is 1, s is taken off
    scale = (1 / (total * rows))[:, None]
    dx.copy_(wide_product(e, weight).mul_(scale))
    add_wide_product(dw, e.T, (x * scale).to(x.dtype), first)
    return total.log()


@torch.no_grad()
def token_nats(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, in nats, chunk by chunk.

    Args:
        x: what `GPT.hidden` returned, flattened. (N, C)
        weight: the head; `wte.weight[:vocab_size]` to mask the padding rows. (V, C)
        targets: ids below V. (N,) int64

    Returns:
        (N,)
    """
    logits = x.new_empty(min(LOSS_ROWS, len(x)), len(weight))
    nats = []
    for part, target in zip(torch.split(x, LOSS_ROWS), torch.split(targets, LOSS_ROWS), strict=True):
        place = torch.mm(part, weight.T, out=logits[: len(part)])
        nats.append(torch.log_softmax(place, 1, out=place).gather(1, target[:, None])[:, 0].neg())
    return torch.cat(nats)
