"""Load a trained model, generate text, and score texts.

    import compactgpt

    model = compactgpt.load("models/compact")
    print(model.generate("The future of AI is"))
    print(model.score("Some text."))

`compactgpt generate` and `compactgpt evaluate` call these functions.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactgpt import config
from compactgpt.common.console import Progress, silent
from compactgpt.common.device import resolve_device
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import MANIFEST, read_manifest
from compactgpt.data.token_files import TokenFile, pack_documents
from compactgpt.data.tokenizer import encode, load_encoding, save_gpt2
from compactgpt.evaluation.likelihood import LanguageModel, NeuralModel

if TYPE_CHECKING:
    import tiktoken

MODEL = "models/compact"
TOKENIZER = "data/tokenizer"
LONGEST_WINDOW = 1024  # tokens; the maximum of `Model.window`
BATCH_SIZE = 16  # number of windows that a model reads at once
_IN_MLFLOW = re.compile("models:/[^/@]+([/@][^/@]+)?|runs:/[^/]+/.+")


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text. Tokens are counted with the project's tokenizer."""

    documents: int
    tokens: int
    bytes: int
    window: int  # the model sees at most this many tokens before the predicted token
    loss: float  # nats per token
    perplexity: float | None  # per token; None if the perplexity is too large for a float
    bits_per_byte: float
    # Name of a metric, such as "loss" -> the limits of its 95 % interval.
    # `intervals` is empty for a single document.
    intervals: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        """Return the score on one line."""
        perplexity = "too large" if self.perplexity is None else f"{self.perplexity:,.2f}"
        return (
            f"{self.loss:.3f} nats per token, perplexity {perplexity}, "
            f"{self.bits_per_byte:.3f} bits per byte ({self.tokens:,} tokens, {self.bytes:,} bytes)"
        )


@dataclass(frozen=True)
class Model:
    """A language model that generates text and scores texts."""

    name: str
    language_model: LanguageModel
    encoding: "tiktoken.Encoding"  # the project's tokenizer; losses are per token of this tokenizer

    @property
    def window(self) -> int:
        """The default `window` of `score`: the model's context, but at most LONGEST_WINDOW tokens."""
        model = self.language_model
        return min(LONGEST_WINDOW, model.block_size) if isinstance(model, NeuralModel) else LONGEST_WINDOW

    def generate(self, prompt: str, **options: Any) -> str:
        """Return a continuation of a prompt, without the prompt. The options are those of `stream`."""
        return "".join(new for (new,) in self.stream(prompt, **options))

    def stream(
        self,
        prompt: str,
        *,
        num_samples: int = 1,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 40,
        seed: int = 1337,
    ) -> Iterator[list[str]]:
        """Return an iterator over the steps of the generation. A step adds at most a token to a continuation.

        The iterator yields a list of `num_samples` strings: the text that the step adds to each continuation.
        With temperature 0, each token is the most probable one.
        Raises BadConfig if the model can't generate text.
        """
        from compactgpt.evaluation import generation

        model = self.language_model
        if not isinstance(model, NeuralModel) or model.codec is None:
            raise BadConfig(f"{self.name} can't generate text: name a neural model, such as {MODEL}")
        if min(num_samples, max_new_tokens, top_k) < 1 or temperature < 0:
            raise BadConfig(
                "num_samples, max_new_tokens and top_k must be at least 1, temperature at least 0"
            )
        _to_utf8(prompt)

        probabilities = partial(generation.top_k_probabilities, temperature=temperature, top_k=top_k)
        samplers: list[generation.Sampler] = [generation.greedy] * num_samples
        if temperature > 0:
            keys = [f"{sample} {prompt}" for sample in range(num_samples)]
            samplers = [generation.seeded_sampler(probabilities, seed, key) for key in keys]
        end = model.codec.first_token
        prompts = [[end, *model.codec.encode(prompt)]] * num_samples
        steps = generation.generate_tokens(model, prompts, samplers, max_new_tokens, end)
        return _new_texts(steps, num_samples, end, model.codec.decode)

    def score(
        self, text: str | Sequence[str], *, window: int | None = None, progress: Progress = silent
    ) -> Score:
        """Return the loss, perplexity and bits per byte of one or more documents.

        A neural model sees at most `window` tokens before each predicted token. Default: `self.window`.
        """
        from compactgpt.evaluation.likelihood import evaluate
        from compactgpt.evaluation.totals import figures

        window = window or self.window
        likelihood = config.Likelihood(
            window=window, batch_size=BATCH_SIZE, own_context=window, stride_share=1.0
        )
        split = _as_split([text] if isinstance(text, str) else text, self.encoding)
        totals = evaluate(self.language_model, split, self.encoding, likelihood, progress=progress)
        found = figures(totals.nats, totals)
        names = [name for name in ("loss", "perplexity", "bits_per_byte") if found[name]]
        is_several = (totals.tokens > 0).sum() > 1
        return Score(
            documents=len(totals.ids),
            tokens=int(totals.tokens.sum()),
            bytes=int(totals.bytes.sum()),
            window=window,
            **{"perplexity": None, **{name: found[name]["value"] for name in names}},
            intervals={name: (found[name]["low"], found[name]["high"]) for name in names if is_several},
        )


def _new_texts(
    steps: Iterable[list[int | None]], num_samples: int, end: int, decode: Callable[[list[int]], str]
) -> Iterator[list[str]]:
    tokens: list[list[int]] = [[] for _ in range(num_samples)]
    texts = [""] * num_samples
    for step in steps:
        for row, token in zip(tokens, step, strict=True):
            if token is not None and token != end:
                row.append(token)
        # `decode` returns U+FFFD for an incomplete last character, which a later token completes.
        now = [decode(row).rstrip("\ufffd") for row in tokens]
        yield [new[len(old) :] for new, old in zip(now, texts, strict=True)]
        texts = now


def load(model: str | Path = MODEL, *, params_file: str | Path = "params.yaml") -> Model:
    """Load a model from a folder, from MLflow, or by its name in `baseline.specs`.

    A name in MLflow is `models:/compactgpt@champion`, for example.
    Raises MissingInput if no model is found.
    """
    name, folder = str(model), Path(model).expanduser()
    if _IN_MLFLOW.fullmatch(name):
        from compactgpt.tracking.registry import download_model

        with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
            return _load_folder(name, download_model(name, Path(scratch)))
    if folder.is_dir():
        return _load_folder(name, folder)
    if name == MODEL:
        raise MissingInput(f"{MODEL} is missing: `make repro` in the repository folder trains this model")
    params = config.load_params(Path(params_file)) if Path(params_file).exists() else None
    known = sorted(params.baseline.specs) if params else []
    if params is None or name not in known:
        raise MissingInput(
            f"there is no model {name!r}: give a folder, a model in MLflow (models:/compactgpt@champion), or "
            f"a baseline in {params_file} ({', '.join(known) or 'this file is missing'})"
        )
    from compactgpt.evaluation.baselines import load_baseline
    from compactgpt.tracking import state_folder

    encoding = _load_tokenizer(Path(MODEL))
    train = Path("data/tokens/train.tokens")
    return Model(name, load_baseline(name, params, encoding, train, state_folder()), encoding)


def _load_folder(name: str, folder: Path) -> Model:
    if (folder / MANIFEST).exists() and read_manifest(folder).get("kind") == "model":
        from compactgpt.evaluation.compact import as_neural_model
        from compactgpt.model.weights import load_model

        encoding = _load_tokenizer(folder)
        model = as_neural_model(load_model(folder, resolve_device("auto")), BATCH_SIZE, encoding)
        if len(model.head) != encoding.n_vocab:
            raise BadData(
                f"{folder} has a vocabulary of {len(model.head):,} tokens, but the tokenizer has "
                f"{encoding.n_vocab:,}: if another project trained the model, name its folder in that project"
            )
        return Model(name, model, encoding)
    if not (folder / "config.json").exists():
        raise MissingInput(
            f"{folder} has no model: give a folder with a model of this project, or in Hugging Face's format"
        )
    from compactgpt.evaluation.baselines import load_folder

    encoding = _load_tokenizer(folder)
    runtime = config.Runtime(device="auto", num_threads=os.cpu_count() or 1, num_workers=1)
    return Model(name, load_folder(folder, encoding, BATCH_SIZE, runtime), encoding)


def _load_tokenizer(model: Path) -> "tiktoken.Encoding":
    """Return the first tokenizer found: in the model's project, the current folder, or the model's folder."""
    project = model.absolute().parent.parent  # PROJECT, if the model is PROJECT/models/compact
    for folder in (project / TOKENIZER, Path(TOKENIZER)):
        if folder.is_dir():
            return load_encoding(folder)
    if (model / "vocab.json").exists() and (model / "merges.txt").exists():
        with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
            folder = Path(scratch) / "tokenizer"
            save_gpt2(folder, (model / "merges.txt").read_bytes(), (model / "vocab.json").read_bytes())
            return load_encoding(folder)
    raise MissingInput(f"there is no tokenizer in {TOKENIZER}: run `dvc repro download`")


def _to_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadData(f"the text can't be encoded as UTF-8 ({error}): correct the text") from error


def _as_split(documents: Sequence[str], encoding: "tiktoken.Encoding") -> TokenFile:
    """Tokenize documents into a token file in memory."""
    contents = [_to_utf8(text) for text in documents]
    if not any(contents):
        raise BadData("the text is empty: give at least one character")
    rows = [
        (hashlib.sha256(content).digest()[:16], len(content), encode(encoding, text))
        for content, text in zip(contents, documents, strict=True)
    ]
    vocabulary = {"vocab_size": encoding.n_vocab, "eot_token": encoding.eot_token}
    return pack_documents(Path("the text"), rows, tokenizer_sha256="", **vocabulary)
