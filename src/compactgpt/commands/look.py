"""Commands that use the trained model, or check the results of a run."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compactgpt.commands.options import PARAMS, AsJson, ParamsFile
from compactgpt.common.console import ProgressBar, echo, report
from compactgpt.common.errors import BadData, CheckFailed, MissingInput, printable

if TYPE_CHECKING:
    from compactgpt.api import Score
    from compactgpt.config import Params

app = typer.Typer()

MODEL = "models/compact"
TWO_COLUMNS = 80  # characters that a terminal must have for two columns of text
FIGURES = {"loss": 3, "perplexity": 2, "bits_per_byte": 3}  # digits after the point
MODELS = (
    "A folder with a model, a model in MLflow (models:/compactgpt@champion), or a name from baseline.specs "
    "in params.yaml"
)
TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="The folder of the project's tokenizer, if it is not data/tokenizer."),
]


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
            help="The text to continue; `-` reads it from standard input. Without a prompt, the command asks "
            "for prompts until you enter an empty line.",
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", help=f"{MODELS}.")] = MODEL,
    compare: Annotated[
        str, typer.Option("--compare", metavar="MODEL", help="Also show the text of another model.")
    ] = "",
    num_samples: Annotated[int, typer.Option(min=1, help="Number of continuations.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a continuation.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="The logits are divided by it; 0 selects the most probable token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=1, help="Number of most probable tokens to draw each next token from.")
    ] = 40,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text.")
    ] = 1337,
    tokenizer: TokenizerFolder = None,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Continue a text with the trained model.

    Prints the prompt and its continuation, token by token on a terminal. Writes no file.

    Example: compactgpt generate "The future of AI is" --num-samples 3
    """
    from compactgpt.api import load

    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None or prompt == "-":
        prompt = "" if interactive else _read_text("-").removesuffix("\n")
    names = [model, compare] if compare else [model]
    models = [load(name, tokenizer=tokenizer, params_file=params_file) for name in names]

    def show(prompt: str) -> None:
        streams = [
            one.stream(
                prompt,
                num_samples=num_samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
            )
            for one in models
        ]
        if compare:
            _show_side_by_side(prompt, dict(zip(names, streams, strict=True)), num_samples)
        else:
            _show_samples(prompt, streams[0], num_samples)

    if interactive:
        _ask_for_prompts(show)
    else:
        show(prompt)


def _read_text(name: str) -> str:
    """Return the text of a file, or of standard input if the name is `-`, without a byte-order mark."""
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
            f"{shown} is not UTF-8 (byte {error.start:,}): convert the text, for example by iconv"
        ) from error


def _ask_for_prompts(show: Callable[[str], None]) -> None:
    """Ask for prompts, and continue each, until the user enters an empty line or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 (the arrow keys then edit the line and show earlier lines)
    report("Enter a prompt. An empty line or Ctrl-D ends.")
    with suppress(EOFError):
        while prompt := input("> "):
            show(prompt)


def _show_samples(prompt: str, stream: Iterator[list[str]], num_samples: int) -> None:
    """Print the first sample while the model generates all samples, then print the other samples."""
    others = [""] * (num_samples - 1)
    echo(prompt, end="")
    for first, *rest in stream:
        echo(first, end="")
        others = [text + new for text, new in zip(others, rest, strict=True)]
    echo("")
    for text in others:
        echo(f"---\n{prompt}{text}")


def _show_side_by_side(prompt: str, streams: dict[str, Iterator[list[str]]], num_samples: int) -> None:
    """Print the samples of two models: in two columns on a wide terminal, else one below the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Column, Table
    from rich.text import Text

    texts = {name: [""] * num_samples for name in streams}

    def table() -> Table:
        found = Table(*(Column(Text(name)) for name in texts), show_lines=True, expand=True)
        for row in zip(*texts.values(), strict=True):
            found.add_row(*(Text(printable(text, keep="\n\t")) for text in row))
        return found

    console = Console(highlight=False)
    is_wide = console.is_terminal and console.width >= TWO_COLUMNS
    echo(prompt)
    with Live(console=console, auto_refresh=False) if is_wide else nullcontext() as live:
        for step in zip_longest(*streams.values(), fillvalue=[""] * num_samples):
            for name, new in zip(texts, step, strict=True):
                texts[name] = [old + each for old, each in zip(texts[name], new, strict=True)]
            if live:
                live.update(table(), refresh=True)
    if not live:
        for name, samples in texts.items():
            for text in samples:
                echo(f"--- {name}\n{text}")


@app.command()
def evaluate(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Text files in UTF-8, one document each; `-`: standard input."
        ),
    ],
    model: Annotated[list[str], typer.Option("--model", help=f"{MODELS}; can be repeated.")] = [MODEL],  # noqa: B006 (typer copies it)
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="WAY",
            help="Cut each file into documents by auto, blank-lines, lines, heading or size, like "
            "download.files.split in params.yaml. Without --split, each file is one document.",
        ),
    ] = "",
    tokenizer: TokenizerFolder = None,
    as_json: AsJson = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Measure how well models predict a text: nats per token, perplexity and bits per byte.

    Prints a line per model, with 95 % intervals if the text has several documents. Writes no file. Every
    model reads the same windows. evaluation.likelihood in params.yaml sets their length, if the file exists.

    Example: compactgpt evaluate README.md --model models/compact --model smollm2-135m-instruct-q4
    """
    from compactgpt.api import default_likelihood, load
    from compactgpt.config import load_params

    params = load_params(params_file) if params_file.exists() or split else None
    documents = [text for name in files for text in _read_documents(name, params, split)]
    models = [load(name, tokenizer=tokenizer, params_file=params_file) for name in model]
    likelihood = default_likelihood(models, params.evaluation.likelihood if params else None)
    scores = {
        one.name: one.score(documents, likelihood=likelihood, progress=ProgressBar(one.name, "windows"))
        for one in models
    }
    if as_json:
        echo(json.dumps({name: asdict(score) for name, score in scores.items()}, indent=2))
    else:
        _print_scores(scores)


def _print_scores(scores: "dict[str, Score]") -> None:
    """Print a table with a row per model."""
    score = next(iter(scores.values()))
    echo(
        f"documents: {score.documents:,}; {score.tokens:,} tokens, {score.bytes:,} bytes; "
        f"windows of {score.window:,} tokens"
    )
    rows = [["model", "nats per token", "perplexity", "bits per byte"]]
    for name, score in scores.items():
        rows.append([name, *(_figure(score, key, digits) for key, digits in FIGURES.items())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not score.intervals:
        echo("no intervals: an interval needs several documents (several files, or --split)")


def _read_documents(name: str, params: "Params | None", split: str) -> list[str]:
    """Return the documents of a text file. `split` replaces `download.files.split`; empty: one document."""
    from compactgpt.common.sections import check_section
    from compactgpt.config import Files
    from compactgpt.data.splitting import split_text

    text = _read_text(name)
    if params is None or not split:
        return [text]
    files = check_section({**params.download.files.model_dump(), "split": split}, Files, "--split")
    return [piece.text for piece in split_text(io.BytesIO(text.encode()), name, files, len(text))]


def _figure(score: "Score", name: str, digits: int) -> str:
    number = getattr(score, name)
    value = "-" if number is None else f"{number:,.{digits}f}"
    if name not in score.intervals:
        return value
    low, high = score.intervals[name]
    return f"{value} ({low:,.{digits}f} to {high:,.{digits}f})"


@app.command()
def trace(
    name: Annotated[str, typer.Argument(help="The name of a value in reports/evidence.json.")],
    as_json: AsJson = False,
) -> None:
    """Show where a number comes from.

    Prints the number's report and stage, the files that the stage read and wrote, the git commit and the
    MLflow run. Writes no file.

    Example: compactgpt trace compact.loss
    """
    from compactgpt.common.storage import read_json
    from compactgpt.reporting.provenance import RECORD, find_value
    from compactgpt.reporting.provenance import trace as trace_value
    from compactgpt.tracking.store import run_of_value

    record = read_json(RECORD)
    lines = trace_value(Path(), record, name)
    lines.append(("MLflow run", run_of_value(Path.cwd(), find_value(record, name)["stage"])))
    if as_json:
        facts: dict[str, list[str]] = {}
        for what, found in lines:  # a stage reads and writes several files
            facts.setdefault(what, []).append(found)
        echo(json.dumps({**facts, "evidence": find_value(record, name)}, indent=2))
    else:
        echo("\n".join(f"{what:<12}{found}" for what, found in lines))


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Compare every file with dvc.lock, and compute every reported number again.

    Prints the number of checks and every difference. Writes no file. The exit code is 3 if there is a
    difference.

    Example: compactgpt verify
    """
    from compactgpt.reporting.verify import verify as verify_project

    found = verify_project(Path())
    echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))
    if found.differences:
        raise typer.Exit(CheckFailed.exit_code)
