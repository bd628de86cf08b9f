"""Scaling laws, and the loss that is expected of a run before it is made.

Each law is published, with its constants, its source and the range it was fitted in. `expect` makes of
them, and of the measured run nearest to ours, one loss with two intervals: a rule that was frozen before the
demo was trained and stays as it was. How often it holds is counted in compactgpt.calibration.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from compactgpt.config import Anchor, ExpectedLoss

SOLVER_STEPS = 200


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
class Range:
    """What a law was fitted on; sizes are counted as the law counts them."""

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    text: str

    def holds(self, num_params: int, tokens: int) -> bool:
        """Whether a run lies inside."""
        (least, most), (fewest, largest) = self.parameters, self.tokens
        return least <= num_params <= most and fewest <= tokens <= largest


@dataclass(frozen=True)
class Law:
    """A published scaling law: the loss in nats per token that a run ends at."""

    name: str
    loss: Callable[[Run], float]
    irreducible: float  # nats per token that no size and no data remove
    source: str
    validity: str
    formula: str
    constants: Mapping[str, float]
    counts: Literal["nanogpt", "non_embedding"]  # which parameters N is
    fitted: Range

    def size(self, run: Run) -> int:
        """The run's N as this law counts it."""
        return run.num_params if self.counts == "nanogpt" else run.num_params_non_embedding

    def inside(self, run: Run) -> bool:
        """Whether the run lies where the law was fitted."""
        return self.fitted.holds(self.size(run), run.tokens)


KAPLAN = {"Nc": 6.5e13, "aN": 0.077, "Sc": 2.1e3, "aS": 0.76, "Bstar": 2.1e8, "aB": 0.21}


def kaplan(run: Run) -> float:
    """L(N, S) of Kaplan et al. 2020, equation 1.6, with the critical batch size of equation 1.4."""
    k = KAPLAN
    size_term: float = (k["Nc"] / run.num_params_non_embedding) ** k["aN"]
    loss: float = size_term + 1
    for _ in range(SOLVER_STEPS):  # the critical batch depends on the loss itself: a damped fixed point
        critical_batch = k["Bstar"] / loss ** (1 / k["aB"])  # tokens
        smallest_steps = run.max_steps / (1 + critical_batch / run.tokens_per_step)
        loss = 0.5 * loss + 0.5 * (size_term + (k["Sc"] / smallest_steps) ** k["aS"])
    return loss


def _hoffmann(name: str, source: str, constants: Mapping[str, float]) -> Law:
    """L(N, D) = E + A / N^alpha + B / D^beta: Hoffmann et al. 2022, equation 2."""
    c = constants
    return Law(
        name,
        lambda run: c["E"] + c["A"] / run.num_params ** c["alpha"] + c["B"] / run.tokens ** c["beta"],
        c["E"],
        source,
        "7e7 to 1.6e10 parameters, 5e9 to 5e11 tokens, MassiveText, another tokenizer",
        "E + A / N^alpha + B / D^beta",
        constants,
        "nanogpt",
        Range((7e7, 1.6e10), (5e9, 5e11), "MassiveText, another tokenizer"),
    )


LAWS = (
    Law(
        "kaplan-2020",
        kaplan,
        0.0,
        "Kaplan et al. 2020, arXiv 2001.08361, L(N, S)",
        "768 to 1.5e9 non-embedding parameters, WebText2, GPT-2's tokenizer",
        "(Nc / N)^aN + (Sc / Smin)^aS, Smin = S / (1 + Bcrit / B), Bcrit = Bstar / L^(1 / aB)",
        KAPLAN,
        "non_embedding",
        Range((768, 1.5e9), (2.2e7, 2.3e10), "WebText2, GPT-2's tokenizer"),
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


def through(law: Law, anchor: Anchor, run: Run) -> float:
    """The law's loss for `run` once its reducible part is scaled to pass through a measured run."""
    scale = (anchor.loss - law.irreducible) / (law.loss(run_of(anchor)) - law.irreducible)
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
    known = max(anchors, key=lambda a: _flops(run_of(a)))
    miss = max(abs(law.loss(run_of(known)) - known.loss) for law in LAWS)
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


def run_of(anchor: Anchor) -> Run:
    """The run that an anchor measured."""
    return Run(anchor.num_params, anchor.num_params_non_embedding, anchor.max_steps, anchor.tokens_per_step)


def _flops(run: Run) -> int:
    return 6 * run.num_params * run.tokens


def _decades(run: Run, anchor: Anchor) -> float:
    """Powers of ten between the compute of two runs; rounded, so that equal means equal."""
    return round(abs(math.log10(_flops(run) / _flops(run_of(anchor)))), 9)
