"""`align data check | preview | convert | split | instruct`: data files, before anything is trained on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from alignment.converters import STRENGTHS, ConversionSummary, convert_file
from alignment.data import load_dialogues, load_rows, pick, read_lines, split_by_prompt, split_point, write_rows
from alignment.data_report import FileReport, Lengths, Overlap, TypedRow, check_files, parse_row, some
from alignment.dialogue import Candidate, Dialogue, LayoutError, PreferencePair, RowError
from alignment.errors import DataError, ModelError
from alignment.files import check_new_file
from alignment.layouts import CONVERTERS, RatingBins, Strength, layout_hint
from alignment.sources import find_data

if TYPE_CHECKING:
    from alignment.chat import ChatFormat, EncodedDialogue

app = typer.Typer(no_args_is_help=True)

BAR_WIDTH = 12
MAX_REASONS_SHOWN = 20
MAX_VALUES_SHOWN = 10  # of a field, on one line


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, names in ALIGN_DATA_DIR, or Hub ids.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what files hold, and every bad row. Exit code 0 where all rows are good, 2 otherwise."""
    report = check_files(files)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        console = Console(highlight=False)
        for file in report.files:
            _print_file(console, file)
        if report.overlaps:
            _print_overlaps(console, report.overlaps)
    if not report.is_good:
        raise typer.Exit(2)


@app.command()
def preview(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, a name in ALIGN_DATA_DIR, or a Hub id.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer: folder, run, Hub id or built-in name.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to show, from the first.")] = 3,
    chat_template: Annotated[str, typer.Option(help="auto, llama2, chatml or a Jinja file.")] = "auto",
) -> None:
    """Show rows as a model sees them, token by token: green carries loss, dim does not."""
    from alignment.chat import preview as token_text
    from alignment.model_folders import load_chat, model_folder

    shown = list(islice(_typed_rows(file), rows))
    if not shown:
        raise DataError(f"{file}: has no rows.")
    chat = load_chat(model_folder(model), chat_template)
    console = Console(highlight=False)
    for where, row in shown:
        console.print(f"--- {where}", style="bright_black", markup=False, soft_wrap=True)
        try:
            parts = _encode(chat, row)
        except (DataError, ModelError) as error:  # the chat format cannot know which row it was given
            raise type(error)(f"{where}: {error}") from error
        for name, encoded in parts.items():
            trained = f", {encoded.num_trained} trained" if isinstance(row, Dialogue) else ""
            console.print(f"{name} ({len(encoded.input_ids)} tokens{trained})", style="bold", markup=False)
            console.print(token_text(chat, encoded), soft_wrap=True)


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, a name in ALIGN_DATA_DIR, or a Hub id.")],
    layout: Annotated[str, typer.Option("--from", metavar="LAYOUT", help=f"One of {', '.join(CONVERTERS)}.")],
    out: Annotated[Path, typer.Option(metavar="F.jsonl", help="The file to write; .jsonl.gz compresses.")],
    aim: Annotated[
        Literal["helpfulness", "safety"],
        typer.Option(help="safety marks pairs and prompts; in pku-saferlhf the safer response is then chosen."),
    ] = "helpfulness",
    rating_bins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MEASURE=]A,B,C",
            help="Rate pairs by how much better the chosen response is: difference of ranks (oasst), of votes "
            "(pandalm), of scores (ultrafeedback), or what a row of graded has. Below A: negligibly_better; from A: "
            "slightly_better; from B: better; from C: significantly_better. For graded, once a measure: ranks=1,2,3.",
        ),
    ] = None,
) -> None:
    """Turn a public data layout into rows for `align`, leaving out and counting what cannot be used."""
    summary = convert_file(file, layout, out, aim=aim, rating_bins=_parse_bins(rating_bins or [], layout))
    _print_summary(Console(highlight=False), summary, out)


@app.command()
def split(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, a name in ALIGN_DATA_DIR, or a Hub id.")],
    out: Annotated[Path, typer.Option(metavar="NAME", help="Writes NAME.train.jsonl and NAME.valid.jsonl.")],
    valid_fraction: Annotated[float, typer.Option(min=0.001, max=0.999, help="Share of conversations held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Decides which.")] = 0,
) -> None:
    """Split rows into train and valid; rows that open with the same user message stay on one side."""
    if out.name in ("", ".."):
        raise DataError(f"{out}: is a folder. Name the beginning of two files, e.g. --out {out / 'mine'}.")
    paths = [out.with_name(f"{out.name}.{part}.jsonl") for part in ("train", "valid")]
    for path in paths:
        check_new_file(path)
    raws: list[Mapping[str, Any]] = []

    def parse(raw: Mapping[str, Any]) -> TypedRow:
        row = parse_row(raw)
        raws.append(raw)
        return row

    rows = load_rows([file], parse).rows
    columns = {id(row): raw for row, raw in zip(rows, raws, strict=True)}  # those that nothing here reads stay too
    parts = split_by_prompt(rows, valid_fraction=valid_fraction, seed=seed)
    if not all(parts):
        raise DataError(f"{file}: {_why_one_sided(rows, seed, name='train' if parts[0] else 'valid')}")
    for path, part in zip(paths, parts, strict=True):
        whole = ({**columns[id(row)], **row.to_json()} for row in part)
        count = write_rows(path, whole, default=str)  # a Hub's rows may hold dates
        typer.echo(f"{path}: {count:,} rows")


@app.command()
def instruct(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Demonstrations.")],
    out: Annotated[Path, typer.Option(metavar="F.jsonl", help="Where the rows go.")],
    kinds: Annotated[str, typer.Option(help="Kinds of instructions, with commas between them.")] = "",
    rate: Annotated[float, typer.Option(min=0, max=1, help="Share of demonstrations that get an instruction.")] = 0.7,
    max_words: Annotated[int | None, typer.Option(min=1, help="Leave out those with longer answers.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use at most this many demonstrations.")] = None,
    copies: Annotated[int, typer.Option(min=1, help="Of each demonstration, each with its own draw.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Make demonstrations that obey: an instruction in every turn, answers changed by rule so that they keep it."""
    from sft.instructions import built_in_pool
    from sft.obedience import RULED_KINDS, obedient_dialogues

    check_new_file(out)
    names = [name.strip() for name in kinds.split(",") if name.strip()] or list(RULED_KINDS)
    if unknown := [name for name in names if name not in RULED_KINDS]:
        raise DataError(f"--kinds: no rule makes an answer keep {unknown[0]!r}. There are {', '.join(RULED_KINDS)}.")
    rows = load_dialogues(files).rows
    if max_words is not None:
        rows = [row for row in rows if _longest_answer(row) <= max_words]
    dialogues, pool = pick(rows, max_rows, seed), built_in_pool(names, "train")
    made = [obedient_dialogues(dialogues, pool, rate=rate, seed=seed + copy) for copy in range(copies)]
    count = write_rows(out, (dialogue.to_json() for dialogue in chain(*made)))
    changed = sum(after is not before for before, after in zip(dialogues * copies, chain(*made), strict=True))
    typer.echo(f"{out}: {count:,} demonstrations, {changed:,} of them with an instruction.")


def _why_one_sided(rows: Sequence[TypedRow], seed: int, *, name: str) -> str:
    """Why all rows are in one part, and the fraction nearest to the one asked for that moves some to the other."""
    points = {split_point(row, seed) for row in rows}
    if len(points) == 1:
        return f"its {len(rows):,} rows open with the same user message, so they stay together. Hold out another file."
    fraction = math.floor(1000 * min(points) + 1) / 1000 if name == "train" else math.floor(1000 * max(points)) / 1000
    return (
        f"its {len(rows):,} rows open with {len(points):,} user messages, all of which fall into {name}. Give "
        f"--valid-fraction {fraction:g}, or another --seed."
    )


def _longest_answer(dialogue: Dialogue) -> int:
    """Words of its longest answer."""
    return max(len(message.content.split()) for message in dialogue.messages if message.role == "assistant")


def _print_file(console: Console, file: FileReport) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    bad = f", {file.num_bad:,} of them bad" if file.num_bad else ""
    line(f"{file.name}: {file.num_rows:,} rows of {file.kind or 'no known kind'}{bad}", "bold")
    if file.lengths:
        line(f"  user turns          {_counts(file.user_turns)}")
        line(f"  with a system turn  {file.num_with_system:,}")
        if file.kind != "demonstrations":
            line(f"  marked is_safety    {file.num_safety:,}")
        if file.kind == "pairs":
            line(f"  ratings             {_counts(file.ratings)}")
            line(f"  safety bins         {_counts(file.safety_bins)}")
            line(f"  chosen is longer    {file.chosen_longer_rate:.1%}")
        line(f"  exact repeats       {len(file.duplicates):,}")
        if file.kind != "candidates":
            line(f"  share their prompt  {file.num_shared_prompts:,}")
        if set(file.sources) != {""}:
            line(f"  sources             {_counts(file.sources)}")
        if file.unread_fields:
            line(f"  fields not read     {', '.join(file.unread_fields)}")
        console.print(_length_table(file.lengths))
    for warning in file.warnings:
        line(f"  note: {warning}", "yellow")
    for problem in file.problems:
        line(problem, "red")
    if file.looks_like and file.num_bad == file.num_rows:
        line(f"This looks like the {file.looks_like} layout. Convert it:", "yellow")
        line(f"  align data convert {file.name} --from {file.looks_like} --out NEW.jsonl", "yellow")
    console.print()


def _counts(counts: Mapping[object, int]) -> str:
    shown = ", ".join(f"{name or '(none)'}: {rows:,}" for name, rows in islice(counts.items(), MAX_VALUES_SHOWN))
    return shown + (f" and {len(counts) - MAX_VALUES_SHOWN} more" if len(counts) > MAX_VALUES_SHOWN else "")


def _length_table(lengths: Mapping[str, Lengths]) -> Table:
    """Percentiles and histograms of all kinds of text side by side."""
    table = Table(box=None, pad_edge=False)
    for header in ("  words", *lengths):
        table.add_column(header, no_wrap=True)
    for name in ("min", "median", "p95", "max"):
        table.add_row(f"  {name}", *(f"{getattr(found, name):,}" for found in lengths.values()))
    starts = sorted({start for found in lengths.values() for start in found.histogram})
    for index, start in enumerate(starts):
        end = f" to {starts[index + 1] - 1}" if index + 1 < len(starts) else " and more"
        table.add_row(f"  {start}{end}", *(_bar(found.histogram, start) for found in lengths.values()))
    return table


def _bar(histogram: Mapping[int, int], start: int) -> str:
    count = histogram.get(start, 0)
    return f"{'#' * -(-BAR_WIDTH * count // max(histogram.values()))} {count:,}".strip() if count else ""


def _print_overlaps(console: Console, overlaps: list[Overlap]) -> None:
    found = [overlap for overlap in overlaps if overlap.same_first_message]
    for overlap in found:
        whole = f", {len(overlap.same_prompt):,} have its whole prompt" if overlap.same_prompt else ""
        text = (
            f"{overlap.second}: {len(overlap.same_first_message):,} rows open with the same user message as a row of "
            f"{overlap.first}{whole}{some(overlap.same_first_message)}"
        )
        console.print(text, style="yellow", markup=False, soft_wrap=True)
    if not found:
        console.print("No prompt of one file opens with the same user message as one of another.")


def _typed_rows(file: str) -> Iterator[tuple[str, TypedRow]]:
    for line in read_lines(find_data(file)):
        try:
            if line.row is None:
                raise RowError(line.problem or "unreadable")
            yield line.where, parse_row(line.row)
        except RowError as error:
            hint = f" {layout_hint(line.row, file)}" if isinstance(error, LayoutError) else ""
            raise DataError(f"{line.where}: {error.problem}{hint}") from error


def _encode(chat: ChatFormat, row: TypedRow) -> dict[str, EncodedDialogue]:
    """The parts of a row by name; in pairs and candidates the responses count as trained, the prompt does not."""
    from alignment.chat import EncodedDialogue, encode_dialogue, encode_prompt

    if isinstance(row, Dialogue):
        return {"dialogue": encode_dialogue(chat, row)}
    responses: dict[str, str] = {}
    if isinstance(row, PreferencePair):
        prompt, responses = row.prompt, {"chosen": row.chosen, "rejected": row.rejected}
    elif isinstance(row, Candidate):
        prompt, responses = row.prompt.messages, {"response": row.response}
    else:
        prompt = row.messages
    ids = {"prompt": encode_prompt(chat, prompt)}
    ids |= {name: chat.encode_response(text) for name, text in responses.items()}
    return {name: EncodedDialogue(tokens, [name != "prompt"] * len(tokens)) for name, tokens in ids.items()}


def _parse_bins(options: list[str], layout: str) -> dict[Strength, RatingBins]:
    """Bins by measure; without a measure, for the only one the layout has."""
    found: dict[Strength, RatingBins] = {}
    for option in options:
        name, _, numbers = option.rpartition("=")
        measures = STRENGTHS.get(layout, ())
        if not name and len(measures) > 1:
            raise DataError(f'--rating-bins is "{option}". Say for which measure, e.g. {measures[0]}={option}.')
        try:
            a, b, c = (float(part) for part in numbers.split(","))
        except ValueError as error:
            raise DataError(f'--rating-bins is "{option}". Give three numbers, e.g. 1,2,3.') from error
        found[name or (measures[0] if measures else "scores")] = (a, b, c)
    return found


def _print_summary(console: Console, summary: ConversionSummary, out: Path) -> None:
    left_out = sum(summary.dropped.values())
    head = f"{out}: {summary.num_written:,} rows from {summary.num_read:,}; {left_out:,} left out"
    console.print(head, markup=False, soft_wrap=True)
    for reason, rows in islice(summary.dropped.items(), MAX_REASONS_SHOWN):
        text = f"  {rows:,} x {reason} (first: {summary.first_dropped[reason]})"
        console.print(text, markup=False, soft_wrap=True)
    if len(summary.dropped) > MAX_REASONS_SHOWN:
        console.print(f"  ... and {len(summary.dropped) - MAX_REASONS_SHOWN} more reasons")
