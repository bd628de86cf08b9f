"""Stage `inspection` checks the token files, and writes a report and Data Docs (HTML pages)."""

from pathlib import Path

from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Check the token files, write a report, and stop the pipeline if an expectation failed."""
    from compactgpt.common.storage import write_json
    from compactgpt.data.inspection import inspect, passed, uncompared
    from compactgpt.data.validation import require_success

    report, docs = Path("reports/inspection.json"), Path("data/data_docs/tokens")
    with open_stage("inspection", tracker, ("inspection",)) as stage:
        facts = inspect(
            Path("data/documents"),
            Path("data/tokens"),
            docs,
            stage.params.inspection,
            num_workers=stage.params.runtime.num_workers,
            corpus_name=stage.params.download.corpus_name,
            progress=stage.progress("documents"),
        )
        stage.report(report, facts)
        stage.data_docs(docs)
        if message := uncompared(facts, stage.params.inspection.overlap_words):
            stage.print_message(message)
        require_success(facts, "the token files", f"{report} has the complete result")
        write_json(Path("data/inspection.json"), passed(facts))  # DVC trains only if this file exists


if __name__ == "__main__":
    app()
