"""What `lm_head_loss` is given: complaints about it, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError
from automodel_fn.ops._choice import is_plain
from automodel_fn.ops._heads import PRECISIONS

_REDUCTIONS = ("mean", "sum", "none")
_LABELS = (torch.int64, torch.int32)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def complaints_about_tensors(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, precision: Any
) -> Iterator[str]:
    """What is wrong with the tensors, a line each."""
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        yield f"hidden_states and weight have the shapes {shapes}; they must be [..., H] and [V, H]"
    if weight.dim() == 2 and weight.shape[0] == 0:
        yield "weight has no rows: a loss needs a vocabulary"
    if labels.shape != hidden.shape[:-1]:
        expected = tuple(hidden.shape[:-1])
        yield f"labels has the shape {tuple(labels.shape)}; hidden_states ask for {expected}"
    if labels.dtype not in _LABELS:
        yield f"labels has the dtype {dtype_name(labels.dtype)}; it must be int64 or int32"
    if bias is not None and bias.shape != weight.shape[:1]:
        yield f"bias has the shape {tuple(bias.shape)}; weight asks for {tuple(weight.shape[:1])}"
    named = {"hidden_states": hidden, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in _DTYPES:
            found = dtype_name(tensor.dtype)
            yield f"{name} has the dtype {found}; it must be bf16, fp16, fp32 or float64"
    everything = {**given, "labels": labels}
    if precision == "bf16x3" and hidden.dtype != torch.bfloat16:
        found = dtype_name(hidden.dtype)
        yield (
            f"hidden_states has the dtype {found}; precision='bf16x3' takes bf16: cast them, "
            "or use precision='fp32'"
        )
    if precision == "bf16x3" and weight.dtype == torch.float64:
        yield "weight has the dtype float64; precision='bf16x3' splits bf16, fp16 or fp32"
    devices = {name: str(tensor.device) for name, tensor in everything.items()}
    if len(set(devices.values())) > 1:
        yield f"the tensors are on several devices: {devices}"
    spread = [name for name, tensor in everything.items() if isinstance(tensor, DTensor)]
    rest = [name for name in everything if name not in spread]
    if spread and rest:
        verb = "is a DTensor" if len(spread) == 1 else "are DTensors"
        other = "is not" if len(rest) == 1 else "are not"
        yield f"{' and '.join(spread)} {verb}, {' and '.join(rest)} {other}: distribute all or none"
    for name in ("weight", "bias"):
        if isinstance(given.get(name), DTensor) and _is_sharded(given[name]):
            yield (
                f"{name} is sharded over its mesh; the softmax needs the whole vocabulary on every "
                f"rank: call this inside the forward of the module that FSDP2 gathers it for, or "
                f"gather it with {name}.full_tensor(grad_placements=[Partial('avg')]), which "
                f"averages its gradient over the ranks"
            )


def complaints_about_terms(
    ignore_index: Any, label_smoothing: Any, z_loss: Any, softcap: Any
) -> Iterator[str]:
    """What is wrong with the terms of the loss, a line each."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        yield f"ignore_index={ignore_index!r} must be an int, such as -100"
    if not _is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        yield f"label_smoothing={label_smoothing!r} must be a number from 0 to 1"
    if not _is_number(z_loss) or not 0 <= z_loss < math.inf:
        yield f"z_loss={z_loss!r} must be a finite number of at least 0, such as 1e-4"
    if softcap is not None and (not _is_number(softcap) or not 0 < softcap < math.inf):
        yield f"softcap={softcap!r} must be None or a finite number above 0, such as 30.0"


def complaints_about_choices(
    reduction: Any, precision: Any, num_items_in_batch: Any, chunk_size: Any
) -> Iterator[str]:
    """What is wrong with the other options, a line each."""
    if reduction not in _REDUCTIONS:
        yield f"reduction={reduction!r} must be 'mean', 'sum' or 'none'"
    if precision is not None and precision not in PRECISIONS:
        yield f"precision={precision!r} must be None, 'fp32', 'bf16x3' or 'bf16'"
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        yield f"chunk_size={chunk_size!r} must be None or an int of at least 1"
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        yield f"num_items_in_batch divides a mean; with reduction={reduction!r} it has no part"
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            shape = tuple(num_items_in_batch.shape)
            yield f"num_items_in_batch has the shape {shape}; it must be one number"
    elif not _is_number(num_items_in_batch):
        yield f"num_items_in_batch={num_items_in_batch!r} must be an int or a tensor of one"


def demand_no_transform(tensors: Iterable[Tensor]) -> None:
    """Raise within a transform of `torch.func`, which would need more derivatives than there are.

    Raises:
        ConfigError: A tensor is wrapped by one.
    """
    if any(type(tensor) in (Tensor, nn.Parameter) and not is_plain(tensor) for tensor in tensors):
        raise ConfigError(
            "lm_head_loss is called within a transform of torch.func, such as grad or vmap, and "
            "has no rule for it; use F.cross_entropy on full logits there."
        )


def demand_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise if a label is neither ignored nor in the vocabulary. Reads the labels.

    Raises:
        ConfigError: One is not.
    """
    is_wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if is_wrong.any():
        found = labels[is_wrong].unique().tolist()
        raise ConfigError(
            f"labels has {found[:5]}, outside of 0 to {vocabulary - 1}; "
            f"labels that do not count must be ignore_index={ignore_index}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_sharded(tensor: Any) -> bool:
    return any(not placement.is_replicate() for placement in tensor.placements)
