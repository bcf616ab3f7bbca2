"""Sentences about the ranking of a run, for the terminal and the report."""

from __future__ import annotations

from moesaic.nas.trust.findings import Check, FlopsErrors, Standing, Trust
from moesaic.nas.trust.ranking import Agreement

INHERITED, CORRECTED = "inherited loss", "inherited loss, corrected"
FLOPS, PARAMETERS = "counting FLOPs", "counting parameters"
"""Judges of architectures: inherited loss, the same corrected by trainings, and two that need no evaluation."""
_WIDE = 0.5
"""A 95 % interval of Kendall's tau this wide cannot tell a good judge from a middling one."""


def sentences(trust: Trust) -> list[str]:
    """All sentences, as one text."""
    return [
        front_sentence(trust),
        *filter(None, [rivals_sentence(trust)]),
        check_sentence(trust.check),
        flops_sentence(trust.flops),
    ]


def front_sentence(trust: Trust) -> str:
    """How many levels of the front the search's losses can tell apart."""
    front = trust.front
    error = max(member.standard_error for member in front)
    if len(front) == 1:
        return f"The front has one member, whose inherited loss has a standard error of {error:.4f}."
    return (
        f"Inherited losses have a standard error of up to {error:.4f}. Paired over the same {trust.sequences} "
        f"sequences, they tell {trust.levels} levels apart among the {len(front)} members of the front: "
        f"{sum(member.differs for member in front)} of the {len(front) - 1} others differ from the best one, and "
        f"{trust.neighbours_that_differ} of {len(front) - 1} pairs of neighbours differ. These tests are about these "
        "weights and other text; training again may change the order."
    )


def flops_sentence(flops: FlopsErrors | None) -> str:
    """How far predicted FLOPs of models with threshold routers are off on unseen text."""
    if flops is None:
        return "FLOPs: no evaluated architecture has a threshold router, so they are exact."
    before, after = flops.before, flops.after
    return (
        f"FLOPs per token of {flops.models} models with threshold routers, on the test split: the prediction before "
        f"evaluation is off by {before.median:.1%} in the median and {before.largest:.1%} at most; with the routing "
        f"measured on the validation split, by {after.median:.1%} and {after.largest:.1%}."
    )


def rivals_sentence(trust: Trust) -> str:
    """How the best one compares with each rival; empty where there is none."""
    if not trust.rivals:
        return ""
    return f"By inherited loss the best one is {' and '.join(map(_against, trust.rivals))}."


def _against(rival: Standing) -> str:
    above = rival.above_best
    figures = f"{rival.name} (difference {above.mean:+.4f} ± {above.standard_error:.4f})"
    if not rival.differs:
        return f"not distinguishable from {figures}"
    return f"significantly {'better' if above.mean > 0 else 'worse'} than {figures}"


def check_sentence(check: Check | None) -> str:
    """How well inherited losses ranked the members that were trained from scratch, or how to find out."""
    if check is None:
        return (
            "It was not measured how well inherited losses rank models trained alone; `fidelity.check=8` trains "
            "eight architectures to find out."
        )
    failed = sum(member.retrained_loss is None for member in check.members)
    count = len(check.members) - failed
    diverged = f" ({failed} more diverged)" if failed else ""
    judges = check.judges
    if judges is None:
        return f"Only {count} members were trained alone{diverged}: too few to estimate a rank correlation."
    own = judges[INHERITED]
    text = (
        f"Inherited loss ranked {count} members{diverged}, trained alone for {check.steps} steps, with "
        f"Kendall's tau {tau_text(own)}, {FLOPS} with {_number(judges[FLOPS].tau)}, {PARAMETERS} with "
        f"{_number(judges[PARAMETERS].tau)}"
    )
    if own.tau_low is not None and own.tau_high is not None and own.tau_high - own.tau_low > _WIDE:
        text += f"; with {count} members the interval is wide"
    beaten = [name for name in (FLOPS, PARAMETERS) if (own.tau or 0.0) <= (judges[name].tau or 0.0)]
    if beaten:
        text += f". This supernet ranked no better than {' or '.join(beaten)}"
    return f"{text}.{_correction_text(judges)}"


def _correction_text(judges: dict[str, Agreement]) -> str:
    if CORRECTED not in judges:
        return ""
    own, corrected = judges[INHERITED], judges[CORRECTED]
    text = f" Losses corrected by the other trainings ranked them with tau {tau_text(corrected)}"
    if corrects(judges):
        return f"{text}, so corrected losses decide what is exported and its rivals."
    return f"{text}, no better than the {_number(own.tau)} of uncorrected losses, which decide."


def corrects(judges: dict[str, Agreement] | None) -> bool:
    """Whether corrected losses rank held-out members better than inherited losses do."""
    if judges is None or CORRECTED not in judges:
        return False
    return (judges[CORRECTED].tau or 0.0) > (judges[INHERITED].tau or 0.0)


def tau_text(judge: Agreement) -> str:
    """``0.64 [0.20, 0.93]``: Kendall's tau and its 95 % interval."""
    if judge.tau is None:
        return _number(None)
    return f"{judge.tau:.2f} [{_number(judge.tau_low)}, {_number(judge.tau_high)}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
