"""What the tests of Transformer Engine share."""

import warnings

import pytest

from automodel_fn import probe
from automodel_fn.te._load import load_te_classes


@pytest.fixture(scope="session")
def classes():
    if not probe().package("transformer-engine").version:
        pytest.skip("transformer-engine is not installed")
    # It warns of what else is installed, which would be an error where warnings are. One that is
    # installed and cannot be imported is a failure: nothing of it would be tested.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_te_classes()


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """What Transformer Engine's attention asks for when it is made; its default may use atomics."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
