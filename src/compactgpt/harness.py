"""Our models inside EleutherAI's lm-evaluation-harness: any of its tasks, our own arithmetic.

    python -m pip install lm-eval==0.4.13
    python -m compactgpt.harness models/compact data/tokenizer lambada_openai

The harness cuts text and counts; nats and hits come from `evaluation.score_targets`, generated text from
`generation.write_on`. lm_eval is an extra and is imported when an adapter is made.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.compact import load_compact
from compactgpt.data import Window
from compactgpt.encoding import load_encoding
from compactgpt.errors import BadConfig, MissingInput
from compactgpt.evaluation import Codec, Neural
from compactgpt.generation import write_on
from compactgpt.tasks import score_windows


def harness_model(model: Neural) -> Any:
    """Wrap a model as a `lm_eval.api.model.TemplateLM`, to be given to `lm_eval.simple_evaluate`.

    Raises:
        MissingInput: lm_eval is not installed.
        BadConfig: the model has no tokenizer here.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise MissingInput("lm_eval is not installed: python -m pip install lm-eval==0.4.13") from error
    if model.codec is None:
        raise BadConfig(f"{model.facts.get('kind')} has no tokenizer here")
    codec: Codec = model.codec

    class Adapter(TemplateLM):  # type: ignore[misc]
        """Answers the harness's three kinds of question."""

        @property
        def eot_token_id(self) -> int:
            return codec.first_token

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return codec.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return _answers(model, [(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            return [_of_text(model, codec, *request.args) for request in requests]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return [_written(model, codec, *request.args) for request in requests]

    return Adapter()


def _answers(model: Neural, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Log-probability of each continuation behind its context, and whether greedy decoding says it."""
    windows = []
    for place, (context, continuation) in enumerate(pairs):
        stream = np.array([*context, *continuation], np.int64)[-(model.block_size + 1) :]
        windows.append(Window(place, 0, stream[:-1], stream[1:][-len(continuation) :]))
    nats, hits = score_windows(model, windows)
    return list(zip((-nats).tolist(), hits.tolist(), strict=True))


def _of_text(model: Neural, codec: Codec, text: str) -> float:
    """Log-probability of a whole text, cut into windows as the harness cuts it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    rolled = get_rolling_token_windows(codec.encode(text), codec.first_token, model.block_size, 1)
    return sum(value for value, _ in _answers(model, [make_disjoint_window(pair) for pair in rolled]))


def _written(model: Neural, codec: Codec, prompt: str, settings: Mapping[str, Any]) -> str:
    """What greedy decoding writes behind a prompt, up to the first of the words to stop at."""
    limit = int(settings.get("max_gen_toks", 256))
    fed = [codec.encode(prompt)[-model.block_size :] or [codec.first_token]]
    (new,) = write_on(model, fed, [lambda logits: int(logits.argmax())], limit, codec.first_token)
    text = codec.decode(new.tokens)
    for stop in settings.get("until", []):
        text = text.split(stop)[0]
    return text


def main(folder: str, tokenizer: str, *tasks: str) -> dict[str, Any]:
    """Run tasks of the harness on a model of ours."""
    from lm_eval import simple_evaluate

    compact = load_compact(Path(folder), load_encoding(Path(tokenizer)), batch_size=16, device="cpu")
    found: dict[str, Any] = simple_evaluate(harness_model(compact), tasks=list(tasks))
    return dict(found["results"])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:]), indent=2, default=str) + "\n")
