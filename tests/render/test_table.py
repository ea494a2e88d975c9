import pytest
from torch import nn

from automodel_fn import bf16, cast_plan
from automodel_fn.render import BenchmarkLine, benchmark_tables, plan_table, simple_table


def test_pins_come_first_then_casts_then_what_is_left_alone(row, plan_of, drawn):
    text = drawn(
        plan_table(plan_of(row("a", "skip"), row("b", "other"), row("c"), row("d", "keep")))
    )

    places = [text.index(f"\n  {name} ") for name in "dcab"]
    assert places == sorted(places)


def test_a_row_tells_change_saving_and_reason(row, plan_of, drawn):
    text = drawn(plan_table(plan_of(row("w", num_aliases=2, reason="no rule keeps it"))))

    (line,) = [line for line in text.splitlines() if "w (+2 alias)" in line]
    assert line.split()[3:] == ["1", "fp32", "->", "bf16", "4", "B", "no", "rule", "keeps", "it"]


def test_what_looks_like_markup_is_shown_as_it_is(row, plan_of, drawn):
    text = drawn(plan_table(plan_of(row("[red]w[/red]", reason="[bold]why"))))
    assert "[red]w[/red]" in text
    assert "[bold]why" in text

    assert "[red]cell[/red]" in drawn(simple_table("t", ("a",), [("[red]cell[/red]",)]))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_long_names_are_folded_and_never_cut(row, plan_of, drawn, width):
    name = "x" * 100
    text = drawn(plan_table(plan_of(row(name))), width)

    assert text.count("x") == 100
    assert "\u2026" not in text


def test_every_tensor_of_a_plan_is_in_the_table():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(12)))
    plan = cast_plan(model, bf16, keep_fp32="re:.*1.weight")
    table = plan_table(plan)

    counts = [int(str(cell)) for cell in table.columns[1].cells]
    assert sum(counts) == len(plan.entries)
    assert str(table.caption).startswith(f"{len(plan.entries)} tensors:")


def test_a_benchmark_line_has_medians_ratios_and_pins(drawn):
    ours = BenchmarkLine("few", subject="a", is_ours=True, medians=(1234.5, None), pins_exact=True)
    peer = BenchmarkLine(
        "few", subject="b", medians=(2469.0, 3.0), ratios=(0.5, None), pins_exact=False
    )
    text = drawn(*benchmark_tables("t", [("apply_ms", "ms"), ("peak_mib", "MiB")], [ours, peer]))

    lines = {line.split()[1]: line.split()[2:] for line in text.splitlines() if "few" in line}
    assert lines["a"] == ["1,234.5", "ms", "-", "yes"]
    assert lines["b"] == ["2,469.0", "ms", "(0.50)", "3.0", "MiB", "NO"]


def test_what_is_absent_has_its_reason_once(drawn):
    lines = [
        BenchmarkLine("few", subject="peer", absent="it is not installed"),
        BenchmarkLine("many", subject="peer", absent="it is not installed"),
        BenchmarkLine("huge", subject="", absent="no memory"),
    ]
    text = drawn(*benchmark_tables("t", [("ms", "ms")], lines))

    text = " ".join(text.split())

    assert text.count("absent: peer: it is not installed") == 1
    assert "absent: huge: no memory" in text
    assert "(all)" in text
