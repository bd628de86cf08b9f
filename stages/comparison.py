"""Door of compactgpt.comparison: reports, claims, published values -> evidence.json and what it shows."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.door import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    inputs: Annotated[
        Path, typer.Option(help="Folder of claims.yaml, published.yaml and the code.")
    ] = Path(),
    reports: Annotated[Path, typer.Option(help="The other stages' reports; ours go there.")] = Path(
        "reports"
    ),
    data: Annotated[Path, typer.Option(help="Folder of the sums by document.")] = Path("data"),
    models: Annotated[Path, typer.Option(help="Folder of our model.")] = Path("models"),
    show: Annotated[bool, typer.Option("--show", help="Only print the table of the last run.")] = False,
    readme: Annotated[Path | None, typer.Option(help="Only renew the tables that this page quotes.")] = None,
    tracker: TrackerName = "mlflow",
) -> None:
    """Regenerate the note's table from what is known."""
    from compactgpt import rendering
    from compactgpt.publication import RECORD, published_files
    from compactgpt.storage import read_json, write_bytes, write_text

    if show or readme:
        tracker = "none"
    with open_stage("comparison", params_file, tracker, ("comparison",)) as stage:
        language = stage.params.comparison.language
        if show:
            record = read_json(reports / RECORD)
            width = max(shutil.get_terminal_size((120, 24)).columns, 80)
            colour = sys.stdout.isatty()
            typer.echo(rendering.terminal(record, width=width, colour=colour, language=language))
            return
        if readme:
            report = rendering.markdown(read_json(reports / RECORD))
            write_text(readme, rendering.quote_tables(readme.read_text("utf-8"), report))
            return
        from compactgpt.comparison import compare, measured_values
        from compactgpt.readings import read_sources

        sources = read_sources(inputs, reports, data, models, stage.params.baseline.names)
        record = compare(sources, stage.params.evaluation.likelihood)
        for name, content in published_files(record, language).items():
            write_bytes(reports / name, content)
            stage.tracker.artifact(reports / name, "reports")
        stage.tracker.metrics(measured_values(record))


if __name__ == "__main__":
    app()
