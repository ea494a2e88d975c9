"""The modules of a model, each once, with all of its names."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from torch import nn

from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.convert._settings import own_class, settings_of
from automodel_fn.errors import ConfigError
from automodel_fn.fqn import ancestry, parse_patterns, unmatched_message


@attrs.frozen(eq=False)
class Part:
    """One module object of a model.

    Args:
        module: The module itself.
        names: Its FQNs without wrappers; the first is canonical.
        raw_names: The same with wrappers.
    """

    module: nn.Module
    names: tuple[str, ...] = attrs.field(kw_only=True)
    raw_names: tuple[str, ...] = attrs.field(kw_only=True)

    @property
    def own(self) -> type[nn.Module]:
        """The module's class without what was made of it here, or by FSDP2."""
        return own_class(type(self.module))

    @property
    def settings(self) -> dict[str, str]:
        """By which backend it was set to run, by field; without what it does of itself."""
        return settings_of(self.module)

    @property
    def class_name(self) -> str:
        """The name of its own class."""
        return self.own.__name__


def is_experts(part: Part) -> bool:
    """Whether a module has the weights of all experts stacked, and asks transformers how to use it.

    That is, whether its class is one that `use_experts_implementation` decorates.
    """
    has_config = hasattr(getattr(part.module, "config", None), "_experts_implementation")
    return has_config and hasattr(part.own, "_apply_gate") and hasattr(part.module, "has_gate")


def parts_of(model_scan: ModelScan) -> tuple[Part, ...]:
    """Every module once, in registration order."""
    found: dict[int, Part] = {}
    for name, raw_name, module in model_scan.modules:
        known = found.get(id(module))
        names, raw_names = (known.names, known.raw_names) if known else ((), ())
        # A wrapper has the name of what it wraps, which comes after it: both are parts.
        found[id(module)] = Part(module, names=(*names, name), raw_names=(*raw_names, raw_name))
    return tuple(found.values())


def scanned(model: nn.Module) -> tuple[ModelScan, tuple[Part, ...]]:
    """A model's tensors and its modules."""
    model_scan = scan(model)
    return model_scan, parts_of(model_scan)


def skipped_parts(parts: Iterable[Part], skip: str | Iterable[str]) -> dict[int, str]:
    """By the id of each module that `skip` names, or that is beneath one, the pattern.

    Raises:
        ConfigError: A pattern matches no module; all such are listed.
    """
    patterns = parse_patterns(skip, "skip")
    used: set[str] = set()
    chosen: dict[int, str] = {}
    known: list[str] = []
    for part in parts if patterns else ():
        for name in dict.fromkeys((*part.names, *part.raw_names)):
            known.append(name)
            for pattern in patterns:
                if any(pattern.matches(above) for above in ancestry(name)):
                    used.add(pattern.text)
                    chosen.setdefault(id(part.module), pattern.text)
    unmatched = [pattern for pattern in patterns if pattern.text not in used]
    if unmatched:
        text = unmatched_message("skip", unmatched, [name for name in known if name])
        raise ConfigError(text.replace("no tensor and no module", "no module"))
    return chosen
