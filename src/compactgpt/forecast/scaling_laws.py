"""Published scaling laws, and the rule `expect_loss`, which predicts the loss of a run from these laws.

The rule uses reference runs with a measured loss: `estimate.anchors` in params.yaml.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compactgpt.config import Anchor, ExpectedLoss, Model, NoteRun, Run, Training
from compactgpt.forecast.model_size import count_parameters


def run_of(model: Model, training: Training | NoteRun) -> Run:
    """Return the size of a model and the budget of its training."""
    sizes = count_parameters(model)
    return Run(
        num_params=sizes.nanogpt,
        num_params_non_embedding=sizes.non_embedding,
        max_steps=training.max_steps,
        tokens_per_step=training.tokens_per_step,
    )


@dataclass(frozen=True)
class Law:
    """A published scaling law. It predicts the final loss of a run in nats per token."""

    name: str
    loss: Callable[[Run], float]
    irreducible: float  # limit of the loss for an infinite model and infinite data, in nats per token
    source: str
    counted: Literal["nanogpt", "non_embedding"]  # the convention by which the law counts parameters
    validity: str  # a description of the runs that the law was fitted on
    parameters: tuple[float, float]  # smallest and largest number of parameters that the law was fitted on
    tokens: tuple[float, float]  # smallest and largest number of training tokens that the law was fitted on

    def covers(self, run: Run) -> bool:
        """Return whether size and tokens of `run` are in the ranges that the law was fitted on."""
        size = run.num_params if self.counted == "nanogpt" else run.num_params_non_embedding
        inside_sizes = self.parameters[0] <= size <= self.parameters[1]
        return inside_sizes and self.tokens[0] <= run.tokens <= self.tokens[1]

    def loss_through(self, anchor: Anchor, run: Run) -> float:
        """Return the loss of `run` in nats per token, predicted after the law is scaled to the run `anchor`.

        To scale the law, the part of the loss above `irreducible` is multiplied by the factor that makes the
        law's loss of `anchor` equal to the measured loss.
        """
        reducible = self.loss(anchor) - self.irreducible
        scale = (anchor.loss - self.irreducible) / reducible
        return self.irreducible + scale * (self.loss(run) - self.irreducible)


KAPLAN = {"Nc": 6.5e13, "aN": 0.077, "Sc": 2.1e3, "aS": 0.76, "Bstar": 2.1e8, "aB": 0.21}


def kaplan_loss(run: Run) -> float:
    """Return the loss (Nc / N)^aN + (Sc / S)^aS (Kaplan et al. 2020, equations 1.4 and 1.6).

    N is the number of non-embedding parameters. With an infinite batch, training would reach the same loss
    in S steps (S_min in the paper). `KAPLAN` has the constants.
    """
    k = KAPLAN
    size_term: float = (k["Nc"] / run.num_params_non_embedding) ** k["aN"]
    loss: float = size_term + 1
    for _ in range(200):  # damped fixed-point iteration: loss and critical batch size depend on each other
        critical_batch = k["Bstar"] / loss ** (1 / k["aB"])  # tokens
        smallest_steps = run.max_steps / (1 + critical_batch / run.tokens_per_step)
        loss = 0.5 * loss + 0.5 * (size_term + (k["Sc"] / smallest_steps) ** k["aS"])
    return loss


def _hoffmann(name: str, source: str, constants: Mapping[str, float]) -> Law:
    """Return the law E + A / N^alpha + B / D^beta: N parameters, D tokens (Hoffmann et al. 2022, eq. 2)."""
    c = constants
    return Law(
        name,
        lambda run: c["E"] + c["A"] / run.num_params ** c["alpha"] + c["B"] / run.tokens ** c["beta"],
        irreducible=c["E"],
        source=source,
        counted="nanogpt",
        validity="7e7 to 1.6e10 parameters, 5e9 to 5e11 tokens of MassiveText; the tokenizer is not GPT-2's",
        parameters=(7e7, 1.6e10),
        tokens=(5e9, 5e11),
    )


LAWS = (
    Law(
        "kaplan-2020",
        kaplan_loss,
        irreducible=0.0,
        source="Kaplan et al. 2020, arXiv 2001.08361, L(N, S)",
        counted="non_embedding",
        validity="768 to 1.5e9 non-embedding parameters, WebText2, GPT-2's tokenizer",
        parameters=(768, 1.5e9),
        tokens=(2.2e7, 2.3e10),
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
        "Besiroglu et al. 2024, arXiv 2404.10102, a new fit of approach 3 of Hoffmann et al. 2022",
        {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    ),
)


def expect_loss(run: Run, optimizer: str, vocab_size: int, anchors: Sequence[Anchor]) -> ExpectedLoss:
    """Return the expected loss of a run, with intervals, in nats per token.

    Each law is scaled to the measured loss of one reference run: the run in `anchors` whose FLOPs are nearest
    to the FLOPs of `run`. Of two equally near runs, the run with the same `optimizer` is used.
    The 80 % interval is the range of the losses that the laws predict, widened because the laws have errors.
    """
    # Rounded, so that floating-point errors do not make equal distances different.
    distances = {anchor.name: round(abs(math.log10(run.flops / anchor.flops)), 9) for anchor in anchors}
    nearest = min(anchors, key=lambda anchor: (distances[anchor.name], anchor.optimizer != optimizer))
    guess = math.log(vocab_size)
    losses = [min(law.loss_through(nearest, run), guess) for law in LAWS]
    low, high = min(losses), max(losses)
    largest = max(anchors, key=lambda anchor: anchor.flops)
    # Widen the 80 % interval by the largest error of a law on the largest reference run. If the FLOPs of
    # `nearest` and `run` differ by a factor of 10^d with d above 1, widen the interval by d times this error.
    largest_error = max(abs(law.loss(largest) - largest.loss) for law in LAWS)
    width = largest_error * max(1.0, distances[nearest.name])

    def bound(loss: float) -> float:
        return min(max(loss, 0.01), guess)

    return ExpectedLoss(
        value=(low + high) / 2,
        low_80=bound(low - width),
        high_80=bound(high + width),
        low_95=bound(low - 2 * width),
        high_95=bound(high + 2 * width),
        basis="published scaling laws, each scaled so that it predicts the measured loss of the run "
        f"{nearest.name} ({nearest.corpus}, loss {nearest.loss}; the compute of the two runs differs by a "
        f"factor of 10^{distances[nearest.name]:.2f}). The 80 % interval is the range of the laws' "
        f"predictions, widened on each side by {width:.3f} nats because of the laws' errors on the run "
        f"{largest.name}. The 95 % interval is widened by twice as much",
    )


@dataclass(frozen=True)
class Calibration:
    """Checks of the rule `expect_loss`: it predicts the loss of each measured run from the other runs."""

    anchors: tuple[Anchor, ...]
    checks: tuple[dict[str, Any], ...]  # for each measured run, its loss and the prediction for it

    def factor(self, share: float) -> float:
        """Return a factor for the widths of the 80 % intervals.

        Multiplied by this factor, the intervals contain at least `share` of the measured losses. The method
        is split conformal prediction (Papadopoulos et al. 2002).
        """
        ordered = sorted(check["factor"] for check in self.checks)
        rank = math.ceil(share * (len(ordered) + 1))
        return float(ordered[min(rank, len(ordered)) - 1])

    def calibrated_loss(self, run: Run, optimizer: str, vocab_size: int) -> ExpectedLoss:
        """Return the result of `expect_loss` but with calibrated intervals, see `factor`."""
        rule = expect_loss(run, optimizer, vocab_size, self.anchors)
        middle, half = _middle_and_half(rule)
        half_80, half_95 = half * self.factor(0.80), half * self.factor(0.95)
        guess = math.log(vocab_size)
        return ExpectedLoss(
            value=middle,
            low_80=max(middle - half_80, 0.01),
            high_80=min(middle + half_80, guess),
            low_95=max(middle - half_95, 0.01),
            high_95=min(middle + half_95, guess),
            basis=f"{rule.basis}. Calibration then replaces both widths. The new widths come from the "
            f"rule's errors: it predicted each of {len(self.checks)} measured runs from the other runs",
        )

    def report(self) -> dict[str, Any]:
        """Return the section `calibration` of reports/estimate.json."""
        return {
            "checks": list(self.checks),
            "of": len(self.checks),
            "held_80": sum(check["inside_80"] for check in self.checks),
            "held_95": sum(check["inside_95"] for check in self.checks),
            "factor_80": self.factor(0.80),
            "factor_95": self.factor(0.95),
        }


def calibrate(measured: Sequence[Anchor], vocab_size: int) -> Calibration:
    """Check the rule `expect_loss`: predict each measured run from the other runs.

    A run with `assumed_budget` has a number of steps that is only a guess. The rule predicts this
    run, too, but does not use this run to predict other runs.
    """
    known = tuple(anchor for anchor in measured if not anchor.assumed_budget)
    checks = []
    for anchor in measured:
        others = [other for other in known if other.name != anchor.name]
        rule = expect_loss(anchor, anchor.optimizer, vocab_size, others)
        middle, half = _middle_and_half(rule)
        about = {"name", "corpus", "optimizer", "num_params", "assumed_budget"}
        check = {
            **anchor.model_dump(include=about),
            "tokens": anchor.tokens,
            "measured": anchor.loss,
            **rule.model_dump(exclude={"basis"}),
            "inside_80": rule.low_80 <= anchor.loss <= rule.high_80,
            "inside_95": rule.low_95 <= anchor.loss <= rule.high_95,
            "factor": abs(anchor.loss - middle) / half,
        }
        checks.append(check)
    return Calibration(known, tuple(checks))


def _middle_and_half(rule: ExpectedLoss) -> tuple[float, float]:
    return (rule.low_80 + rule.high_80) / 2, (rule.high_80 - rule.low_80) / 2
