import sys
from xml.etree import ElementTree

import pytest

from automodel_fn.errors import BackendUnavailableError
from automodel_fn.render import Panel, bars_svg

PANELS = (
    Panel("forward, %", groups={"norm": {"ours": 91.5, "torch": 40.25}, "rope": {"ours": 88.0}}),
    Panel("backward, %", groups={"norm": {"ours": 71.5}}),
)


def texts(svg):
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("text")]


def test_bars_are_svg_with_groups_names_titles_and_lengths():
    found = texts(bars_svg(PANELS))

    assert {"norm", "rope", "ours", "torch", "forward, %", "backward, %"} <= set(found)
    assert {"91.5", "40.2", "88.0", "71.5"} <= set(found)


def test_a_name_stands_once_in_the_legend_whatever_it_has():
    assert texts(bars_svg(PANELS)).count("ours") == 1


def test_the_same_values_give_the_same_text():
    assert bars_svg(PANELS) == bars_svg(PANELS)
    assert bars_svg(PANELS) != bars_svg(PANELS[:1])


def test_there_may_be_more_names_than_colours():
    bars = {f"peer {number}": 1.0 for number in range(12)}

    assert {f"peer {number}" for number in range(12)} <= set(
        texts(bars_svg([Panel("t", groups={"g": bars})]))
    )


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(BackendUnavailableError, match=r"automodel_fn\[plots\]"):
        bars_svg(PANELS)
