"""Stage `tokenization` encodes the documents, and writes a token file for each of the two splits."""

from pathlib import Path

from compactgpt.tracking import state_folder
from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Encode the documents, and write the token files of the train split and the val split."""
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
