"""Compute the number of parameters and the FLOPs of a GPT from its shape."""

from dataclasses import dataclass

from compactgpt.config import Model, Training


@dataclass(frozen=True)
class ParameterCounts:
    """The number of parameters of a GPT, counted by three different conventions."""

    all_tensors: int  # all parameters; head and token embedding share one matrix, counted once
    # Without position embeddings, as nanoGPT's get_num_params counts: N of Hoffmann's law.
    nanogpt: int
    non_embedding: int  # without token and position embeddings: N of Kaplan's law


def count_parameters(model: Model) -> ParameterCounts:
    """Return the parameter counts of a GPT as in nanoGPT's model.py: head and token embedding are tied."""
    C = model.n_embd
    # With biases, a block has 11 C more parameters: 9 C in the linear layers and 2 C in the layer norms.
    block = 12 * C * C + 2 * C + (11 * C if model.bias else 0)
    final_norm = 2 * C if model.bias else C
    non_embedding = model.n_layer * block + final_norm
    nanogpt = non_embedding + model.padded_vocab_size * C
    return ParameterCounts(nanogpt + model.block_size * C, nanogpt, non_embedding)


def flops_per_token(model: Model, training: Training | None = None) -> dict[str, int]:
    """Return the FLOPs of the forward and backward pass for one token, counted in two ways.

    `six_n` is 6 times nanoGPT's number of parameters. `with_attention` also counts the FLOPs of attention
    (Chowdhery et al. 2022, appendix B). If training.head is `sampled`, training computes only the
    logits of sampled tokens, so `with_attention` counts only the head's rows for these tokens.
    """
    sizes = count_parameters(model)
    head_rows = model.padded_vocab_size
    if training is not None and training.head == "sampled":
        head_rows = min(training.sample_tokens, model.vocab_size)
    multiplied = sizes.non_embedding + head_rows * model.n_embd
    return {
        "six_n": 6 * sizes.nanogpt,
        "with_attention": 6 * multiplied + 12 * model.n_layer * model.n_embd * model.block_size,
    }
