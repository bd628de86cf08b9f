"""The GPT model, with nanoGPT's architecture and initialization (github.com/karpathy/nanoGPT, model.py).

Token embedding and head are one matrix (Press and Wolf 2017).
Shapes: B sequences, T tokens, C = n_embd channels, nh heads of hs channels, V = padded_vocab_size.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compactgpt import config
from compactgpt.model.cross_entropy import linear_cross_entropy

INIT_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.n_head, self.dropout = shape.n_head, shape.dropout
        # one matrix product computes queries, keys and values of all heads
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Let each position attend to itself and to all earlier positions. (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between; the hidden layer has 4 C channels."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.dropout = shape.dropout
        # nanoGPT uses the exact GELU. OpenAI trained GPT-2 with the tanh approximation.
        self.gelu = "tanh" if shape.gelu == "tanh" else "none"
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to each position separately. (B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate=self.gelu)  # (B, T, 4 C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """One layer of the GPT: attention and then an MLP, each with a residual connection."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream. (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A decoder-only transformer whose head is the token embedding `wte.weight`, (V, C).

    Rows from `vocab_size` on are padding. Training includes them in the softmax, as nanoGPT does;
    evaluation excludes them.
    """

    def __init__(self, shape: config.Model, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.padded_vocab_size, shape.n_embd)  # tokens
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)  # positions
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.compiled: Callable[[Tensor], Tensor] | None = None  # `blocks`, compiled by torch.compile
        self._init_weights(seed)

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        """Draw matrices at random; set biases to 0 and layer norm weights to 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                # The projections that add to the residual stream get a smaller std: there are 2 n_layer
                # projections, and the variance of the stream must not grow with n_layer.
                residual = name.endswith("c_proj.weight")
                std = INIT_STD / math.sqrt(2 * self.shape.n_layer) if residual else INIT_STD
                parameter.normal_(0.0, std, generator=generator)

    @property
    def num_params(self) -> int:
        """Number of all parameters; token embedding and head are one matrix, counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_params_nanogpt(self) -> int:
        """Number of all parameters except position embeddings, as nanoGPT counts them."""
        return self.num_params - self.wpe.weight.numel()

    @property
    def num_params_non_embedding(self) -> int:
        """Number of parameters except token and position embeddings: N of Kaplan et al. 2020."""
        return self.num_params_nanogpt - self.wte.weight.numel()

    def hidden(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the hidden states after the last layer norm. (B, T) int64 -> (B, T, C).

        `tokens` are row numbers of `table`, by default `wte.weight`. Raises ValueError if T > block_size.
        """
        T = tokens.shape[1]
        table = self.wte.weight if table is None else table
        if self.shape.block_size < T:
            raise ValueError(f"got {T} tokens, the model attends to at most {self.shape.block_size}")
        # On a CPU, a sparse gradient is cheaper: it has B x T rows instead of V.
        x = F.embedding(tokens, table, sparse=tokens.device.type == "cpu")  # (B, T, C)
        x = F.dropout(x + self.wpe.weight[:T], self.shape.dropout, self.training)
        return self.compiled(x) if self.compiled and self.training else self.blocks(x)

    def blocks(self, x: Tensor) -> Tensor:
        """Apply all layers and the last layer norm. (B, T, C) -> (B, T, C)."""
        for block in self.h:
            x = block(x)
        return cast(Tensor, self.ln_f(x))

    def forward(
        self, tokens: Tensor, targets: Tensor, table: Tensor | None = None, correction: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross-entropy of the targets in nats per token, a scalar.

        `tokens` and `targets`, (B, T) int64, are row numbers of `table`. `table`, (K, C), has K token
        embeddings; the default is `wte.weight`. `correction`, (K,), is added to the logits at each position.
        """
        table = self.wte.weight if table is None else table
        # Embedding and head share `table`, so autograd adds their gradients. On a CPU, the gradient of the
        # embedding is sparse, and the gradient of the head is dense. If the dense gradient arrives last,
        # autograd adds the sparse one to it in place, without a copy. `expand_as`, which changes no value,
        # makes the dense gradient arrive last.
        head = table.expand_as(table)
        x = self.hidden(tokens, table).flatten(0, 1)  # (B T, C)
        return linear_cross_entropy(x, head, targets.flatten(), correction)
