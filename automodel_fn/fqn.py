"""Fully qualified names (FQNs): wrappers, parametrizations, and the grammar of patterns.

Pure functions on strings. A pattern names a tensor or a module, and a module stands for everything
beneath it: an exact FQN, a glob (`*` crosses dots, `?`, `[...]`), or `re:` and a regular expression
that matches the whole name.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator

import attrs

from automodel_fn.errors import ConfigError

WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Attribute names under which torch.compile, checkpoint and FSDP1 wrappers hold the module."""

_PARAMETRIZED = re.compile(r"(?<![^.])parametrizations\.([^.]+)\.original\d*(?=\.|$)")


def without_parametrizations(fqn: str) -> str:
    """The name of the tensor that a parametrization's original stands for.

    Example:
        >>> without_parametrizations("norm.parametrizations.weight.original0")
        'norm.weight'
    """
    return _PARAMETRIZED.sub(r"\1", fqn) if "parametrizations." in fqn else fqn


def owner_of(fqn: str) -> str:
    """The name of the module that a tensor belongs to; "" is the root.

    Example:
        >>> owner_of("layers.0.weight"), owner_of("weight")
        ('layers.0', '')
    """
    return fqn.rpartition(".")[0]


def joined(prefix: str, name: str) -> str:
    """A child's name beneath a prefix, which may be empty.

    Example:
        >>> joined("layers", "0"), joined("", "layers")
        ('layers.0', 'layers')
    """
    return f"{prefix}.{name}" if prefix and name else prefix or name


def ancestry(fqn: str) -> Iterator[str]:
    """The name itself, then each module above it, innermost first; without the root.

    Example:
        >>> list(ancestry("a.b.c"))
        ['a.b.c', 'a.b', 'a']
    """
    while fqn:
        yield fqn
        fqn = owner_of(fqn)


def has_segments(fqn: str, keyword: str) -> bool:
    """Whether `keyword` is a run of whole dotted segments of the name.

    Example:
        >>> has_segments("mlp.gate.weight", "gate"), has_segments("mlp.gate_up.weight", "gate")
        (True, False)
    """
    return f".{keyword}." in f".{fqn}."


@attrs.frozen
class Pattern:
    """One pattern of the grammar above, ready to match.

    Example:
        >>> glob = Pattern.parse("layers.*.norm")
        >>> glob.matches("layers.0.norm"), glob.matches("layers.0.mlp")
        (True, False)
    """

    text: str
    matches: Callable[[str], bool] = attrs.field(kw_only=True, eq=False, repr=False)
    is_exact: bool = attrs.field(kw_only=True)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            ConfigError: An empty pattern, or a regular expression that is none.
        """
        if not text:
            raise ConfigError("pattern='' is empty; name a tensor, a module, a glob, or 're:...'.")
        if text.startswith("re:"):
            try:
                compiled = re.compile(text.removeprefix("re:"))
            except re.error as error:
                raise ConfigError(f"pattern={text!r} is no regular expression: {error}.") from None
        elif any(character in text for character in "*?["):
            compiled = re.compile(fnmatch.translate(text))
        else:
            return cls(text, matches=text.__eq__, is_exact=True)
        return cls(text, matches=lambda name: compiled.fullmatch(name) is not None, is_exact=False)


def parse_patterns(value: str | Iterable[str], argument: str) -> tuple[Pattern, ...]:
    """The patterns of an argument; one str is one pattern, doubles are dropped.

    Raises:
        ConfigError: Something in it is not a str, or not a pattern.

    Example:
        >>> [pattern.text for pattern in parse_patterns("a.b", "skip")]
        ['a.b']
    """
    if not isinstance(value, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"{argument}={value!r} must be a str, or several.")
    texts = (value,) if isinstance(value, str) else tuple(value)
    wrong = [text for text in texts if not isinstance(text, str)]  # pyright: ignore[reportUnnecessaryIsInstance]
    if wrong:
        raise ConfigError(f"{argument}={wrong[0]!r} must be a str, or several.")
    return tuple(Pattern.parse(text) for text in dict.fromkeys(texts))


def unmatched_message(argument: str, patterns: Iterable[Pattern], names: Iterable[str]) -> str:
    """What to say of patterns that match nothing, with the nearest names."""
    known = list(dict.fromkeys(names))
    lines: list[str] = []
    for pattern in patterns:
        near = difflib.get_close_matches(pattern.text, known, n=3, cutoff=0.6)
        hint = f"; near: {', '.join(near)}" if near else ""
        lines.append(f"{argument}={pattern.text!r} matches no tensor and no module{hint}")
    return "\n".join(lines)
