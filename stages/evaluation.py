"""Stage `evaluation`: evaluate the trained model on the val split; write reports and per-document losses."""

from pathlib import Path

from stages._runner import TrackerName, new_app, open_stage

app = new_app()
REPORTS = Path("reports")


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Evaluate the trained model on the val split and on tasks, and generate text."""
    from compactgpt.common.device import prepare_process, resolve_device
    from compactgpt.common.storage import write_json, write_text
    from compactgpt.data.token_files import open_tokens
    from compactgpt.data.tokenizer import load_encoding
    from compactgpt.evaluation.compact import as_neural_model
    from compactgpt.evaluation.generation import generate_texts, samples_markdown
    from compactgpt.evaluation.likelihood import evaluate, headline, scored_split, summarize
    from compactgpt.evaluation.tasks import run_tasks
    from compactgpt.evaluation.totals import write_totals
    from compactgpt.model.weights import load_model

    with open_stage("evaluation", tracker, ("evaluation",)) as stage:
        settings, runtime = stage.params.evaluation, stage.params.runtime
        likelihood = settings.likelihood
        prepare_process(runtime.num_threads)
        encoding = load_encoding(Path("data/tokenizer"))
        split = scored_split(open_tokens(Path("data/tokens/val.tokens")), encoding, likelihood)
        device = resolve_device(runtime.device)
        gpt = load_model(Path("models/compact"), device)
        compact = as_neural_model(gpt, likelihood.batch_size, encoding)
        windows, tasks, texts = (stage.progress(unit) for unit in ("windows", "tasks", "texts"))
        found = evaluate(compact, split, encoding, likelihood, windows)
        write_totals(Path("data/evaluation/compact.parquet"), found)
        text = generate_texts(compact, split, encoding, settings.text, texts)
        samples = {key: text.pop(key) for key in ("settings", "samples")}  # for samples.json and samples.md
        write_text(REPORTS / "samples.md", samples_markdown(samples))
        stage.report(REPORTS / "samples.json", samples)
        report = summarize("compact", compact, found, split, likelihood) | {"text": text}
        report["tasks"] = run_tasks(compact, split, encoding, settings.tasks, tasks)
        stage.report(REPORTS / "evaluation.json", report)
        write_json(REPORTS / "metrics.json", headline(report))


if __name__ == "__main__":
    app()
