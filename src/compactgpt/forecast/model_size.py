"""Parameters and arithmetic of a GPT, from its shape alone.

Three counts of parameters are in use and none may be mistaken for another:

    all_tensors      every trained number; the head is tied to the token embedding and counted once
    nanogpt          all but the position embedding (nanoGPT's get_num_params): N of 6N and of Hoffmann's law
    non_embedding    all but both embeddings: N of Kaplan's law
"""

from dataclasses import dataclass

from compactgpt.config import Model, Training


@dataclass(frozen=True)
class Counts:
    """Parameters of a GPT in the three conventions of the module."""

    all_tensors: int
    nanogpt: int
    non_embedding: int


def counts(model: Model) -> Counts:
    """Count the parameters of nanoGPT's architecture with a tied head.

    A block holds 12 C^2 weights and two norms of C; with `bias`, 9 C more for the four linear maps and
    2 C for the norms (nanoGPT model.py).
    """
    C = model.n_embd
    block = 12 * C * C + 2 * C + (11 * C if model.bias else 0)
    final_norm = 2 * C if model.bias else C
    non_embedding = model.n_layer * block + final_norm
    nanogpt = non_embedding + model.padded_vocab_size * C
    return Counts(nanogpt + model.block_size * C, nanogpt, non_embedding)


def flops_per_token(model: Model, training: Training | None = None) -> dict[str, int]:
    """Arithmetic of one token, forward and backward.

    `six_n` is 6N with N in nanoGPT's convention; `with_attention` adds 12 L H Q T for layers L, heads H,
    head size Q and context T (PaLM, Chowdhery et al. 2022, appendix B; nanoGPT estimate_mfu).

    Args:
        model: the shape.
        training: where its softmax is sampled, `with_attention` counts the sample's expected rows of the
            head in place of all; those that a batch adds, a few hundred, are not counted.
    """
    sizes = counts(model)
    sampled = training is not None and training.head == "sampled"
    rows = min(training.sample_tokens, model.vocab_size) if training and sampled else model.padded_vocab_size
    multiplied = sizes.non_embedding + rows * model.n_embd
    return {
        "six_n": 6 * sizes.nanogpt,
        "with_attention": 6 * multiplied + 12 * model.n_layer * model.n_embd * model.block_size,
    }
