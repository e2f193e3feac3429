"""What an inspection found, for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from collavo.loss_masks.inspection import Inspected, LabelReport, WayReport
from collavo.loss_masks.processors import BLANK_SIDE, PromptSource
from collavo.loss_masks.ways import LAST, WAYS
from collavo.panoptic.coco_index import Skipped

_TARGET, _IMAGE, _CONTROL, _BAD, _END = (
    f"\x1b[{code}m" for code in ("30;42", "35", "2", "31", "0")
)
_BRACKETS = ("[[", "]]")
_MOST_NAMED = 20
_WIDTH = 100


def format_conversation(one: Inspected, source: PromptSource, *, colour: bool = False) -> str:
    """Return a conversation as the model is trained on it, its targets marked.

    Targets stand on a green ground, or in ``[[`` brackets ``]]`` without colour. A picture's tokens
    are one word, tokens of control are seen, and a line break is shown and made.

    Args:
        one: The conversation.
        source: Made its tokens.
        colour: Whether the terminal takes colours.
    """
    control = set(source.tokenizer.all_special_ids)
    text = ""
    kept = list(zip(*one.kept, strict=True))
    at = 0
    for target, entries in groupby(kept, key=lambda entry: entry[2] > 0):
        part = ""
        for kind, same in groupby(entries, key=lambda entry: _kind(entry[0], source, control)):
            run = list(same)
            words = _decoded(one.kept.ids, at, at + len(run), source)
            at += len(run)
            if kind == "image":
                words = f"{source.image_token} x {sum(count for _, count, _ in run)}"
            words = words.replace("\n", "↵\n")
            style = {"image": _IMAGE, "control": _CONTROL}.get(kind, "")
            part += f"{style}{words}{_END}" if colour and style and not target else words
        if target and colour:  # ground colours end with the line
            text += "\n".join(f"{_TARGET}{line}{_END}" for line in part.split("\n"))
        else:
            text += part.join(_BRACKETS) if target else part
    return text


def _kind(token: int, source: PromptSource, control: set[int]) -> str:
    if token in source.image_ids:
        return "image"
    return "control" if token in control else "text"


def _decoded(ids: Sequence[int], start: int, stop: int, source: PromptSource) -> str:
    """Return the text of some tokens, the blank that a tokenizer drops at a start included."""
    before, whole = source.decode(ids[:start]), source.decode(ids[:stop])
    return whole[len(before) :] if whole.startswith(before) else source.decode(ids[start:stop])


def format_sample(
    one: Inspected, report: LabelReport, source: PromptSource, *, colour: bool = False
) -> str:
    """Return a conversation, and what was found in it.

    Args:
        one: The conversation.
        report: Of it alone.
        source: Made its tokens.
        colour: Whether the terminal takes colours.
    """
    images = f", {_count(one.images, 'image')} of {one.image_tokens:,} tokens" if one.images else ""
    cut = f", cut from {one.length:,}" if one.cut else ""
    head = f"{one.name}: {_count(report.tokens, 'token')}{cut}, {_count(report.targets, 'target')}"
    text = format_conversation(one, source, colour=colour).rstrip("\n")
    found = [*_verdict(report, colour), *_remarks(report)]
    return "\n".join([head + images, "", text, "", *found, "", *format_ways(report)])


def format_report(report: LabelReport, *, template: str = "", colour: bool = False) -> str:
    """Return what was found in a data set.

    Args:
        report: Of ``inspect_labels``.
        template: The chat template's name, where it has one.
        colour: Whether the terminal takes colours.
    """
    file = _only_file(report)
    head = [file] if file else []
    head += [_count(report.conversations, "conversation"), report.processor]
    lines = [
        ", ".join([*head, f"template {template}"] if template else head),
        "",
        *_verdict(report, colour),
        "",
        *_counts(report),
        "",
        *format_ways(report),
        "",
        f"longest, in tokens{' before cutting' if report.cut else ''}",
        *(f"{length:>10,}  {_short(name, file)}" for length, name in report.longest),
    ]
    return "\n".join(lines)


def _only_file(report: LabelReport) -> str:
    """Return the file of all records that are named, or "" if there are several."""
    names = [one.name for one in (*report.failures, *report.skipped)]
    names += [name for _, name in report.longest]
    files = {name.rpartition(": [")[0] for name in names}
    return files.pop() if len(files) == 1 else ""


def _short(name: str, file: str) -> str:
    return name.removeprefix(f"{file}: ") if file else name


def _verdict(report: LabelReport, colour: bool) -> Iterator[str]:
    right = report.conversations - len(report.failures)
    line = (
        "targets decode to the answers and their stop tokens, nothing else: "
        f"{right:,} of {report.conversations:,}"
    )
    if not report.failures:
        yield line
        return
    yield f"{_BAD}{line}{_END}" if colour else line
    yield from _named(report.failures, _only_file(report))


def _counts(report: LabelReport) -> Iterator[str]:
    each = report.tokens / report.conversations
    share = 100 * report.targets / max(1, report.tokens)
    rows = [
        ("tokens", report.tokens, f"{each:,.0f} a conversation"),
        ("targets", report.targets, f"{share:.1f} % of the tokens"),
        ("images", report.images, f"{report.image_tokens:,} tokens"),
        ("cut", report.cut, "conversations, behind their last whole answer that fits"),
        ("skipped", len(report.skipped), "records"),
    ]
    for name, number, remark in rows:
        yield f"{name:<9}{number:>12,}" + (f"  {remark}" if number else "")
    yield from _named(report.skipped, _only_file(report))
    yield from _remarks(report)


def _remarks(report: LabelReport) -> Iterator[str]:
    if report.unknown_sizes:
        yield (
            f"{_count(report.unknown_sizes, 'image')} taken as blank, {BLANK_SIDE} pixels square; "
            "--images reads sizes"
        )
    if report.left_out_images:
        yield (
            f"{_count(report.left_out_images, 'image')} left out: {report.processor} takes text "
            "alone"
        )


def _named(faults: Sequence[Skipped], file: str) -> Iterator[str]:
    for one in faults[:_MOST_NAMED]:
        yield f"    {_short(one.name, file)}: {one.reason}"
    if len(faults) > _MOST_NAMED:
        yield f"    and {len(faults) - _MOST_NAMED:,} more"


def format_ways(report: LabelReport) -> list[str]:
    """Return the table of ways of making labels, and where each goes wrong first.

    Args:
        report: Of ``inspect_labels``.
    """
    heads = ("trained wrongly", "too many", "of images", "too few", "share", "conversations")
    names = {one.name: _way_name(one, report.asks) for one in report.ways.values()}
    width = max(map(len, (*names.values(), heads[0])))
    lines = [_row(heads, width)]
    notes: list[str] = []
    for one in report.ways.values():
        name, done = names[one.name], report.conversations - one.refused
        if not done:
            lines.append(f"{name:<{width}}  cannot be done: {one.reason}")
            continue
        wrong = one.wrong
        share = 100 * (wrong.too_many + wrong.too_few) / max(1, wrong.tokens)
        numbers = (wrong.too_many, wrong.image_tokens, wrong.too_few)
        cells = [f"{number:,}" for number in numbers]
        lines.append(
            _row((name, *cells, f"{share:.1f} %", f"{one.conversations:,} of {done:,}"), width)
        )
        notes += _notes(one, name, _only_file(report))
    return lines + (["", *notes] if notes else [])


def _row(cells: Sequence[str], width: int) -> str:
    first, *others, last = cells
    return f"{first:<{width}}" + "".join(f"{cell:>11}" for cell in others) + f"{last:>18}"


def _notes(one: WayReport, name: str, file: str) -> Iterator[str]:
    if one.example is not None:
        words, record = one.example
        words = words if len(words) <= _WIDTH else f"{words[: _WIDTH - 3]}..."
        yield f"{name}: {_short(record, file)}"
        yield f"    {words}"
    if one.refused:
        yield f"{name}: cannot be done for {_count(one.refused, 'conversation')}: {one.reason}"


def _way_name(one: WayReport, asks: str) -> str:
    name = WAYS[one.name]
    return name.format(asks=repr(asks.strip() or "prompt")) if one.name == LAST else name


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
