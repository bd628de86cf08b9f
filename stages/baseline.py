"""Stage `baseline`: evaluate one baseline on the val split; write a report and per-document losses."""

import os
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.tracking import state_folder
from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="A name from baseline.specs in params.yaml; DVC sets it.")] = "",
    tracker: TrackerName = "mlflow",
) -> None:
    """Evaluate one baseline on the val split. A neural baseline also solves tasks and generates text."""
    from compactgpt.data.token_files import open_tokens
    from compactgpt.data.tokenizer import load_encoding
    from compactgpt.evaluation.baselines import load_baseline
    from compactgpt.evaluation.generation import generate_texts
    from compactgpt.evaluation.likelihood import NeuralModel, evaluate, scored_split, summarize
    from compactgpt.evaluation.tasks import run_tasks
    from compactgpt.evaluation.totals import write_totals

    # DVC passes the name in the environment variable DVC_STAGE. The command in dvc.yaml does not have the
    # name, because the shell would execute a name such as `$(code)`.
    name = name or os.environ.get("DVC_STAGE", "").partition("@")[2]  # `xz` for the stage `baseline@xz`
    if not name:
        raise typer.BadParameter(
            "no baseline is named: use a name from baseline.specs in params.yaml", param_hint="NAME"
        )
    with open_stage("baseline", tracker, ("evaluation", "baseline"), item=name) as stage:
        params, settings = stage.params, stage.params.evaluation
        likelihood, encoding = settings.likelihood, load_encoding(Path("data/tokenizer"))
        split = scored_split(open_tokens(Path("data/tokens/val.tokens")), encoding, likelihood)
        train = Path("data/tokens/train.tokens")
        stage.print_message("loading the model")
        model = load_baseline(name, params, encoding, train, state_folder())
        is_neural = isinstance(model, NeuralModel)
        progress = stage.progress("windows" if is_neural else "documents")
        found = evaluate(model, split, encoding, likelihood, progress)
        write_totals(Path(f"data/baseline/{name}.parquet"), found)
        report = summarize(name, model, found, split, likelihood)
        report["model"]["label"] = params.baseline.specs[name].label or name
        if isinstance(model, NeuralModel):
            report["text"] = generate_texts(model, split, encoding, settings.text, stage.progress("texts"))
            report["tasks"] = run_tasks(model, split, encoding, settings.tasks, stage.progress("tasks"))
        stage.report(Path(f"reports/baseline/{name}.json"), report)


if __name__ == "__main__":
    app()
