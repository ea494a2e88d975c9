"""The cosines and sines of rotary embeddings, of what a config says, as transformers has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._rope import RopeConfig

# What a model was trained on is, where its parameters leave it out, the length it is made for.
_BY_PRETRAINING = ("llama3", "yarn", "longrope")
_BY_RATIO = ("yarn", "longrope")


@attrs.frozen(eq=False)
class RopeTables:
    """Cosines and sines of the angles of every position, in float32, for `apply_rope`.

    Both are multiplied by the attention factor of the scaling, where it has one (yarn, longrope):
    turned queries and keys are then longer by it.

    Args:
        cos: `[P, R / 2]`.
        sin: `[P, R / 2]`.

    Example:
        >>> tables = rope_tables(RopeConfig(10000.0), 64, 128)
        >>> tables.cos.shape, tables.rotary_dim
        (torch.Size([128, 32]), 64)
    """

    cos: Tensor
    sin: Tensor = attrs.field(kw_only=True)

    @property
    def rotary_dim(self) -> int:
        """R: how many values of a head are turned."""
        return 2 * self.cos.shape[-1]


def rope_tables(
    config: RopeConfig,
    head_dim: int,
    num_positions: int,
    *,
    seq_len: int | None = None,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
) -> RopeTables:
    """Tables for the positions from 0 on, with the bits of transformers' rotary modules.

    Frequencies are made on the CPU by transformers' `ROPE_INIT_FUNCTIONS`, and cosines and sines of
    them on `device`, all in float32. Tables have no state: where frequencies depend on the length
    of the sequence (dynamic, longrope) they are those of `seq_len`, whatever was asked before.

    Args:
        config: What `rope_config` says of these layers.
        head_dim: D, of which `config.partial_rotary_factor` is turned.
        num_positions: P.
        seq_len: The length by which dynamic and longrope choose frequencies, in tokens; None is
            `num_positions`. Others do not look at it.
        max_position_embeddings: The model's, in tokens. Dynamic needs it, and what leaves out
            `factor` (yarn, longrope) or `original_max_position_embeddings` (these and llama3).
        device: Where the tables shall be; None is torch's default device.

    Raises:
        ConfigError: These layers have no rotary embedding, transformers does not know the type, or
            something that it needs is missing.

    Source:
        `LlamaRotaryEmbedding` and `modeling_rope_utils` (Hugging Face transformers).

    Example:
        >>> rope_tables(RopeConfig(10000.0), 4, 2).sin
        tensor([[0.0000, 0.0000],
                [0.8415, 0.0100]])
    """
    length = num_positions if seq_len is None else seq_len
    _demand_values(config, head_dim, num_positions, length)
    frequencies, attention_factor = _frequencies(config, head_dim, length, max_position_embeddings)
    device = torch.get_default_device() if device is None else torch.device(device)
    positions = torch.arange(num_positions, device=device, dtype=torch.int64).float()
    angles = positions[:, None] * frequencies.to(device)
    return RopeTables(angles.cos() * attention_factor, sin=angles.sin() * attention_factor)


def _demand_values(config: Any, head_dim: Any, num_positions: Any, seq_len: Any) -> None:
    sizes = {"head_dim": head_dim, "num_positions": num_positions, "seq_len": seq_len}
    lines = [
        f"{name}={value!r} must be an int of at least 0"
        for name, value in sizes.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 0
    ]
    if not isinstance(config, RopeConfig):
        found = f"config is a {type(config).__name__}"
        lines.append(f"{found}; it must be a RopeConfig: rope_config(...), or that of a layer type")
    if lines:
        raise ConfigError(itemized("rope_tables cannot be made:", lines))


def _frequencies(
    config: RopeConfig, head_dim: int, seq_len: int, max_position_embeddings: int | None
) -> tuple[Tensor, float]:
    if config.theta is None:
        raise ConfigError("config.theta=None: these layers have no rotary embedding.")
    size = int(head_dim * config.partial_rotary_factor)
    if size % 2 or not 0 < size <= head_dim:
        found = f"head_dim={head_dim} and partial_rotary_factor={config.partial_rotary_factor}"
        raise ConfigError(f"{found} make {size} values to turn; expected an even part of a head.")
    if config.rope_type == "default":
        steps = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
        return 1.0 / config.theta ** (steps / size), 1.0
    return _scaled_frequencies(config, head_dim, seq_len, max_position_embeddings)


def _scaled_frequencies(
    config: RopeConfig, head_dim: int, seq_len: int, max_position_embeddings: int | None
) -> tuple[Tensor, float]:
    # This module of transformers only, no models.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_type
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(map(repr, ("default", *ROPE_INIT_FUNCTIONS)))
        raise ConfigError(f"rope_type={kind!r} is none that transformers knows: {known}.")
    stated = _completed_parameters(config, max_position_embeddings)
    as_config = SimpleNamespace(
        rope_parameters=stated,
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    length: Any = seq_len
    if kind == "dynamic":
        # The rotary modules leave the first frequencies until the model's length is passed, and
        # give a tensor then, which makes other bits than an int.
        is_longer = max_position_embeddings is not None and seq_len > max_position_embeddings
        length = torch.tensor(seq_len, device="cpu") if is_longer else None
    try:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](as_config, device="cpu", seq_len=length)
    except KeyError as error:
        raise ConfigError(
            f"rope_type={kind!r} needs {error.args[0]!r}, which config.parameters do not have."
        ) from error
    return frequencies, factor


def _completed_parameters(
    config: RopeConfig, max_position_embeddings: int | None
) -> dict[str, Any]:
    kind, stated = config.rope_type, dict(config.parameters)
    stated |= {"rope_theta": config.theta, "partial_rotary_factor": config.partial_rotary_factor}
    original = stated.get("original_max_position_embeddings")
    missing = ["itself"] if kind == "dynamic" else []
    if kind in _BY_PRETRAINING and original is None:
        missing.append("original_max_position_embeddings")
        stated["original_max_position_embeddings"] = max_position_embeddings
    if kind in _BY_RATIO and stated.setdefault("factor", None) is None:
        missing.append("factor")
    if missing and max_position_embeddings is None:
        raise ConfigError(
            f"max_position_embeddings=None: rope_type={kind!r} needs it ({', '.join(missing)}); "
            "give the model's."
        )
    return stated
