"""What a training run was asked to do, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch

from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._text import plain_value
from automodel_fn.dtypes import bf16, parse_castable
from automodel_fn.errors import ConfigError


def _at_least(least: int) -> Any:
    def check(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
        if value < least:
            raise ConfigError(f"{attribute.name}={value} must be at least {least}.")

    return check


@attrs.frozen
class TrainSettings:
    """The settings of one run.

    Args:
        model: A folder with a checkpoint, a transformers model type, or None for the built-in one.
        data: Files and folders to read as bytes; none stands for Python's standard library.
        steps: Optimizer steps.
        microbatches: Microbatches an optimizer step.
        batch_size: Sequences a microbatch.
        seq_len: Tokens a sequence.
        dtype: The dtype to cast to.
        activation_checkpointing: Whether activations are recomputed in the backward.
        learning_rate: AdamW's, after a warm-up over the first tenth of the steps.
        backend: Which backend runs which modules; None leaves them as they are.
        seed: Seed of the weights and of the order of the text.
        out: The run folder.
    """

    model: str | None = attrs.field(default=None, kw_only=True)
    data: tuple[Path, ...] = attrs.field(default=(), kw_only=True)
    steps: int = attrs.field(default=40, kw_only=True, validator=_at_least(1))
    microbatches: int = attrs.field(default=4, kw_only=True, validator=_at_least(1))
    batch_size: int = attrs.field(default=4, kw_only=True, validator=_at_least(1))
    seq_len: int = attrs.field(default=128, kw_only=True, validator=_at_least(2))
    dtype: torch.dtype = attrs.field(default=bf16, kw_only=True, converter=parse_castable)
    activation_checkpointing: bool = attrs.field(default=False, kw_only=True)
    learning_rate: float = attrs.field(default=2e-3, kw_only=True)
    backend: BackendConfig | None = attrs.field(default=None, kw_only=True)
    seed: int = attrs.field(default=0, kw_only=True, validator=_at_least(0))
    out: Path = attrs.field(kw_only=True)

    def __attrs_post_init__(self) -> None:
        """Refuse a learning rate that is none."""
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate={self.learning_rate} must be between 0 and 1.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return attrs.asdict(self, value_serializer=lambda _, __, value: _plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else plain_value(value)
