import io

import pytest
from rich.console import Console

from automodel_fn.plans import Row


@pytest.fixture
def row():
    def make(name, action="cast", **changes):
        after = "bfloat16" if action == "cast" else "float32"
        known = {"before": "float32", "after": after, "action": action, "reason": "a rule"}
        sizes = {"bytes_before": 8, "bytes_after": 4 if action == "cast" else 8, "shape": "[2]"}
        return Row(name, **(known | sizes | changes))

    return make


class StandInPlan:
    def __init__(self, *rows, notes=()):
        self._rows, self.notes = rows, notes

    def rows(self):
        return self._rows


@pytest.fixture
def plan_of():
    return StandInPlan


@pytest.fixture
def drawn():
    def draw(table, width=120):
        text = io.StringIO()
        Console(width=width, file=text).print(table)
        return text.getvalue()

    return draw
