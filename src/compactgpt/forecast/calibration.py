"""How often the rule of compactgpt.laws would have held: each measured run, told by all the others.

The runs are the anchors of params.yaml and the rungs of our ladder. Each is left out in turn, the rule makes
its two intervals from what is left, and the measured loss lies inside or not. GPT-2's own budget was never
published: those runs are checked at an assumed one and tell nothing about others.

The calibrated interval is the rule's with all these runs at hand, widened by the factor that would have
held the stated share of them (split conformal prediction, Papadopoulos et al. 2002: the k-th smallest of
the n factors, k = ceil(share (n + 1)); where n is too small for that, the largest).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compactgpt.config import Anchor, ExpectedLoss
from compactgpt.forecast.scaling_laws import Run, expect, run_of
from compactgpt.forecast.sweep import Rung


@dataclass(frozen=True)
class Check:
    """One measured run and what the rule said of it without knowing it."""

    name: str
    corpus: str
    optimizer: str
    tokens: int
    num_params: int
    assumed_budget: bool
    measured: float
    value: float
    low_80: float
    high_80: float
    low_95: float
    high_95: float
    inside_80: bool
    inside_95: bool
    factor: float  # by which the 80 % interval, about its middle, would just have held


@dataclass(frozen=True)
class Calibration:
    """All checks, and the runs that they were made from."""

    anchors: tuple[Anchor, ...]
    checks: tuple[Check, ...]

    def factor(self, share: float) -> float:
        """What the 80 % interval must be multiplied by to hold a share of the checked runs."""
        ordered = sorted(check.factor for check in self.checks)
        return ordered[min(math.ceil(share * (len(ordered) + 1)), len(ordered)) - 1]

    def widened(self, run: Run, optimizer: str, vocab_size: int) -> ExpectedLoss:
        """The calibrated interval of a run: see the module."""
        told = expect(run, optimizer, vocab_size, self.anchors)
        middle, half = (told.low_80 + told.high_80) / 2, (told.high_80 - told.low_80) / 2
        guessing = math.log(vocab_size)
        near, far = (half * self.factor(share) for share in (0.80, 0.95))
        far = max(near, far)
        return ExpectedLoss(
            value=middle,
            low_80=max(middle - near, 0.01),
            high_80=max(min(middle + near, guessing), middle),
            low_95=max(middle - far, 0.01),
            high_95=max(min(middle + far, guessing), middle),
            basis=f"{told.basis}; calibrated on {len(self.checks)} measured runs, each told by the others",
        )

    def report(self) -> dict[str, Any]:
        """Render for reports/estimate.json."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "of": len(self.checks),
            "held_80": sum(check.inside_80 for check in self.checks),
            "held_95": sum(check.inside_95 for check in self.checks),
            "factor_80": self.factor(0.80),
            "factor_95": self.factor(0.95),
            "enough_for_95": len(self.checks) >= 19,  # fewer, and the largest factor stands in
        }


def calibrate(anchors: Sequence[Anchor], rungs: Sequence[Rung], vocab_size: int) -> Calibration:
    """Check the rule on every measured run, each left out in turn."""
    measured = [*anchors, *map(_anchor, rungs)]
    known = tuple(anchor for anchor in measured if not anchor.assumed_budget)
    return Calibration(known, tuple(_check(anchor, known, vocab_size) for anchor in measured))


def _anchor(rung: Rung) -> Anchor:
    shared = set(Anchor.model_fields) & set(Rung.model_fields)
    return Anchor(**rung.model_dump(include=shared), corpus="ours", source="results/ladder.json")


def _check(anchor: Anchor, known: Sequence[Anchor], vocab_size: int) -> Check:
    others = tuple(other for other in known if other.name != anchor.name)
    told = expect(run_of(anchor), anchor.optimizer, vocab_size, others)
    middle, half = (told.low_80 + told.high_80) / 2, (told.high_80 - told.low_80) / 2
    return Check(
        **anchor.model_dump(include={"name", "corpus", "optimizer", "num_params", "assumed_budget"}),
        tokens=run_of(anchor).tokens,
        measured=anchor.loss,
        **told.model_dump(exclude={"basis"}),
        inside_80=told.low_80 <= anchor.loss <= told.high_80,
        inside_95=told.low_95 <= anchor.loss <= told.high_95,
        factor=abs(anchor.loss - middle) / half,
    )
