"""Door of compactgpt.training: token files -> a model, its loss curve and a report."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.runtime import prepare_process, stop_requests
from stages.door import ParamsFile, TrackerName, new_app, open_stage, share_out, state_folder

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    tokens: Annotated[Path, typer.Option(help="Folder of token files.")] = Path("data/tokens"),
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = Path("models/compact"),
    report: Annotated[Path, typer.Option(help="What is written.")] = Path("reports/training.json"),
    curve: Annotated[Path, typer.Option(help="The loss curve.")] = Path("reports/loss.csv"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Train the compact model, or go on where an interrupted run was."""
    paths = {"tokens": tokens, "model": model, "report": report, "curve": curve}
    share_out("stages.training", params_file, {**paths, "tracker": tracker})
    with open_stage("training", params_file, tracker, ("model", "training", "runtime")) as stage:
        prepare_process(stage.params.runtime)
        from compactgpt import training
        from compactgpt.checkpoint import drop_states, save_model
        from compactgpt.storage import write_text

        splits = training.open_splits(tokens)
        states = state_folder() / "training" / training.run_key(stage.params, splits)
        with stop_requests() as stopping:
            trained = training.train(
                stage.params,
                splits,
                states,
                progress=stage.progress("steps"),
                on_metrics=lambda step, values: stage.tracker.metrics(values, step),
                stopping=stopping,
            )
        if not stage.leads:
            return
        facts = training.report(stage.params, splits, trained)
        write_text(curve, training.loss_csv(trained.rows))
        save_model(trained.model, model, facts)
        stage.report(report, facts)
        stage.tracker.artifact(curve, "reports")
        stage.tracker.artifact(model / "config.json", "model")
        stage.tracker.tags({"run_key": states.name, "resumed_from_step": str(trained.resumed_from)})
        drop_states(states)


if __name__ == "__main__":
    app()
