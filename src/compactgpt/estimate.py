"""What a run will be, from params.yaml alone: size, tokens, arithmetic, memory, time, and the loss expected.

Nothing here has seen data, and nothing imports torch: the numbers are written down before the training
that they are judged by. Three counts of parameters are in use and none may be mistaken for another:

    all_tensors      every trained number; the head is tied to the token embedding and counted once
    nanogpt          all but the position embedding (nanoGPT's get_num_params): N of 6N and of Hoffmann's law
    non_embedding    all but both embeddings: N of Kaplan's law
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from compactgpt.config import Anchor, Estimate, ExpectedLoss, Machine, Model, Params

FP32_BYTES = 4
ADAM_MOMENTS = 2
SOLVER_STEPS = 200


@dataclass(frozen=True)
class Counts:
    """Parameters of a GPT in the three conventions of the module."""

    all_tensors: int
    nanogpt: int
    non_embedding: int


@dataclass(frozen=True)
class Run:
    """A training run as the scaling laws see it."""

    num_params: int  # nanoGPT's convention
    num_params_non_embedding: int
    max_steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Tokens trained on, repeats included."""
        return self.max_steps * self.tokens_per_step


@dataclass(frozen=True)
class Law:
    """A published scaling law: the loss in nats per token that a run ends at."""

    name: str
    loss: Callable[[Run], float]
    irreducible: float  # nats per token that no size and no data remove
    source: str
    validity: str


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


def flops_per_token(model: Model) -> dict[str, int]:
    """Arithmetic of one token, forward and backward.

    `six_n` is 6N with N in nanoGPT's convention; `with_attention` adds 12 L H Q T for layers L, heads H,
    head size Q and context T (PaLM, Chowdhery et al. 2022, appendix B; nanoGPT estimate_mfu).
    """
    six_n = 6 * counts(model).nanogpt
    return {"six_n": six_n, "with_attention": six_n + 12 * model.n_layer * model.n_embd * model.block_size}


def kaplan(run: Run) -> float:
    """L(N, S) of Kaplan et al. 2020, equation 1.6, with the critical batch size of equation 1.4."""
    size_term: float = (6.5e13 / run.num_params_non_embedding) ** 0.077
    loss: float = size_term + 1
    for _ in range(SOLVER_STEPS):  # the critical batch depends on the loss itself: a damped fixed point
        critical_batch = 2.1e8 / loss ** (1 / 0.21)  # tokens
        smallest_steps = run.max_steps / (1 + critical_batch / run.tokens_per_step)
        loss = 0.5 * loss + 0.5 * (size_term + (2.1e3 / smallest_steps) ** 0.76)
    return loss


def _parametric(irreducible: float, a: float, b: float, alpha: float, beta: float) -> Callable[[Run], float]:
    """L(N, D) = E + A / N^alpha + B / D^beta: Hoffmann et al. 2022, equation 2."""
    return lambda run: irreducible + a / run.num_params**alpha + b / run.tokens**beta


_KAPLAN_RANGE = "768 to 1.5e9 non-embedding parameters, WebText2, GPT-2's tokenizer"
_HOFFMANN_RANGE = "7e7 to 1.6e10 parameters, 5e9 to 5e11 tokens, MassiveText, another tokenizer"
LAWS = (
    Law("kaplan-2020", kaplan, 0.0, "Kaplan et al. 2020, arXiv 2001.08361, L(N, S)", _KAPLAN_RANGE),
    Law(
        "hoffmann-2022",
        _parametric(1.69, 406.4, 410.7, 0.34, 0.28),
        1.69,
        "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
        _HOFFMANN_RANGE,
    ),
    Law(
        "hoffmann-2022-exact",
        _parametric(1.6934, 406.4, 410.7, 0.3392, 0.2849),
        1.6934,
        "Hoffmann et al. 2022, exponents as in the paper's TeX source",
        _HOFFMANN_RANGE,
    ),
    Law(
        "besiroglu-2024",
        _parametric(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
        1.8172,
        "Besiroglu et al. 2024, arXiv 2404.10102, a new fit of approach 3",
        _HOFFMANN_RANGE,
    ),
)


def through(law: Law, anchor: Anchor, run: Run) -> float:
    """The law's loss for `run` once its reducible part is scaled to pass through a measured run."""
    scale = (anchor.loss - law.irreducible) / (law.loss(_run_of(anchor)) - law.irreducible)
    return law.irreducible + scale * (law.loss(run) - law.irreducible)


def expect(run: Run, optimizer: str, vocab_size: int, anchors: tuple[Anchor, ...]) -> ExpectedLoss:
    """The loss expected of a run, with intervals.

    The rule: take the measured run nearest in compute (6 N D; the same optimizer where two are equally
    near), let every law pass through it, and read the laws at our run. The 80 % interval is their spread
    widened on both sides by the laws' largest miss, unscaled, at the largest anchor, once for every
    decade of compute between anchor and run (at least once); the 95 % interval is widened by twice that.
    No law's loss and no bound lies above ln(vocabulary), the loss of guessing.
    """
    decades = {anchor.name: _decades(run, anchor) for anchor in anchors}
    anchor = min(anchors, key=lambda a: (decades[a.name], a.optimizer != optimizer))
    guessing = math.log(vocab_size)
    losses = [min(through(law, anchor, run), guessing) for law in LAWS]
    known = max(anchors, key=lambda a: _flops(_run_of(a)))
    miss = max(abs(law.loss(_run_of(known)) - known.loss) for law in LAWS)
    width = miss * max(1.0, decades[anchor.name])
    low, high = min(losses), max(losses)
    return ExpectedLoss(
        value=(low + high) / 2,
        low_80=_between(low - width, guessing),
        high_80=_between(high + width, guessing),
        low_95=_between(low - 2 * width, guessing),
        high_95=_between(high + 2 * width, guessing),
        basis=f"the laws through {anchor.name} ({anchor.corpus}, {anchor.loss} nats per token, "
        f"{decades[anchor.name]:.2f} decades of compute away): their spread, widened by {width:.3f} "
        f"nats (80 %) or twice that (95 %), the laws' largest miss at {known.name}",
    )


def _between(loss: float, guessing: float) -> float:
    """Keep a bound between almost nothing and the loss of guessing."""
    return min(max(loss, 0.01), guessing)


def _run_of(anchor: Anchor) -> Run:
    return Run(anchor.num_params, anchor.num_params_non_embedding, anchor.max_steps, anchor.tokens_per_step)


def _flops(run: Run) -> int:
    return 6 * run.num_params * run.tokens


def _decades(run: Run, anchor: Anchor) -> float:
    """Powers of ten between the compute of two runs; rounded, so that equal means equal."""
    return round(abs(math.log10(_flops(run) / _flops(_run_of(anchor)))), 9)


def estimate(params: Params) -> dict[str, Any]:
    """Estimate the run of params.yaml and the note's.

    Returns:
        The report: `compact` and `note`, each as `forecast` makes it, and the laws' sources.
    """
    training, note, settings = params.training, params.estimate.note, params.estimate
    run = _run(params.model, training.max_steps, training.tokens_per_step)
    expected = expect(run, training.optimizer, params.model.vocab_size, settings.anchors)
    own = forecast(params.model, run, training.micro_batch_size, None, expected, settings)
    note_run = _run(note, note.max_steps, note.tokens_per_step)
    theirs = forecast(note, note_run, note.micro_batch_size, note.corpus_tokens, note.expected_loss, settings)
    return {
        "compact": own | {"corpus": params.download.corpus, "notes": _notes(params)},
        "note": theirs,
        "laws": {law.name: {"source": law.source, "validity": law.validity} for law in LAWS},
    }


def _run(model: Model, max_steps: int, tokens_per_step: int) -> Run:
    sizes = counts(model)
    return Run(sizes.nanogpt, sizes.non_embedding, max_steps, tokens_per_step)


def _notes(params: Params) -> list[str]:
    """What a reader of the demo's estimate must know."""
    notes = ["the laws are extrapolated far below the sizes and budgets that they were fitted on"]
    if params.download.corpus == "docstrings":
        notes.append("the corpus is docstrings, for which no law is calibrated")
    else:
        notes.append("the corpus is the user's own: its size is unknown here and no law is calibrated for it")
    return notes


def forecast(
    model: Model,
    run: Run,
    micro_batch_size: int,
    corpus_tokens: int | None,
    expected: ExpectedLoss,
    settings: Estimate,
) -> dict[str, Any]:
    """One run's estimate.

    Args:
        model: the shape.
        run: the budget.
        micro_batch_size: sequences in one forward pass.
        corpus_tokens: tokens of the training split, where known.
        expected: the loss expected.
        settings: of the stage, for its machines.

    Returns:
        Numbers with their units in the keys; `epochs` is null where the corpus' size is not known.
    """
    flops = {key: value * run.tokens for key, value in flops_per_token(model).items()}
    machines = settings.machines.items()
    return {
        "model": model.model_dump(include=set(Model.model_fields)),
        "parameters": asdict(counts(model)),
        "steps": run.max_steps,
        "tokens_per_step": run.tokens_per_step,
        "sequences_per_step": run.tokens_per_step // model.block_size,
        "tokens": run.tokens,
        "epochs": None if corpus_tokens is None else run.tokens / corpus_tokens,
        "flops_per_token": flops_per_token(model),
        "flops": flops,
        "memory_bytes": _memory(model, micro_batch_size),
        "minutes": {name: _minutes(flops["with_attention"], machine) for name, machine in machines},
        "laws": {law.name: _law_facts(law, run, model.vocab_size) for law in LAWS},
        "expected_loss": expected.model_dump(),
    }


def _memory(model: Model, micro_batch_size: int) -> dict[str, int]:
    """fp32 bytes that training holds; the logits as if all were held at once, which ours never are."""
    weights = counts(model).all_tensors * FP32_BYTES
    logits = micro_batch_size * model.block_size * model.padded_vocab_size * FP32_BYTES  # (B, T, vocabulary)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": ADAM_MOMENTS * weights,
        "logits_if_held_at_once": logits,
    }


def _minutes(flops: int, machine: Machine) -> float:
    return flops / (machine.peak_teraflops * 1e12 * machine.utilisation) / 60


def _law_facts(law: Law, run: Run, vocab_size: int) -> dict[str, Any]:
    """A law's raw loss, and whether it is usable: a model that only guesses has ln(vocabulary)."""
    loss = law.loss(run)
    return {"loss": loss, "better_than_guessing": loss < math.log(vocab_size)}
