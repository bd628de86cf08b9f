"""The command `compactgpt`: what a user does with the project besides `dvc repro`.

The commands are in the folder `commands`. Each command reads its options and calls one function of the
library. It imports that function only then, so that `--help` is quick.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compactgpt import __version__
from compactgpt.commands import compare, look, run, share, upkeep
from compactgpt.common.console import echo, handle_user_errors


class Commands(TyperGroup):
    """A group of commands that prints a user's mistake as one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the user gave."""
        with handle_user_errors():
            return super().invoke(ctx)


HELP = {"help_option_names": ["-h", "--help"]}  # for every command
app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, pretty_exceptions_enable=False)

# The title of each group of commands in `compactgpt --help`, in this order.
GROUPS = {
    "Run": run,
    "Look": look,
    "Compare": compare,
    "Share": share,
    "Called by make repro": upkeep,
}
for title, module in GROUPS.items():
    for entry in [*module.app.registered_commands, *module.app.registered_groups]:
        entry.rich_help_panel = title
    app.add_typer(module.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"compactgpt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a compact GPT, compare it with GPT-2, and show where every number comes from.

    `dvc repro` or `make repro` runs the pipeline; run these commands in the project's root folder.
    """
