"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

PARAMS = Path("params.yaml")


def _experiment_names() -> list[str]:
    return sorted(path.stem for path in Path("conf/experiments").glob("*.yaml"))


ParamsFile = Annotated[Path, typer.Option("--params", help="The file of parameters.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("-S", "--set-param", metavar="KEY=VALUE", help="Change a parameter; can be repeated."),
]
ExperimentName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", autocompletion=_experiment_names, help="See `compactgpt experiment list`."
    ),
]
ModelFolder = Annotated[Path, typer.Option("--model", help="The folder of the trained model.")]
Tokenizer = Annotated[Path, typer.Option("--tokenizer", help="The folder of the model's tokenizer.")]
Card = Annotated[
    Path, typer.Option("--card", help="The model card. It is not included if it describes another model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
