import sys
from xml.etree import ElementTree

import pytest

from automodel_fn.errors import BackendUnavailableError
from automodel_fn.render import curve_svg


def curve(values, **changes):
    return curve_svg(values, **({"x_label": "step", "y_label": "loss (nats)"} | changes))


def test_a_curve_is_svg_with_its_labels():
    svg = curve([3.0, 2.0, 1.5], marks=[(1, 3.1), (3, 1.6)])

    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    texts = {"".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")}
    assert {"step", "loss (nats)", "fixed batch"} <= texts


def test_the_same_values_give_the_same_text():
    assert curve([3.0, 2.0], marks=[(1, 3.0)]) == curve([3.0, 2.0], marks=[(1, 3.0)])
    assert curve([3.0, 2.0]) != curve([3.0, 1.0])


def test_without_marks_there_is_no_legend():
    assert "fixed batch" not in curve([1.0])


@pytest.mark.parametrize("values", [[1.0], [float("nan")] * 3, [1.0, float("inf"), 2.0]])
def test_values_that_cannot_be_drawn_leave_a_gap(values):
    assert curve(values).startswith("<svg")


def test_labels_are_escaped():
    assert "<script" not in curve([1.0, 2.0], x_label="<script>", y_label="<script>")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(BackendUnavailableError, match=r"automodel_fn\[plots\]"):
        curve([1.0])
