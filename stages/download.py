"""Stage `download`: read the corpus; write document shards, the tokenizer and a report."""

from pathlib import Path

from compactgpt.tracking import state_folder
from stages._runner import TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(tracker: TrackerName = "mlflow") -> None:
    """Read the corpus, download the tokenizer, and write both to data/."""
    from compactgpt.data.inputs import require_corpus
    from compactgpt.data.sources import collect, corpus_name, download_tokenizer, limits_of, open_corpus

    with open_stage("download", tracker, ("download",)) as stage:
        params, state, log = stage.params.download, state_folder(), stage.print_message
        local_copy = params.hub.sets[params.hub.name].file
        if params.corpus == "files" or (params.corpus == "hub" and local_copy is not None):
            require_corpus(state.parent)
        # The tokenizer is small. It comes first, so that the user sees at once if there is no network.
        tokenizer = download_tokenizer(params.tokenizer, Path("data/tokenizer"), state / "wheels")
        progress = stage.progress("texts" if params.corpus == "hub" else "files")
        corpus = open_corpus(params, Path(), stage.params.runtime.num_workers, progress, log)
        documents = Path("data/documents")
        facts = collect(corpus, documents, limits_of(params), state=state / "download", log=log)
        report = {**facts, "name": corpus_name(params), "tokenizer": tokenizer}
        stage.report(Path("reports/download.json"), report)


if __name__ == "__main__":
    app()
