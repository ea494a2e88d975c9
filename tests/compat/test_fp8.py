import sys
from contextlib import nullcontext

import pytest

from automodel_fn.compat import nemo

CLASSES = ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
NAMES = {
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "delayed": "Float8CurrentScaling",
    "mxpf8": "Float8CurrentScaling",
    "": "Float8CurrentScaling",
    "Block": "Float8CurrentScaling",
}


def _recipe(name):
    return type(name, (), {"__eq__": lambda self, other: type(self) is type(other)})


@pytest.fixture
def engine(transformer_engine, monkeypatch, module):
    """Transformer Engine with all recipes, and the calls of its autocast."""
    calls = []

    def autocast(**arguments):
        calls.append(arguments)
        return nullcontext("entered")

    for name in CLASSES:
        setattr(transformer_engine.recipe, name, _recipe(name))
    transformer_engine.quantization.autocast = autocast
    monkeypatch.setattr(module, "HAVE_TE", True)
    return transformer_engine, calls


@pytest.mark.parametrize("recipe", ["current", "mxfp8", "bogus", object()])
def test_without_transformer_engine_nothing_happens(module, monkeypatch, recipe):
    monkeypatch.setattr(module, "HAVE_TE", False)
    config = module.TEFp8Config(recipe=recipe)
    assert config.build_recipe() is None
    assert type(config.maybe_te_autocast()) is nullcontext


@pytest.mark.parametrize("recipe", NAMES)
def test_a_name_gives_the_recipe_that_it_gives_in_the_original(engine, module, recipe, outcome):
    end = outcome(module, lambda u: u.TEFp8Config(recipe=recipe).build_recipe())
    assert type(end.value).__name__ == NAMES[recipe]
    assert end.log_levels == ((30,) if recipe == "mxfp8" else ())


@pytest.mark.parametrize("recipe", [object(), None, 3])
def test_what_is_no_name_is_passed_through(engine, module, recipe):
    assert module.TEFp8Config(recipe=recipe).build_recipe() is recipe


@pytest.mark.parametrize("recipe", ["block", "mxfp8"])
def test_autocast_is_entered_with_the_recipe(engine, module, recipe, outcome):
    end = outcome(module, lambda u: u.TEFp8Config(recipe=recipe).maybe_te_autocast())
    with end.value as entered:
        assert entered == "entered"
    (arguments,) = engine[1]
    assert sorted(arguments) == ["enabled", "recipe"]
    assert arguments["enabled"] is True
    assert type(arguments["recipe"]).__name__ == NAMES[recipe]


def test_autocast_takes_the_recipe_of_an_overridden_build_recipe(engine, module, monkeypatch):
    monkeypatch.setattr(module.TEFp8Config, "build_recipe", lambda self: "another")
    module.TEFp8Config().maybe_te_autocast()
    assert engine[1] == [{"enabled": True, "recipe": "another"}]


def test_a_version_that_is_too_old_for_mxfp8_is_an_import_error(engine, module):
    del engine[0].recipe.MXFP8BlockScaling
    with pytest.raises(ImportError, match="MXFP8BlockScaling"):
        module.TEFp8Config(recipe="mxfp8").build_recipe()


@pytest.mark.parametrize("recipe", ["current", "block"])
def test_a_version_that_is_too_old_for_all_is_an_import_error(engine, module, recipe):
    for name in CLASSES:
        delattr(engine[0].recipe, name)
    with pytest.raises(ImportError):
        module.TEFp8Config(recipe=recipe).build_recipe()


def test_a_recipe_needs_no_class_but_its_own_where_the_original_needs_another(engine, module):
    del engine[0].recipe.Float8BlockScaling
    if module is nemo:
        assert type(nemo.TEFp8Config().build_recipe()).__name__ == "Float8CurrentScaling"
    else:
        with pytest.raises(ImportError):
            module.TEFp8Config().build_recipe()


def test_without_an_autocast_the_import_fails(engine, module, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.quantization", None)
    with pytest.raises(ImportError):
        module.TEFp8Config().maybe_te_autocast()


def test_a_config_is_a_value_and_can_be_changed(original):
    for module in (nemo, original):
        config = module.TEFp8Config()
        assert config == module.TEFp8Config(recipe="current") != module.TEFp8Config(recipe="block")
        config.recipe = "block"
        assert config == module.TEFp8Config(recipe="block")
        with pytest.raises(TypeError):
            module.TEFp8Config("block")
