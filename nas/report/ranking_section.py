"""The report's section on trust: which models inherited losses can tell apart, and how well they rank them."""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.nas.report.figures import ranking_figure
from moesaic.nas.report.html import paragraph, plot, table
from moesaic.nas.trust.findings import Check, Standing, Trust
from moesaic.nas.trust.sentences import INHERITED, check_sentence, front_sentence, rivals_sentence, tau_text


def trust_section(trust: Trust, unit: str) -> Iterator[str]:
    """The section's parts, from what stage fidelity found; losses are in ``unit``."""
    yield paragraph(check_sentence(trust.check), "verdict")
    if trust.check is not None:
        yield from _check(trust.check, unit)
    yield "<h3>What inherited losses can tell apart</h3>"
    yield paragraph(f"{front_sentence(trust)} {rivals_sentence(trust)}")
    yield table(
        (
            "member of the front, or rival",
            "inherited loss",
            "above the best, in pairs",
            "level",
            "p",
            "differs from best",
        ),
        [_best_row(trust.front[0]), *map(_other_row, (*trust.front[1:], *trust.rivals))],
        chosen=0,
    )
    yield paragraph(
        f"± is the standard error over {trust.sequences} sequences of the validation split, for a pair that of the "
        "paired difference. p is from a paired t-test with Holm's correction for all pairs of these models; "
        "below 0.05 a difference is called significant. A level ends before the first member that differs "
        f"significantly from the level's first: {trust.levels} levels, {len(trust.front)} members. The tests ignore "
        "training-seed variance, of the supernet too, and that the front was selected from all trials by these same "
        "losses.",
        "muted",
    )


def _best_row(row: Standing) -> tuple[str, ...]:
    return row.name, _loss_text(row.loss, row.standard_error), "", str(row.level), "", ""


def _other_row(row: Standing) -> tuple[str, ...]:
    above = row.above_best
    return (
        row.name,
        _loss_text(row.loss, row.standard_error),
        _loss_text(above.mean, above.standard_error, "+"),
        "rival" if row.level is None else str(row.level),
        "< 0.0001" if row.p_value < 1e-4 else f"{row.p_value:.4f}",
        "yes" if row.differs else "no",
    )


def _loss_text(loss: float, error: float, sign: str = "") -> str:
    return f"{loss:{sign}.4f} ± {error:.4f}"


def _check(check: Check, unit: str) -> Iterator[str]:
    judges = check.judges
    if judges is not None:
        tops = list(judges[INHERITED].regret)
        yield table(
            ("judge", "Kendall's tau, 95 % interval", "Spearman's rho", *(f"regret, first {k}" for k in tops)),
            [
                (
                    name,
                    tau_text(judge),
                    "undefined" if judge.rho is None else f"{judge.rho:.2f}",
                    *(f"{judge.regret[k]:.2%}" for k in tops),
                )
                for name, judge in judges.items()
            ],
            chosen=0,
        )
        yield paragraph(
            "Agreement with the losses of the same architectures trained alone. Regret: how far the best of a "
            "judge's top k is above the best of all. The interval is exact in Mallows's model, where the "
            "chance of a ranking falls by one factor with every pair in the wrong order.",
            "muted",
        )
    if any(member.retrained_loss is not None for member in check.members):
        yield plot("ranking", ranking_figure(check.members, unit))
        yield paragraph(
            "Bars are ± one standard error over sequences. All members are evaluated on the same sequences, so most of "
            "the error shifts all points together. With a perfect judge the points would rise from left to right.",
            "muted",
        )
