"""Which packages are installed, by the original's way of asking: is there a module of that name."""

from __future__ import annotations

import importlib.util
import logging

import torch

LOGGER = logging.getLogger("automodel_fn.compat.nemo")


def _is_installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in modules)


HAVE_TE = _is_installed("transformer_engine")
HAVE_DEEP_EP = _is_installed("deep_ep")
HAVE_GMM = _is_installed("grouped_gemm")
HAVE_UCCL_EP = _is_installed("uccl", "ep")


def is_first_rank() -> bool:
    """Whether this process speaks for all: it is the only one, or rank 0."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
