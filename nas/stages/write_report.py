"""Stage report: the page and the pictures of a run."""

from __future__ import annotations

from moesaic.nas.report.summary import build_summary
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import write_front
from moesaic.search_spaces.files import write_json, write_text


def run_report(run: Run) -> None:
    """Leaves ``summary.json`` beside the stages, and ``index.html`` and ``pareto.png``, ``.svg`` and ``.csv``."""
    with run.work("report") as stage:
        if stage is None:
            return
        # Imported here: plotly and matplotlib take longer to import than most commands take to run.
        from moesaic.nas.report.findings import gather
        from moesaic.nas.report.page import build_page
        from moesaic.nas.report.paper import write_paper_figures

        summary = build_summary(run)
        write_json(run.path / "summary.json", summary)
        findings = gather(run, summary)
        write_front(stage.path / "pareto.csv", findings.result)
        write_paper_figures(stage.path, findings.points, findings.budget, findings.context, findings.default_cost)
        write_text(stage.path / "index.html", build_page(findings))
