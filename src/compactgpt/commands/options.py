"""Options and arguments of several commands."""

from pathlib import Path
from typing import Annotated

import typer

PARAMS = Path("params.yaml")


def _experiment_names() -> list[str]:
    return sorted(path.stem for path in Path("conf/experiments").glob("*.yaml"))


ParamsFile = Annotated[Path, typer.Option("--params", help="The file of parameters.")]
Settings = Annotated[
    list[str] | None, typer.Option("-S", "--set-param", metavar="KEY=VALUE", help="Change a parameter.")
]
ExperimentName = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=_experiment_names, help="See `experiment list`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
