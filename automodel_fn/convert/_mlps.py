"""MLPs and experts whose `silu(gate) * up` is one operation."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import Overlay, is_close, names_in, probe_tensor
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace, own_class
from automodel_fn.ops._recomputed import recomputed_swiglu
from automodel_fn.ops._swiglu import swiglu
from automodel_fn.ops._swiglu_packed import swiglu_packed

_SPLIT = {"gate_proj", "up_proj", "down_proj"}
_PACKED = {"gate_up_proj", "down_proj"}


def _namespace(below: type[Any], choice: str) -> Namespace:
    if hasattr(below, "_apply_gate"):
        return {"_apply_gate": _gated}
    is_split = names_in(own_class(below)) >= _SPLIT

    @wraps(below.forward)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if is_split:
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        else:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        if choice == "recomputed":
            return recomputed_swiglu(self.down_proj, gate, up)
        return self.down_proj(swiglu(gate, up))

    return {"forward": forward}


def _gated(self: Any, gate_up: Tensor) -> Tensor:
    return swiglu_packed(gate_up)


def _is_mlp(part: Part, around: Around) -> bool:
    if hasattr(part.own, "_apply_gate"):
        return bool(getattr(part.module, "has_gate", False))
    children = part.module._modules.keys()
    return any(children >= kind and names_in(part.own) >= kind for kind in (_SPLIT, _PACKED))


def _refusal(part: Part, around: Around) -> str:
    if around.asked["swiglu"] == "recomputed" and hasattr(part.own, "_apply_gate"):
        return "experts keep what they multiply; swiglu='fused' is for them"
    return "" if _is_swiglu(part.module, part.own) else "it computes no silu(gate) * up"


def _keeping(part: Part, around: Around) -> str:
    is_loop = around.asked.get("experts") == "torch" and hasattr(part.own, "_apply_gate")
    return "the loop over experts has code of its own; see experts" if is_loop else ""


def _is_swiglu(module: nn.Module, own: type[Any]) -> bool:
    """Whether it is: found by trying it, with a gate and an up that were not projected."""
    given, gate, up = (_wide_values(seed) for seed in range(3))
    packed = torch.cat((gate, up), -1)

    def projected(result: Tensor) -> Any:
        # Of the input as it came: what a family makes of it first would be left out.
        return lambda x: result + (x - given).sum()

    try:
        # As in training, since a dropout would be left out; its numbers are not those of the model.
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=()):
            if hasattr(own, "_apply_gate"):
                found = own._apply_gate(module, packed)
            else:
                seen = Overlay(
                    module,
                    training=True,
                    **_dropouts(module),
                    gate_proj=projected(gate),
                    up_proj=projected(up),
                    gate_up_proj=projected(packed),
                    down_proj=lambda x: x,
                )
                found = own.forward(seen, given)
    # It wants other attributes or arguments.
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return False
    return is_close(found, nn.functional.silu(gate) * up)


def _wide_values(seed: int) -> Tensor:
    """Values `[4, 8]`, half of them so large that it shows if a family cuts them off."""
    return probe_tensor(4, 8, seed=seed) * torch.tensor([[1.0], [1.0], [1e6], [1e6]], device="cpu")


def _dropouts(module: nn.Module) -> dict[str, Any]:
    """The module's dropouts by name, as in training, whatever the mode of the model is now."""
    return {
        name: partial(nn.functional.dropout, p=child.p, training=True)
        for name, child in module.named_children()
        if isinstance(child, nn.Dropout)
    }


SWIGLU = Behaviour(_namespace)
SWIGLU_RULE = Rule(
    "swiglu",
    own="torch",
    is_candidate=_is_mlp,
    refusal=_refusal,
    keeping=_keeping,
    is_listed=True,
)
