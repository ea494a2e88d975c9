"""Configs of transformers: of a checkpoint folder, or of a model type; causal LMs only."""

from __future__ import annotations

import difflib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from automodel_fn.cli._small import one_line
from automodel_fn.errors import ConfigError

BUILT_IN = "deepseek_v3"
_ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese")
"""These have `is_decoder` in their config, and do not read it."""


def check_source(source: str | None) -> None:
    """See that a model can be made of it, without making it.

    Raises:
        ConfigError: No such folder or type, or no causal LM.
    """
    if source is None or not is_folder(source):
        default_config(source or BUILT_IN)
    else:
        folder_config(Path(source))


def default_config(model_type: str) -> Any:
    """The transformers config of that type, with its default sizes.

    Raises:
        ConfigError: transformers knows no causal LM of that type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if model_type not in KNOWN:
        near = difflib.get_close_matches(model_type, KNOWN, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ConfigError(
            f"model={model_type!r} is neither a folder with a checkpoint nor a model type of which "
            f"transformers has a causal LM{hint}."
        )
    try:
        with quiet_transformers():
            return _causal(AutoConfig.for_model(model_type), model_type)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model={model_type!r} has no default sizes: {one_line(error)}"
        ) from error


def _causal(config: Any, source: str) -> Any:
    """That config, if its model looks back only.

    Decoders of another model's encoder, as BERT's, have a switch for it that is off by default.
    """
    if config.model_type in _ALWAYS_CAUSAL or getattr(config, "is_decoder", True):
        return config
    raise ConfigError(
        f"model={source!r} is of type {config.model_type!r} with is_decoder=False, which is no "
        "causal LM: its tokens see later ones."
    )


def is_folder(source: str) -> bool:
    """Whether `source` means a folder: it is one, or it is spelt like one.

    Raises:
        ConfigError: It is spelt like one and does not exist.
    """
    path = Path(source)
    if path.is_dir():
        return True
    if path.exists() or "/" in source or source.startswith("."):
        raise ConfigError(f"model={source!r} is no folder; give a folder with a checkpoint.")
    return False


def folder_config(folder: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={str(folder)!r} has no config.json; give a checkpoint folder.")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"model={str(folder)!r} has a config.json that transformers cannot read: "
            f"{one_line(error)}"
        ) from error
    if config.model_type not in KNOWN:
        raise ConfigError(
            f"model={str(folder)!r} is of type {config.model_type!r}, of which transformers has no "
            "causal LM."
        )
    return _causal(config, str(folder))


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No progress bars and no remarks of transformers beside ours."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
