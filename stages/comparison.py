"""Door of compactgpt.comparison: reports, claims and published values -> reports/comparison.*."""

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
    inputs: Annotated[Path, typer.Option(help="Folder of claims.yaml and published.yaml.")] = Path(),
    reports: Annotated[Path, typer.Option(help="The other stages' reports; ours go there.")] = Path(
        "reports"
    ),
    data: Annotated[Path, typer.Option(help="Folder of the sums by document.")] = Path("data"),
    show: Annotated[bool, typer.Option("--show", help="Only print the table of the last run.")] = False,
    readme: Annotated[Path | None, typer.Option(help="Only renew the tables that this page quotes.")] = None,
    tracker: TrackerName = "mlflow",
) -> None:
    """Regenerate the note's table from what is known."""
    from compactgpt import rendering
    from compactgpt.storage import read_json, write_bytes, write_text

    if show or readme:
        tracker = "none"
    with open_stage("comparison", params_file, tracker, ("comparison",)) as stage:
        if show:
            record = read_json(reports / "comparison.json")
            width = max(shutil.get_terminal_size((120, 24)).columns, 80)
            typer.echo(rendering.terminal(record, width=width, colour=sys.stdout.isatty()))
            return
        if readme:
            report = rendering.markdown(read_json(reports / "comparison.json"))
            write_text(readme, rendering.quote_tables(readme.read_text("utf-8"), report))
            return
        from compactgpt.comparison import compare, measured_values, read_sources

        sources = read_sources(inputs, reports, data, stage.params.baseline.names)
        record = compare(sources, stage.params.evaluation.likelihood)
        write_text(reports / "comparison.md", rendering.markdown(record))
        write_text(reports / "comparison.csv", rendering.csv_text(record))
        write_bytes(reports / "bits_per_byte.png", rendering.bits_per_byte_png(record))
        write_bytes(reports / "loss.png", rendering.loss_png(record))
        stage.report(reports / "comparison.json", record)
        stage.tracker.metrics(measured_values(record))
        stage.tracker.artifact(reports / "comparison.md", "reports")
        stage.tracker.artifact(reports / "bits_per_byte.png", "reports")
        stage.tracker.artifact(reports / "loss.png", "reports")


if __name__ == "__main__":
    app()
