"""FP8 recipes in plans: a word, which has the recipe object with it where there is one."""

from __future__ import annotations

from typing import Any, Self

from automodel_fn.backend._fp8 import TEFp8Config


class RecipeWord(str):
    """What a plan says of a recipe object, and the object itself.

    Equal is only the word of the same object: another one may have been changed.

    Example:
        >>> from types import SimpleNamespace
        >>> recipe = SimpleNamespace()
        >>> word = RecipeWord(recipe)
        >>> str(word), word == RecipeWord(recipe), word == str(word)
        ('a SimpleNamespace', True, False)
    """

    recipe: Any
    __slots__ = ("recipe",)

    def __new__(cls, recipe: Any) -> Self:
        """The word of a recipe object."""
        made = super().__new__(cls, f"a {type(recipe).__name__}")
        made.recipe = recipe
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecipeWord) and other.recipe is self.recipe

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return super().__hash__()

    def __str__(self) -> str:
        return self[:]

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return RecipeWord, (self.recipe,)


def recipe_word(config: TEFp8Config | None) -> str:
    """What a plan says of FP8: the name of a recipe, the word of an object, or "none".

    Example:
        >>> recipe_word(TEFp8Config("block")), recipe_word(None)
        ('block', 'none')
    """
    if config is None:
        return "none"
    return config.recipe if isinstance(config.recipe, str) else RecipeWord(config.recipe)


def config_of(word: str) -> TEFp8Config:
    """The config that a plan's word is of.

    Raises:
        ConfigError: It is the name of no recipe.

    Example:
        >>> config_of("block").kind
        'block'
    """
    return TEFp8Config(word.recipe if isinstance(word, RecipeWord) else word)
