"""Translation under a budget: the searched model beside HAT's dense one, homogeneous mixtures, AutoMoE's evolution and
random search.

    python -m experiments.translation.run FOLDER [--source en] [--target de] [--test test_2016_flickr] [--out DIR]
        [KEY=VALUE]...

FOLDER has train, val and the test set in two languages, a sentence a line: ``train.en.gz``, ``train.de.gz``, ... All
kinds share one supernet, one predictor of latency, one judge (the inherited loss) and the number of evaluations. Each
winner is trained from the weights it inherits, with several seeds. Writes ``result.json`` and ``result.md`` beside this
file; what is done stays in DIR and is not repeated.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch

from experiments.common import (
    Row,
    append_row,
    do_stage,
    facts,
    in_processes,
    markdown,
    parser_of,
    read_rows,
    run_script,
)
from experiments.search_bench.methods import Evaluate, Search, automoe, moesaic
from moesaic import (
    Architecture,
    Budget,
    BudgetRun,
    Evaluation,
    Run,
    SearchSpace,
    Transformer,
    open_run,
    single_recipe,
    uniform_layouts,
)
from moesaic.search_spaces import Router, StackSpace
from moesaic.supernet import beam_search, slice_of

HERE = Path(__file__).parent
ROUNDS = 30
LARGEST = "largest dense"
"""The reference without a budget."""


@dataclass(frozen=True)
class Winner:
    """The best architecture of a kind inside a budget, by inherited loss, and what finding it took."""

    budget: str
    kind: str
    architecture: Architecture
    inherited_loss: float
    evaluations: int
    seconds: float


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    for name, default in (("source", "en"), ("target", "de"), ("test", "test_2016_flickr")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--out", type=Path, default=Path("runs/translation"))
    given = parser.parse_intermixed_args()
    splits = {"train": "train", "validation": "val", "test": given.test}
    files = {
        split: [str(given.folder / f"{name}.{language}.gz") for language in (given.source, given.target)]
        for split, name in splits.items()
    }
    settings = [f"data.files={json.dumps(files)}", *given.settings]
    run = open_run(HERE / "multi30k.yaml", settings, given.out)
    for stage in ("supernet", "latency"):
        do_stage(run, stage)
    winners = [winner for part in run.budgets for winner in _winners(part, given.out)]
    winners.append(_largest(run))
    rows = _trained(run, winners, settings, given.out)
    _write(run, winners, rows, _timed(run, winners, given.out))


# ---------------------------------------------------------------- searching


def _winners(part: BudgetRun, out: Path) -> Iterator[Winner]:
    """One of each kind. All see the same losses; each pays for its own evaluations."""
    run, space = part.run, part.run.space
    judge = run.judge("validation", run.config.search.evaluation_windows)
    count, seed = run.config.search.trials, run.config.seed
    known: dict[Architecture, Evaluation] = {}

    def searched(kind: str, search: Search, within: SearchSpace) -> Winner:
        return _found(part, kind, lambda evaluate: search(within, part.budget, evaluate, seed, count), judge, known)

    def layouts(kind: str, router: Router) -> Winner:
        return _found(part, kind, partial(_homogeneous, space, part.budget, router, count), judge, known)

    path = out / f"winners-{part.name}.jsonl"
    done = {row["kind"]: row for row in read_rows(path)}
    kinds: dict[str, Callable[[], Winner]] = {
        "searched": lambda: searched("searched", partial(moesaic, "evolution"), space),
        "HAT": lambda: searched("HAT", partial(moesaic, "evolution"), dense(space)),
        "AutoMoE": lambda: searched("AutoMoE", automoe, as_automoe(space)),
        "random": lambda: searched("random", partial(moesaic, "random"), space),
        "Switch": lambda: layouts("Switch", Router("top_k", k=1)),
        "top-2": lambda: layouts("top-2", Router("top_k", k=2)),
    }
    for kind, find in kinds.items():
        if kind not in done:
            winner = find()
            done[kind] = {**vars(winner), "architecture": winner.architecture.to_dict()}
            append_row(path, done[kind])
        row = done[kind]
        yield Winner(**{**row, "architecture": Architecture.from_dict(row["architecture"])})


def _found(
    part: BudgetRun,
    kind: str,
    search: Callable[[Evaluate], list[Architecture]],
    judge: Evaluate,
    known: dict[Architecture, Evaluation],
) -> Winner:
    """The best that keeps the budget under its measured routing."""
    seconds = 0.0

    def evaluate(architecture: Architecture) -> Evaluation:
        nonlocal seconds
        if architecture not in known:
            started = time.perf_counter()
            known[architecture] = judge(architecture)
            seconds += time.perf_counter() - started
        return known[architecture]

    started = time.perf_counter()
    asked = list(dict.fromkeys(search(evaluate)))
    inside = [
        (known[one].loss, one)
        for one in asked
        if max(part.budget.measured_excess(part.run.pricer.measured(one, known[one].loads)).values()) <= 0
    ]
    loss, best = min(inside, key=lambda pair: pair[0])
    part.reporter.say(f"{part.name}: {kind} {loss:.4f} of {len(inside)} inside the budget")
    return Winner(part.name, kind, best, loss, len(asked), round(time.perf_counter() - started, 1))


def _homogeneous(
    space: SearchSpace, budget: Budget, router: Router, count: int, evaluate: Evaluate
) -> list[Architecture]:
    """Layouts whose layers are alike, with ``router`` everywhere: those with most FLOPs inside the budget, since more
    compute is better."""
    layouts = [
        layout
        for layout in uniform_layouts(space, sparse=True)
        if {layer.feed_forward.router for layer in layout.layers.values()} == {router} and budget.fits(layout)
    ]
    layouts.sort(key=lambda layout: (-budget.pricer.expected(layout)["flops"], layout.fingerprint))
    for layout in layouts[:count]:
        evaluate(layout)
    return layouts[:count]


def dense(space: SearchSpace) -> SearchSpace:
    """HAT's part of the space: every choice but experts."""
    return _with_layers(space, "dense", lambda group: group.experts == 1)


def as_automoe(space: SearchSpace) -> SearchSpace:
    """AutoMoE's part of the space: one expert per token, and as many encoder layers as there are."""
    found = _with_layers(space, "AutoMoE", lambda group: True, lambda router: router is None or router.max_experts == 1)
    assert found.encoder is not None
    return replace(found, encoder=replace(found.encoder, depths=found.encoder.depths[-1:]))


def _with_layers(
    space: SearchSpace, name: str, groups: Callable, routers: Callable = lambda router: True
) -> SearchSpace:
    def stack(whole: StackSpace) -> StackSpace:
        layers = []
        for layer in whole.layers:
            kept = (replace(g, routers=tuple(filter(routers, g.routers))) for g in layer.groups if groups(g))
            layers.append(replace(layer, groups=tuple(kept)))
        return replace(whole, layers=tuple(layers))

    assert space.encoder is not None
    return replace(space, name=name, decoder=stack(space.decoder), encoder=stack(space.encoder))


def _largest(run: Run) -> Winner:
    architecture = dense(run.space).largest
    judge = run.judge("validation", run.config.search.evaluation_windows)
    return Winner("", LARGEST, architecture, judge(architecture).loss, 1, 0.0)


# ---------------------------------------------------------------- training


def _trained(run: Run, winners: list[Winner], settings: list[str], out: Path) -> list[Row]:
    """A row per architecture and seed; equal winners are trained once."""
    path, seeds = out / "trained.jsonl", range(run.config.seed, run.config.seed + run.config.retrain.seeds)
    rows = read_rows(path)
    done = {(row["fingerprint"], row["seed"]) for row in rows}
    jobs = {
        (architecture.fingerprint, seed): (settings, out, architecture.to_dict(), seed)
        for seed in seeds
        for architecture in dict.fromkeys(winner.architecture for winner in winners)
        if (architecture.fingerprint, seed) not in done
    }
    for _, future in in_processes(train_one, jobs, lanes=2):
        rows.append(future.result())
        append_row(path, rows[-1])
        run.reporter.say(f"trained {len(rows)}: {rows[-1]['fingerprint']} {rows[-1]['metrics']}")
    return rows


def train_one(settings: list[str], out: Path, plain: Row, seed: int) -> Row:
    """Train one architecture from the supernet's weights, with one thread, and translate the test set."""
    run = open_run(HERE / "multi30k.yaml", settings, out)
    architecture, config = Architecture.from_dict(plain), run.config.retrain
    started = time.perf_counter()
    model = finished(run, architecture, seed, out)
    evaluation = run.judge("test", config.evaluation_windows, model)(architecture)
    scores = run.scores("test", model, evaluation)
    return {
        "fingerprint": architecture.fingerprint,
        "seed": seed,
        "loss": scores.loss,
        "metrics": scores.metrics,
        "signature": scores.signature,
        "loads": [load and list(load.pairs_per_token) for load in evaluation.loads],
        "seconds": round(time.perf_counter() - started, 1),
    }


def finished(run: Run, architecture: Architecture, seed: int, out: Path) -> Transformer:
    """The trained model; it is trained unless it is there."""
    supernet = run.supernet
    torch.set_num_threads(1)  # two trainings at a time, one thread each, take less time than one after the other
    recipe = single_recipe(architecture, run.config.retrain, seed, run.device.bfloat16)
    folder = out / "trained" / architecture.fingerprint / f"seed-{seed}"
    return run.trainer.finish(recipe, folder, f"{architecture.fingerprint}/{seed}", weights=slice_of(supernet))


# ---------------------------------------------------------------- timing


def _timed(run: Run, winners: list[Winner], out: Path) -> dict[str, float]:
    """Median milliseconds of a translation of the context's lengths by fingerprint, all models by turns."""
    context, batch = run.context, run.task.held_out("test", 200)
    assert batch.source is not None and batch.source_mask is not None
    words, rng = context.sequence_length - 1, Random(0)
    source = batch.source[batch.source_mask][: context.source_length][None]
    architectures = dict.fromkeys(winner.architecture for winner in winners)
    models = {one.fingerprint: finished(run, one, run.config.seed, out) for one in architectures}
    torch.set_num_threads(run.device.threads)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS + 1):
        for name in rng.sample(sorted(models), len(models)):
            started = time.perf_counter()
            beam_search(models[name], source, start=0, end=1, beam=context.beam, min_length=words, max_length=words)
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(own[1:]) for name, own in times.items()}


# ---------------------------------------------------------------- results


def _write(run: Run, winners: list[Winner], rows: list[Row], milliseconds: dict[str, float]) -> None:
    found = []
    for winner in winners:
        own = [row for row in rows if row["fingerprint"] == winner.architecture.fingerprint]
        costs = run.pricer.expected(winner.architecture)
        found.append(
            {
                **asdict(winner),
                "architecture": winner.architecture.to_dict(),
                "fingerprint": winner.architecture.fingerprint,
                "costs": dict(costs),
                "milliseconds": milliseconds[winner.architecture.fingerprint],
                "runs": own,
            }
        )
    plain = {
        **facts(run.device),
        "seed": run.config.seed,
        "data": run.task.fingerprint,
        "context": str(run.context),
        "predictor": run.predictor and run.predictor.describe(),
        "settings": run.config.model_dump(mode="json", include={"supernet", "search", "retrain", "latency", "budgets"}),
        "signature": rows[0]["signature"],
        "models": found,
    }
    (HERE / "result.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    (HERE / "result.md").write_text(table(plain), encoding="utf-8")


def table(plain: Row) -> str:
    """Means over seeds, with the sample's deviation; ratios are to the largest dense model."""
    reference = next(model for model in plain["models"] if model["kind"] == LARGEST)
    lines = []
    for model in plain["models"]:
        bleu = [run["metrics"]["bleu"] for run in model["runs"]]
        spread = f" ± {statistics.stdev(bleu):.2f}" if len(bleu) > 1 else ""
        costs = model["costs"]
        lines.append(
            [
                model["budget"] or "none",
                model["kind"],
                f"{statistics.mean(bleu):.2f}{spread}",
                f"{statistics.mean(run['metrics']['chrf'] for run in model['runs']):.2f}",
                f"{statistics.mean(run['loss'] for run in model['runs']):.3f}",
                f"{costs['flops'] / 1e6:.2f} ({reference['costs']['flops'] / costs['flops']:.2f}x fewer)",
                f"{costs['active_parameters'] / 1e6:.2f} / {costs['parameters'] / 1e6:.2f}",
                f"{model['milliseconds']:.1f} ({reference['milliseconds'] / model['milliseconds']:.2f}x faster)",
                f"{model['evaluations']}, {model['seconds']:.0f} s",
            ]
        )
    head = "budget|kind|BLEU|chrF|loss|MFLOPs per token|active / all parameters (M)|ms per sentence|evaluations, time"
    return markdown(head, lines)


if __name__ == "__main__":
    run_script(main)
