"""Stage `estimate`: check the inputs of all stages; estimate size, memory, time and loss of the training."""

from pathlib import Path

from compactgpt.common.storage import write_json
from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Check the inputs of all stages. Estimate the model's size, and the time and loss of its training."""
    from compactgpt.data.inputs import check_dependencies
    from compactgpt.forecast.estimate import estimate
    from compactgpt.forecast.sweep import read_sweep

    with open_stage("estimate", tracker, ("model", "training", "estimate")) as stage:
        check_dependencies(Path())
        # `download` depends on data/inputs.json, so DVC runs `download` after this check. The content of
        # data/inputs.json is constant: changed content would make DVC run `download` again.
        write_json(Path("data/inputs.json"), {"checked": ["params.yaml", "files of the dependencies"]})
        sweep = read_sweep(Path("results/ladder.json"))  # None if the file is missing
        stage.report(Path("reports/estimate.json"), estimate(stage.params, sweep))


if __name__ == "__main__":
    app()
