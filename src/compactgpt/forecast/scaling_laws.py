"""Published scaling laws, and the loss that a rule made from them expects of a run.

The rule, `expect_loss`, was fixed before the demo was trained and has not changed since;
`forecast.calibration` counts how often it holds. A reference run is a finished run whose loss was measured:
`estimate.anchors` of params.yaml.
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

    num_params: int  # nanoGPT's convention
    num_params_non_embedding: int
    max_steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """Tokens trained on, repeats included."""
        return self.max_steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """6 N D, by which runs are compared."""
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
    """A published scaling law: the loss in nats per token that a run ends at."""

    name: str
    loss: Callable[[Run], float]
    irreducible: float  # nats per token that no size and no data remove
    source: str
    formula: str
    constants: Mapping[str, float]
    counts: Literal["nanogpt", "non_embedding"]  # which parameters N is
    validity: str  # what the law was fitted on, in words and in the two ranges below
    parameters: tuple[float, float]
    tokens: tuple[float, float]

    def covers(self, run: Run) -> bool:
        """Whether the law was fitted on runs of this size and budget."""
        size = run.num_params if self.counts == "nanogpt" else run.num_params_non_embedding
        inside_sizes = self.parameters[0] <= size <= self.parameters[1]
        return inside_sizes and self.tokens[0] <= run.tokens <= self.tokens[1]

    def loss_through(self, anchor: Anchor, run: Run) -> float:
        """Return the loss of `run` by this law, its reducible part scaled to meet a reference run."""
        reducible = self.loss(reference_run(anchor)) - self.irreducible
        scale = (anchor.loss - self.irreducible) / reducible
        return self.irreducible + scale * (self.loss(run) - self.irreducible)


KAPLAN = {"Nc": 6.5e13, "aN": 0.077, "Sc": 2.1e3, "aS": 0.76, "Bstar": 2.1e8, "aB": 0.21}


def kaplan_loss(run: Run) -> float:
    """Return L(N, S) of Kaplan et al. 2020: equation 1.6, with the critical batch size of equation 1.4."""
    k = KAPLAN
    size_term: float = (k["Nc"] / run.num_params_non_embedding) ** k["aN"]
    loss: float = size_term + 1
    for _ in range(200):  # the critical batch size depends on the loss: iterate, damped, to the fixed point
        critical_batch = k["Bstar"] / loss ** (1 / k["aB"])  # tokens
        smallest_steps = run.max_steps / (1 + critical_batch / run.tokens_per_step)
        loss = 0.5 * loss + 0.5 * (size_term + (k["Sc"] / smallest_steps) ** k["aS"])
    return loss


def _hoffmann(name: str, source: str, constants: Mapping[str, float]) -> Law:
    """Make a law of the form of Hoffmann et al. 2022, equation 2."""
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
    """Return the loss expected of a run, with intervals.

    Every law is scaled to meet the reference run nearest in compute (of equally near ones, one with the same
    optimizer) and read at `run`. The 80 % interval is the spread of the laws, widened on both sides by their
    largest unscaled miss at the largest reference run, once for every decade of compute between the
    reference run and `run` (at least once); the 95 % interval is widened by twice that. No loss and no bound
    lies above ln(vocab_size), the loss of a uniform guess.
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
    """Return the powers of ten between two runs' compute, rounded so that equal distances compare equal."""
    return round(abs(math.log10(run.flops / other.flops)), 9)
