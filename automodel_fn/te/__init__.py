"""Transformer Engine: its modules see the step context, by a patch that can be undone."""

from automodel_fn.te._cache import cache_counts
from automodel_fn.te._classes import TEClasses
from automodel_fn.te._kept import CacheCounts
from automodel_fn.te._patch import PatchHandle, patch_te
from automodel_fn.te._unallocated import is_tensor_unallocated

__all__ = [
    "CacheCounts",
    "PatchHandle",
    "TEClasses",
    "cache_counts",
    "is_tensor_unallocated",
    "patch_te",
]
