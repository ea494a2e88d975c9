"""What a model's config says about rotary embeddings, as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._rope_spellings import EVERY_LAYER, Get, parameters_by_type


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    return value


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _complaints(theta: Any, rope_type: Any, partial_rotary_factor: Any) -> list[str]:
    lines: list[str] = []
    if theta is not None and not _is_positive(theta):
        lines.append(f"theta={theta!r} must be a finite number greater than 0")
    if not isinstance(rope_type, str) or not rope_type:
        lines.append(f"rope_type={rope_type!r} must be a name, such as 'default' or 'yarn'")
    if not _is_positive(partial_rotary_factor):
        found = f"partial_rotary_factor={partial_rotary_factor!r}"
        lines.append(f"{found} must be a finite number greater than 0")
    return lines


@attrs.frozen
class RopeConfig:
    """The rotary embedding of a model, or of its layers of one type.

    Args:
        theta: The base of the frequencies; None where these layers have no rotary embedding.
        rope_type: "default", or the name of a scaling, such as "linear", "llama3" or "yarn".
        partial_rotary_factor: The part of a head that is rotated.
        parameters: All that the config says, as one flat `rope_parameters`: "rope_type",
            "rope_theta" and what the scaling needs. A copy that cannot be changed; its lists are
            tuples. It counts for equality, not for the hash.
        layers_without: Indices of layers that have no rotary embedding although others of their
            type have this one.

    Raises:
        ConfigError: A value is not as described.

    Example:
        >>> RopeConfig(10000.0) == RopeConfig(10000), RopeConfig(None).rope_type
        (True, 'default')
    """

    theta: float | None
    rope_type: str = attrs.field(default="default", kw_only=True)
    partial_rotary_factor: float = attrs.field(default=1.0, kw_only=True)
    parameters: Mapping[str, Any] = attrs.field(
        factory=dict, kw_only=True, converter=_frozen, hash=False
    )
    layers_without: tuple[int, ...] = attrs.field(default=(), kw_only=True)

    def __attrs_post_init__(self) -> None:
        """Refuse values that no rotary embedding can be made of."""
        lines = _complaints(self.theta, self.rope_type, self.partial_rotary_factor)
        if lines:
            raise ConfigError(itemized("RopeConfig cannot be made:", lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and deep-copied by its fields, since a MappingProxyType can be neither."""
        fields = {name: getattr(self, name) for name in ("rope_type", "partial_rotary_factor")}
        fields |= {"parameters": _thawed(self.parameters), "layers_without": self.layers_without}
        return partial(RopeConfig, self.theta, **fields), ()


def rope_config(config: Any) -> RopeConfig | Mapping[str, RopeConfig]:
    """What a model's config says about its rotary embedding. Reads only.

    Understood are `rope_parameters`, flat or with a dict for each layer type (None: no rotary
    embedding there; scalars beside the dicts hold for all of them), and, where there is none, the
    older `rope_theta`, `rope_scaling` and `partial_rotary_factor`, with the names that GPT-NeoX,
    Gemma 3 and ModernBERT had for them. A theta that `rope_parameters` leaves out is the config's
    `rope_theta`, or else the `default_theta` of its class. Lists with an entry for each layer,
    `layer_rope_theta` (0: none there) and `no_rope_layers` (the same, whatever its name says), are
    sorted by `layer_types`. What single models called otherwise is known to their config classes
    only: give such a config as its class makes it, not as a dict.

    Args:
        config: A config of transformers, any object with such attributes, or a dict. Of a composite
            one give the part that has the layers, such as `config.text_config`.

    Returns:
        One RopeConfig where it holds for all layers, else a read-only mapping of layer type to
        RopeConfig.

    Raises:
        ConfigError: The config says nothing about rotary embeddings, or what none can be made of;
            or `layer_rope_theta` gives layers of one type different thetas.

    Source:
        Replaces `get_rope_config` (NeMo Automodel); huggingface/transformers #48798 on scalars
        beside nested dicts.

    Example:
        >>> found = rope_config({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 2}})
        >>> found.theta, found.rope_type, found.parameters["factor"]
        (500000.0, 'yarn', 2)
        >>> nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None}
        >>> rope_config({"rope_parameters": nested})["sliding_attention"].theta is None
        True
    """
    get: Get = config.get if isinstance(config, Mapping) else partial(_attribute, config)
    stated = parameters_by_type(get)
    lines: list[str] = []
    for kind, parameters in stated.items():
        lines += [] if parameters is None else _complaints_about(kind, parameters)
    if lines:
        raise ConfigError(itemized("config asks for rotary embeddings that cannot be:", lines))
    found = {kind: _made(parameters) for kind, parameters in stated.items()}
    found = _by_layer(found, get)
    return found[EVERY_LAYER] if EVERY_LAYER in found else MappingProxyType(found)


def _attribute(config: object, name: str) -> Any:
    return getattr(config, name, None)


def _complaints_about(kind: str, parameters: Mapping[str, Any]) -> list[str]:
    where = f"{kind}: " if kind else ""
    theta = parameters["rope_theta"]
    lines = [] if theta is not None else ["rope_theta is nowhere given"]
    part = parameters.get("partial_rotary_factor", 1.0)
    return [where + line for line in [*lines, *_complaints(theta, parameters["rope_type"], part)]]


def _made(parameters: Mapping[str, Any] | None) -> RopeConfig:
    if parameters is None:
        return RopeConfig(None)
    theta = float(parameters["rope_theta"])
    return RopeConfig(
        theta,
        rope_type=parameters["rope_type"],
        partial_rotary_factor=float(parameters.get("partial_rotary_factor", 1.0)),
        parameters={**parameters, "rope_theta": theta},
    )


def _by_layer(found: dict[str, RopeConfig], get: Get) -> dict[str, RopeConfig]:
    name = "layer_rope_theta" if get("layer_rope_theta") else "no_rope_layers"
    values: Sequence[Any] = get(name) or ()
    if not values:
        return found
    kinds: Sequence[str] = get("layer_types") or [EVERY_LAYER] * len(values)
    _refuse(name, _complaints_about_layers(name, values, kinds))
    lines: list[str] = []
    layers: dict[str, dict[int, Any]] = {}
    for index, (kind, value) in enumerate(zip(kinds, values, strict=False)):
        layers.setdefault(kind, {})[index] = value
    by_type = dict(found) if EVERY_LAYER not in found else {}
    for kind, of_kind in layers.items():
        base = found.get(kind, found.get(EVERY_LAYER))
        thetas = sorted({float(value) for value in of_kind.values() if value})
        if name == "layer_rope_theta" and len(thetas) > 1:
            lines.append(f"{kind or 'all'} layers have the thetas {thetas}: read {name} by layer")
        elif base is not None and base.theta is not None:
            theta = thetas[0] if thetas and name == "layer_rope_theta" else base.theta
            by_type[kind] = _switched(base, theta, of_kind)
    _refuse(name, lines)
    if EVERY_LAYER in found and len(set(by_type.values())) == 1:
        return {EVERY_LAYER: next(iter(by_type.values()))}
    return by_type


def _refuse(name: str, lines: Sequence[str]) -> None:
    if lines:
        raise ConfigError(itemized(f"config.{name} cannot be sorted by layer type:", lines))


def _complaints_about_layers(name: str, values: Sequence[Any], kinds: Sequence[str]) -> list[str]:
    lines = [
        f"layer {index} has {value!r}, expected 0 or a finite number greater than 0"
        for index, value in enumerate(values)
        if value != 0 and not _is_positive(int(value) if value is True else value)
    ]
    if len(values) < len(kinds):
        lines.append(f"it has {len(values)} entries for {len(kinds)} layers")
    return lines


def _switched(base: RopeConfig, theta: float, layers: Mapping[int, Any]) -> RopeConfig:
    if not any(layers.values()):
        return RopeConfig(None)
    return attrs.evolve(
        base,
        theta=theta,
        parameters={**base.parameters, "rope_theta": theta},
        layers_without=tuple(index for index, value in layers.items() if not value),
    )
