"""A training recipe for a tiny model."""

from compactgpt.config import Training

RECIPE = {
    "seed": 1,
    "max_steps": 100,
    "tokens_per_step": 16,
    "micro_batch_size": 2,
    "optimizer": "adamw",
    "learning_rate": 1e-2,
    "embedding_learning_rate": 2e-2,
    "muon_learning_rate": 5e-2,
    "min_lr_ratio": 0.1,
    "schedule": "cosine",
    "warmup_steps": 10,
    "decay_share": 0.2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "eval_interval": 10,
    "eval_windows": 4,
    "checkpoint_interval": 10,
}


def recipe(**changes):
    return Training(**{**RECIPE, **changes})
