"""Stage script: params.yaml -> reports/estimate.json, data/inputs.json."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.common.storage import write_json
from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    ladder: Annotated[Path, typer.Option(help="Fit of a sweep, if there is one.")] = Path(
        "results/ladder.json"
    ),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/estimate.json"),
    checked: Annotated[Path, typer.Option(help="File that states that the inputs were checked.")] = Path(
        "data/inputs.json"
    ),
    tracker: TrackerName = "mlflow",
) -> None:
    """Check the inputs of the whole pipeline, and estimate the run before anything runs."""
    from compactgpt.data.inputs import check_dependencies
    from compactgpt.forecast.estimate import estimate
    from compactgpt.forecast.sweep import read_sweep

    logged = ("model", "training", "estimate")
    with open_stage("estimate", params_file, tracker, logged) as stage:
        check_dependencies(Path())
        # Every other stage waits for this file, so its bytes are always the same.
        write_json(checked, {"checked": ["params.yaml", "files of the dependencies"]})
        stage.report(report, estimate(stage.params, read_sweep(ladder)))


if __name__ == "__main__":
    app()
