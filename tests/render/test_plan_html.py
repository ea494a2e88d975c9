import re
from html.parser import HTMLParser

import pytest
from torch import nn

from automodel_fn import bf16, cast_plan
from automodel_fn.render import plan_html, size_text

EVIL = "<script>alert(1)</script>"
VOID = {"meta"}


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def counts(html):
    decisions = html[html.index("<h2>Decisions</h2>") :]
    return [int(n) for n in re.findall(r'</td><td class="n">(\d+)</td>', decisions)]


def cells(html):
    return re.findall(r'<td class="cell (\w+)"', html)


def test_every_tensor_of_a_plan_is_on_the_page():
    layers = (nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.BatchNorm1d(4)}) for _ in range(12))
    plan = cast_plan(nn.Sequential(*layers), bf16, keep_fp32="*.b.weight")
    html = plan_html(plan)

    assert sum(counts(html)) == len(plan.entries)
    assert len(cells(html)) == len(plan.entries)
    actions = [entry.action for entry in plan.entries]
    assert {a: cells(html).count(a) for a in actions} == {a: actions.count(a) for a in actions}


def test_names_and_reasons_of_others_are_escaped(row, plan_of):
    evil = row(f"l.0.{EVIL}", reason=EVIL, shape=EVIL, before=EVIL, after=EVIL)
    html = plan_html(plan_of(evil, notes=(EVIL,)), EVIL)

    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_page_is_balanced(row, plan_of):
    rows = [row(f"l.{i}.w", action) for i, action in enumerate(("cast", "keep", "skip", "other"))]
    parser = Balance()
    parser.feed(plan_html(plan_of(*rows, notes=("a note",))))

    assert parser.open == []


def test_bars_are_to_one_scale(row, plan_of):
    html = plan_html(plan_of(row("a"), row("b", "keep")))

    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', html)]
    assert widths == [50.0, 50.0, 50.0, 25.0]
    for size in (16, 12):
        assert f": {size_text(size)}</p>" in html


def test_layers_that_the_map_has_no_room_for_are_named(row, plan_of):
    rows = [row(f"l.{i}.w") for i in range(200)]
    html = plan_html(plan_of(*rows))

    assert len(cells(html)) == 160
    assert "Layers 160 to 199: in the table only." in html
    assert sum(counts(html)) == 200


def test_a_cell_of_several_tensors_shows_a_pin_among_them(row, plan_of):
    rows = [row(f"l.0.e.{i}.w", "keep" if i == 3 else "cast") for i in range(8)]

    assert cells(plan_html(plan_of(*rows))) == ["keep"]


@pytest.mark.parametrize("notes", [(), ("one", "two")])
def test_notes_stand_on_the_page(row, plan_of, notes):
    html = plan_html(plan_of(row("a"), notes=notes))

    assert ("Notes on the plan" in html) is bool(notes)
    assert all(f"<li>{note}</li>" in html for note in notes)


def test_a_plan_of_nothing_is_a_page_too(plan_of):
    parser = Balance()
    parser.feed(plan_html(plan_of()))

    assert parser.open == []


def test_the_same_plan_gives_the_same_page():
    pages = {plan_html(cast_plan(nn.Linear(2, 2), bf16)) for _ in range(2)}

    assert len(pages) == 1
