"""The original's triple of a rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel_fn.errors import ConfigError
from automodel_fn.ops._rope import RopeConfig, rope_config


def rope_parts(config: Any) -> tuple[float, dict[str, Any], float]:
    """(theta, the config's own parameters, the part of a head that is rotated).

    Where the original finds no theta in `rope_parameters`, what `rope_config` finds.

    Raises:
        ConfigError: Nothing is said about rotary embeddings, or not one thing for all layers.
    """
    stated: Any = getattr(config, "rope_parameters", None)
    if isinstance(stated, Mapping) and "rope_theta" in stated:
        own: Any = stated
        return own["rope_theta"], own, own.get("partial_rotary_factor", 1.0)
    found = rope_config(config)
    if not isinstance(found, RopeConfig) or found.theta is None:
        raise ConfigError(
            f"config={type(config).__name__} has no single rope_theta, found {found}; "
            "use automodel_fn.rope_config, which gives one for each layer type."
        )
    return found.theta, dict(found.parameters), found.partial_rotary_factor
