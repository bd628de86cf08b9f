"""Stage `training`: train the model, and write the model, its loss curve and a report."""

import shutil
from pathlib import Path

from compactgpt.common.device import prepare_process, stop_requests
from compactgpt.tracking import state_folder
from stages._runner import TrackerName, new_app, open_stage, start_processes

app = new_app()
MODEL, CURVE = Path("models/compact"), Path("reports/loss.csv")


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Train the compact model, or resume an interrupted training."""
    start_processes("stages.training", tracker)
    with open_stage("training", tracker, ("model", "training", "runtime")) as stage:
        prepare_process(stage.params.runtime.num_threads)
        # Imported only now: torch reads the number of threads, set by `prepare_process`, at its import.
        from compactgpt.tracking.training_callbacks import TrainingCallbacks
        from compactgpt.training import trainer
        from compactgpt.training.checkpoint import prune_runs

        splits = trainer.open_splits(Path("data/tokens"))
        states = state_folder() / "training" / trainer.run_key(stage.params, splits)
        if stage.is_main_process:
            prune_runs(states.parent, states.name)
        callbacks = TrainingCallbacks(stage, Path("data/tokenizer"), CURVE)
        with stop_requests() as should_stop:
            trained = trainer.train(stage.params, splits, states, callbacks.functions(should_stop))
        for row in trained.rows:
            if row.step <= trained.resumed_from:  # an earlier MLflow run has this row: log it here, too
                losses = {"train/loss": row.train_loss, "val/loss": row.val_loss}
                stage.tracker.metrics(losses, row.step)
        if stage.is_main_process:
            report = trainer.save_results(stage.params, trained, states, MODEL, CURVE)
            stage.report(Path("reports/training.json"), report)
            stage.tracker.artifact(CURVE, "reports")
            stage.tracker.artifact(MODEL / "config.json", "model")
            stage.tracker.tags({"run_key": states.name, "resumed_from_step": str(trained.resumed_from)})
    if stage.is_main_process:  # the stage succeeded: delete its checkpoints (a failed stage needs them)
        shutil.rmtree(states, ignore_errors=True)


if __name__ == "__main__":
    app()
