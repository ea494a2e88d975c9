import sys
from pathlib import Path

import pytest

# With --import-mode=importlib a test folder is not on the path; the zoo's own files lie in it.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _for_small_models(quiet_transformers, one_thread):
    """All models here are small ones of transformers."""


@pytest.fixture(autouse=True)
def _in_this_version(request):
    """Another version of transformers may lack a class of the table; that is said, by name."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case is None:
        return
    from zoo_cases import VERSION, is_in_this_version, is_version_of_the_table

    if not is_version_of_the_table() and not is_in_this_version(case):
        pytest.skip(f"transformers has no {case}; the table is about version {VERSION}")
