"""Ground truth of the fidelity experiment: train every member of the set alone, from scratch, with each seed.

python -m experiments.fidelity.truth small|gpu [KEY=VALUE ...] [--seeds 2] [--lanes 2] [--most N] [--out FOLDER]

Writes members.jsonl and truth.jsonl in the variant's folder, a row per training. Existing rows are not repeated, so
the work may be stopped at any time and continued later. KEY=VALUE changes the variant's YAML.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.common import Row, append_row, in_processes, parser_of, read_rows, run_script, today
from experiments.fidelity.members import stratified
from moesaic import Architecture, Pricer, Run, open_run, resolve_budget, single_recipe

HERE = Path(__file__).parent


def open_variant(variant: str, overrides: Sequence[str] = (), folder: Path | None = None) -> Run:
    """The run of the variant's configuration, with its text and device."""
    return open_run(HERE / f"{variant}.yaml", overrides, folder or HERE / variant)


def train_alone(variant: str, overrides: Sequence[str], architecture: Row, seed: int) -> Row:
    """Losses and costs of one architecture trained from scratch."""
    run, member = open_variant(variant, overrides), Architecture.from_dict(architecture)
    config = run.config.retrain
    recipe = single_recipe(member, config, seed, run.device.bfloat16)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = run.trainer.train(recipe, Path(folder), "fidelity")
    test = run.judge("test", config.evaluation_windows, model)(member)
    seconds = time.perf_counter() - started
    validation = run.judge("validation", run.config.search.evaluation_windows, model)(member)
    costs = Pricer(run.context).measured(member, validation.loads)
    return {
        "fingerprint": member.fingerprint,
        "steps": config.steps,
        "test_loss": round(test.loss, 6),
        "standard_error": round(test.standard_error, 6),
        "validation_loss": round(validation.loss, 6),
        "flops": round(costs["flops"]),
        "parameters": round(costs["parameters"]),
        "active_parameters": round(costs["active_parameters"]),
        "seconds": round(seconds, 1),
        "date": today(),
        "device": str(run.device),
    }


def choose_members(run: Run) -> list[Row]:
    """The rows of members.jsonl, which is written only if missing, so that the set does not change."""
    path, pricer = run.path / "members.jsonl", Pricer(run.context)
    if not path.exists():
        centre = resolve_budget(run.config.budget, run.space, pricer).lines[0].limit
        for member in stratified(run.space, pricer, centre, run.config.seed):
            row = {"member": member.number, "stratum": member.stratum, "architecture": member.architecture.to_dict()}
            append_row(path, row)
    return read_rows(path)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("variant", choices=("small", "gpu"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the variant's YAML")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--lanes", type=int, default=2, help="trainings at the same time, each with the threads of the YAML"
    )
    parser.add_argument("--most", type=int, help="train no more than this many")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: the variant's)")
    arguments = parser.parse_intermixed_args()
    run = open_variant(arguments.variant, arguments.overrides, arguments.out)
    run.path.mkdir(parents=True, exist_ok=True)
    table = run.path / "truth.jsonl"
    done = {(row["member"], row["seed"]) for row in read_rows(table)}
    # Seed by seed, so that an incomplete table has all members under one seed before any under the next.
    todo = {
        (member["member"], seed): (arguments.variant, arguments.overrides, member["architecture"], seed)
        for seed in range(arguments.seeds)
        for member in choose_members(run)
        if (member["member"], seed) not in done
    }
    todo = dict(list(todo.items())[: arguments.most])
    print(f"{len(done)} rows are there, {len(todo)} to go", flush=True)
    for count, (key, job) in enumerate(in_processes(train_alone, todo, arguments.lanes), start=1):
        member, seed = key
        row = {"member": member, "seed": seed, **job.result()}
        append_row(table, row)
        print(f"{count}/{len(todo)} member {member} seed {seed}: test {row['test_loss']:.4f}", flush=True)


if __name__ == "__main__":
    run_script(main)
