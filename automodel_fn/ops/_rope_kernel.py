"""What computes rotary embeddings."""

from __future__ import annotations

from torch import Tensor

from automodel_fn.ops._choice import KernelChoice, is_transformed, kernel_choice
from automodel_fn.ops._rope_rotation import Rotation, rotated_below_autograd


def rope_kernel(q: Tensor, k: Tensor) -> KernelChoice:
    """What `apply_rope` computes with, for these inputs.

    The kernel takes tensors of one CUDA device in bf16, fp16 or fp32, and of DTensors their shards;
    torch's own operators take the rest.

    Example:
        >>> import torch
        >>> rope_kernel(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
        KernelChoice(name='torch', reason='q is on cpu')
    """
    choice = kernel_choice(q=q, k=k)
    if choice.name == "triton" and is_transformed():
        return KernelChoice("torch", reason="a transform of torch.func is at work")
    return choice


def rotated_by_kernel(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The rotation without gradients, by what `rope_kernel` says."""
    if rope_kernel(q, k).name == "torch":
        return rotated_below_autograd(q, k, cos, sin, ids, rotation)
    # Triton is not everywhere, and takes long to import.
    from automodel_fn.ops._apply_rope_triton import launch_rotation

    return launch_rotation(q, k, cos, sin, ids, rotation)
