import re
from pathlib import Path

import pytest

from automodel_fn.backend._availability import dotted
from automodel_fn.backend._fp8 import RECIPES
from automodel_fn.backend._needs import BACKENDS, NEEDS
from automodel_fn.backend._probe import _MODULES, PACKAGES
from automodel_fn.backend._rules import CHOICES, PREFERRED, RUNNABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "backends.md"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text("utf-8")


def rows(page, heading):
    table = page.partition(heading)[2].partition("\n\n")[0]
    for line in table.splitlines()[1:]:
        if line.startswith("| `"):
            yield tuple(cell.strip() for cell in line.strip("|").split("|"))


def written(need):
    least = dotted(need.version)
    below = f", less than {dotted(need.below)}" if need.below else ""
    more = f"CUDA {dotted(need.cuda)}" if need.cuda else ""
    more = f"{need.ranks} ranks" if need.ranks > 1 else more
    return (
        f"`{need.backend}`",
        f"{need.package} {least}".strip(),
        dotted(need.capability) + below if need.capability else "",
        more,
    )


def test_the_page_has_the_needs_that_are_checked(page):
    heading = "| backend | package | compute capability | more |"
    assert list(rows(page, heading)) == [written(need) for need in NEEDS]


def test_the_page_has_the_order_in_which_auto_chooses(page):
    found = {
        name.strip("`"): tuple(re.findall(r"`(\w+)`", values))
        for name, values in rows(page, "| field | order |")
    }
    assert found == {name: tuple(map(str, values)) for name, values in PREFERRED.items()}


def test_every_value_of_a_field_has_a_need_and_every_need_a_value():
    values = {
        f"{name}={value}" for name, all_of in CHOICES.items() for value in all_of if value != "auto"
    }
    values |= {
        f"{name}={value}" for name in ("rope_fusion", "async_masks") for value in (True, False)
    }
    values |= {f"te_fp8={kind}" for kind in (*RECIPES, "delayed", "nvfp4", "custom")}
    assert set(BACKENDS) == values
    assert {backend.partition("=")[0] for backend in BACKENDS} == set(RUNNABLE)


def test_auto_only_becomes_what_can_be_asked_for_by_name():
    for name, values in PREFERRED.items():
        assert set(values) <= set(CHOICES.get(name, (True, False)))


def test_a_probe_looks_for_every_package_that_is_needed():
    assert set(PACKAGES) <= set(_MODULES)
