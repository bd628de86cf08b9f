"""Door of compactgpt.estimate: params.yaml -> reports/estimate.json."""

from pathlib import Path
from typing import Annotated

import typer

from stages.door import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    ladder: Annotated[Path, typer.Option(help="Finished small runs, if there are any.")] = Path(
        "results/ladder.json"
    ),
    report: Annotated[Path, typer.Option(help="What is written.")] = Path("reports/estimate.json"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Write down what the run will be, before it is run."""
    from compactgpt.estimate import estimate
    from compactgpt.ladder import read_ladder

    logged = ("model", "training", "estimate")
    with open_stage("estimate", params_file, tracker, logged) as stage:
        stage.report(report, estimate(stage.params, read_ladder(ladder)))


if __name__ == "__main__":
    app()
