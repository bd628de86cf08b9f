"""Our own model behind the interface of `evaluation`; apart, so that no baseline depends on our GPT."""

from pathlib import Path

from compactgpt.checkpoint import load_model
from compactgpt.evaluation import IN_WINDOW, Neural
from compactgpt.model import GPT


def load_compact(folder: Path, batch_size: int, device: str) -> Neural:
    """Our own trained model, ready to be measured.

    Args:
        folder: the checkpoint.
        batch_size: windows in one forward pass.
        device: cpu, cuda or mps.

    Raises:
        MissingInput: there is no checkpoint.
        BadData: it is damaged.
    """
    return compact(load_model(folder, device), batch_size)


def compact(model: GPT, batch_size: int) -> Neural:
    """Our GPT behind the one interface, with the padding rows of its vocabulary left out."""
    shape = model.shape
    facts = {"kind": "compact", "num_params": model.num_params, "context": IN_WINDOW}
    head = model.eval().wte.weight.detach()[: shape.vocab_size]
    return Neural(facts, model.hidden, head, shape.block_size, batch_size)
