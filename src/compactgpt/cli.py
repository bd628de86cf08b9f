"""The command `compactgpt`: what is asked of a project beside `dvc repro`.

Each command reads its options and makes one call into a room, which is imported only then: `--help` is quick.
"""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.console import told_clearly

ParamsFile = Annotated[Path, typer.Option("--params", help="The numbers of the run.")]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A compact GPT, measured against GPT-2: the pipeline itself is `dvc repro`.",
)


@app.callback()
def main() -> None:
    """Commands of one project: run them from its root."""


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face form goes.")],
    model: Annotated[Path, typer.Option(help="A model of ours.")] = Path("models/compact"),
    tokenizer: Annotated[Path, typer.Option(help="Its tokenizer: goes along.")] = Path(
        "data/tokenizer"
    ),
) -> None:
    """Write a trained model as transformers loads it (AutoModelForCausalLM.from_pretrained)."""
    with told_clearly():
        from compactgpt.checkpoint import load_model
        from compactgpt.export import save_hf

        save_hf(load_model(model), folder, tokenizer)
        print(f"{folder}: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")
