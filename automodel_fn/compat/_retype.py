"""Give tensors of a model other dtypes, also such as a cast plan leaves alone, all or nothing.

The original casts every floating-point tensor, float64 and float8 too. Plain tensors and DTensors
are exchanged together, wholly or not at all, and keep their identity; tensors of another subclass
go through `Module._apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import attrs
import torch
from torch import nn

from automodel_fn.cast._conversions import Conversion, dry_run
from automodel_fn.cast._dtensors import is_distributed, is_plain, is_whole
from automodel_fn.cast._exchange import Exchange, exchange
from automodel_fn.cast._interrupts import interrupts_deferred
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._sharded import Shards, together
from automodel_fn.cast._tensors import NamedTensor, scan

Rule = Callable[[NamedTensor], torch.dtype | None]
"""For a tensor the dtype that it shall have; None leaves it alone."""
_New = tuple[torch.Tensor, torch.Tensor]


@attrs.frozen
class _Change:
    """One tensor, its dtype to be, and the gradient that goes with it."""

    item: NamedTensor
    dtype: torch.dtype = attrs.field(kw_only=True)

    @property
    def tensor(self) -> torch.Tensor:
        return self.item.tensor

    @property
    def with_grad(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in (self.tensor, self.tensor.grad) if t is not None)


def retype(model: nn.Module, rule: Rule) -> None:
    """Give each floating-point tensor the dtype that `rule` says, and its gradient with it.

    Complex, integer and boolean tensors are left alone, whatever the rule says. Plain tensors
    that are views of one storage stay so: all are left alone if the rule leaves one of them alone,
    otherwise all get the widest dtype that it says for any of them.

    Raises:
        Exception: What a conversion raised; the model is as it was.
    """
    model_scan = scan(model)
    items = model_scan.tensors
    wanted = _with_one_dtype_a_storage(items, [_wanted(item, rule) for item in items])
    changes = [
        _Change(item, dtype=dtype)
        for item, dtype in zip(items, wanted, strict=True)
        if dtype is not None and dtype != item.tensor.dtype
    ]
    for dtype in {change.dtype for change in changes}:
        # What no tensor can be is an error of PyTorch's, and one before anything is done.
        torch.empty(0, device="meta").to(dtype)
    known = [change for change in changes if is_whole(change.tensor)]
    special = [change for change in changes if not is_whole(change.tensor)]
    with together(model_scan) as shards:
        conversions = tuple(_conversions(known))
        dry_run(conversions)
        with torch.no_grad():
            new = [(old, old.to(c.dtype)) for c in special for old in c.with_grad]
        _commit(model, [conversion.exchange() for conversion in conversions], new, shards)


def replace_data(model: nn.Module, data: Mapping[str, torch.Tensor]) -> None:
    """Give named tensors float32 data, wholly or not at all; unknown names are ignored.

    Each gets memory of its own, as in the original; its gradient becomes float32 with it.

    Args:
        model: The model.
        data: By FQN, with wrappers or without, the values; plain tensors keep their identity.
    """
    model_scan = scan(model)
    # One's name without wrappers may be another's with them: that is the name in a state dict.
    holders = {name: item for item in model_scan.tensors for name in item.names}
    holders |= {name: item for item in model_scan.tensors for name in item.raw_names}
    known = [(holders[name].tensor, new) for name, new in data.items() if name in holders]
    wanted = {id(tensor): (tensor, new) for tensor, new in known}
    grads = [(tensor.grad, tensor.grad) for tensor, _ in known if tensor.grad is not None]
    wanted |= {id(grad): (grad, new) for grad, new in grads if grad.dtype != torch.float32}
    known_exchanges = [
        Exchange.at_once(("a restored tensor",), (tensor,), partial(_copied, new))
        for tensor, new in wanted.values()
        if is_whole(tensor)
    ]
    special = [(tensor, *_copied(new)) for tensor, new in wanted.values() if not is_whole(tensor)]
    with together(model_scan) as shards:
        _commit(model, known_exchanges, special, shards)


def _copied(new: torch.Tensor) -> tuple[torch.Tensor]:
    return (new.detach().to(torch.float32, copy=True),)


def _wanted(item: NamedTensor, rule: Rule) -> torch.dtype | None:
    return rule(item) if item.tensor.is_floating_point() else None


def _with_one_dtype_a_storage(
    items: Sequence[NamedTensor], wanted: Sequence[torch.dtype | None]
) -> list[torch.dtype | None]:
    found = list(wanted)
    for group in storage_groups(items):
        dtypes = [dtype for index in group if (dtype := wanted[index]) is not None]
        widest = {d for d in dtypes if d.itemsize == max(other.itemsize for other in dtypes)}
        one = next(iter(widest)) if len(dtypes) == len(group) and len(widest) == 1 else None
        for index in group:
            found[index] = one
    return found


def _conversions(changes: Sequence[_Change]) -> Iterator[Conversion]:
    items = [change.item for change in changes]
    groups = {index: group for group in storage_groups(items) for index in group}
    for index, change in enumerate(changes):
        group = groups.get(index, [index])
        if index == group[0]:
            members = tuple(items[member] for member in group)
            names = tuple(member.names[0] for member in members)
            tensors = tuple(member.tensor for member in members)
            yield Conversion.of_one_storage(names, tensors, change.dtype)
        grad, name = change.tensor.grad, change.item.names[0]
        if grad is not None and _is_known(grad) and grad.dtype != change.dtype:
            yield Conversion.of_one_storage((f"{name}.grad",), (grad,), change.dtype, (name,))


def _is_known(grad: torch.Tensor) -> bool:
    return is_plain(grad) or is_distributed(grad)


def _commit(
    model: nn.Module, exchanges: list[Exchange], new: Sequence[_New], shards: Shards
) -> None:
    """Exchange what can be, and give tensors of other subclasses new data; all or nothing."""
    if not new:
        exchange(exchanges, shards)
        return
    # A parameter keeps its identity and takes other data; a buffer is another tensor then.
    back = [(tensor, tensor.detach()) for tensor, _ in new]
    back += [(made, tensor) for tensor, made in new]
    with interrupts_deferred():
        try:
            _apply_data(model, new)
            exchange(exchanges, shards, keep_originals=True)
        except BaseException:
            # Stops where the first one stopped, if it did: what lies behind was not changed.
            with suppress(Exception):
                _apply_data(model, back)
            raise


def _apply_data(model: nn.Module, data: Sequence[_New]) -> None:
    by_tensor = {id(tensor): new for tensor, new in data}
    model._apply(lambda tensor: by_tensor.get(id(tensor), tensor))
