import pytest

from automodel_fn.render import grouped, size_text, summary
from automodel_fn.render._groups import name_pattern


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["w"], "w"),
        (["l.3.w"], "l.3.w"),
        (["l.0.w", "l.1.w", "l.2.w"], "l.{0-2}.w"),
        (["l.0.w", "l.2.w", "l.3.w", "l.10.w"], "l.{0,2-3,10}.w"),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"], "l.{0-1}.e.{0-1}"),
        (["l.0.e.0", "l.1.e.1"], "l.*.e.*"),
        (["l.0.e.5", "l.1.e.5"], "l.{0-1}.e.5"),
        (["0", "1"], "{0-1}"),
        (["conv1.w"], "conv1.w"),
    ],
)
def test_names_that_differ_in_numbers_share_a_pattern(names, pattern):
    assert name_pattern(names) == pattern


def test_only_rows_that_are_alike_share_a_group(row):
    rows = [
        row("l.0.w"),
        row("l.1.w"),
        row("l.2.w", action="keep"),
        row("l.3.w", reason="another"),
        row("l.4.w", shape="[3]"),
        row("l.5.w", before="float16"),
        row("x1.w"),
    ]

    found = grouped(rows)
    assert [group.count for group in found] == [2, 1, 1, 1, 1, 1]
    assert found[0].pattern == "l.{0-1}.w"
    assert (found[0].bytes_before, found[0].bytes_after) == (16, 8)


def test_reasons_that_differ_in_a_layer_number_are_alike(row):
    rows = [row(f"l.{i}.w", reason=f"fp32 pin: declared at l.{i}.w") for i in range(3)]

    assert [group.count for group in grouped(rows)] == [3]


def test_groups_hold_every_row_once(row):
    rows = [
        row(f"l.{i}.{part}", action=a)
        for i in range(5)
        for part, a in (("w", "cast"), ("b", "keep"))
    ]

    found = grouped(rows)
    assert sum(group.count for group in found) == len(rows)
    assert sum(group.bytes_before for group in found) == sum(r.bytes_before for r in rows)
    assert sum(group.bytes_after for group in found) == sum(r.bytes_after for r in rows)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-1536, "-1.5 KiB"),
        (2**40, "1.0 TiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_a_size_has_its_unit(size, text):
    assert size_text(size) == text


def test_a_summary_says_how_many_and_how_much(row):
    assert summary([]) == "0 tensors: none; 0 B -> 0 B (0 B saved)"
    assert summary([row("a"), row("b", action="keep")]) == (
        "2 tensors: 1 cast, 1 keep; 16 B -> 12 B (4 B saved)"
    )
    wider = row("a", bytes_after=16)
    assert summary([wider]) == "1 tensor: 1 cast; 8 B -> 16 B (8 B more)"
