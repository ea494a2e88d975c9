"""Plans with a recipe object of Transformer Engine, in the place of the name of one."""

import copy
import pickle

import attrs
import pytest
from convert_families import OWN, batch_of, small_model

from automodel_fn import ConfigError, TEFp8Config, apply, backend_plan
from automodel_fn.convert._recipes import RecipeWord, config_of, recipe_word

TE = attrs.evolve(OWN, linear="te")
pytestmark = pytest.mark.usefixtures("classes")


@attrs.define
class DelayedScaling:
    """As Transformer Engine's recipes: it can be changed, and cannot be hashed."""

    margin: int = 0

    def delayed(self):
        return True


@pytest.fixture
def llama():
    return small_model("llama")


@pytest.fixture
def planned(gpu):
    def plan(model, recipe):
        return backend_plan(model, attrs.evolve(TE, te_fp8=TEFp8Config(recipe)), availability=gpu)

    return plan


def blocks(plan):
    return [each for each in plan.entries if each.field == "te_fp8"]


def test_the_plan_holds_the_object_and_apply_enters_it(llama, planned, autocasts):
    recipe = DelayedScaling(margin=3)
    plan = planned(llama, recipe)
    apply(plan)
    llama(**batch_of("llama"))

    assert {str(each.after) for each in blocks(plan)} == {"a DelayedScaling"}
    assert autocasts[0] is recipe
    assert all(each is recipe for each in autocasts if each != "left")
    assert "te_fp8=a DelayedScaling" in {row.after for row in plan.rows()}


def test_it_is_undone_and_the_inverse_comes_back_too(llama, planned, autocasts, state):
    before = state(llama)
    plan = planned(llama, DelayedScaling())
    report = apply(plan)
    swapped = state(llama)
    report.undo()
    assert state(llama) == before
    apply(plan)
    assert {name: each[0] for name, each in state(llama).items()} == {
        name: each[0] for name, each in swapped.items()
    }
    apply(plan.inverse())

    assert state(llama) == before


def test_the_same_object_is_there_already_and_another_one_takes_its_place(
    llama, planned, autocasts
):
    recipe, other = DelayedScaling(), DelayedScaling()
    apply(planned(llama, recipe))
    assert {each.action for each in blocks(planned(llama, recipe))} == {"keep"}
    plan = planned(llama, other)
    assert {each.action for each in blocks(plan)} == {"swap"}
    apply(plan)
    llama(**batch_of("llama"))

    assert autocasts[0] is other


def test_plans_with_the_same_object_are_equal(llama, planned, autocasts):
    recipe = DelayedScaling()

    assert planned(llama, recipe) == planned(llama, recipe)
    assert planned(llama, recipe) != planned(llama, DelayedScaling())


def test_a_name_takes_the_place_of_an_object_and_can_be_written(llama, planned, autocasts, gpu):
    apply(planned(llama, DelayedScaling()))
    named = backend_plan(llama, attrs.evolve(TE, te_fp8="current"), availability=gpu)
    apply(named)

    assert {each.after for each in blocks(named)} == {"current"}
    with pytest.raises(ConfigError, match="a DelayedScaling is a recipe object"):
        named.to_json()


def test_json_says_what_cannot_be_written_and_what_to_do(llama, planned, autocasts):
    said = r"\(model\), te_fp8: a DelayedScaling is a recipe object, which has no name to write; "
    with pytest.raises(ConfigError, match=said + "use one of 'current', 'block', 'mxfp8', or plan"):
        planned(llama, DelayedScaling()).to_json()


def test_a_plan_that_was_written_by_hand_has_no_object(llama, planned, autocasts):
    with pytest.raises(ConfigError, match="recipe='a DelayedScaling' must be one of"):
        config_of("a DelayedScaling")


def test_a_swapped_model_is_copied_and_pickled_with_its_recipe(llama, planned, autocasts):
    recipe = DelayedScaling(margin=3)
    apply(planned(llama, recipe))
    copied, pickled = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
    autocasts.clear()
    for model in (copied, pickled):
        model(**batch_of("llama"))

    assert type(copied) is type(llama)
    entered = [each for each in autocasts if each != "left"]
    assert entered[0] is recipe
    assert entered[-1] is not recipe
    assert entered[-1] == recipe


def test_words_of_one_object_are_equal_and_of_no_text():
    recipe = DelayedScaling()
    word = recipe_word(TEFp8Config(recipe))

    assert word == RecipeWord(recipe)
    assert hash(word) == hash(RecipeWord(recipe))
    assert word != "a DelayedScaling"
    assert word != RecipeWord(DelayedScaling())
    assert config_of(word).recipe is recipe
    assert recipe_word(TEFp8Config("block")) == "block"
