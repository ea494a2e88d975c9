"""The product of a head whose weight is a DTensor: tensor-parallel, or whole on every rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from automodel_fn.errors import ConfigError


def product_of_shards(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> DTensor:
    """What `product` gives of what each rank holds, as one DTensor.

    On a mesh dimension that shards the vocabulary, hidden states are gathered and the logits stay
    sharded on it; on one that holds the weight whole, hidden states stay as they are sharded.

    Args:
        hidden: `[..., H]`.
        weight: `[V, H]`, replicated or sharded on V.
        bias: `[V]`, or None.
        product: The product of local tensors, known to autograd.

    Raises:
        ConfigError: Only one of the two is a DTensor, their meshes differ, or the weight is sharded
            in another way.
    """
    if not isinstance(hidden, DTensor) or not isinstance(weight, DTensor):
        found = f"hidden_states {type(hidden).__name__}, weight {type(weight).__name__}"
        raise ConfigError(f"hidden states and weight must both be DTensors or neither; {found}.")
    mesh, last = weight.device_mesh, hidden.dim() - 1
    if hidden.device_mesh != mesh:
        raise ConfigError(
            f"hidden_states are on {hidden.device_mesh} and the weight is on {mesh}; they must be "
            "on one mesh."
        )
    inputs: list[Placement] = []
    outputs: list[Placement] = []
    of_hidden: list[Placement] = []
    of_weight: list[Placement] = []
    for theirs, ours in zip(hidden.placements, weight.placements, strict=True):
        if not (ours.is_replicate() or ours.is_shard(0)):
            raise ConfigError(
                f"weight has the placements {weight.placements}; a head is computed where it is "
                "replicated or sharded on the vocabulary (Shard(0))."
            )
        is_apart = ours.is_replicate() and any(theirs.is_shard(dim) for dim in range(last))
        inputs.append(theirs if is_apart else Replicate())
        outputs.append(Shard(last) if ours.is_shard() else inputs[-1])
        of_hidden.append(Partial() if ours.is_shard() else inputs[-1])
        of_weight.append(Partial() if is_apart else ours)
    whole = (*hidden.shape[:-1], weight.shape[0])
    local = product(
        hidden.redistribute(mesh, inputs).to_local(grad_placements=of_hidden),
        weight.to_local(grad_placements=of_weight),
        None if bias is None else _local_bias(bias, [*weight.placements], of_weight),
    )
    strides = make_contiguous_strides_for(whole)
    return DTensor.from_local(local, mesh, outputs, run_check=False, shape=whole, stride=strides)


def _local_bias(bias: Tensor, places: list[Placement], of_bias: list[Placement]) -> Tensor:
    assert isinstance(bias, DTensor), "a weight is a DTensor and its bias is none"
    return bias.redistribute(bias.device_mesh, places).to_local(grad_placements=of_bias)
