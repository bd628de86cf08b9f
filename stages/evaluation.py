"""Stage `evaluation`: evaluate the trained model on the val split; write reports and per-document losses."""

from pathlib import Path
from typing import Annotated

import typer

from stages._runner import ParamsFile, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = Path("models/compact"),
    tokens: Annotated[Path, typer.Option(help="Folder of the token files.")] = Path("data/tokens"),
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer.")] = Path("data/tokenizer"),
    totals: Annotated[Path, typer.Option(help="File to write per-document losses to.")] = Path(
        "data/evaluation/compact.parquet"
    ),
    reports: Annotated[Path, typer.Option(help="Folder for reports.")] = Path("reports"),
    params_file: ParamsFile = Path("params.yaml"),
    tracker: TrackerName = "mlflow",
) -> None:
    """Evaluate the trained model on the val split, generate text and run the tasks."""
    from compactgpt.common.device import prepare_process, resolve_device
    from compactgpt.common.storage import write_json, write_text
    from compactgpt.data.token_files import open_tokens
    from compactgpt.data.tokenizer import load_encoding
    from compactgpt.evaluation.compact import load_compact
    from compactgpt.evaluation.generation import generate_texts, samples_markdown
    from compactgpt.evaluation.likelihood import evaluate, headline, scored_split, summarize
    from compactgpt.evaluation.tasks import run_tasks
    from compactgpt.evaluation.totals import write_totals

    with open_stage("evaluation", params_file, tracker, ("evaluation",)) as stage:
        settings, runtime = stage.params.evaluation, stage.params.runtime
        likelihood = settings.likelihood
        prepare_process(runtime.num_threads)
        encoding = load_encoding(tokenizer)
        split = scored_split(open_tokens(tokens / "val.tokens"), encoding, likelihood)
        compact = load_compact(model, encoding, likelihood.batch_size, resolve_device(runtime.device))
        windows, tasks, texts = (stage.progress(unit) for unit in ("windows", "tasks", "texts"))
        found = evaluate(compact, split, encoding, likelihood, windows)
        write_totals(totals, found)
        text = generate_texts(compact, split, encoding, settings.text, texts)
        samples = {key: text.pop(key) for key in ("settings", "samples")}  # these go to samples.json
        write_text(reports / "samples.md", samples_markdown(samples))
        stage.report(reports / "samples.json", samples)
        report = summarize("compact", compact, found, split, likelihood) | {"text": text}
        report["tasks"] = run_tasks(compact, split, encoding, settings.tasks, tasks)
        stage.report(reports / "evaluation.json", report)
        write_json(reports / "metrics.json", headline(report))


if __name__ == "__main__":
    app()
