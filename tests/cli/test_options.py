from typing import get_args

import pytest
from typer.models import OptionInfo

from automodel_fn.cli import _options

OPTIONS = {
    name: extra
    for name, annotation in vars(_options).items()
    for extra in get_args(annotation)
    if isinstance(extra, OptionInfo)
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_named_and_not_after_its_metavar(name):
    # Inside Annotated, typer keeps the first name where the default stands otherwise.
    names = (OPTIONS[name].default, *(OPTIONS[name].param_decls or ()))

    assert len(names) == 1
    assert all(spelling == spelling.lower() and spelling.startswith("--") for spelling in names)
