"""Commands that export and upload the trained model."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.commands.options import PARAMS, Card, ModelFolder, ParamsFile, Tokenizer
from compactgpt.common.console import echo

app = typer.Typer()


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: ModelFolder = Path("models/compact"),
    tokenizer: Tokenizer = Path("data/tokenizer"),
    card: Card = Path("reports/model_card.md"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export whose files have changed.")
    ] = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Export the trained model for transformers, with its tokenizer and model card.

    Prints the Python call that loads the model. Writes the folder. An error leaves the folder as it was.

    Example: compactgpt export exported
    """
    _export(folder, model, tokenizer, card, params_file, overwrite=overwrite)
    echo(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def _export(
    folder: Path, model: Path, tokenizer: Path, card: Path, params_file: Path, *, overwrite: bool = False
) -> None:
    from compactgpt.config import load_params
    from compactgpt.data.hub import with_base_model
    from compactgpt.model.huggingface import save_hf
    from compactgpt.model.weights import load_model
    from compactgpt.reporting.model_card import read_card

    text, why_none = read_card(model, card)
    if text and params_file.exists():
        text = with_base_model(text, load_params(params_file).training.init_from)
    save_hf(load_model(model), folder, tokenizer, text, overwrite=overwrite)
    if why_none:
        echo(f"without a model card: {why_none}")


@app.command("push-to-hub")
def push_to_hub(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository on the hub: owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and upload nothing.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, make it private.")
    ] = False,
    model: ModelFolder = Path("models/compact"),
    tokenizer: Tokenizer = Path("data/tokenizer"),
    card: Card = Path("reports/model_card.md"),
    params_file: ParamsFile = PARAMS,
) -> None:
    """Export the trained model and upload it to the Hugging Face hub.

    Needs HF_TOKEN or `hf auth login`. Prints the files and the address of the commit. Writes no file on this
    machine.

    Example: compactgpt push-to-hub me/compact-gpt --dry-run
    """
    from compactgpt.common.storage import MANIFEST
    from compactgpt.data.hub import push_folder

    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        folder = Path(scratch) / "model"
        _export(folder, model, tokenizer, card, params_file)
        (folder / MANIFEST).unlink()  # only this project reads it
        for path in sorted(folder.iterdir()):
            echo(f"{path.stat().st_size:>12,}  {path.name}")
        if dry_run:
            echo(f"nothing was uploaded; next: compactgpt push-to-hub {repo}")
        else:
            echo(push_folder(folder, repo, private=private))
