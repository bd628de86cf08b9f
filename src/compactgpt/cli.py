"""The command `compactgpt`. The folder `commands` has its subcommands."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compactgpt import __version__
from compactgpt.commands import check, model, run
from compactgpt.common.console import echo, handle_user_errors


class Commands(TyperGroup):
    """A group of commands that prints a `UserError` as one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the user's command. After a `UserError`, print the error's message and exit."""
        with handle_user_errors():
            return super().invoke(ctx)


HELP = {"help_option_names": ["-h", "--help"]}  # typer has only `--help` by default
app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, pretty_exceptions_enable=False)
for title, module in {"Run": run, "Use the model": model, "Check and compare": check}.items():
    for entry in [*module.app.registered_commands, *module.app.registered_groups]:
        if not isinstance(entry.rich_help_panel, str):
            entry.rich_help_panel = title
    app.add_typer(module.app)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        echo(f"compactgpt {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")


@app.callback()
def main(version: Annotated[bool, VERSION] = False) -> None:
    """Train a compact GPT and compare it with GPT-2.

    Run the commands in the project's folder. `make repro` runs the whole pipeline.
    """
