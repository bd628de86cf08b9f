"""Lay named settings over params.yaml: `python -m stages.apply conf/note.yaml conf/recipes/nanogpt.yaml`.

Not a stage: it edits params.yaml, which is all that DVC reads; `git diff params.yaml` shows what it did and
`git checkout params.yaml` takes it back.
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

from compactgpt.config import lay_over, load_params, parse_params, read_yaml
from compactgpt.console import told_clearly
from compactgpt.errors import BadConfig
from compactgpt.storage import write_text
from stages.door import ParamsFile, new_app

app = new_app()


@app.command()
def main(
    settings: Annotated[list[Path], typer.Argument(help="Files to lay over it, in this order.")],
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Change params.yaml as the files say, or refuse and change nothing."""
    with told_clearly():
        load_params(params_file)
        for line in apply(settings, params_file):
            print(line)


def apply(settings: list[Path], params_file: Path) -> list[str]:
    """Lay files over params.yaml; its comments stay.

    Returns:
        A line for each value that changed.

    Raises:
        MissingInput: a file is not there.
        BadConfig: a file is no YAML, or params.yaml would not be valid after it.
    """
    yaml = _round_trip()
    tree = yaml.load(params_file)
    told = []
    for path in settings:
        if not isinstance(change := read_yaml(path), dict):
            raise BadConfig(f"{path} holds no sections of params.yaml")
        told += lay_over(tree, change)
        content = io.StringIO()
        yaml.dump(tree, content)
        parse_params(YAML(typ="safe", pure=True).load(content.getvalue()), f"params.yaml with {path}")
    if told:
        write_text(params_file, content.getvalue())
    return told


def _round_trip() -> YAML:
    """A YAML reader and writer that leaves what it was not told to change as it was."""
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


if __name__ == "__main__":
    app()
