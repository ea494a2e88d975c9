import importlib.abc
import sys
from contextlib import nullcontext
from types import ModuleType

import attrs
import pytest

from automodel_fn import BackendConfig, BackendUnavailableError, ConfigError, TEFp8Config, probe
from automodel_fn.backend import _fp8

CLASSES = {
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
SAYS = {
    "delayed": "delayed",
    "mxfp8": "mxfp8",
    "current": "float8_current_scaling",
    "block": "float8_block_scaling",
    "nvfp4": "nvfp4",
    "custom": "custom",
}


class Recipe:
    """As Transformer Engine's: it can be changed, is equal by value, and so has no hash."""

    kind = ""
    __hash__ = None

    def __eq__(self, other):
        return type(self) is type(other)


def _recipe(kind):
    methods = {method: (lambda self, is_it=(name == kind): is_it) for name, method in SAYS.items()}
    return type(CLASSES.get(kind, "Another"), (Recipe,), {**methods, "kind": kind})


RECIPES = {kind: _recipe(kind) for kind in SAYS}


class _Hidden(importlib.abc.MetaPathFinder):
    """Nothing of Transformer Engine is found but what was put in place, also where it is real."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformer_engine":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def no_engine(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hidden(), *sys.meta_path])


@pytest.fixture
def engine(monkeypatch, no_engine, machine):
    def install(version="2.20.2", kinds=tuple(CLASSES), *, autocast=True, old=False, gpu=(9, 0)):
        calls = []

        def record(name):
            def opened(**arguments):
                calls.append((name, arguments))
                return nullcontext(name)

            return opened

        names = ["", ".common", ".common.recipe", ".pytorch"]
        names += [".pytorch.quantization"] if autocast else []
        made = {name: ModuleType(f"transformer_engine{name}") for name in names}
        made[""].__version__ = version
        for kind in kinds:
            setattr(made[".common.recipe"], CLASSES[kind], RECIPES[kind])
        if autocast:
            made[".pytorch.quantization"].autocast = record("autocast")
        if old:
            made[".pytorch"].fp8_autocast = record("fp8_autocast")
        for name, module in made.items():
            module.__path__ = []
            monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
        monkeypatch.setattr(_fp8, "_found", lambda version: machine(gpu, te=version))
        return calls

    return install


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_recipe_has_a_name(recipe):
    assert TEFp8Config(recipe).recipe == TEFp8Config(recipe=recipe).kind == recipe


def test_current_scaling_is_the_default():
    assert TEFp8Config() == TEFp8Config("current")


def test_a_config_is_a_value_and_hashable_as_its_recipe_is():
    assert len({TEFp8Config("block"), TEFp8Config("block"), TEFp8Config("mxfp8")}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        TEFp8Config().recipe = "block"
    assert TEFp8Config(RECIPES["block"]()) == TEFp8Config(RECIPES["block"]())
    with pytest.raises(TypeError, match="unhashable"):
        hash(BackendConfig(te_fp8=TEFp8Config(RECIPES["block"]())))


@pytest.mark.parametrize(
    ("recipe", "meant"), [("blok", "block"), ("Current", "current"), ("mxfp4", "mxfp8")]
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(recipe, meant):
    with pytest.raises(ConfigError, match="'current', 'block', 'mxfp8'") as caught:
        TEFp8Config(recipe)
    assert str(caught.value).startswith(f"recipe={recipe!r} must be one of ")
    assert str(caught.value).endswith(f"Did you mean {meant!r}?")


@pytest.mark.parametrize("recipe", [None, 8, ("current",), True, object()])
def test_what_is_no_recipe_is_an_error(recipe):
    with pytest.raises(ConfigError, match="Float8CurrentScaling"):
        TEFp8Config(recipe)


def test_a_class_is_not_a_recipe_and_the_error_says_to_call_it():
    with pytest.raises(ConfigError, match=r"call it: recipe=Float8BlockScaling\(\)"):
        TEFp8Config(RECIPES["block"])


@pytest.mark.parametrize("kind", SAYS)
def test_a_recipe_object_says_which_kind_it_is(kind):
    assert TEFp8Config(RECIPES[kind]()).kind == kind


def test_a_recipe_object_of_an_older_version_may_have_few_words():
    class Old:
        def delayed(self):
            return False

        def mxfp8(self):
            return False

    assert TEFp8Config(Old()).kind == "custom"


def test_making_a_config_imports_nothing(no_engine):
    TEFp8Config("mxfp8")
    BackendConfig(te_fp8="mxfp8")
    assert "transformer_engine" not in sys.modules


@pytest.mark.parametrize("kind", CLASSES)
def test_a_recipe_is_built_by_its_class(engine, kind):
    engine()
    assert type(TEFp8Config(kind).build_recipe()) is RECIPES[kind]


def test_a_recipe_object_is_returned_as_it_is(no_engine):
    recipe = RECIPES["delayed"]()
    assert TEFp8Config(recipe).build_recipe() is recipe


def test_a_recipe_can_be_built_without_a_gpu_and_not_entered(engine):
    engine(gpu=None)
    assert TEFp8Config("block").build_recipe() == RECIPES["block"]()
    with pytest.raises(BackendUnavailableError, match="there is no CUDA GPU"):
        TEFp8Config("block").autocast()


@pytest.mark.parametrize("method", ["build_recipe", "autocast"])
def test_without_transformer_engine_the_error_says_what_to_install(no_engine, method):
    with pytest.raises(BackendUnavailableError, match="which is not installed") as caught:
        getattr(TEFp8Config("block"), method)()
    assert "recipe='block'" in str(caught.value)
    assert "pip install 'transformer-engine[pytorch]'" in str(caught.value)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("problem", [OSError, RuntimeError, AssertionError, ImportError])
def test_an_import_that_fails_is_told_with_its_cause(no_engine, monkeypatch, problem):
    class Failing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "transformer_engine":
                raise problem("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    with pytest.raises(BackendUnavailableError, match=r"libcublas\.so\.13") as caught:
        TEFp8Config().autocast()
    assert isinstance(caught.value.__cause__, problem)


def test_a_missing_dependency_is_not_taken_for_a_missing_transformer_engine(no_engine, monkeypatch):
    class Failing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "transformer_engine":
                raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    with pytest.raises(BackendUnavailableError, match=r"cannot be imported.*pydantic"):
        TEFp8Config().build_recipe()


@pytest.mark.parametrize(
    ("recipe", "version", "least"),
    [("block", "2.2", "2.3"), ("current", "2.1", "2.2"), ("mxfp8", "1.13", "2.3")],
)
def test_too_old_a_version_is_told_with_the_one_that_would_do(engine, recipe, version, least):
    engine(version, kinds=())
    with pytest.raises(BackendUnavailableError, match=f"needs {CLASSES[recipe]}") as caught:
        TEFp8Config(recipe).build_recipe()
    assert f"transformer-engine is {version}, at least {least} is needed" in str(caught.value)
    assert "pip install -U 'transformer-engine[pytorch]'" in str(caught.value)


@pytest.mark.parametrize("recipe", ["block", RECIPES["block"]()])
def test_autocast_is_that_of_transformer_engine(engine, recipe):
    calls = engine()
    with TEFp8Config(recipe).autocast() as entered:
        assert entered == "autocast"
    assert calls == [("autocast", {"enabled": True, "recipe": RECIPES["block"]()})]


@pytest.mark.parametrize("has_module", [True, False])
def test_an_older_version_has_its_own_autocast(engine, has_module):
    calls = engine("2.5", autocast=has_module, old=True)
    if has_module:
        del sys.modules["transformer_engine.pytorch.quantization"].autocast
    with TEFp8Config("current").autocast():
        pass
    assert calls == [("fp8_autocast", {"enabled": True, "fp8_recipe": RECIPES["current"]()})]


def test_the_newer_autocast_is_preferred_since_the_older_one_warns(engine):
    calls = engine(old=True)
    TEFp8Config().autocast()
    assert [name for name, _ in calls] == ["autocast"]


def test_a_version_with_neither_is_an_error(engine):
    engine(autocast=False)
    with pytest.raises(BackendUnavailableError, match="has neither"):
        TEFp8Config().autocast()


@pytest.mark.parametrize(
    ("recipe", "gpu", "reason", "instead"),
    [
        ("mxfp8", (9, 0), "has compute capability 9.0, at least 10.0", "'current', 'block'"),
        ("mxfp8", (12, 0), "has compute capability 12.0, less than 12.0", "'current', 'block'"),
        ("block", (8, 9), "has compute capability 8.9, at least 9.0", "'current'."),
        ("current", (8, 0), "has compute capability 8.0, at least 8.9", "none of the recipes can"),
        ("current", None, "there is no CUDA GPU", "none of the recipes can"),
    ],
)
def test_a_gpu_that_lacks_a_recipe_is_told_with_those_that_it_has(
    engine, recipe, gpu, reason, instead
):
    calls = engine(gpu=gpu)
    with pytest.raises(BackendUnavailableError) as caught:
        TEFp8Config(recipe).autocast()
    assert str(caught.value).startswith(f"recipe={recipe!r} cannot run here: ")
    assert reason in str(caught.value)
    assert instead in str(caught.value)
    assert calls == []


def test_a_recipe_object_is_held_to_the_same(engine):
    engine()
    with pytest.raises(BackendUnavailableError, match="recipe=MXFP8BlockScaling cannot run here"):
        TEFp8Config(RECIPES["mxfp8"]()).autocast()


def test_what_there_is_for_fp8_is_what_a_probe_would_find():
    found, whole = _fp8._found("2.20.2"), probe()
    assert (found.torch, found.cuda) == (whole.torch, whole.cuda)
    assert found.package("transformer-engine").version == "2.20.2"
    assert set(found.devices) <= set(whole.devices)
    assert bool(found.devices) == bool(whole.devices)
