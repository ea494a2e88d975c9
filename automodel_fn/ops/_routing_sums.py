"""The sums over each token's rows, and their gradients, by torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sums(
    rows: Tensor, weights: Tensor | None, places: Tensor, dtype: torch.dtype
) -> Tensor:
    """The sums of each token's rows, in their order at the token.

    Args:
        rows: `[R, H]`.
        weights: `[T, K]`; None for 1.
        places: `[T, K]`, the rows of each token.
        dtype: Of the result, `[T, H]`.

    Example:
        >>> rows, places = torch.tensor([[1.0], [10.0]]), torch.tensor([[1, 0]])
        >>> weighted_sums(rows, torch.tensor([[0.5, 2.0]]), places, torch.float32)
        tensor([[7.]])
    """
    wide = _wide(rows, weights)
    taken = rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[-1])
    if weights is None:
        return taken.sum(1, dtype=wide).to(dtype)
    return (taken.to(wide) * weights.to(wide)[..., None]).sum(1).to(dtype)


def gradients(
    dy: Tensor,
    rows: Tensor,
    weights: Tensor,
    tokens: Tensor,
    places: Tensor,
    *,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the rows and of the weights; of a row that fills an expert up it is 0.

    Args:
        dy: `[T, H]`, of the weighted sums.
        rows: `[R, H]`.
        weights: `[T, K]`.
        tokens: `[R]`, the token of each row.
        places: `[T, K]`, the rows of each token.
        needed: Which of both.

    Example:
        >>> rows, places = torch.tensor([[1.0], [10.0]]), torch.tensor([[1, 0]])
        >>> dy, weights, tokens = torch.ones(1, 1), torch.tensor([[0.5, 2.0]]), torch.tensor([0, 0])
        >>> gradients(dy, rows, weights, tokens, places, needed=(True, True))
        (tensor([[2.0000],
                [0.5000]]), tensor([[10.,  1.]]))
    """
    wide, drows, dweights = _wide(rows, weights), None, None
    if needed[0]:
        of_rows = weights.new_zeros(len(rows), dtype=wide)
        of_rows = of_rows.index_copy(0, places.flatten(), weights.flatten().to(wide))
        drows = (dy.index_select(0, tokens).to(wide) * of_rows[:, None]).to(rows.dtype)
    if needed[1]:
        taken = rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[-1])
        products = taken.to(wide) * dy.to(wide)[:, None]
        dweights = products.sum(-1).to(weights.dtype)
    return drows, dweights


def _wide(rows: Tensor, weights: Tensor | None) -> torch.dtype:
    of_both = rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)
    return torch.promote_types(of_both, torch.float32)
