"""Published scaling laws, a rule that predicts the loss of a run from these laws, and checks of the rule.

A reference run is a finished run whose loss was measured; `estimate.anchors` in params.yaml lists the
reference runs. The rule, `expect_loss`, was fixed before the demo was trained, and has not changed since.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    irreducible: float  # limit of the loss for an infinite model and infinite data, in nats per token
    source: str
    formula: str
    constants: Mapping[str, float]
    counted: Literal["nanogpt", "non_embedding"]  # which parameters N counts
    validity: str  # the runs that the law was fitted on, in words
    parameters: tuple[float, float]  # smallest and largest number of parameters of these runs
    tokens: tuple[float, float]  # smallest and largest number of training tokens of these runs

    def covers(self, run: Run) -> bool:
        """Return whether the law was fitted on runs of this size and this number of tokens."""
        size = run.num_params if self.counted == "nanogpt" else run.num_params_non_embedding
        inside_sizes = self.parameters[0] <= size <= self.parameters[1]
        return inside_sizes and self.tokens[0] <= run.tokens <= self.tokens[1]

    def loss_through(self, anchor: Anchor, run: Run) -> float:
        """Return the loss of `run` by the scaled law, in nats per token.

        The law is scaled so that it gives the measured loss of the reference run `anchor`: the loss minus the
        irreducible loss is multiplied by a factor.
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
        irreducible=c["E"],
        source=source,
        formula="E + A / N^alpha + B / D^beta",
        constants=constants,
        counted="nanogpt",
        validity="7e7 to 1.6e10 parameters, 5e9 to 5e11 tokens, MassiveText, another tokenizer",
        parameters=(7e7, 1.6e10),
        tokens=(5e9, 5e11),
    )


LAWS = (
    Law(
        "kaplan-2020",
        kaplan_loss,
        irreducible=0.0,
        source="Kaplan et al. 2020, arXiv 2001.08361, L(N, S)",
        formula="(Nc / N)^aN + (Sc / Smin)^aS, Smin = S / (1 + Bcrit / B), Bcrit = Bstar / L^(1 / aB)",
        constants=KAPLAN,
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
        "Besiroglu et al. 2024, arXiv 2404.10102, a new fit of approach 3",
        {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    ),
)


def expect_loss(run: Run, optimizer: str, vocab_size: int, anchors: Sequence[Anchor]) -> ExpectedLoss:
    """Return the expected loss of a run, with intervals.

    Each law is scaled by the reference run that is nearest in compute. Among equally near reference runs, a
    run with the optimizer of `run` is used. The range of the scaled laws' losses is widened on both sides by
    w for the 80 % interval, and by 2 w for the 95 % interval. w is the largest error of the unscaled laws at
    the largest reference run, times the decades of compute between `run` and the nearest reference run (at
    least 1). No limit is above ln(vocab_size), the loss of a uniform guess.
    """
    # Without rounding, two equal distances could differ in their last bits.
    distances = {
        anchor.name: round(abs(math.log10(run.flops / reference_run(anchor).flops)), 9) for anchor in anchors
    }
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


@dataclass(frozen=True)
class Calibration:
    """The checks of the rule on all measured runs, and the reference runs used for predictions.

    The factor of a check is the number by which the 80 % interval must be multiplied to just contain the
    measured loss. The calibrated interval is the rule's interval times the k-th smallest of n factors, with
    k = ceil(share (n + 1)), or times the largest factor if k > n (split conformal prediction, Papadopoulos
    et al. 2002).
    """

    anchors: tuple[Anchor, ...]
    checks: tuple[dict[str, Any], ...]  # one for each measured run, as in reports/estimate.json

    def factor(self, share: float) -> float:
        """Return the factor that makes the 80 % interval contain this share of the measured runs."""
        ordered = sorted(check["factor"] for check in self.checks)
        rank = math.ceil(share * (len(ordered) + 1))
        return float(ordered[min(rank, len(ordered)) - 1])

    def calibrated_loss(self, run: Run, optimizer: str, vocab_size: int) -> ExpectedLoss:
        """Return the expected loss of a run, with calibrated intervals."""
        rule = expect_loss(run, optimizer, vocab_size, self.anchors)
        middle, half = _middle_and_half(rule)
        half_80 = half * self.factor(0.80)
        half_95 = max(half_80, half * self.factor(0.95))
        guess = math.log(vocab_size)
        return ExpectedLoss(
            value=middle,
            low_80=max(middle - half_80, 0.01),
            high_80=max(min(middle + half_80, guess), middle),
            low_95=max(middle - half_95, 0.01),
            high_95=max(min(middle + half_95, guess), middle),
            basis=f"{rule.basis}; calibrated on {len(self.checks)} measured runs, each predicted from the "
            "others",
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
            "enough_for_95": len(self.checks) >= 19,  # with fewer runs, k > n
        }


def calibrate(measured: Sequence[Anchor], vocab_size: int) -> Calibration:
    """Check the rule on every measured run: predict the run's loss from all other runs.

    The training budget of GPT-2 was never published. So the checks of GPT-2's runs assume a budget, and these
    runs are not used to predict other runs.
    """
    known = tuple(anchor for anchor in measured if not anchor.assumed_budget)
    checks = []
    for anchor in measured:
        others = [other for other in known if other.name != anchor.name]
        rule = expect_loss(reference_run(anchor), anchor.optimizer, vocab_size, others)
        middle, half = _middle_and_half(rule)
        about = {"name", "corpus", "optimizer", "num_params", "assumed_budget"}
        check = {
            **anchor.model_dump(include=about),
            "tokens": reference_run(anchor).tokens,
            "measured": anchor.loss,
            **rule.model_dump(exclude={"basis"}),
            "inside_80": rule.low_80 <= anchor.loss <= rule.high_80,
            "inside_95": rule.low_95 <= anchor.loss <= rule.high_95,
            "factor": abs(anchor.loss - middle) / half,
        }
        checks.append(check)
    return Calibration(known, tuple(checks))


def _middle_and_half(rule: ExpectedLoss) -> tuple[float, float]:
    """Return the middle of the 80 % interval, and half of its width."""
    return (rule.low_80 + rule.high_80) / 2, (rule.high_80 - rule.low_80) / 2
