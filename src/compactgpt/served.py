"""The compact model as a service: prompts in, continuations and losses out.

This is what MLflow's pyfunc calls (compactgpt.registry writes the few lines between); it needs torch, and
nothing of DVC or MLflow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactgpt.compact import load_compact
from compactgpt.config import Text
from compactgpt.encoding import load_encoding
from compactgpt.errors import BadConfig
from compactgpt.evaluation import own_windows, target_nats
from compactgpt.generation import WAYS, chooser, write_on

# What a request may change.
DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": 32,
    "way": "top_k",
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "seed": 1337,
}
_FEWEST = 5  # new tokens that a `Text` allows; a request may ask for less


class Speaker:
    """A model and its tokenizer, ready to answer."""

    def __init__(self, model: Path, tokenizer: Path) -> None:
        """Load both.

        Raises:
            MissingInput, BadData: one is not there, or damaged.
        """
        encoding = load_encoding(tokenizer)
        self.model = load_compact(model, encoding, 16, "cpu")
        self.codec = self.model.codec
        assert self.codec is not None

    def answer(self, prompt: str, wishes: Mapping[str, Any] | None = None) -> tuple[str, float]:
        """Continue a prompt.

        Args:
            prompt: any text.
            wishes: other values for some of DEFAULTS.

        Returns:
            The continuation, and the prompt's own loss in nats per token.

        Raises:
            BadConfig: there is no such way to choose tokens.
        """
        assert self.codec is not None
        settings = {**DEFAULTS, **(wishes or {})}
        if settings["way"] not in WAYS:
            raise BadConfig(f"way is {settings['way']!r}, allowed are {', '.join(WAYS)}")
        new_tokens = int(settings["max_new_tokens"])
        text = Text(
            prompts=(prompt,),
            documents=2,
            prompt_tokens=1,
            max_new_tokens=max(_FEWEST, new_tokens),
            batch_size=1,
            **{key: settings[key] for key in ("temperature", "top_k", "top_p", "seed")},
        )
        tokens = [self.codec.first_token, *self.codec.encode(prompt)]
        choose = [chooser(settings["way"], text, prompt)]
        (found,) = write_on(self.model, [tokens], choose, new_tokens, self.codec.first_token)
        return self.codec.decode(found.tokens), self.loss(tokens)

    def loss(self, tokens: list[int]) -> float:
        """Nats per token of a text behind its first token, in windows of the model's context; 0.0 of none."""
        import numpy as np

        windows = own_windows([(0, np.array(tokens, np.int64))], self.model.block_size)
        nats = sum(float(values.sum()) for _, values in target_nats(self.model, windows))
        return nats / max(1, len(tokens) - 1)
