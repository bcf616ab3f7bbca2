"""A mixture trained on two domains, Python source and English, pruned for one of them: which experts should stay?

python -m experiments.uncurl.run ENGLISH [--out runs/uncurl] [--steps 1500]

ENGLISH is a text file; the Python source is the standard library's top folder. Experts are ordered by REAP's
saliency on text of the domain (`own`), on text of the other one (`other`), or stay as stored (`stored`); the first ones
are kept, in all layers alike, and nothing is trained. `merged` merges them into as many instead. Losses are of the
domain's test split. Then the number of experts of each layer is searched, at the parameters of equal numbers.
"""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import moesaic
from experiments.common import Row, do_stage, facts, markdown, parser_of, run_script
from experiments.uncurl.merging import merged
from moesaic import Architecture, Run, load_search, open_run, write_value
from moesaic.search_spaces import FeedForward, Router

HERE = Path(__file__).parent
KEPT = (16, 12, 8, 6, 4, 2)
WINDOWS = 128
CALIBRATION = 128


def kept(whole: Architecture, experts: int) -> Architecture:
    """``whole`` with the first ``experts`` experts of each layer."""

    def pruned(part: FeedForward) -> FeedForward:
        return FeedForward(part.expert_sizes[:experts], Router("top_k", k=2), part.shared_size)

    return whole.with_layers(
        {slot: replace(layer, feed_forward=pruned(layer.feed_forward)) for slot, layer in whole.layers.items()}
    )


def split_on(files: str, model: Path, out: Path, *settings: str) -> Run:
    """The mixture with its experts ordered on text of a domain."""
    run = open_run(HERE / "prune.yaml", [f"data.files=['{files}']", f"model.from={model}", *settings], out)
    do_stage(run, "supernet")
    return run


def losses_of_merged(run: Run) -> dict[str, float]:
    windows, whole = run.task.batch(CALIBRATION, run.config.seed, 0).tokens, run.space.largest
    return {str(n): round(run.judge("test", WINDOWS, merged(run.supernet, windows, n))(whole).loss, 4) for n in KEPT}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("english", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/uncurl"))
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    domains = {"python": f"{sysconfig.get_paths()['stdlib']}/*.py", "english": str(arguments.english.absolute())}
    both = ", ".join(f"'{files}'" for files in domains.values())
    settings = [f"data.files=[{both}]", f"retrain.steps={arguments.steps}"]
    moesaic.run(HERE / "mixture.yaml", settings, arguments.out / "mixture")
    model = arguments.out / "mixture" / "exports" / "best"

    own = {name: split_on(files, model, arguments.out / name) for name, files in domains.items()}
    stored = split_on(domains["python"], model, arguments.out / "stored", "model.cluster=stored")
    rows: list[Row] = []
    for domain, other in zip(own, reversed(list(own)), strict=True):
        for order, run in (("own", own[domain]), ("other", own[other]), ("stored", stored)):
            judge = own[domain].judge("test", WINDOWS, run.supernet)
            losses = {str(n): round(judge(kept(run.space.largest, n)).loss, 4) for n in KEPT}
            rows.append({"domain": domain, "order": order, "losses": losses})
        rows.append({"domain": domain, "order": "merged", "losses": losses_of_merged(own[domain])})
    searched = [search(domain, files, n, model, arguments.out) for domain, files in domains.items() for n in (8, 4)]
    run = own["python"]
    result = {
        **facts(run.device),
        "seed": run.config.seed,
        "steps": arguments.steps,
        "rows": rows,
        "searched": searched,
    }
    write_value(HERE / "result.json", result, dict)
    table = [[row["domain"], row["order"], *map(str, row["losses"].values())] for row in rows]
    print(markdown("domain|order by|" + "|".join(map(str, KEPT)), table))
    print(markdown("domain|experts|uniform|searched", [[str(value) for value in row.values()] for row in searched]))


def search(domain: str, files: str, experts: int, model: Path, out: Path) -> Row:
    """Loss on the test split of equal numbers of experts, and of searched ones within the same parameters."""
    run = split_on(files, model, out / domain)
    member = kept(run.space.largest, experts)
    limit = run.pricer.expected(member)["parameters"] * 1.0001
    searching = split_on(files, model, out / f"{domain}-{experts}", f"budget.parameters={limit / 1e6:.6f}M")
    for stage in ("latency", "search"):
        do_stage(searching, stage)
    (part,) = searching.budgets
    judge, best = searching.judge("test", WINDOWS), load_search(part)[1].best.architecture
    losses = {"uniform": round(judge(member).loss, 4), "searched": round(judge(best).loss, 4)}
    return {"domain": domain, "experts": experts, **losses}


if __name__ == "__main__":
    run_script(main)
