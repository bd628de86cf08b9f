"""Stage `training`: train the model on the token files; write the model, its loss curve and a report."""

from pathlib import Path
from typing import Annotated

import typer

from compactgpt.common.device import prepare_process, stop_requests
from compactgpt.tracking import state_folder
from stages._runner import ParamsFile, TrackerName, new_app, open_stage, start_processes

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    tokens: Annotated[Path, typer.Option(help="Folder of the token files.")] = Path("data/tokens"),
    model: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("models/compact"),
    report: Annotated[Path, typer.Option(help="Report to write.")] = Path("reports/training.json"),
    curve: Annotated[Path, typer.Option(help="Loss curve to write (CSV).")] = Path("reports/loss.csv"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer, for sample texts.")] = Path(
        "data/tokenizer"
    ),
    tracker: TrackerName = "mlflow",
) -> None:
    """Train the compact model, or resume an interrupted run."""
    paths = {"tokens": tokens, "model": model, "report": report, "curve": curve, "tokenizer": tokenizer}
    start_processes("stages.training", params_file, {**paths, "tracker": tracker})
    with open_stage("training", params_file, tracker, ("model", "training", "runtime"), held=True) as stage:
        prepare_process(stage.params.runtime.num_threads)
        # Import these modules late: they import torch, before which the number of threads must be set.
        from compactgpt.tracking.training_callbacks import TrainingCallbacks
        from compactgpt.training import trainer
        from compactgpt.training.checkpoint import prune_runs, remove_states

        splits = trainer.open_splits(tokens)
        states = state_folder() / "training" / trainer.run_key(stage.params, splits)
        stage.tracker.begin(states / "journal")
        if stage.is_main_process:
            prune_runs(states.parent, states.name)
        callbacks = TrainingCallbacks(stage, tokenizer, curve)
        with stop_requests() as should_stop:
            trained = trainer.train(stage.params, splits, states, callbacks.functions(should_stop))
        if stage.is_main_process:
            stage.report(report, trainer.save_results(stage.params, splits, trained, states, model, curve))
            stage.tracker.artifact(curve, "reports")
            stage.tracker.artifact(model / "config.json", "model")
            stage.tracker.tags({"run_key": states.name, "resumed_from_step": str(trained.resumed_from)})
    if stage.is_main_process:  # only after success, because a failed stage resumes from its training states
        remove_states(states)


if __name__ == "__main__":
    app()
