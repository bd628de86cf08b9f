"""Log the model to MLflow, register it as the champion, and download models."""

import os
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compactgpt.common.errors import CheckFailed, MissingInput
from compactgpt.data.hub import one_line
from compactgpt.tracking.dvc_files import MODEL, TOKENIZER, Cache, Folder, all_outs, checkout, read_entries
from compactgpt.tracking.journal import DEFAULT_URI, MAX_DIGEST, tracking_store
from compactgpt.tracking.store import Store, open_store, store_errors

NAME = "compactgpt"
CHAMPION = "champion"  # alias of the model version that `compactgpt gate --promote` promoted
EXAMPLE = "The future of AI is"
# A served model generates at most this many tokens for one request.
MAX_NEW_TOKENS = 64
PIPELINE_RUN = "pipeline_run"  # tag of a model version; its value is the id of the pipeline's run


def log_model(store: Store, run_id: str, after: Folder, cache: Cache, weights: str, val: str) -> str:
    """Log the trained model of a pipeline's run, unless MLflow has the model. Return the model's id.

    `weights` and `val` are the SHA-256 of the model's weights and of the val split.
    `after` has dvc.lock and the reports as they were after the pipeline.
    """
    from mlflow.entities import Metric

    if model_id := _logged(store, weights):
        return model_id
    model_id = _log(run_id, after, cache, {"weights_sha256": weights, "val_sha256": val})
    data = ("val.tokens", val[:MAX_DIGEST]) if val else (None, None)
    for key in store.client.get_run(run_id).data.metrics:
        if key.startswith("eval/"):
            history = store.client.get_metric_history(run_id, key)
            points = [(key, one.value, one.timestamp, one.step, model_id, *data) for one in history]
            store.client.log_batch(run_id, [Metric(*point, run_id) for point in points])
    return model_id


def _logged(store: Store, weights: str) -> str:
    """Return the id of the model whose weights have this SHA-256; empty if none was logged completely."""
    wanted = f"tags.weights_sha256 = '{weights}'"
    found = store.client.search_logged_models([store.experiment], filter_string=wanted)
    return next((str(model.model_id) for model in found if model.status == "READY"), "")


def _log(run_id: str, after: Folder, cache: Cache, tags: dict[str, str]) -> str:
    """Log a pipeline's model in Hugging Face's format to an MLflow run, and return the model's id."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # without network: all files are on this machine
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(scratch)
        made = all_outs(read_entries(after))  # path of an output -> its MD5
        for path in (MODEL, TOKENIZER):
            if not checkout(cache, Folder(folder), path, made.get(path, ""), folder / path):
                raise MissingInput(f"DVC's cache lacks {path}: `dvc repro` or `dvc pull` restores it")
        import mlflow
        from huggingface_hub import ModelCard
        from transformers import pipeline

        from compactgpt.model.huggingface import save_hf
        from compactgpt.model.weights import load_model

        model, text = load_model(folder / MODEL), after.read("reports/model_card.md")
        card = text.decode() if text else "# compactgpt\n"  # without a model card, use a title
        save_hf(model, folder / NAME, folder / TOKENIZER, card)
        # A served model uses these options if a request does not set them.
        options = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
        logged = mlflow.transformers.log_model(
            # Load the model here, because `log_model` fails if it gets only the model's path.
            pipeline("text-generation", model=str(folder / NAME)),
            name="compact",
            task="text-generation",
            run_id=run_id,
            # MLflow copies the run's metrics of this step to the model, but without their data set. The run
            # has no metric at step -1, so MLflow copies nothing. Instead, the caller logs the metrics to the
            # model, together with their data set.
            step=-1,
            signature=mlflow.models.infer_signature([EXAMPLE], [EXAMPLE], options),
            input_example=[EXAMPLE],
            model_config={
                "max_new_tokens": min(MAX_NEW_TOKENS, model.shape.block_size // 2),
                "handle_long_generation": "hole",  # a too long prompt loses its first tokens
                "return_full_text": False,
            },
            model_card=ModelCard(card, ignore_metadata_errors=True),
            model_type="gpt2",
            tags=tags,
            pip_requirements=[
                f"{one}=={version(one).partition('+')[0]}" for one in ("torch", "transformers")
            ],
        )
        return str(logged.model_id)


def promote(store: Store, weights: str, reason: str = "") -> str:
    """Register the model with the SHA-256 `weights` as champion and return its version number.

    Raises MissingInput for an unknown model.
    Raises CheckFailed if the present champion has another configuration than the model and `reason` is empty.
    """
    import mlflow

    if not (model_id := _logged(store, weights)):
        raise MissingInput("MLflow has no model with these weights: `make repro` logs the trained model")
    model, present = store.client.get_logged_model(model_id), champion(store)
    if present and not reason:
        # Read the id from `source`, because `present.model_id` is empty in a SQLite store.
        present_id = present.source.removeprefix("models:/")
        _refuse_other_configuration(model, store.client.get_logged_model(present_id))
    known = store.client.search_model_versions(f"name = '{NAME}' and tags.weights_sha256 = '{weights}'")
    number = max((str(one.version) for one in known), key=int, default="")
    if not number:
        tags = {"weights_sha256": weights, PIPELINE_RUN: model.source_run_id, "accepted": reason}
        number = str(mlflow.register_model(f"models:/{model_id}", NAME, tags=tags).version)
    store.client.set_registered_model_alias(NAME, CHAMPION, number)
    return number


def _refuse_other_configuration(model: Any, present: Any) -> None:
    old, new = ({**one.params, "val split": one.tags.get("val_sha256", "")[:12]} for one in (present, model))
    keys = sorted(key for key in old.keys() | new.keys() if key.startswith(("model.", "training.", "val ")))
    other = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if other:
        raise CheckFailed(
            f"not promoted: the champion has another configuration ({', '.join(other[:8])}); "
            "`compactgpt gate --promote --accept REASON` promotes the model anyway"
        )


def download_model(uri: str, folder: Path) -> Path:
    """Download a model into an empty folder and return the subfolder in Hugging Face's format.

    A URI is, for example, `models:/NAME@ALIAS`. Raises MissingInput for an unknown URI.
    """
    address = tracking_store()["uri"]
    if address == DEFAULT_URI and not Path("mlflow.db").exists():
        raise MissingInput(f"{uri}: there is no mlflow.db here: set MLFLOW_TRACKING_URI, or run `make repro`")
    open_store(Path())
    import mlflow

    with store_errors(address):
        try:
            found = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
        except mlflow.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise MissingInput(f"MLflow at {address} has no model {uri}: {one_line(error)}") from error
    if not (found / "model").is_dir():
        raise MissingInput(f"{uri} is not a model of this project: `make ui` shows the models that exist")
    return Path(shutil.copytree(found / "components/tokenizer", found / "model", dirs_exist_ok=True))


def champion(store: Store) -> Any:
    """Return MLflow's model version with the alias `champion`, or None if there is no champion."""
    found = store.client.search_registered_models(f"name = '{NAME}'")
    if not found or CHAMPION not in found[0].aliases:
        return None
    return store.client.get_model_version_by_alias(NAME, CHAMPION)
