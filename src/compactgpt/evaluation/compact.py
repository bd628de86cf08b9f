"""Convert our GPT to a `NeuralModel`, which evaluation can score.

Shapes: B texts, T new tokens, S tokens read so far, C channels, nh heads of hs channels.
"""

from collections.abc import Iterable
from functools import partial
from typing import cast

import tiktoken
import torch
from torch import Tensor
from torch.nn import functional as F

from compactgpt.evaluation.likelihood import IN_WINDOW, Codec, NeuralModel
from compactgpt.model.gpt import GPT, Attention, Block


def as_neural_model(model: GPT, batch_size: int, encoding: tiktoken.Encoding | None = None) -> NeuralModel:
    """Return our GPT as a `NeuralModel`. Tasks and generated text need an encoding."""
    facts = {"kind": "compact", "num_params": model.num_params, "context": IN_WINDOW}
    # The head, (V, C), has no rows that only pad the vocabulary.
    head = model.eval().wte.weight.detach()[: model.shape.vocab_size]
    codec = None
    if encoding is not None:
        codec = Codec(encoding.encode_ordinary, encoding.decode, encoding.eot_token)
    decoder = partial(CachedReader, model)
    return NeuralModel(
        facts, model.hidden, head, model.shape.block_size, batch_size, codec=codec, decoder=decoder
    )


class CachedReader:
    """Run our GPT step by step with a cache of keys and values.

    Short texts have padding on the left. No token of a text attends to the padding.
    """

    def __init__(self, model: GPT, padding: Tensor) -> None:
        self._model, self._padding = model, padding[:, None]  # (B, 1)
        self._read = 0
        self._cache: list[tuple[Tensor, Tensor]] = []  # for each layer: its keys and values, (B, nh, S, hs)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read the next tokens, (B, T). Return the last token's hidden state, (B, C)."""
        model, start = self._model, self._read
        self._read = end = start + tokens.shape[1]
        columns = torch.arange(start, end, device=tokens.device)  # (T,)
        seen = torch.arange(end, device=tokens.device)  # (S,)
        is_text = (seen >= self._padding)[:, None]  # (B, 1, S)
        is_before, is_self = seen <= columns[:, None], seen == columns[:, None]  # (T, S)
        # Padding attends to itself, because the softmax of a fully masked row is NaN.
        mask = (is_text & is_before) | is_self  # (B, T, S)
        positions = (columns - self._padding).clamp_min(0)  # (B, T)
        x = model.wte(tokens) + model.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(cast(Iterable[Block], model.h)):
            x = x + self._attend(layer, block.attn, block.ln_1(x), mask[:, None])
            x = x + block.mlp(block.ln_2(x))
        return cast(Tensor, model.ln_f(x[:, -1]))

    def _attend(self, layer: int, attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
        """Return one layer's attention, (B, T, C), for `x`, (B, T, C), and `mask`, (B, 1, T, S)."""
        B, T, C = x.shape
        heads = attention.c_attn(x).view(B, T, 3, attention.n_head, C // attention.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
        if layer == len(self._cache):
            self._cache.append((k, v))
        else:
            k, v = (torch.cat(pair, 2) for pair in zip(self._cache[layer], (k, v), strict=True))
            self._cache[layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, nh, T, hs)
        return cast(Tensor, attention.c_proj(y.transpose(1, 2).reshape(B, T, C)))
