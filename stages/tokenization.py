"""Stage `tokenization`: encode the documents of both splits as tokens."""

from pathlib import Path

from compactgpt.tracking import state_folder
from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Encode the documents, and write a token file for each split."""
    from compactgpt.data.tokenization import tokenize

    with open_stage("tokenization", tracker, ("tokenization",)) as stage:
        facts = tokenize(
            Path("data/documents"),
            Path("data/tokenizer"),
            Path("data/tokens"),
            stage.params.tokenization,
            num_workers=stage.params.runtime.num_workers,
            state=state_folder() / "tokenization",
            progress=stage.progress("bytes"),
        )
        stage.report(Path("reports/tokenization.json"), facts)


if __name__ == "__main__":
    app()
