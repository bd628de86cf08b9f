"""Check the rule `scaling_laws.expect_loss` on measured runs, and calibrate its interval.

The measured runs are the reference runs of params.yaml and the runs of our sweep. For each measured run, the
rule predicts the loss from the other runs, and the check states whether the measured loss is inside the
interval. The training budget of GPT-2 was never published. So the checks of GPT-2's runs assume a budget, and
GPT-2's runs are not used to predict other runs.

For each of the n measured runs, the check computes the factor by which the 80 % interval must be multiplied
to just contain the measured loss. The calibrated interval is the rule's interval multiplied by the k-th
smallest factor, with k = ceil(share (n + 1)), or by the largest factor if k > n (split conformal prediction,
Papadopoulos et al. 2002).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compactgpt.config import Anchor, ExpectedLoss
from compactgpt.forecast.scaling_laws import Run, expect_loss, reference_run
from compactgpt.forecast.sweep import SweepRun


@dataclass(frozen=True)
class Calibration:
    """The checks of the rule on all measured runs, and the reference runs used for predictions."""

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
            "enough_for_95": len(self.checks) >= 19,  # with fewer runs, k > n: see the module docstring
        }


def calibrate(anchors: Sequence[Anchor], runs: Sequence[SweepRun], vocab_size: int) -> Calibration:
    """Check the rule on every measured run: predict the run's loss from all other runs."""
    measured = [*anchors, *map(_anchor_of, runs)]
    known = tuple(anchor for anchor in measured if not anchor.assumed_budget)
    return Calibration(known, tuple(_check(anchor, known, vocab_size) for anchor in measured))


def _anchor_of(run: SweepRun) -> Anchor:
    shared = set(Anchor.model_fields) & set(SweepRun.model_fields)
    return Anchor(**run.model_dump(include=shared), corpus="ours", source="results/ladder.json")


def _check(anchor: Anchor, known: Sequence[Anchor], vocab_size: int) -> dict[str, Any]:
    """Predict the loss of one measured run from the other runs, and return the check.

    `factor` is the number by which the 80 % interval must be multiplied to just contain the measured loss.
    """
    others = [other for other in known if other.name != anchor.name]
    rule = expect_loss(reference_run(anchor), anchor.optimizer, vocab_size, others)
    middle, half = _middle_and_half(rule)
    return {
        **anchor.model_dump(include={"name", "corpus", "optimizer", "num_params", "assumed_budget"}),
        "tokens": reference_run(anchor).tokens,
        "measured": anchor.loss,
        **rule.model_dump(exclude={"basis"}),
        "inside_80": rule.low_80 <= anchor.loss <= rule.high_80,
        "inside_95": rule.low_95 <= anchor.loss <= rule.high_95,
        "factor": abs(anchor.loss - middle) / half,
    }


def _middle_and_half(rule: ExpectedLoss) -> tuple[float, float]:
    """Return the middle of the 80 % interval, and half of its width."""
    return (rule.low_80 + rule.high_80) / 2, (rule.high_80 - rule.low_80) / 2
