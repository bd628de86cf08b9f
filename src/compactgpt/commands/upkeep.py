"""Commands that `make repro` calls before and after the pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.commands.options import PARAMS, ParamsFile
from compactgpt.common.console import echo, report
from compactgpt.common.errors import UserError

app = typer.Typer()


@app.command()
def check(params_file: ParamsFile = PARAMS) -> None:
    """Check params.yaml and the files that DVC reads, before a run.

    Prints one line. Writes nothing. `make repro` starts with it.

    Example: compactgpt check
    """
    from compactgpt.config import load_params
    from compactgpt.data.inputs import check_dependencies

    load_params(params_file)
    check_dependencies(Path())
    echo("params.yaml is valid, and DVC can read every dependency")


@app.command()
def sync(
    warn: Annotated[bool, typer.Option("--warn", help="If MLflow fails, print a warning only.")] = False,
) -> None:
    """Copy to MLflow what it lacks of the runs that have ended here.

    Prints one line. Writes to the MLflow tracking server or mlflow.db. `make repro` ends with it.

    Example: compactgpt sync
    """
    from compactgpt.tracking.mlflow_logger import sync as sync_runs

    try:
        address = sync_runs(Path.cwd(), record_unrun=True)
    except UserError as error:
        if not warn:
            raise
        report(f"warning: {error}")
        return
    echo(f"MLflow at {address} has all of the runs that have ended here")


@app.command()
def repair() -> None:
    """Repair dvc.lock if DVC was killed while it wrote the file.

    Prints a line if there was something to repair. Writes dvc.lock. `make repro` starts with it.

    Example: compactgpt repair
    """
    from compactgpt.tracking.dvc_files import restore_lock

    if restore_lock(Path()):
        echo("dvc.lock was incomplete, since DVC was killed: restored as the last stage found it")


app.command("mend", hidden=True)(repair)  # its name until version 0.2  # wording: quoted
