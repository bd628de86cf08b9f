"""The claims of the note *Performance de NanoGPT Compact contre GPT-2*, and their verdicts.

Most claims give an interval, such as a perplexity of 80 to 120. A value inside this interval supports the
claim.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from compactgpt.common.sections import Name, Section
from compactgpt.config import Model

COMPACT = "compact"  # the name of the model that this project trains
# The possible verdicts on a claim of the note.
Verdict = Literal[
    "confirmed",  # a count or a calculation agrees with the claim
    "restated",  # the claim agrees only with a number that was copied from the note
    "consistent",  # the claim agrees with other claims of the note, but all of them may be wrong
    "supported",  # a measurement or a published value agrees with the claim
    "contradicted",  # the value's interval is outside the claimed interval
    "inconclusive",  # the value's interval overlaps the claimed interval, but is not inside it
    "self-inconsistent",  # the claim contradicts another claim of the note
    "misleading",  # the claim is true in one reading and false in another reading
    "unverifiable",
    "not yet measured",  # a value that decides the claim is missing
]
# How a value was obtained.
Known = Literal[
    "measured",  # by a stage or an experiment of this project
    "computed",  # from a model's configuration, such as the number of parameters
    "published",
    "derived",  # calculated from published values
    "estimated",  # predicted, such as the expected loss
    "reported",  # copied from somebody else's log
]
# A value decides a claim only if the value was obtained in one of these ways.
DECIDING: tuple[Known, ...] = ("measured", "computed", "published", "derived")
# Two claims contradict each other if their intervals overlap too little. The overlap must be at least this
# fraction of the shorter interval.
LEAST_OVERLAP = 0.05
Relation = Literal["inside", "outside", "overlaps"]


class ByEvidence(Section):
    """How to judge a claim: compare the claimed interval with values of reports/evidence.json."""

    by: Literal["evidence"]
    ids: Annotated[tuple[str, ...], Field(min_length=1)]  # ids of the values that decide the claim
    until_measured: tuple[str, ...] = ()  # ids of values that decide while a value of `ids` is missing
    copied: bool = False  # True: the values come from the note itself, so they prove nothing
    reason: str = ""


class ByAgreement(Section):
    """How to judge a claim: check whether the claims in `of` agree with each other."""

    by: Literal["agreement"]
    # The claims must satisfy an equation: loss = log(perplexity), or ratio = numerator / denominator.
    through: Literal["logarithm", "ratio"]
    # Ids of the claims: (perplexity, loss) for `logarithm`, (numerator, denominator, ratio) for `ratio`.
    of: tuple[str, ...]
    reason: str = ""

    def _mistakes(self) -> Iterator[str]:
        needed = {"logarithm": 2, "ratio": 3}[self.through]
        if len(self.of) != needed:
            yield f"`through: {self.through}` needs {needed} claims in `of`, found {len(self.of)}"


class ByHand(Section):
    """The verdict of a person who read the claim and its source."""

    by: Literal["hand"]
    verdict: Verdict
    reason: str


class Claim(Section):
    """One statement of the note that this project checks."""

    id: Name
    quote: str
    english: str  # the quote in English, with English number format
    where: str  # section of the note that contains the quote
    model: str
    quantity: str
    unit: str  # unit of `low` and `high`
    low: float | None = None  # None: no lower limit
    high: float | None = None  # None: no upper limit
    beside: tuple[str, ...] = ()  # ids of values that are shown with the claim, but do not decide the verdict
    experiment: Name | None = None  # the experiment that measures the values of `judged.ids`
    judged: Annotated[ByEvidence | ByAgreement | ByHand, Field(discriminator="by")]

    def _mistakes(self) -> Iterator[str]:
        low, high = self.bounds
        if isinstance(self.judged, ByEvidence) and self.low is None and self.high is None:
            yield "a claim judged by evidence needs low, high or both"
        if low > high:
            yield f"low ({low}) must be at most high ({high})"

    @property
    def bounds(self) -> tuple[float, float]:
        """The claimed interval (low, high). A limit that the claim lacks is infinite."""
        return (-math.inf if self.low is None else self.low, math.inf if self.high is None else self.high)


class Row(Section):
    """A row of the table in the note: for each model, the id of the claim about the row's quantity."""

    id: Literal["parameters", "perplexity", "context", "tokens", "loss"]
    compact: Name
    gpt2: Name
    gpt2_xl: Name


class Claims(Section):
    """The content of claims.yaml."""

    claims: tuple[Claim, ...]
    table: tuple[Row, ...]

    def _mistakes(self) -> Iterator[str]:
        known = [claim.id for claim in self.claims]
        if repeated := sorted({name for name in known if known.count(name) > 1}):
            yield f"more than one claim has the id {repeated}: give each claim a different id"
        named = {name for row in self.table for name in (row.compact, row.gpt2, row.gpt2_xl)}
        # `_compare_claims` divides limits and takes their logarithm, so the limits must be above 0.
        positive = {c.id for c in self.claims if c.low is not None and c.low > 0 and c.high is not None}
        for claim in self.claims:
            if isinstance(claim.judged, ByAgreement):
                named.update(claim.judged.of)
                if unusable := sorted(set(claim.judged.of) - positive):
                    yield f"{claim.id} compares the claims {unusable}: each needs `low` (above 0) and `high`"
        if unknown := sorted(named - set(known)):
            yield f"no such claims: {unknown}; use ids of `claims`"


@dataclass(frozen=True)
class Evidence:
    """One value of reports/evidence.json, with its source, its interval and the hashes of its inputs."""

    id: str
    value: float
    unit: str
    known: Known
    model: str
    source: str
    corpus: str = ""
    low: float | None = None
    high: float | None = None
    exact: bool = False  # True for counts, which have no uncertainty
    stage: str = "comparison"  # the stage that computed the value
    report: str = ""  # the file that contains the value
    context: int | None = None  # tokens in a window; None: no windows, or their size is unknown
    stride: int | None = None  # tokens between the starts of two neighbouring windows
    tokenizer: str = ""
    data_sha256: str = ""  # hash of the token file on which the value was measured
    weights_sha256: str = ""
    code_sha256: str = ""  # hash of the code of `stage`, see `code_hashes`

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval (low, high) of the value. If a limit is missing, `value` replaces this limit."""
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return low, high


class Published(Section):
    """The content of published.yaml: the published models' architectures and values."""

    models: dict[Name, Model]
    values: tuple[Evidence, ...]

    def _mistakes(self) -> Iterator[str]:
        needed = {f"{model}.openwebtext.loss" for model in ("gpt2", "gpt2-tuned", "nanogpt-124m")}
        needed |= {"openwebtext.bytes_per_token", "gpt2.webtext_figure.perplexity"}
        missing = sorted(needed - {value.id for value in self.values}) + sorted({"gpt2"} - set(self.models))
        if missing:
            yield f"the comparison needs {missing}: add these values or models to published.yaml"
        if own := [value.id for value in self.values if value.known in ("measured", "computed", "estimated")]:
            yield f"the field `known` must be published, derived or reported: correct it in the values {own}"


@dataclass(frozen=True)
class Decision:
    """The comparison of a claim with one value, or with other claims."""

    source: str  # id of the value in reports/evidence.json, or ids of the claims that were compared
    # Limits of the value's interval. If claims were compared, limits of the interval that the other claims
    # imply for the last claim.
    low: float
    high: float
    relation: Relation  # where the interval (low, high) is, relative to the claimed interval


@dataclass(frozen=True)
class Judgement:
    """A claim's verdict and the comparisons that led to it."""

    verdict: Verdict
    decisions: tuple[Decision, ...] = ()
    by_hand: bool = False
    reason: str = ""


def judge_claims(claims: Sequence[Claim], evidence: Mapping[str, Evidence]) -> list[Judgement]:
    """Return the judgement of each claim, in the order of the claims."""
    by_id = {claim.id: claim for claim in claims}
    return [_judge(claim, by_id, evidence) for claim in claims]


def _judge(claim: Claim, claims: Mapping[str, Claim], evidence: Mapping[str, Evidence]) -> Judgement:
    judged = claim.judged
    if isinstance(judged, ByHand):
        return Judgement(judged.verdict, by_hand=True, reason=judged.reason)
    if isinstance(judged, ByAgreement):
        decision = _compare_claims(judged, claims)
        verdicts: dict[Relation, Verdict] = {
            "inside": "consistent", "outside": "self-inconsistent", "overlaps": "inconclusive",
        }  # fmt: skip
        return Judgement(verdicts[decision.relation], (decision,), reason=judged.reason)
    usable = {name: item for name, item in evidence.items() if item.known in DECIDING}
    ids = judged.ids if set(judged.ids) <= set(usable) else judged.until_measured or judged.ids
    found = [usable[name] for name in ids if name in usable]
    decisions = tuple(Decision(item.id, *item.bounds, relate(*item.bounds, *claim.bounds)) for item in found)
    relations = {decision.relation for decision in decisions}
    verdict: Verdict = "inconclusive"
    if len(found) < len(ids):
        verdict = "not yet measured"
    elif relations == {"inside"}:
        is_exact = all(item.exact for item in found)
        verdict = "supported" if not is_exact else "restated" if judged.copied else "confirmed"
    elif relations == {"outside"}:
        verdict = "contradicted"
    elif {"inside", "outside"} <= relations:
        verdict = "misleading"
    return Judgement(verdict, decisions, reason=judged.reason)


def _compare_claims(judged: ByAgreement, claims: Mapping[str, Claim]) -> Decision:
    """Compare the last claim in `judged.of` with the interval that is calculated from the other claims."""
    *others, last = (claims[name].bounds for name in judged.of)
    if judged.through == "logarithm":
        low, high = math.log(others[0][0]), math.log(others[0][1])
    else:
        low, high = others[0][0] / others[1][1], others[0][1] / others[1][0]
    # The claims agree if one interval contains the other: `last` (the last claim's) and (low, high).
    contains_last = relate(*last, low, high) == "inside"
    relation = "inside" if contains_last else relate(low, high, *last)
    shared = min(high, last[1]) - max(low, last[0])
    if relation == "overlaps" and shared < LEAST_OVERLAP * min(high - low, last[1] - last[0]):
        relation = "outside"
    return Decision(" and ".join(judged.of), low, high, relation)


def relate(low: float, high: float, claim_low: float, claim_high: float) -> Relation:
    """Return whether the interval (low, high) is inside the claimed interval, outside it, or overlaps it.

    Two intervals that share only a limit overlap.
    """
    if claim_low <= low and high <= claim_high:
        return "inside"
    return "outside" if high < claim_low or low > claim_high else "overlaps"
