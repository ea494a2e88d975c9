"""What the tests of Transformer Engine share."""

import warnings

import pytest

from automodel_fn import BackendUnavailableError
from automodel_fn.te._load import load_te_classes


@pytest.fixture(scope="session")
def classes():
    try:
        # It warns of what else is installed, which would be an error where warnings are.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_te_classes()
    except BackendUnavailableError as error:
        # Not installed, or not for this GPU: the message says which.
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """What Transformer Engine's attention asks for when it is made; its default may use atomics."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
