from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

PEERS = Path(__file__).resolve().parents[2] / ".ci" / "peers.txt"


@pytest.mark.skipif(
    not (os.environ.get("CI") and PEERS.exists()),
    reason="only where all that is compared with has to be there: in CI, in a checkout",
)
def test_what_the_tests_compare_with_is_installed_so_that_none_of_them_skips():
    lines = PEERS.read_text("utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines if line and not line.startswith("#"))

    assert {name: version(name) for name in wanted} == wanted
    assert set(wanted) == {"nemo-automodel", "transformer-engine"}
