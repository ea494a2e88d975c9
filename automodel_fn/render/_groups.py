"""Rows of a plan, grouped: what is said of every layer alike is said once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod

import attrs

from automodel_fn.plans import Row

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@attrs.frozen
class Group:
    """Rows that differ in the numbers of their names only.

    Args:
        pattern: Their name, with sets of numbers, as "layers.{0-3}.weight".
        first: The first of them.
        count: How many they are.
        bytes_before: Their size now, in bytes.
        bytes_after: Their size afterwards.
    """

    pattern: str
    first: Row = attrs.field(kw_only=True)
    count: int = attrs.field(kw_only=True)
    bytes_before: int = attrs.field(kw_only=True)
    bytes_after: int = attrs.field(kw_only=True)


def grouped(rows: Iterable[Row]) -> tuple[Group, ...]:
    """Rows alike but for numbers in their names, in the order of their first.

    Example:
        >>> row = Row("layers.0.bias", before="float32", after="bfloat16", action="cast",
        ...           reason="r")
        >>> grouped([row, attrs.evolve(row, name="layers.1.bias")])[0].pattern
        'layers.{0-1}.bias'
    """
    alike: defaultdict[object, list[Row]] = defaultdict(list)
    for row in rows:
        what = (row.before, row.after, row.action, _without_numbers(row.reason), row.shape)
        alike[_without_numbers(row.name), what].append(row)
    return tuple(
        Group(
            name_pattern([row.name for row in members]),
            first=members[0],
            count=len(members),
            bytes_before=sum(row.bytes_before for row in members),
            bytes_after=sum(row.bytes_after for row in members),
        )
        for members in alike.values()
    )


def _without_numbers(name: str) -> str:
    return _NUMBER.sub("*", name)


def name_pattern(names: Sequence[str]) -> str:
    """One name for several that differ in numbers only; `*` where the numbers are no full grid.

    Example:
        >>> name_pattern(["l.0.w", "l.1.w", "l.3.w"]), name_pattern(["a.0.b.0", "a.1.b.1"])
        ('l.{0-1,3}.w', 'a.*.b.*')
    """
    found = [_NUMBER.findall(name) for name in names]
    columns = [sorted({int(n) for n in column}) for column in zip(*found, strict=True)]
    is_grid = prod(len(column) for column in columns) == len(names)
    texts = iter([_number_set(c) if is_grid or len(c) == 1 else "*" for c in columns])
    return _NUMBER.sub(lambda _: next(texts), names[0])


def _number_set(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) + "}"


def size_text(num_bytes: int) -> str:
    """A size for a person.

    Example:
        >>> size_text(512), size_text(3 * 2**20), size_text(-2048)
        ('512 B', '3.0 MiB', '-2.0 KiB')
    """
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def summary(rows: Sequence[Row]) -> str:
    """A plan in one line: how many of what, and the bytes.

    Example:
        >>> row = Row("w", before="float32", after="bfloat16", action="cast", reason="r",
        ...           bytes_before=4096, bytes_after=2048)
        >>> summary([row])
        '1 tensor: 1 cast; 4.0 KiB -> 2.0 KiB (2.0 KiB saved)'
    """
    counts: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.action] += 1
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    actions = ", ".join(f"{count} {action}" for action, count in sorted(counts.items()))
    change = f"{size_text(abs(before - after))} {'saved' if before >= after else 'more'}"
    noun = "tensor" if len(rows) == 1 else "tensors"
    sizes = f"{size_text(before)} -> {size_text(after)} ({change})"
    return f"{len(rows)} {noun}: {actions or 'none'}; {sizes}"
