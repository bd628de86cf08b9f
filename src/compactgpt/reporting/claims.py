"""The note's claims and what is known -> verdicts, with the numbers that decided.

A claim is an interval; so is a piece of evidence (a point where its uncertainty is unknown or none). The
interval rule: evidence inside the claim supports it, disjoint from it contradicts it, anything else
decides nothing. Evidence that is only reported or estimated stands beside a claim and never decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compactgpt.config import Model, Name, Section

Verdict = Literal[
    "confirmed",  # a count or plain arithmetic says so
    "supported",  # a measurement or a publication says so
    "contradicted",
    "inconclusive",  # the intervals overlap, neither inside
    "self-inconsistent",  # with another claim of the note
    "misleading",  # true in one reading, false in another
    "unverifiable",
    "not yet measured",
]
Known = Literal["measured", "computed", "published", "estimated", "reported"]
Relation = Literal["inside", "outside", "overlaps"]


class ByEvidence(Section):
    """Judged against values of the record."""

    by: Literal["evidence"]
    ids: Annotated[tuple[str, ...], Field(min_length=1)]


class ByAgreement(Section):
    """Judged against other claims: a perplexity and a loss, or two perplexities and their ratio."""

    by: Literal["agreement"]
    through: Literal["logarithm", "ratio"]
    of: tuple[str, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"logarithm": 2, "ratio": 3}[self.through]
        if len(self.of) != needed:
            raise ValueError(f"through {self.through} takes {needed} claims, found {len(self.of)}")
        return self


class ByHand(Section):
    """A human reading."""

    by: Literal["hand"]
    verdict: Verdict
    reason: str


class Claim(Section):
    """One checkable sentence of the note."""

    id: Name
    quote: str
    english: str  # the quote in English, with English number marks
    where: str
    model: str
    quantity: str
    unit: str
    low: float | None = None
    high: float | None = None
    beside: tuple[str, ...] = ()
    experiment: Name | None = None  # whose run decides it
    judged: Annotated[ByEvidence | ByAgreement | ByHand, Field(discriminator="by")]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if isinstance(self.judged, ByEvidence) and self.low is None and self.high is None:
            raise ValueError("a claim judged by evidence needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) must be at most high ({self.high})")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """What the note says, an open side being infinite."""
        return (
            -math.inf if self.low is None else self.low,
            math.inf if self.high is None else self.high,
        )


class Row(Section):
    """A row of the note's table: the claim in each of its columns."""

    id: Literal["parameters", "perplexity", "context", "tokens", "loss"]
    compact: Name
    gpt2: Name
    gpt2_xl: Name


class Claims(Section):
    """All of claims.yaml."""

    claims: tuple[Claim, ...]
    table: tuple[Row, ...]

    @model_validator(mode="after")
    def _linked(self) -> Self:
        known = [claim.id for claim in self.claims]
        if len(set(known)) != len(known):
            raise ValueError(f"ids repeat themselves: {sorted({i for i in known if known.count(i) > 1})}")
        named = [name for row in self.table for name in (row.compact, row.gpt2, row.gpt2_xl)]
        bounded = {c.id for c in self.claims if c.low is not None and c.low > 0 and c.high is not None}
        for claim in self.claims:
            if isinstance(claim.judged, ByAgreement):
                named += claim.judged.of
                if open_ended := sorted(set(claim.judged.of) - bounded):
                    raise ValueError(f"{claim.id}: agreement of {open_ended} needs low (above 0) and high")
        if unknown := sorted(set(named) - set(known)):
            raise ValueError(f"no such claims: {unknown}")
        return self


class PublishedValue(Section):
    """A number that somebody else made known."""

    id: str
    model: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str
    exact: bool = False
    corpus: str
    known: Literal["published", "reported"]
    source: str
    context: int | None = None  # most tokens that the model could see
    stride: int | None = None  # tokens between the starts of two windows
    tokenizer: str = ""


class Published(Section):
    """All of published.yaml: shapes to compute with, and values."""

    models: dict[Name, Model]
    values: tuple[PublishedValue, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"gpt2.openwebtext.loss", "gpt2-tuned.openwebtext.loss", "openwebtext.bytes_per_token"}
        missing = sorted(needed - {value.id for value in self.values}) + sorted({"gpt2"} - set(self.models))
        if missing:
            raise ValueError(f"the comparison needs {missing}")
        return self


@dataclass(frozen=True)
class Evidence:
    """One value of the record, with all that a reader needs to trust it or not."""

    id: str
    value: float
    unit: str
    known: Known
    model: str
    source: str
    corpus: str = ""
    low: float | None = None
    high: float | None = None
    exact: bool = False  # a count: no uncertainty

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval, or the point where none is known."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )

    @property
    def decides(self) -> bool:
        """Whether a verdict may rest on it."""
        return self.known in ("measured", "computed", "published")


@dataclass(frozen=True)
class Decision:
    """One number that was held against a claim."""

    source: str  # id of the evidence, or of the claims that were compared
    low: float
    high: float
    relation: Relation


@dataclass(frozen=True)
class Judgement:
    """A claim's verdict and what it rests on."""

    claim: str
    verdict: Verdict
    by_hand: bool
    reason: str  # of a reading by hand
    decisions: tuple[Decision, ...]


def relate(low: float, high: float, claim_low: float, claim_high: float) -> Relation:
    """Where an interval lies with respect to a claimed one; touching ends count as shared."""
    if claim_low <= low and high <= claim_high:
        return "inside"
    return "outside" if high < claim_low or low > claim_high else "overlaps"


def judge(claims: Sequence[Claim], evidence: Mapping[str, Evidence]) -> list[Judgement]:
    """Judge every claim with the evidence at hand, in the order of the claims."""
    by_id = {claim.id: claim for claim in claims}
    return [_judge_one(claim, by_id, evidence) for claim in claims]


def _judge_one(claim: Claim, claims: Mapping[str, Claim], evidence: Mapping[str, Evidence]) -> Judgement:
    judged = claim.judged
    if isinstance(judged, ByHand):
        return Judgement(claim.id, judged.verdict, True, judged.reason, ())
    if isinstance(judged, ByAgreement):
        decision = _agreement(judged, claims)
        agree: dict[Relation, Verdict] = {
            "inside": "confirmed",
            "outside": "self-inconsistent",
            "overlaps": "inconclusive",
        }
        return Judgement(claim.id, agree[decision.relation], False, "", (decision,))
    found = [evidence[name] for name in judged.ids if name in evidence and evidence[name].decides]
    decisions = tuple(Decision(e.id, *e.bounds, relate(*e.bounds, *claim.bounds)) for e in found)
    complete = len(found) == len(judged.ids)
    verdict = _verdict(decisions, all(e.exact for e in found)) if complete else None
    return Judgement(claim.id, verdict or "not yet measured", False, "", decisions)


def _verdict(decisions: Sequence[Decision], exact: bool) -> Verdict:
    relations = {decision.relation for decision in decisions}
    if relations == {"inside"}:
        return "confirmed" if exact else "supported"
    if relations == {"outside"}:
        return "contradicted"
    return "misleading" if {"inside", "outside"} <= relations else "inconclusive"


def _agreement(judged: ByAgreement, claims: Mapping[str, Claim]) -> Decision:
    """Turn the first claim (or the ratio of the first two) into the last one's unit and compare."""
    *first, last = (claims[name].bounds for name in judged.of)
    if judged.through == "logarithm":
        low, high = math.log(first[0][0]), math.log(first[0][1])
    else:
        low, high = first[0][0] / first[1][1], first[0][1] / first[1][0]
    relation = relate(low, high, *last)
    if relate(*last, low, high) == "inside":
        relation = "inside"  # the wider statement holds the narrower one, whichever it is
    return Decision(" and ".join(judged.of), low, high, relation)
