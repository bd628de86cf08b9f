"""Stage `estimate`: check the inputs of all stages; write the estimate of size, time and loss."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.common.storage import write_json
from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    ladder: Annotated[Path, typer.Option(help="Results of a sweep; the file may be missing.")] = Path(
        "results/ladder.json"
    ),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/estimate.json"),
    checked: Annotated[Path, typer.Option(help="File to write after the inputs are checked.")] = Path(
        "data/inputs.json"
    ),
    tracker: TrackerName = "mlflow",
) -> None:
    """Check the inputs of all stages, and estimate size, time and loss of the training before it starts."""
    from compactgpt.data.inputs import check_dependencies
    from compactgpt.forecast.estimate import estimate
    from compactgpt.forecast.sweep import read_sweep

    logged = ("model", "training", "estimate")
    with open_stage("estimate", params_file, tracker, logged) as stage:
        check_dependencies(Path())
        # All other stages depend on this file. A change of its content would make DVC run all stages again.
        write_json(checked, {"checked": ["params.yaml", "files of the dependencies"]})
        stage.report(report, estimate(stage.params, read_sweep(ladder)))


if __name__ == "__main__":
    app()
