"""Published scaling laws, and `expect_loss`, a rule that predicts the loss of a run from these laws.

The rule was fixed before the demo was trained, and has not changed since. `forecast.calibration` counts how
often its intervals contain the measured loss. A reference run is a finished run whose loss was measured;
`estimate.anchors` in params.yaml lists the reference runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compactgpt.config import Anchor, ExpectedLoss, Params
from compactgpt.forecast.model_size import count_parameters


@dataclass(frozen=True)
class Run:
    """The size and the budget of a training run."""

    num_params: int  # counted by nanoGPT's convention
    num_params_non_embedding: int
    max_steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Number of tokens that the run trains on; a repeated token counts each time."""
        return self.max_steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """Training compute in FLOPs: 6 times parameters times tokens."""
        return 6 * self.num_params * self.tokens


def configured_run(params: Params) -> Run:
    """Return the run that params.yaml describes."""
    sizes, training = count_parameters(params.model), params.training
    return Run(sizes.nanogpt, sizes.non_embedding, training.max_steps, training.tokens_per_step)


def reference_run(anchor: Anchor) -> Run:
    """Return the size and the budget of a reference run."""
    return Run(anchor.num_params, anchor.num_params_non_embedding, anchor.max_steps, anchor.tokens_per_step)


@dataclass(frozen=True)
class Law:
    """A published scaling law, which predicts the final loss of a run in nats per token."""

    name: str
    loss: Callable[[Run], float]
    irreducible: float  # loss in nats per token of an infinite model with infinite data
    source: str
    formula: str
    constants: Mapping[str, float]
    counts: Literal["nanogpt", "non_embedding"]  # which parameters N counts
    # The runs that the law was fitted on: in words, and as ranges of parameters and tokens.
    validity: str
    parameters: tuple[float, float]
    tokens: tuple[float, float]

    def covers(self, run: Run) -> bool:
        """Return whether the law was fitted on runs of this size and this number of tokens."""
        size = run.num_params if self.counts == "nanogpt" else run.num_params_non_embedding
        inside_sizes = self.parameters[0] <= size <= self.parameters[1]
        return inside_sizes and self.tokens[0] <= run.tokens <= self.tokens[1]

    def loss_through(self, anchor: Anchor, run: Run) -> float:
        """Return the loss that this law predicts for `run`, scaled by a reference run.

        The law's reducible loss is multiplied by a constant, so that the law gives the measured loss of the
        reference run.
        """
        reducible = self.loss(reference_run(anchor)) - self.irreducible
        scale = (anchor.loss - self.irreducible) / reducible
        return self.irreducible + scale * (self.loss(run) - self.irreducible)


KAPLAN = {"Nc": 6.5e13, "aN": 0.077, "Sc": 2.1e3, "aS": 0.76, "Bstar": 2.1e8, "aB": 0.21}


def kaplan_loss(run: Run) -> float:
    """Return L(N, S) of Kaplan et al. 2020: equation 1.6, with the critical batch size of equation 1.4."""
    k = KAPLAN
    size_term: float = (k["Nc"] / run.num_params_non_embedding) ** k["aN"]
    loss: float = size_term + 1
    for _ in range(200):  # damped fixed-point iteration: the critical batch size depends on the loss
        critical_batch = k["Bstar"] / loss ** (1 / k["aB"])  # tokens
        smallest_steps = run.max_steps / (1 + critical_batch / run.tokens_per_step)
        loss = 0.5 * loss + 0.5 * (size_term + (k["Sc"] / smallest_steps) ** k["aS"])
    return loss


def _hoffmann(name: str, source: str, constants: Mapping[str, float]) -> Law:
    """Return a law with the formula of Hoffmann et al. 2022, equation 2."""
    c = constants
    return Law(
        name,
        lambda run: c["E"] + c["A"] / run.num_params ** c["alpha"] + c["B"] / run.tokens ** c["beta"],
        c["E"],
        source,
        "E + A / N^alpha + B / D^beta",
        constants,
        "nanogpt",
        "7e7 to 1.6e10 parameters, 5e9 to 5e11 tokens, MassiveText, another tokenizer",
        (7e7, 1.6e10),
        (5e9, 5e11),
    )


LAWS = (
    Law(
        "kaplan-2020",
        kaplan_loss,
        0.0,
        "Kaplan et al. 2020, arXiv 2001.08361, L(N, S)",
        "(Nc / N)^aN + (Sc / Smin)^aS, Smin = S / (1 + Bcrit / B), Bcrit = Bstar / L^(1 / aB)",
        KAPLAN,
        "non_embedding",
        "768 to 1.5e9 non-embedding parameters, WebText2, GPT-2's tokenizer",
        (768, 1.5e9),
        (2.2e7, 2.3e10),
    ),
    _hoffmann(
        "hoffmann-2022",
        "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
        {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    ),
    _hoffmann(
        "hoffmann-2022-exact",
        "Hoffmann et al. 2022, exponents as in the paper's TeX source",
        {"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849},
    ),
    _hoffmann(
        "besiroglu-2024",
        "Besiroglu et al. 2024, arXiv 2404.10102, a new fit of approach 3",
        {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    ),
)


def expect_loss(run: Run, optimizer: str, vocab_size: int, anchors: Sequence[Anchor]) -> ExpectedLoss:
    """Return the expected loss of a run, with intervals.

    Each law is scaled by the reference run that is nearest in compute. Among equally near reference runs, the
    rule prefers one with the same optimizer. The range of the scaled laws' losses for `run` is widened on
    both sides by a width w for the 80 % interval, and by 2 w for the 95 % interval. To compute w, take the
    largest error of the unscaled laws at the largest reference run, and multiply it by the decades of compute
    between `run` and the nearest reference run (at least 1). No limit is above ln(vocab_size), the loss of a
    uniform guess.

    Args:
        run: the run to predict.
        optimizer: the run's optimizer.
        vocab_size: the size of the vocabulary.
        anchors: the reference runs.
    """
    distances = {anchor.name: _decades_apart(run, reference_run(anchor)) for anchor in anchors}
    nearest = min(anchors, key=lambda anchor: (distances[anchor.name], anchor.optimizer != optimizer))
    guess = math.log(vocab_size)
    losses = [min(law.loss_through(nearest, run), guess) for law in LAWS]
    low, high = min(losses), max(losses)
    largest = max(anchors, key=lambda anchor: reference_run(anchor).flops)
    miss = max(abs(law.loss(reference_run(largest)) - largest.loss) for law in LAWS)
    width = miss * max(1.0, distances[nearest.name])

    def bound(loss: float) -> float:
        return min(max(loss, 0.01), guess)

    return ExpectedLoss(
        value=(low + high) / 2,
        low_80=bound(low - width),
        high_80=bound(high + width),
        low_95=bound(low - 2 * width),
        high_95=bound(high + 2 * width),
        basis=f"the laws through {nearest.name} ({nearest.corpus}, {nearest.loss} nats per token, "
        f"{distances[nearest.name]:.2f} decades of compute away): their spread, widened by {width:.3f} "
        f"nats (80 %) or twice that (95 %), the laws' largest miss at {largest.name}",
    )


def _decades_apart(run: Run, other: Run) -> float:
    """Return the distance of two runs' compute in powers of ten; rounding makes equal distances equal."""
    return round(abs(math.log10(run.flops / other.flops)), 9)
