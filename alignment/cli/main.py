"""`align`: one command a stage, pipelines, scoring, sampling, chat and data tools.

Exit codes: 0 done, 2 the user's mistake or a file system's refusal (a message, no traceback), 1 a bug. Help does not
import torch.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignment.cli import data
from alignment.cli.stages import STAGES, Stage, prepare_libraries
from alignment.errors import AlignError, ConfigError

if TYPE_CHECKING:
    from alignment.config import StageConfig

_NO_ROOM = "Free space or name another place. Where a run was going, --resume goes on."
_NO_RIGHT = "Ask for the right to read or write it, or name another place."
_OTHER_KIND = "A file is where a folder is needed, or the other way round. Name another place."
# What a file system may refuse that is no bug of ours, with what to do.
_LESS_MEMORY = (
    "Halve train.max_tokens_per_batch (in scoring rewards.max_tokens_per_batch, in sampling sampling.max_rows) and "
    "start the stage anew: run.overwrite=true, in a pipeline --from STAGE. What --resume takes, and what else helps: "
    "docs/troubleshooting.md, Out of memory."
)
_REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_RIGHT),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _OTHER_KIND),
    errno.ENAMETOOLONG: "Give a shorter name.",
}


class AlignGroup(typer.core.TyperGroup):
    """Also finds commands of two words, such as `rm compare`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name and the arguments left."""
        name = " ".join(args[:2])
        if name in self.commands:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="align",
    cls=AlignGroup,
    help="Llama 2-Chat's post-training: SFT, Ghost Attention, two reward models, rejection sampling, PPO, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data", help="Check, preview and convert data files.")


class StageCommand(typer.core.TyperCommand):
    """A command whose help ends with its settings: key, type, default, meaning with unit and the paper's value."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, then the settings."""
        super().format_help(ctx, formatter)
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        from alignment.config import describe

        console = Console(highlight=False, width=max(120, Console().width))
        for kind in (None, *STAGES[self.name].kinds):
            title = f"Settings with kind={kind}" if kind else "Settings (KEY=VALUE, or YAML)"
            table = Table(title=title, title_justify="left", box=None, pad_edge=False)
            table.add_column("key", no_wrap=True)
            table.add_column("type", max_width=18)
            table.add_column("default", max_width=18)
            table.add_column("meaning", ratio=1)
            for row in describe(STAGES[self.name].of_kind(kind).config_class()):
                table.add_row(*map(escape, row))
            console.print(table)


Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A YAML file and/or settings.")
]


def _add_stage(stage: Stage) -> None:
    @app.command(stage.name, cls=StageCommand, help=stage.summary)
    def command(
        arguments: Arguments = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Check settings and rows, train nothing.")] = False,
        show_config: Annotated[bool, typer.Option("--show-config", help="Print the resolved settings.")] = False,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    ) -> None:
        run_stage(stage.name, arguments or [], dry_run=dry_run, show_config=show_config, resume=resume)


for _stage in STAGES.values():
    _add_stage(_stage)


def run_stage(
    name: str, arguments: list[str], *, dry_run: bool = False, show_config: bool = False, resume: bool = False
) -> None:
    """What `align sft ...` does; recipe scripts call it too."""
    from alignment.config import build_config, merge, parse_overrides, read_yaml, to_yaml
    from alignment.runs import check_run_dir

    path, overrides = _split(arguments)
    values = merge(read_yaml(path) if path else {}, parse_overrides(overrides))
    where = str(path) if path else "command line"
    try:
        stage = STAGES[name].of_kind(values.get("kind"))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    config = build_config(stage.config_class(), values, where)
    _check_packages({where: config})
    if show_config:
        sys.stdout.write(to_yaml(config))
    if dry_run or not show_config:
        check_run_dir(config, resume=resume)
    if dry_run:
        found = stage.check_function()(config)
        typer.echo(f"{name}: settings and rows are in order: {found}", err=True)
    if show_config or dry_run:
        return
    run = stage.run_function()
    prepare_libraries()
    result = run(config, resume=resume)
    from accelerate import PartialState

    from alignment.cli.summary import print_result
    from alignment.distributed import leave_process_group

    if PartialState().is_main_process:
        print_result(result, Path(config.run.dir))
    leave_process_group()


@app.command("run")
def run_pipeline(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Stages in order.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="e.g. sft.train.epochs=1")
    ] = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all stages, run none.")] = False,
) -> None:
    """Run all stages of a pipeline in order; finished ones are skipped, an unfinished one goes on."""
    from alignment.cli.pipeline import check_pipeline, load_pipeline, run_stages

    plan = load_pipeline(pipeline, overrides or [], from_stage=from_stage)
    _check_packages({f"{pipeline}: stages.{stage.name}": stage.config for stage in plan.to_run})
    if dry_run:
        check_pipeline(plan)
        typer.echo(f"{pipeline}: {len(plan.stages)} stages are in order.", err=True)
        return
    prepare_libraries()
    from alignment.distributed import leave_process_group

    run_stages(plan)
    leave_process_group()


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...", help="A pipeline, a stage's file, or a stage with settings."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Processes, one device each.")] = 1,
    gpu: Annotated[
        str, typer.Option("--gpu", help="h100-80gb, a100-80gb, ...; cpu is this machine, which processes share.")
    ] = "h100-80gb",
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Split the models of sft, rm and ppo in full over the devices (FSDP).")
    ] = False,
    utilisation: Annotated[
        float, typer.Option("--utilisation", help="Share of the device's peak that is reached, for the times.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print every phase as JSON.")] = False,
) -> None:
    """Memory and time of every stage on a device, from shapes alone: what does not fit and what to change."""
    words = list(arguments or [])
    stage = words.pop(0) if words and words[0] in STAGES else None
    path, overrides = _split(words)
    from alignment.cli.plan import plan_command

    sizes = {"gpu": gpu, "gpus": gpus, "fsdp": fsdp, "utilisation": utilisation}
    plan_command(path, stage, overrides, **sizes, as_json=as_json)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A reward model: folder or run.")],
    files: Annotated[list[str], typer.Argument(metavar="DATA...", help="Pairs, or rows with prompt and response.")],
    out: Annotated[Path | None, typer.Option(metavar="F.jsonl", help="Write the rows with their scores here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted call that had --out.")] = False,
    wanted_precision: Annotated[
        float, typer.Option(help="Pairs with safety labels: the threshold to report flags unsafe ones this precisely.")
    ] = 0.9,
) -> None:
    """Score preference pairs (accuracy with intervals, calibration, length bias) or responses (score, probability)."""
    from alignment.cli.scoring import score_files

    prepare_libraries()
    score_files(model, files, out=out, as_json=as_json, resume=resume, wanted_precision=wanted_precision)


@app.command("rm compare")
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A reward model, or a file of `align score --out`.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one to compare with it.")],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[DATA]...", help="Pairs; where left out, those A's run held out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare two reward models pair by pair: difference of accuracies with its interval, McNemar's test."""
    from alignment.cli.scoring import compare_models

    prepare_libraries()
    compare_models(first, second, files or [], as_json=as_json)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A chat model: folder, run, Hub id or built-in name.")],
    prompts: Annotated[str, typer.Argument(help="Rows with prompts.")],
    num_candidates: Annotated[int, typer.Option(help="K, responses a prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens in a response at most.")] = 256,
    max_prompts: Annotated[int | None, typer.Option(help="Use at most this many prompts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random streams.")] = 0,
    engine: Annotated[str, typer.Option(help="torch or vllm.")] = "torch",
    out: Annotated[Path | None, typer.Option(help="Write rows here; the terminal otherwise.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted call that had --out.")] = False,
) -> None:
    """Sample K responses to each prompt of a file."""
    from alignment.cli.inference import sample_file

    prepare_libraries()
    settings = {
        "num_candidates": num_candidates,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "engine": engine,
    }
    sample_file(model, prompts, settings, max_prompts=max_prompts, seed=seed, out=out, resume=resume)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A chat model: folder, run, Hub id or built-in name.")],
    message: Annotated[
        list[str] | None,
        typer.Option("--message", "-m", metavar="TEXT", help="Answer this and end; repeat it for further turns."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as a row of candidates, with its prompt and raw scores.")
    ] = False,
    helpfulness: Annotated[str | None, typer.Option(help="Show this reward model's score of each answer.")] = None,
    safety: Annotated[str | None, typer.Option(help="Show this reward model's P(safe) of each answer.")] = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens in an answer at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the random streams.")] = 0,
) -> None:
    """Talk to a model: /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.

    Without a terminal every line of standard input is a turn.
    """
    from alignment.cli.chat import chat as talk

    prepare_libraries()
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    talk(
        model,
        settings,
        messages=message or [],
        as_json=as_json,
        helpfulness=helpfulness,
        safety=safety,
        system=system,
        seed=seed,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs: one, a pipeline's, several.")],
    out: Annotated[
        Path | None, typer.Option(metavar="F.html", help="The page; report.html in the only RUN, or here.")
    ] = None,
) -> None:
    """Show runs side by side in one HTML page: curves, accuracies, scores, answers, data, differences in settings."""
    from alignment.report.page import write_report

    typer.echo(f"Figures, tables and answers side by side:  {write_report(runs, out)}", err=True)


def main() -> None:
    """Entry point: the user's mistakes, and what a file system refuses, end with a message and exit code 2.

    Characters that the terminal cannot show are written as JSON's escapes, so that rows remain JSON.
    """
    codecs.register_error("json", lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="json")
    try:
        app(standalone_mode=True)
    except AlignError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this file does not import
            typer.echo(f"error: the device is out of memory. {str(error).splitlines()[0]} {_LESS_MEMORY}", err=True)
            raise SystemExit(2) from None
        if (number := _refused(error)) is None:
            raise
        place = f"{error.filename}: " if getattr(error, "filename", None) else ""
        typer.echo(f"error: {place}{os.strerror(number)}. {_REFUSALS[number]}", err=True)
        raise SystemExit(2) from None


def _refused(error: Exception) -> int | None:
    """The number of what a file system refused, which some libraries hide in their words; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        number = int(found[1])
    elif "inline_container" in str(error) and "unexpected pos" in str(error):  # torch.save on a full disk
        number = errno.ENOSPC
    return number if number in _REFUSALS else None


def _check_packages(configs: Mapping[str, StageConfig]) -> None:
    """Raises ConfigError where a stage needs a package that is not installed here."""
    from alignment.config import missing_packages

    problems = [f"{where}: {problem}" for where, config in configs.items() for problem in missing_packages(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def _split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    paths = [argument for argument in arguments if "=" not in argument or _is_file(argument)]
    if len(paths) > 1:
        raise ConfigError(f"command line: {paths[1]!r} is a second file. Give one YAML file and key=value settings.")
    return (Path(paths[0]) if paths else None), [argument for argument in arguments if argument not in paths]


def _is_file(argument: str) -> bool:
    """Whether it is a YAML file whose path has a `=`, as that of a run may: runs/lr=1e-4/config.yaml."""
    return argument.endswith((".yaml", ".yml")) and Path(argument).is_file()


if __name__ == "__main__":
    main()
