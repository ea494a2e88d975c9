import ast
import inspect
import subprocess
import sys

import pytest

from automodel_fn import testing
from automodel_fn.testing import _facts, _oracle, _twin

NO_HYPOTHESIS = """
import sys
sys.modules["hypothesis"] = None
from automodel_fn import BackendUnavailableError
try:
    import automodel_fn.testing
except BackendUnavailableError as error:
    print(isinstance(error, ImportError), error)
"""


def test_without_hypothesis_the_error_says_what_to_install():
    command = [sys.executable, "-c", NO_HYPOTHESIS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True ")
    assert "pip install 'automodel_fn[testing]'" in done.stdout


@pytest.mark.parametrize("module", [_oracle, _facts, _twin])
def test_the_oracle_shares_nothing_with_what_it_judges(module):
    imported = [
        node.module
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("automodel_fn")
    ]
    assert all(name.startswith("automodel_fn.testing._") for name in imported)


def test_every_public_thing_has_an_example():
    for name in testing.__all__:
        assert ">>>" in inspect.getdoc(getattr(testing, name)), name
