"""An independent reference for our GPT: one text at a time, all logits in float64."""

import torch
from torch.nn import functional as F


def plain_logits(model, fed):
    """Return the logits at the last tokens that fit the context, (T, V)."""
    with torch.no_grad():
        hidden = model.double().eval().hidden(torch.tensor([fed[-model.shape.block_size :]]))[0]
        logits = hidden @ model.wte.weight[: model.shape.vocab_size].T
    model.float()
    return logits


def plain_nats(model, fed, targets):
    """Return the sum of the losses of the targets, which follow the last tokens of `fed`."""
    logits = plain_logits(model, fed)[-len(targets) :]
    return F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
