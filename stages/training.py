"""Door of compactgpt.training: token files -> a model, its loss curve and a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.common.device import prepare_process, stop_requests
from compactgpt.common.storage import write_text
from compactgpt.common.torchrun import dist_info
from compactgpt.tracking import state_folder
from stages._runner import ParamsFile, Stage, TrackerName, new_app, open_stage, start_processes

app = new_app()
MEASURED_STEPS = 10  # before the time left is announced


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    tokens: Annotated[Path, typer.Option(help="Folder of token files.")] = Path("data/tokens"),
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = Path("models/compact"),
    report: Annotated[Path, typer.Option(help="What is written.")] = Path("reports/training.json"),
    curve: Annotated[Path, typer.Option(help="The loss curve.")] = Path("reports/loss.csv"),
    tokenizer: Annotated[Path, typer.Option(help="Decodes the samples; no result depends on it.")] = Path(
        "data/tokenizer"
    ),
    tracker: TrackerName = "mlflow",
) -> None:
    """Train the compact model, or go on where an interrupted run was."""
    paths = {"tokens": tokens, "model": model, "report": report, "curve": curve, "tokenizer": tokenizer}
    start_processes("stages.training", params_file, {**paths, "tracker": tracker})
    with open_stage("training", params_file, tracker, ("model", "training", "runtime"), held=True) as stage:
        prepare_process(stage.params.runtime.num_threads)
        from compactgpt.training import trainer
        from compactgpt.training.checkpoint import drop_states, prune_runs

        splits = trainer.open_splits(tokens)
        states = state_folder() / "training" / trainer.run_key(stage.params, splits)
        stage.tracker.begin(states / "journal")
        if stage.leads:
            prune_runs(states.parent, states.name)
        telling = _Telling(stage, tokenizer)

        def write_curve(rows: list[trainer.Row]) -> None:
            """Keep the file that `dvc plots show` draws up to date: complete at any moment."""
            if stage.leads:
                write_text(curve, trainer.loss_csv(rows))

        with stop_requests() as stopping:
            trained = trainer.train(
                stage.params, splits, states, stopping=stopping,
                progress=telling.progress, on_metrics=telling.metrics, on_curve=write_curve,
                watch=telling.watch, tell=telling.news,
            )  # fmt: skip
        if stage.leads:
            stage.report(report, trainer.save_results(stage.params, splits, trained, states, model, curve))
            stage.tracker.artifact(curve, "reports")
            stage.tracker.artifact(model / "config.json", "model")
            stage.tracker.tags({"run_key": states.name, "resumed_from_step": str(trained.resumed_from)})
            stage.tracker.tags(telling.band.score(trained.rows[-1].val_loss))
            drop_states(states)


class _Telling:
    """What a training says while it runs, to the person who waits and to the tracker."""

    def __init__(self, stage: Stage, tokenizer: Path) -> None:
        from compactgpt.tracking import training_callbacks as callbacks
        from compactgpt.training import trainer

        self.stage, self.bar = stage, stage.progress("steps")
        self.first: int | None = None  # step of this process: a resumed run does not begin with 1
        stage.say(budget := trainer.budget(stage.params, dist_info().world_size))
        stage.tracker.tags({"make_up_of_a_step": budget})
        self.band = callbacks.expected_band(stage.params)
        stage.tracker.params(self.band.frozen())
        self.used = callbacks.Utilisation(stage.params, dist_info().world_size) if stage.leads else None
        self.watch = callbacks.Sampler(stage.params.runtime, tokenizer, self.sample)

    def progress(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        self.first = done if self.first is None else self.first
        if done == self.first + MEASURED_STEPS and figures:
            names = ", ".join(self.stage.params.baseline.names)
            self.stage.say(
                f"{figures['left']} left at the speed of this machine's first steps; then the evaluation and "
                f"the baselines ({names})"
            )
        self.bar(done, total, {**(figures or {}), "of peak": str(self.used), "expected": str(self.band)})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.stage.tracker.metrics(self.used.added(values) if self.used else values, step)
        if "val/loss" in values and (news := self.band.judge(step, values["val/loss"])):
            self.stage.say(news)
            self.stage.tracker.tags({"outside_expected_band": news})

    def news(self, text: str) -> None:
        self.stage.say(text)
        self.stage.tracker.tags({"number_of_processes": text})

    def sample(self, step: int, text: str) -> None:
        self.stage.text(f"step-{step:08d}.txt", text, "samples")


if __name__ == "__main__":
    app()
