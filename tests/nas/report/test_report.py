"""The report: values of its pictures, escaping, and files that open anywhere."""

from __future__ import annotations

import csv
import io
import random
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from rich.console import Console

from moesaic.nas.config import load_config
from moesaic.nas.costs.compliance import MeasuredLine, margin_text
from moesaic.nas.exports.figures import RetrainedModel
from moesaic.nas.pipeline import run_stages
from moesaic.nas.report.data import (
    ON_FRONT,
    Measurement,
    axis_title,
    breakdown,
    front_line,
    pareto_points,
    read_measurements,
    training_curves,
)
from moesaic.nas.report.figures import pareto_figure, ranking_figure
from moesaic.nas.report.findings import Findings
from moesaic.nas.report.html import table
from moesaic.nas.report.page import build_page
from moesaic.nas.report.paper import write_paper_figures
from moesaic.nas.report.pictures import architecture_svg, pixels_per_neuron
from moesaic.nas.report.terminal_summary import print_summary
from moesaic.nas.search.trials import read_trials
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.write_report import build_summary, gather
from moesaic.nas.terminal.progress import Reporter
from tests.nas.run_tools import only

EVIL = '<script>alert("x")</script>&'
CONFIG = """
name: small
data: {{kind: text, files: {files}, vocab_size: 270, sequence_length: 16}}
space: tiny
budget: {{flops: 50%, parameters: 50%}}
device: {{device: cpu, threads: 1}}
supernet: {{steps: 3, batch_size: 2}}
latency: {{batch_size: 1, models: 8, repeats: 3}}
search: {{sampler: nsga2, trials: 16, population: 6, evaluation_windows: 4}}
fidelity: {{check: 4, steps: 3}}
export: {{front: 1}}
retrain: {{steps: 3, batch_size: 2, evaluation_windows: 4}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("report")
    words = random.Random(0).choices(("expert", "router", "token", "layer", "width", "sparse", "dense"), k=6000)
    (root / "corpus.txt").write_text("\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 8)))
    (root / "small.yaml").write_text(CONFIG.format(files=root / "corpus.txt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(root / "cache"))
        quiet = Console(file=io.StringIO())
        run = Run(load_config(root / "small.yaml"), root / "run", Reporter(quiet), latency_asked=True)
        run_stages(run, quiet)
        yield run


@pytest.fixture(scope="module")
def findings(run: Run) -> Findings:
    return gather(only(run), build_summary(only(run)))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return (run.path / "report" / "index.html").read_text(encoding="utf-8")


def test_points_show_every_architecture_once_by_what_became_of_it(run: Run, findings: Findings):
    trials = read_trials(run.path / "search" / "trials.jsonl")
    evaluated = [point for point in findings.points if point.kind in ("evaluated", "over", *ON_FRONT)]
    refused = [point for point in findings.points if point.kind == "refused"]
    assert len(evaluated) == sum(trial.state == "evaluated" for trial in trials)
    assert {p.architecture for p in refused} == {t.architecture for t in trials if t.state == "refused"}
    assert len(refused) == len({p.architecture for p in refused})
    assert all(point.loss is None for point in refused)
    assert all(point.loss is not None for point in evaluated)
    assert [point.kind for point in findings.points].count("best") == 1
    assert [p.label for p in findings.points if p.kind == "rival"] == [model.name for model in findings.models[1:]]


def test_refused_points_have_no_loss_and_say_what_was_over(run: Run, findings: Findings):
    trial = read_trials(run.path / "search" / "trials.jsonl")[0]
    refused = replace(trial, number=99, state="refused", loss=None, values=(), excess={"flops": 0.2, "latency": -0.1})
    again, duplicate = replace(refused, number=100), replace(trial, number=101, state="duplicate")
    points = pareto_points([refused, again, duplicate], findings.result, {}, [])
    assert [(p.kind, p.label, p.loss) for p in points] == [("refused", "trial 99, over budget: FLOPs", None)]


def test_evaluated_points_over_budget_are_a_kind_of_their_own(run: Run, findings: Findings):
    trials = [t for t in read_trials(run.path / "search" / "trials.jsonl") if t.state == "evaluated"]
    number = next(t.number for t in trials if t.number not in {member.number for member in findings.result.front})
    over = [replace(t, excess={"flops": 0.01}) if t.number == number else t for t in trials]
    points = pareto_points(over, findings.result, {}, [])
    assert [p.label for p in points if p.kind == "over"] == [f"trial {number}, over budget: FLOPs"]


def test_front_members_are_not_dominated(findings: Findings):
    inside = [p for p in findings.points if p.kind in ("evaluated", *ON_FRONT) and p.loss is not None]
    front = [(p.loss or 0.0, p.costs["flops"]) for p in inside if p.kind in ON_FRONT]
    others = [(p.loss or 0.0, p.costs["flops"]) for p in inside]
    assert not [a for a in front for b in others if b != a and b[0] <= a[0] and b[1] <= a[1]]


def test_front_line_falls_from_left_to_right_in_every_plane(findings: Findings):
    for cost in findings.points[0].costs:
        line = front_line(findings.points, cost)
        assert line == sorted(line)
        assert [loss for _, loss in line] == sorted((loss for _, loss in line), reverse=True)


def test_breakdown_sums_to_the_total(findings: Findings):
    for model in findings.models:
        rows = breakdown(model, findings.context)
        assert [name for name, _ in rows][-1] == "vocabulary"
        assert len(rows) == len(model.architecture.layers) + 1
        assert sum(sum(parts.values()) for _, parts in rows) == pytest.approx(model.costs["flops"])


def test_history_has_a_step_per_evaluation_and_only_improves(findings: Findings):
    history = findings.history
    assert [step.evaluations for step in history] == list(range(1, len(history) + 1))
    best = [step.best for step in history if step.best is not None]
    assert best == sorted(best, reverse=True)
    assert best[-1] == findings.result.best.loss
    assert all(a.hypervolume <= b.hypervolume + 1e-9 for a, b in pairwise(history))


def test_curves_are_of_the_supernet_and_every_model(run: Run, findings: Findings, tmp_path):
    assert {curve.model for curve in findings.curves} == {None, *(model.name for model in findings.models)}
    assert len({curve.label for curve in findings.curves if curve.model is None}) == 1
    assert training_curves(tmp_path, {"absent": tmp_path / "absent"}) == []


def test_measurements(tmp_path):
    (tmp_path / "m.csv").write_text("kind,measured_ms,predicted_ms,head_macs\nmodel,1.5,1.25,7\n")
    assert read_measurements(tmp_path / "m.csv") == [Measurement("model", 1.5, 1.25)]


def test_words(findings: Findings):
    def margin(measured: float) -> str:
        return margin_text(MeasuredLine("flops", "expected", None, 100.0, 0.0, 0.0, measured, "", "inside"))

    assert margin(90.0) == "inside by 10.0%"
    assert margin(100.0) == "inside by 0.0%"
    assert margin(103.0) == "over by 3.0%"
    assert margin(400.0) == "over 4×"
    assert axis_title("flops", findings.context) == "FLOPs per token"
    assert axis_title("latency", findings.context) == "latency, ms per batch of 1 × 16 tokens"
    assert axis_title("parameters", findings.context) == "parameters in total"


class _References(HTMLParser):
    """Collects what a page would load, and its identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: list[str] = []
        self.identifiers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "href" and value and value.startswith("#"):
                self.anchors.append(value[1:])
            elif name in ("src", "href", "data", "action") and value:
                self.loaded.append(value)
            elif name == "id" and value:
                self.identifiers.append(value)


def test_page_loads_nothing_and_its_anchors_exist(page: str):
    references = _References()
    references.feed(page)
    assert references.loaded == []
    assert references.anchors
    assert set(references.anchors) <= set(references.identifiers)
    assert len(set(references.identifiers)) == len(references.identifiers)
    assert "@import" not in page.split("</style>", maxsplit=1)[0]
    assert "default-src 'none'" in page


def test_page_has_the_configuration_and_every_model(page: str, findings: Findings):
    assert "vocab_size: 270" in page
    for model in [*findings.models, *findings.exported]:
        assert f"<h3>{model.name}</h3>" in page


def test_user_data_is_escaped(findings: Findings):
    model = replace(findings.models[0], name=EVIL)
    assert EVIL not in table([EVIL], [[EVIL]])
    assert EVIL not in architecture_svg(model, pixels_per_neuron([model]))
    summary = replace(findings.summary, name=EVIL, device=EVIL)
    points = [replace(point, label=EVIL) for point in findings.points]
    page = build_page(
        replace(
            findings,
            summary=summary,
            configuration=EVIL,
            models=[model],
            points=points,
            curves=[replace(curve, label=EVIL) for curve in findings.curves],
        )
    )
    assert EVIL not in page
    hover = pareto_figure(points, findings.budget, findings.context, "flops", "nats").to_dict()["data"][0]["hovertext"][
        0
    ]
    assert hover.startswith("&lt;script&gt;")


def test_pictures_are_xml_with_a_tile_per_expert(findings: Findings):
    for model in findings.models:
        root = ElementTree.fromstring(architecture_svg(model, 1.0))
        titles = [element.text or "" for element in root.iter("title")]
        parts = [layer.feed_forward for layer in model.architecture.layers.values()]
        tiles = sum(part.experts + bool(part.shared_size) for part in parts)
        assert sum("of" in title.split() and title.split()[-1] == "neurons" for title in titles) == tiles


def test_page_of_a_run_without_rivals_and_other_exports(findings: Findings):
    bare = replace(
        findings,
        summary=replace(findings.summary, rivals=()),
        models=findings.models[:1],
        exported=[],
        points=[point for point in findings.points if point.kind in ("evaluated", *ON_FRONT)],
        objectives=("loss",),
    )
    assert bare.default_cost == "flops"
    assert "unknown whether" in build_page(bare)


def test_a_run_without_latency_is_reported_without_it(findings: Findings):
    def untimed(result: RetrainedModel) -> RetrainedModel:
        costs = {name: value for name, value in result.measured.items() if name != "latency"}
        return replace(result, measured=costs, latency=None)

    searched, rivals = untimed(findings.summary.chosen.retrained), tuple(map(untimed, findings.summary.rivals))
    chosen = replace(findings.summary.chosen, retrained=searched, measured=searched.measured, latency=None)
    summary = replace(findings.summary, chosen=chosen, rivals=rivals, latency_predictor=None)
    page = build_page(replace(findings, summary=summary, measurements=[]))
    assert "<td>latency, per" not in page
    assert 'id="latency"' not in page
    out = io.StringIO()
    print_summary(Console(file=out, width=200), summary, {})
    shown = out.getvalue().splitlines()
    assert not [line for line in shown if line.strip().startswith("latency ")]
    assert "times the parameters" in out.getvalue()


def test_the_page_says_how_well_scores_of_parts_add_up(findings: Findings):
    additivity = {"solutions": 12, "mean_absolute_error": 0.0084, "mean_error": -0.0066, "tau": None}
    assert findings.summary.search.additivity is None
    search = replace(findings.summary.search, additivity=additivity)
    found = build_page(replace(findings, summary=replace(findings.summary, search=search)))
    assert "the 12 solutions of the integer programme with a mean absolute error of 0.008 (" in found
    assert "(mean error -0.007)." in found


def test_trust_shows_the_front_the_rivals_and_the_check(page: str, findings: Findings):
    section = page.split('<section id="trust">')[1].split("</section>", maxsplit=1)[0]
    for row in (*findings.summary.trust.front, *findings.summary.trust.rivals):
        assert f"<td>{row.name}</td><td>{row.loss:.4f} ± {row.standard_error:.4f}</td>" in section
    assert "Inherited loss ranked 4 members, trained alone for 3 steps" in section
    for judge in ("inherited loss", "counting FLOPs", "counting parameters"):
        assert f"<td>{judge}</td>" in section
    assert 'id="ranking"' in section


def test_trust_without_a_check_says_how_to_get_one(findings: Findings):
    trust = replace(findings.summary.trust, check=None)
    page = build_page(replace(findings, summary=replace(findings.summary, trust=trust)))
    assert "`fidelity.check=8`" in page
    assert 'id="ranking"' not in page


def test_the_ranking_is_drawn_of_those_that_finished(findings: Findings):
    check = findings.summary.trust.check
    assert check is not None
    first, second, *others_left = check.members
    members = [first, replace(second, retrained_loss=None), *others_left]
    others, best = ranking_figure(members, "nats").to_dict()["data"]
    assert list(best["x"]) == [first.inherited_loss]
    assert list(others["y"]) == [member.retrained_loss for member in others_left]
    assert "per token" in others["text"][0]


def test_table_has_a_row_per_front_member(run: Run, findings: Findings):
    with open(run.path / "report" / "pareto.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == [trial.number for trial in findings.result.front]
    assert [float(row["loss"]) for row in rows] == [trial.loss for trial in findings.result.front]
    assert {"fingerprint", "standard_error", "flops", "latency", "memory"} <= set(rows[0])


def test_paper_figures_are_valid_and_reproducible(run: Run, findings: Findings, tmp_path):
    report = run.path / "report"
    assert (report / "pareto.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse(report / "pareto.svg").getroot().tag.endswith("svg")
    write_paper_figures(
        tmp_path, findings.points, findings.budget, findings.context, findings.default_cost, "nats per token"
    )
    for name in ("pareto.png", "pareto.svg"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes()


def test_summary_is_written(run: Run):
    assert (run.path / "summary.json").exists()
    assert only(run).folder("report").complete
