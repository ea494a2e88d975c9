"""Exchanging classes of modules and settings of configs: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from automodel_fn.cast._interrupts import interrupts_deferred
from automodel_fn.convert._covers import covered_as
from automodel_fn.convert._settings import ADDED, own_class, settings_of
from automodel_fn.convert._variants import BEHAVIOURS, variant


@attrs.define(eq=False)
class ClassChange:
    """A module gets another class, and the attributes that it needs for it.

    Args:
        module: The module.
        cls: Its next class.
        state: All of its attributes afterwards.
    """

    module: nn.Module
    cls: type[Any] = attrs.field(kw_only=True)
    state: dict[str, Any] = attrs.field(kw_only=True)

    def exchange(self) -> None:
        """Exchange what the module has and what is kept here; twice is as it was."""
        cls, state = type(self.module), dict(vars(self.module))
        self.module.__class__ = self.cls
        own = vars(self.module)
        for name in own.keys() - self.state.keys():
            del own[name]
        own.update(self.state)
        self.cls, self.state = cls, state


@attrs.define(eq=False)
class ConfigChange:
    """An attribute of a config gets another value."""

    config: Any
    name: str = attrs.field(kw_only=True)
    value: Any = attrs.field(kw_only=True)

    def exchange(self) -> None:
        """Exchange the value that the config has and the one that is kept here."""
        value = getattr(self.config, self.name)
        setattr(self.config, self.name, self.value)
        self.value = value


Change = ClassChange | ConfigChange


def class_change(module: nn.Module, settings: Mapping[str, str]) -> ClassChange:
    """What gives a module other settings; nothing is changed yet.

    Args:
        module: The module.
        settings: All of its settings afterwards, by field; without those that are its own way.
    """
    before = settings_of(module)
    added: dict[str, tuple[str, ...]] = dict(vars(module).get(ADDED, {}))
    state = {name: value for name, value in vars(module).items() if name != ADDED}
    for field in [field for field in added if settings.get(field) != before[field]]:
        for name in added.pop(field):
            state.pop(name, None)
    for field, choice in settings.items():
        if before.get(field) != choice:
            needs = BEHAVIOURS[field].state(module, choice)
            found = {name: value for name, value in needs.items() if name not in state}
            state |= found
            added |= {field: tuple(found)} if found else {}
    if added:
        state[ADDED] = added
    cls = type(module)
    made = covered_as(cls, variant(own_class(cls), settings))
    return ClassChange(module, cls=made, state=state)


def carry_out(changes: Sequence[Change]) -> None:
    """Make all changes; if one fails or is interrupted, those before it are taken back."""
    done: list[Change] = []
    with interrupts_deferred() as check_interrupt:
        try:
            for change in changes:
                change.exchange()
                done.append(change)
            check_interrupt()
        except BaseException:
            for change in reversed(done):
                change.exchange()
            raise
