"""Our own model behind the interface of `evaluation`; apart, so that no baseline depends on our GPT.

B texts, T tokens read at once, S tokens read so far, C channels, nh heads, hs channels of a head.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import cast

import tiktoken
import torch
from torch import Tensor
from torch.nn import functional as F

from compactgpt.evaluation.likelihood import IN_WINDOW, Codec, Neural
from compactgpt.model.gpt import GPT, Attention, Block
from compactgpt.model.weights import load_model


def load_compact(folder: Path, encoding: tiktoken.Encoding, batch_size: int, device: str) -> Neural:
    """Our own trained model, ready to be measured.

    Args:
        folder: the checkpoint.
        encoding: that it was trained with.
        batch_size: windows in one forward pass.
        device: cpu, cuda or mps.

    Raises:
        MissingInput: there is no checkpoint.
        BadData: it is damaged.
    """
    return compact(load_model(folder, device), batch_size, encoding)


def compact(model: GPT, batch_size: int, encoding: tiktoken.Encoding | None = None) -> Neural:
    """Our GPT behind the one interface, with the padding rows of its vocabulary left out."""
    shape = model.shape
    facts = {"kind": "compact", "num_params": model.num_params, "context": IN_WINDOW}
    head = model.eval().wte.weight.detach()[: shape.vocab_size]
    codec = None if encoding is None else plain_codec(encoding)
    decoder = partial(Reading, model)
    return Neural(facts, model.hidden, head, shape.block_size, batch_size, codec=codec, decoder=decoder)


def plain_codec(encoding: tiktoken.Encoding) -> Codec:
    """Spell text with a tiktoken encoding."""
    return Codec(encoding.encode_ordinary, encoding.decode, encoding.eot_token)


class Reading:
    """Our GPT reading texts part by part: keys and values of what was read are kept.

    Padding stands on the left of shorter texts; nothing looks at it but itself.
    """

    def __init__(self, model: GPT, padding: Tensor) -> None:
        self._model, self._padding = model, padding[:, None]  # (B, 1)
        self._read = 0
        self._kept: list[tuple[Tensor, Tensor]] = []  # of each layer, keys and values (B, nh, S, hs)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read on. (B, T) int64 -> hidden state of the last place, (B, C)."""
        model, start = self._model, self._read
        end = start + tokens.shape[1]
        places = torch.arange(start, end, device=tokens.device)  # (T,)
        seen = torch.arange(end, device=tokens.device)  # (S,)
        real = seen >= self._padding[:, None]  # (B, 1, S)
        mask = (real & (seen <= places[:, None])) | (seen == places[:, None])  # (B, T, S)
        x = model.wte(tokens) + model.wpe((places - self._padding).clamp_min(0))  # (B, T, C)
        for layer, block in enumerate(cast(Iterable[Block], model.h)):
            x = x + self._attend(layer, block.attn, block.ln_1(x), mask[:, None])
            x = x + block.mlp(block.ln_2(x))
        self._read = end
        return cast(Tensor, model.ln_f(x[:, -1]))

    def _attend(self, layer: int, attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = attention.c_attn(x).view(B, T, 3, attention.n_head, C // attention.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
        if layer < len(self._kept):
            k, v = (torch.cat(pair, 2) for pair in zip(self._kept[layer], (k, v), strict=True))
            self._kept[layer] = k, v
        else:
            self._kept.append((k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, nh, T, hs)
        return cast(Tensor, attention.c_proj(y.transpose(1, 2).reshape(B, T, C)))
