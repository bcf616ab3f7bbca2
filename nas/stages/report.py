"""Stage report: the pages and pictures of a run."""
from __future__ import annotations
from nas.stages.run import Run
from nas.summary import build_summary
from search_spaces.files import write_json


def run_report(run: Run) -> None:
    with run.work("report") as stage:
        if stage is None:
            return
        write_json(run.path / "summary.json", build_summary(run))
