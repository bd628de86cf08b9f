"""Count the parameters and the arithmetic of a GPT from its shape alone."""

from dataclasses import dataclass

from compactgpt.config import Model, Training


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a GPT by the three conventions in use, which must not be confused."""

    all_tensors: int  # every trained number; the tied head and token embedding are counted once
    nanogpt: int  # all but position embeddings (nanoGPT, get_num_params): N of 6N and of Hoffmann's law
    non_embedding: int  # all but both embeddings: N of Kaplan's law


def count_parameters(model: Model) -> ParameterCounts:
    """Count the parameters of nanoGPT's architecture with a tied head.

    A block holds 12 C^2 weights and two norms of C; with `bias`, 9 C more for the four linear maps and
    2 C for the norms (nanoGPT model.py).
    """
    C = model.n_embd
    block = 12 * C * C + 2 * C + (11 * C if model.bias else 0)
    final_norm = 2 * C if model.bias else C
    non_embedding = model.n_layer * block + final_norm
    nanogpt = non_embedding + model.padded_vocab_size * C
    return ParameterCounts(nanogpt + model.block_size * C, nanogpt, non_embedding)


def flops_per_token(model: Model, training: Training | None = None) -> dict[str, int]:
    """Return the FLOPs of one token, forward and backward.

    `six_n` is 6N with N in nanoGPT's convention; `with_attention` adds 12 L H Q T for L layers, H heads of
    size Q and context T (PaLM, Chowdhery et al. 2022, appendix B). Where `training` samples its softmax,
    `with_attention` counts the expected sample of the head's rows; the rows of the batch's own tokens, a few
    hundred, are left out.
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
