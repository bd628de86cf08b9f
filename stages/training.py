"""Door of compactgpt.training: token files -> a model, its loss curve and a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.launching import own_place
from compactgpt.runtime import prepare_process, stop_requests
from compactgpt.tracking import state_folder
from stages.door import ParamsFile, TrackerName, new_app, open_stage, share_out

app = new_app()


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
    share_out("stages.training", params_file, {**paths, "tracker": tracker})
    with open_stage("training", params_file, tracker, ("model", "training", "runtime"), held=True) as stage:
        prepare_process(stage.params.runtime)
        from compactgpt import training, watching
        from compactgpt.checkpoint import drop_states, prune_runs

        splits = training.open_splits(tokens)
        states = state_folder() / "training" / training.run_key(stage.params, splits)
        stage.tracker.begin(states / "journal")
        if stage.leads:
            prune_runs(states.parent, states.name)
        stage.say(budget := training.budget(stage.params, own_place().size))
        stage.tracker.tags({"make_up_of_a_step": budget})
        band = watching.expected_band(stage.params)
        stage.tracker.params(band.frozen())

        used = watching.Utilisation(stage.params, own_place().size) if stage.leads else None

        def on_metrics(step: int, values: Mapping[str, float]) -> None:
            stage.tracker.metrics(used.added(values) if used else values, step)
            if "val/loss" in values and (news := band.judge(step, values["val/loss"])):
                stage.say(news)
                stage.tracker.tags({"outside_expected_band": news})

        def on_news(text: str) -> None:
            stage.say(text)
            stage.tracker.tags({"number_of_processes": text})

        def on_sample(step: int, text: str) -> None:
            stage.text(f"step-{step:08d}.txt", text, "samples")

        bar = stage.progress("steps")
        with stop_requests() as stopping:
            trained = training.train(
                stage.params,
                splits,
                states,
                progress=lambda done, total, figures=None: bar(
                    done, total, {**(figures or {}), "of peak": str(used), "expected": str(band)}
                ),
                on_metrics=on_metrics,
                watch=watching.Sampler(stage.params.runtime, tokenizer, on_sample),
                tell=on_news,
                stopping=stopping,
            )
        if stage.leads:
            facts = training.save_results(stage.params, splits, trained, states, model, curve)
            stage.report(report, facts)
            stage.tracker.artifact(curve, "reports")
            stage.tracker.artifact(model / "config.json", "model")
            stage.tracker.tags({"run_key": states.name, "resumed_from_step": str(trained.resumed_from)})
            stage.tracker.tags(band.score(trained.rows[-1].val_loss))
            drop_states(states)


if __name__ == "__main__":
    app()
