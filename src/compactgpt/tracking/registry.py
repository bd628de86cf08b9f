"""The compact model in MLflow: logged once a set of weights, registered when the gate promotes it."""

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.common.errors import CheckFailed, MissingInput
from compactgpt.tracking.dvc_files import MODEL, PARAMS, TOKENIZER, Cache, Chain, Folder, checkout, parse_yaml
from compactgpt.tracking.pipeline_run import tuned_params
from compactgpt.tracking.store import Store

NAME = "compactgpt"
CHAMPION = "champion"
EXAMPLE = "The future of AI is"
MAX_NEW_TOKENS = 64  # of an answer, or half of a shorter context: a request can't ask for more
_NEEDED = ("torch", "transformers")
_COMPARED = ("model.", "training.")  # parameters by which two models are of one configuration
_RUN = "pipeline_run"  # tag of a model and of its version


@dataclass(frozen=True)
class Trained:
    """A model that a pipeline made."""

    chain: Chain
    cache: Cache
    after: Path  # the files that the pipeline left
    weights: str  # SHA-256
    datasets: list[dict[str, str]]  # as Tracker.inputs takes them
    source_run: str  # that trained it
    pipeline: str  # run


def log_model(store: Store, trained: Trained) -> str:
    """Log the model of a pipeline, unless its weights are logged, with the metrics of this pipeline.

    Returns:
        The id of the logged model.

    Raises:
        MissingInput: DVC's cache lacks the model or the tokenizer.
    """
    from mlflow.entities import Metric

    validation = next((one for one in trained.datasets if one["name"] == "val.tokens"), None)
    known = _logged(store, trained.weights)
    model_id = known or _log(trained, validation["digest"] if validation else "")
    _link(store, trained.pipeline, model_id, is_output=not known)
    data = (validation["name"], validation["digest"][:36]) if validation else (None, None)
    metrics = [
        Metric(one.key, one.value, one.timestamp, one.step, model_id, *data, trained.pipeline)
        for key in store.client.get_run(trained.pipeline).data.metrics
        if key.startswith("eval/")
        for one in store.client.get_metric_history(trained.pipeline, key)
        if one.model_id is None
    ]
    store.client.log_batch(trained.pipeline, metrics=metrics)
    return model_id


def _link(store: Store, run_id: str, model_id: str, *, is_output: bool) -> None:
    """Show a model on the page of a run, which MLflow refuses to do twice."""
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    run = store.client.get_run(run_id)
    linked = [*run.inputs.model_inputs, *(run.outputs.model_outputs if run.outputs else [])]
    if model_id in (one.model_id for one in linked):
        return
    if is_output:
        store.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
    else:
        store.client.log_inputs(run_id, models=[LoggedModelInput(model_id)])


def _logged(store: Store, weights: str) -> str:
    """Return the logged model with these weights; one that was cut off is deleted."""
    wanted = f"tags.weights_sha256 = '{weights}'"
    found = store.client.search_logged_models([store.experiment], filter_string=wanted)
    for model in found:
        if model.status != "READY":
            store.client.delete_logged_model(model.model_id)
    return next((str(model.model_id) for model in found if model.status == "READY"), "")


def _log(trained: Trained, val_sha256: str) -> str:
    """Export a model to the form of Hugging Face, and log that."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is here: nothing is asked of the hub
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(scratch)
        for path in (MODEL, TOKENIZER):
            if not checkout(trained.cache, Folder(folder), path, trained.chain.out(path), folder / path):
                raise MissingInput(f"DVC's cache lacks {path}")
        import mlflow
        from huggingface_hub import ModelCard
        from transformers import pipeline

        from compactgpt.model.huggingface import save_hf
        from compactgpt.model.weights import load_model

        model, text = load_model(folder / MODEL), Folder(trained.after).read("reports/model_card.md")
        card = text.decode() if text else f"# compactgpt\n\nSHA-256 of the weights: `{trained.weights}`.\n"
        save_hf(model, folder / NAME, folder / TOKENIZER, card)
        params = tuned_params(parse_yaml(Folder(trained.after).read(PARAMS), PARAMS))
        logged = mlflow.transformers.log_model(
            pipeline("text-generation", model=str(folder / NAME)),
            name="compact",
            task="text-generation",
            run_id=trained.source_run,
            signature=_signature(),
            input_example=[EXAMPLE],
            model_config={
                "max_new_tokens": min(MAX_NEW_TOKENS, model.shape.block_size // 2),
                "handle_long_generation": "hole",  # of a longer prompt the last part is read
                "return_full_text": False,
            },
            model_card=ModelCard(card, ignore_metadata_errors=True),
            model_type="gpt2",
            params={key: value for key, value in params.items() if key.startswith(_COMPARED)},
            tags={"weights_sha256": trained.weights, "val_sha256": val_sha256, _RUN: trained.pipeline},
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in _NEEDED],
        )
        return str(logged.model_id)


def _signature() -> Any:
    """Return what the model takes and gives. How many tokens it writes is not for a request to say."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    options = [
        ParamSpec("do_sample", "boolean", True),
        ParamSpec("temperature", "double", 0.8),
        ParamSpec("top_k", "long", 40),
        ParamSpec("top_p", "double", 0.95),
    ]
    text = Schema([ColSpec("string")])
    return ModelSignature(text, text, ParamSchema(options))


def promote(store: Store, weights: str, reason: str = "") -> str:
    """Register the model with these weights, and make it the champion: only the gate calls this.

    Args:
        store: the tracking store.
        weights: SHA-256 of the model's file.
        reason: why a model of another configuration or val split is accepted.

    Returns:
        The version that carries the alias now.

    Raises:
        MissingInput: no logged model has them.
        CheckFailed: configuration or val split are not the champion's, and there is no reason.
    """
    import mlflow

    if not (model_id := _logged(store, weights)):
        raise MissingInput("MLflow has no model with these weights: `make repro` logs what it made")
    model, present = store.client.get_logged_model(model_id), champion(store)
    if present and not reason:
        _refuse_other_configuration(model, store.client.get_logged_model(present["model_id"]))
    version = _version_of(store, weights)
    if not version:
        tags = {"weights_sha256": weights, _RUN: model.tags.get(_RUN, ""), "accepted": reason}
        version = str(mlflow.register_model(f"models:/{model_id}", NAME, tags=tags).version)
    store.client.set_registered_model_alias(NAME, CHAMPION, version)
    return version


def _refuse_other_configuration(model: Any, present: Any) -> None:
    was, now = present.params, model.params
    keys = sorted(key for key in {*was, *now} if key.startswith(_COMPARED))
    other = [f"{key} {was.get(key)} -> {now.get(key)}" for key in keys if was.get(key) != now.get(key)]
    if was_split := present.tags.get("val_sha256"):
        now_split = model.tags.get("val_sha256", "")
        other += [f"val split {was_split[:12]} -> {now_split[:12]}"] if was_split != now_split else []
    if other:
        raise CheckFailed(
            f"not promoted: the champion is of another configuration ({', '.join(other[:8])}); "
            "`compactgpt gate --promote --accept REASON` promotes the model all the same"
        )


def _version_of(store: Store, weights: str) -> str:
    """Return the newest version with these weights, or nothing."""
    found = store.client.search_model_versions(f"name = '{NAME}' and tags.weights_sha256 = '{weights}'")
    return max((str(one.version) for one in found), key=int, default="")


def champion(store: Store) -> Mapping[str, str] | None:
    """Return the version that passed the gate last, or None.

    Returns:
        `version`, `weights_sha256`, `model_id`, and as `run_id` the run of the pipeline that has its reports,
        lock and sums by document as artifacts.
    """
    found = store.client.search_registered_models(f"name = '{NAME}'")
    if not found or CHAMPION not in found[0].aliases:
        return None
    version = store.client.get_model_version_by_alias(NAME, CHAMPION)
    return {
        "version": str(version.version),
        "run_id": version.tags.get(_RUN, ""),
        "weights_sha256": version.tags.get("weights_sha256", ""),
        "model_id": str(version.model_id or version.source.removeprefix("models:/")),
    }
