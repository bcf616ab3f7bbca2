"""The command line: one command per stage, `run` for all of them, and tools to check a run before training."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from moesaic.nas import __version__
from moesaic.nas.stages.stage import STAGES

app = typer.Typer(
    name="moesaic",
    help="Designs heterogeneous sparse Transformers under a compute budget.",
    epilog="Start with: moesaic init my.yaml, moesaic plan my.yaml, moesaic run my.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

imports = typer.Typer(help="Read an architecture of another tool.", no_args_is_help=True)
app.add_typer(imports, name="import", rich_help_panel="Main")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. search.trials=50.", show_default=False),
]
Out = Annotated[Path | None, typer.Option("--out", help="Directory of the run.  [default: runs/NAME]")]
Convention = Literal["hat"]
ConvertedForm = Literal["transformers"]
Json = Annotated[bool, typer.Option("--json", help="Print data instead of tables.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"moesaic {__version__}")
        raise typer.Exit


@app.command(rich_help_panel="Main", help=f"Run all stages: {', '.join(stage.name for stage in STAGES)}.")
def run(config: ConfigFile, overrides: Overrides = None, out: Out = None) -> None:
    _stages(config, overrides, out, None)


@app.command(rich_help_panel="Main")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Json = False,
    latency: Annotated[bool, typer.Option("--latency", help="Time this machine: latency, and stages.")] = False,
) -> None:
    """Check before training: size of the space, range of costs, whether the budget can be met."""
    with _told():
        from moesaic.nas.config import load_config
        from moesaic.nas.plan import build_plan, print_plan
        from moesaic.nas.stages.run import Run
        from moesaic.nas.terminal.tables import output_console

        run = Run(load_config(config, overrides or ()), Path("runs"))
        results = {part.name: build_plan(part, latency) for part in run.budgets}
        if as_json:
            plain = {name: asdict(result) for name, result in results.items()}
            print(json.dumps(plain if len(plain) > 1 else next(iter(plain.values())), indent=2))
        else:
            for name, result in results.items():
                print_plan(output_console(), result, name)
        if any(result.problem for result in results.values()):
            raise typer.Exit(2)


@app.command(rich_help_panel="Main")
def init(path: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write a commented configuration to start from."""
    with _told():
        import re

        from moesaic.search_spaces import MoesaicError
        from moesaic.search_spaces.files import write_text

        if path.exists():
            raise MoesaicError("exists already", where=str(path), allowed="a new file")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run"
        template = Path(__file__).parent / "templates" / "config.yaml"
        write_text(path, template.read_text(encoding="utf-8").format(name=name))
        typer.echo(f"wrote {path}; next: {shlex.join(['moesaic', 'plan', str(path)])}")


@app.command(rich_help_panel="Main")
def cost(
    path: Annotated[Path, typer.Argument(metavar="ARCHITECTURE|EXPORT", help="architecture.yaml, or an export.")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="[default: 1024, or the export's]")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="[default: 128, or the convention's]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[default: 8]")] = None,
    count: Annotated[bool, typer.Option("--count", help="Count FLOPs with torch and fvcore too.")] = False,
    convention: Annotated[
        Convention | None, typer.Option(help="Price as published: a teacher-forced pass without the vocabulary.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Price one architecture, layer by layer, and measure its latency on this device."""
    with _told():
        if convention is not None:
            given = {"--vocab-size": vocab_size, "--batch-size": batch_size, "--count": count or None}
            _price_as_published(path, sequence_length, given, as_json)
            return
        from dataclasses import replace

        from moesaic.nas.context import Context
        from moesaic.nas.costs.count import count_flops
        from moesaic.nas.costs.statement import build_statement, print_statement
        from moesaic.nas.exports.folder import load_exported
        from moesaic.nas.terminal.tables import output_console
        from moesaic.search_spaces import Architecture, MoesaicError
        from moesaic.supernet import Transformer

        model = load_exported(path) if path.is_dir() else None
        if model and vocab_size not in (None, model.vocab_size):
            raise MoesaicError(
                "the export has its own vocabulary", where="--vocab-size", found=vocab_size, nearest=model.vocab_size
            )
        value = model.architecture if model else Architecture.from_yaml(path)
        vocabulary = model.vocab_size if model else vocab_size or 1024
        length = sequence_length or 128
        context = Context(
            vocabulary,
            length,
            batch_size or 8,
            source_length=length if value.encoder else 0,
            source_vocab_size=model.source_vocab_size if model else None,
        )
        statement = build_statement(value, context)
        if count:
            model = model or Transformer(value, context.vocab_size)
            statement = replace(statement, counted=count_flops(model, context))
        if as_json:
            print(json.dumps(statement.plain(), indent=2))
        else:
            print_statement(output_console(), value, statement)


@app.command(rich_help_panel="Main")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder, or an export.")],
    text: Annotated[Path | None, typer.Option(help="Text of the kind that the model is for.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a trained model, how sparse each layer is, and what splitting or pruning it would lose."""
    with _told(), _stopping() as should_stop:
        from moesaic.nas.inspect import inspect_checkpoint, print_inspection
        from moesaic.nas.terminal.progress import Reporter
        from moesaic.nas.terminal.tables import output_console
        from moesaic.search_spaces import Interrupted
        from moesaic.supernet.convert import open_checkpoint

        checkpoint = open_checkpoint(folder)
        with Reporter().progress("inspect") as bar:

            def on_layer(done: int, total: int) -> None:
                bar.update(done, total, "layers")
                if should_stop():
                    raise Interrupted("stopped; nothing was written")

            found = inspect_checkpoint(checkpoint, text, on_layer)
        if as_json:
            print(json.dumps(found.plain(), indent=2))
        else:
            print_inspection(output_console(), found)


def _price_as_published(path: Path, sequence_length: int | None, given: dict[str, int | None], as_json: bool) -> None:
    """Print the costs of ``path`` in HAT's convention, in which the options ``given`` have no meaning."""
    from moesaic.nas.costs.hat import WMT_LENGTH, hat_costs, print_hat_costs
    from moesaic.nas.exports.folder import load_exported
    from moesaic.nas.terminal.tables import output_console
    from moesaic.search_spaces import Architecture, MoesaicError

    for name, value in given.items():
        if value is not None:
            raise MoesaicError(f"{name} has no meaning with --convention hat", found=value, allowed="--sequence-length")
    architecture = load_exported(path).architecture if path.is_dir() else Architecture.from_yaml(path)
    costs = hat_costs(architecture, sequence_length or WMT_LENGTH)
    if as_json:
        print(json.dumps(costs.plain(), indent=2))
    else:
        print_hat_costs(output_console(), architecture, costs)


@imports.command("hat")
def import_hat(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Sub-transformer YAML of HAT or AutoMoE.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write.  [default: standard output]")] = None,
) -> None:
    """Read a sub-transformer of HAT or AutoMoE."""
    with _told():
        from moesaic.search_spaces import MoesaicError
        from moesaic.search_spaces.files import write_text
        from moesaic.search_spaces.foreign import read_hat

        text = read_hat(file).to_yaml()
        if out is None:
            print(text, end="")
            return
        if out.exists():
            raise MoesaicError("exists already", where=str(out), allowed="a new file")
        write_text(out, text)
        typer.echo(f"wrote {out}; next: {shlex.join(['moesaic', 'cost', str(out), '--convention', 'hat'])}")


@app.command(rich_help_panel="Main")
def convert(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="An exported model.")],
    form: Annotated[ConvertedForm, typer.Option("--format", help="The program that it is for.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    as_json: Json = False,
) -> None:
    """Convert an exported model for another program, and check that it computes the same there."""
    with _told():
        from moesaic.nas.exports.convert import check_text
        from moesaic.nas.exports.convert import convert as converted

        check = converted(folder, form, out)
        print(json.dumps(asdict(check), indent=2) if as_json else f"wrote {out}. {check_text(check)}")


@app.command(rich_help_panel="Main")
def translate(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="An exported model that translates.")],
    beam: Annotated[int, typer.Option(min=1, help="Hypotheses of a sentence at a time; 1 is greedy.")] = 4,
    length_penalty: Annotated[float, typer.Option(min=0, help="Larger values prefer longer translations.")] = 0.6,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines that are read and translated at a time.")] = 32,
) -> None:
    """Translate standard input, a sentence a line, to standard output."""
    with _told():
        from moesaic.nas.config import DeviceConfig
        from moesaic.nas.device import choose_device
        from moesaic.nas.exports.translate import load_translator, translate_lines, utf8_lines
        from moesaic.nas.tasks.translator import Decoding

        translator, longest = load_translator(folder, Decoding(beam, length_penalty, batch_size))
        translator.model.to(choose_device(DeviceConfig()).torch_device)
        lines = utf8_lines(sys.stdin.buffer, "standard input")
        try:
            for text in translate_lines(translator, longest, lines, "standard input, line"):
                sys.stdout.buffer.write(text.encode() + b"\n")
                sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def latency(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, even if there is a calibration.")] = False,
) -> None:
    _stages(config, overrides, out, "latency", fresh=fresh)


def retrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG|DIRECTORY", help="YAML file of a run, or an export.")],
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    if not config.is_dir():
        _stages(config, overrides, out, "retrain")
        return
    with _told(), _stopping() as should_stop:
        from moesaic.nas.stages.retrain_export import retrain_export
        from moesaic.nas.terminal.progress import Reporter
        from moesaic.search_spaces import MoesaicError

        if out is not None:
            raise MoesaicError("--out is only for runs; exports are retrained in place", where="--out", found=out)
        result, metrics = retrain_export(config, overrides or (), Reporter(), should_stop)
        seeds = len(result.runs)
        over = f"95 % interval over {seeds} seeds" if seeds > 1 else "standard error over sequences, one seed"
        figures = ", ".join(f"{metric.title} {metric.format(result.metrics[metric.name])}" for metric in metrics)
        typer.echo(
            f"test loss {result.loss:.4f} ± {result.error:.4f} ({over}), {figures}; weights in {config / 'retrained'}, "
            "a folder per seed"
        )


_OF_ITS_OWN: dict[str, Callable[..., None]] = {"latency": latency, "retrain": retrain}
"""Stages whose command has extra arguments."""


def _command_of(name: str) -> Callable[..., None]:
    def command(config: ConfigFile, overrides: Overrides = None, out: Out = None) -> None:
        _stages(config, overrides, out, name)

    return command


for _stage in STAGES:
    _command = _OF_ITS_OWN.get(_stage.name) or _command_of(_stage.name)
    app.command(_stage.name, help=_stage.help, rich_help_panel="Stages")(_command)


@app.command(rich_help_panel="Main")
def doctor() -> None:
    """Show versions, device, threads, triton, and what is missing."""
    with _told():
        from rich.table import Column, Table
        from rich.text import Text

        from moesaic.nas.doctor import examine
        from moesaic.nas.terminal.tables import output_console

        checks = examine()
        table = Table("", Column(overflow="fold"), show_header=False)
        for check in checks:
            table.add_row(check.name, Text(check.value, style="" if check.fine else "bold red"))
        output_console().print(table)
        if not all(check.fine for check in checks):
            raise typer.Exit(1)


def _stages(config: Path, overrides: list[str] | None, out: Path | None, only: str | None, fresh: bool = False) -> None:
    """Run one stage, or run all of them and print the result."""
    with _told(), _stopping() as should_stop:
        from moesaic.nas.config import load_config
        from moesaic.nas.data.cache import expanded
        from moesaic.nas.terminal.progress import Reporter

        reporter = Reporter()
        loaded = load_config(config, overrides or ())
        path = expanded(str(out), "--out") if out else Path("runs") / loaded.config.name
        reporter.say(f"moesaic {__version__}: {only or 'run'} {config} into {path}")
        from moesaic.nas.device import usable_processors, used_by_others
        from moesaic.nas.pipeline import run_stages
        from moesaic.nas.stages.run import Run
        from moesaic.nas.terminal.tables import output_console

        others, processors = used_by_others(), usable_processors()
        if others > processors / 4:
            reporter.say(
                f"other programs keep {others:.1f} of {processors} processors busy: this run takes longer, and its "
                "measured latency is less certain"
            )
        run_stages(Run(loaded, path, reporter, should_stop), output_console(), only, fresh)


@contextmanager
def _stopping() -> Iterator:
    from moesaic.nas.terminal.stop import stop_on_signals

    with stop_on_signals() as should_stop:
        yield should_stop


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors the user can fix into one message and an exit code; any other exception is a bug and propagates."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped at once; the same command continues from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        from moesaic.search_spaces.errors import MoesaicError

        if isinstance(error, MoesaicError):
            text, status = str(error), error.exit_code
        elif isinstance(error, OSError) and error.filename is not None:  # of the file system, not of a bug
            text, status = f"{error.filename}: {error.strerror}", 2
        elif _out_of_memory(error):
            text, status = f"out of memory: {error}; use smaller batches, sequences or models", 2
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise typer.Exit(status) from None


def _out_of_memory(error: Exception) -> bool:
    """numpy raises a MemoryError, torch an OutOfMemoryError on a GPU and a plain RuntimeError on a CPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool({"MemoryError", "OutOfMemoryError"} & names) or "can't allocate memory" in str(error)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # signs and file names that its encoding lacks become escapes
            stream.reconfigure(errors="backslashreplace")
    app()
