"""Commands that use the trained model."""

import io
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactgpt.commands.options import PARAMS, AsJson, ParamsFile
from compactgpt.common.console import ProgressBar, echo, echo_json, report
from compactgpt.common.errors import BadData, MissingInput, printable

if TYPE_CHECKING:
    from compactgpt.api import Model, Score

app = typer.Typer()

MODEL = "models/compact"
EVALUATION = Path("reports/evaluation.json")
PIECE = 1000  # `evaluate` splits a long text into documents of about this many characters
LONG = 5 * PIECE  # characters of the longest text that stays one document
FIGURES = {"loss": 3, "perplexity": 2, "bits_per_byte": 3}  # metric -> its number of digits after the point
MODELS = "A folder, a model in MLflow (models:/compactgpt@champion), or a name from baseline.specs"
ModelFolder = Annotated[Path, typer.Option("--model", help="The folder of the trained model.")]


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="`-`: standard input. Without PROMPT, asks for one."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help=f"{MODELS}.")] = MODEL,
    compare: Annotated[str, typer.Option(metavar="MODEL", help="Also show another model's text.")] = "",
    num_samples: Annotated[int, typer.Option(min=1, help="Number of continuations.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a continuation.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most probable token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw from the TOP_K most probable tokens.")] = 40,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Same seed, same text.")] = 1337,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Continue a text with the trained model.

    Prints the prompt and the new text. Writes no file.
    Example: compactgpt generate "The future of AI is" --num-samples 3
    """
    models = _load([model, compare] if compare else [model], params_file)
    options: dict[str, Any] = {"num_samples": num_samples, "max_new_tokens": max_new_tokens}
    options |= {"temperature": temperature, "top_k": top_k, "seed": seed}

    def show(prompt: str) -> None:
        streams = [one.stream(prompt, **options) for one in models]
        if compare:
            _show_in_columns(prompt, models, streams)
        else:
            _show_samples(prompt, streams[0])

    if prompt is None and sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (with it, the arrow keys edit the line and show earlier lines)
        report("Enter a prompt. An empty line or Ctrl-D ends.")
        with suppress(EOFError):
            while typed := input("> "):
                show(typed)
    else:
        show(_read_text("-").removesuffix("\n") if prompt in (None, "-") else str(prompt))


def _load(names: Sequence[str], params_file: Path) -> list["Model"]:
    """Load models. Each model except MODEL can take half a minute to load, so print a message first."""
    from compactgpt.api import load

    models = []
    for name in names:
        if name != MODEL:
            report(f"loading {name} ...")
        models.append(load(name, params_file=params_file))
    return models


def _read_text(name: str) -> str:
    """Return the text of a file, or of standard input for the name `-`."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return content.decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingInput(
            f"{name} is not a file: give the path of a text file, or `-` for standard input"
        ) from error
    except UnicodeDecodeError as error:
        shown = "standard input" if name == "-" else name
        raise BadData(
            f"{shown} is not UTF-8 (first wrong byte: number {error.start + 1:,}): "
            "convert the text, for example by iconv"
        ) from error


def _show_samples(prompt: str, stream: Iterator[list[str]]) -> None:
    """Print the first sample while the model generates all samples, then print the other samples."""
    steps = []
    echo(prompt, end="")
    for first, *others in stream:
        echo(first, end="")
        steps.append(others)
    echo("")
    for pieces in zip(*steps, strict=True):
        echo(f"---\n{prompt}{''.join(pieces)}")


def _show_in_columns(prompt: str, models: "list[Model]", streams: list[Iterator[list[str]]]) -> None:
    """Print a table with a column per model and a row per sample. A terminal shows each step."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Column, Table
    from rich.text import Text  # in a plain string, rich would read square brackets as markup

    texts: list[list[str]] = [[] for _ in models]  # for each model: the text of each sample so far

    def draw() -> Table:
        table = Table(*(Column(Text(one.name)) for one in models), show_lines=True, expand=True)
        for row in zip_longest(*texts, fillvalue=""):
            table.add_row(*(Text(printable(text, keep="\n\t")) for text in row))
        return table

    echo(prompt)
    with Live(console=Console(highlight=False), get_renderable=draw):
        for number, stream in enumerate(streams):
            for pieces in stream:
                texts[number] = [old + new for old, new in zip_longest(texts[number], pieces, fillvalue="")]


@app.command()
def evaluate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Text files; `-`: standard input.")],
    model: Annotated[list[str], typer.Option("--model", help=f"{MODELS}; can be repeated.")] = [MODEL],  # noqa: B006 (typer copies it)
    whole: Annotated[bool, typer.Option("--whole", help="Score a single file as one document.")] = False,
    as_json: AsJson = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Measure how well models predict a text.

    Prints nats per token, perplexity and bits per byte, with 95 % intervals. Writes no file.
    Example: compactgpt evaluate README.md --model models/compact --model smollm2-135m-instruct-q4
    """
    from compactgpt.reporting.schemas import Score as Report
    from compactgpt.reporting.schemas import read_report

    documents, cut = [_read_text(name) for name in files], ""
    if len(documents) == 1 and not whole:
        documents, cut = _cut(documents[0], files[0])
    own = read_report(EVALUATION, Report) if MODEL in model and EVALUATION.exists() else None
    models = _load(model, params_file)
    window = min(one.window for one in models)  # all models get the same context, so they can be compared
    scores = {
        one.name: one.score(documents, window=window, progress=ProgressBar(one.name, "windows"))
        for one in models
    }
    if as_json:
        echo_json({name: asdict(score) for name, score in scores.items()})
        return
    if cut:
        echo(cut)
    score = scores[models[0].name]
    echo(
        f"documents: {score.documents:,}; {score.tokens:,} tokens, {score.bytes:,} bytes; "
        f"context windows of {window:,} tokens; "
        "for every model, tokens are counted with the project's tokenizer"
    )
    rows = [["model", "nats per token", "perplexity", "bits per byte"]]
    for name, score in scores.items():
        rows.append([name, *(_format_figure(score, key, digits) for key, digits in FIGURES.items())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for one in models:
        if scores[one.name].loss > math.log(one.encoding.n_vocab):
            echo(f"{one.name} predicts this text worse than a random guess: it was trained on other text")
    if own:
        echo(
            f"for comparison: {MODEL} has {own.loss.value:.3f} nats per token on its own val documents, "
            f"in context windows of {own.window:,} tokens ({EVALUATION})"
        )
    if not score.intervals:
        echo(f"no intervals: they need several files, or one file of over {LONG:,} characters")


def _cut(text: str, name: str) -> tuple[list[str], str]:
    """Split a long text into documents. Return the documents, and a message ("" if the text was not cut)."""
    from compactgpt.config import Files
    from compactgpt.data.splitting import split_text

    auto = Files.model_construct(
        split="auto", heading=None, split_characters=PIECE, split_over_characters=LONG
    )
    pieces = list(split_text(io.BytesIO(text.encode()), name, auto, sys.maxsize))
    cut = pieces[0].cut if pieces else ""
    message = f"{name}: cut into {len(pieces):,} documents by {cut}; use --whole to score one document"
    return [piece.text for piece in pieces], message if cut else ""


def _format_figure(score: "Score", name: str, digits: int) -> str:
    number = getattr(score, name)
    value = "-" if number is None else f"{number:,.{digits}f}"
    if name not in score.intervals:
        return value
    low, high = score.intervals[name]
    return f"{value} ({low:,.{digits}f} to {high:,.{digits}f})"


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: ModelFolder = Path(MODEL),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace files you edited.")] = False,
) -> None:
    """Export the trained model for transformers.

    Writes the model, tokenizer and model card to FOLDER.
    Example: compactgpt export exported
    """
    _export(folder, model, overwrite=overwrite)
    echo(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def _export(folder: Path, model: Path, *, overwrite: bool) -> None:
    from compactgpt.model.huggingface import save_hf
    from compactgpt.model.weights import load_model
    from compactgpt.reporting.pages import read_card

    card, why_none = read_card(model, Path("reports/model_card.md"))
    save_hf(load_model(model), folder, Path("data/tokenizer"), card, overwrite=overwrite)
    if why_none:
        echo(f"the export has no model card: {why_none}")


@app.command()
def push_to_hub(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository on the hub: owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and upload nothing.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="If REPO does not exist, create it private.")
    ] = False,
    model: ModelFolder = Path(MODEL),
) -> None:
    """Upload the trained model to the Hugging Face hub.

    Needs HF_TOKEN or `hf auth login`. Prints the files and the commit's address.
    Example: compactgpt push-to-hub me/compact-gpt --dry-run
    """
    from compactgpt.common.storage import MANIFEST
    from compactgpt.data.hub import push_folder

    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        folder = Path(scratch) / "model"
        _export(folder, model, overwrite=False)
        (folder / MANIFEST).unlink()  # not for the hub: only this project reads the manifest
        for path in sorted(folder.iterdir()):
            echo(f"{path.stat().st_size:>12,}  {path.name}")
        if dry_run:
            echo(f"nothing was uploaded; next: compactgpt push-to-hub {repo}")
        else:
            echo(push_folder(folder, repo, private=private))
