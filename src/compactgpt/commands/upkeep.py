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

    Prints one line. Writes no file. `make repro` starts with this command.

    Example: compactgpt check
    """
    from compactgpt.config import load_params
    from compactgpt.data.inputs import check_dependencies

    load_params(params_file)
    check_dependencies(Path())
    echo("params.yaml is valid, and DVC can read every dependency")


@app.command()
def sync(
    warn: Annotated[
        bool, typer.Option("--warn", help="If MLflow fails, print a warning instead of an error.")
    ] = False,
) -> None:
    """Copy the finished runs of this folder to MLflow.

    Prints one line. Writes the runs that MLflow does not have yet to the tracking server or mlflow.db.
    `make repro` ends with this command.

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
    echo(f"MLflow at {address} has all finished runs of this folder")


@app.command()
def repair() -> None:
    """Repair dvc.lock if DVC was killed while it wrote the file.

    Prints a line if the file was incomplete. Writes dvc.lock. `make repro` starts with this command.

    Example: compactgpt repair
    """
    from compactgpt.tracking.dvc_files import restore_lock

    if restore_lock(Path()):
        echo("dvc.lock was incomplete, because DVC was killed: the version before the last stage is restored")


app.command("mend", hidden=True)(repair)  # its name until version 0.2  # wording: quoted
