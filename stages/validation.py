"""Stage `validation` checks the documents, and writes a report and Data Docs (HTML pages)."""

from pathlib import Path

from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Check the documents, write a report, and stop the pipeline if an expectation failed."""
    from compactgpt.data.validation import require_success, validate

    report, docs = Path("reports/validation.json"), Path("data/data_docs/documents")
    with open_stage("validation", tracker, ("validation",)) as stage:
        facts = validate(
            Path("data/documents"),
            docs,
            stage.params.validation,
            corpus_name=stage.params.download.corpus_name,
            progress=stage.progress("documents"),
        )
        stage.report(report, facts)
        stage.data_docs(docs)
        require_success(facts, "the documents", f"{report} has the complete result")


if __name__ == "__main__":
    app()
