"""The head of a language model as a module that makes logits as exact as it says."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from automodel_fn.dtypes import parse_dtype
from automodel_fn.errors import ConfigError
from automodel_fn.ops._heads import PRECISIONS, LogitsPrecision, is_plain_linear
from automodel_fn.ops._logits_product import logits_product
from automodel_fn.ops._split import num_parts_of
from automodel_fn.ops._weight_parts import WeightParts, rounded_weight, weight_parts
from automodel_fn.step._watch import WeightsWatch


class LMHead(nn.Linear):
    """A Linear that returns float32 logits, made in a precision of its own: see `lm_head_logits`.

    Parameters, their names and the state dict are those of `nn.Linear`, and so is what FSDP2 and
    tensor parallelism make of it. On CUDA the bfloat16 parts of the weight are kept from one call
    to the next, and made anew after the weight has changed: once in an optimizer step, however many
    microbatches it has. They take one and a half times the memory of a float32 weight (half of it
    with "bf16"; none for a bfloat16 weight), are in no state dict, and are not copied or pickled.
    After a change that cannot be noticed (see `invalidate`), say so with `invalidate(head)`.

    Compiled by `torch.compile`, the head splits the weight in every call. Under FSDP2 the kept
    parts are of the whole weight, so that each rank holds what sharding had saved;
    `keep_parts=False` splits some rows at a time instead. While a CUDA graph is recorded kept parts
    are used only if the weight needs no gradient: at a replay they would be those of the recording.

    Args:
        in_features: H, the size of the hidden dimension.
        out_features: V, the size of the vocabulary.
        bias: Whether it has one.
        device: Where the weight is made; "meta" works too.
        dtype: The dtype in which the weight is stored: fp32, fp16 or bf16.
        precision: "bf16x3", "bf16" or "fp32"; the first two take bfloat16 hidden states.
        keep_parts: Whether parts are kept.

    Raises:
        ConfigError: An argument is not as described.

    Example:
        >>> head = LMHead.from_linear(nn.Linear(4, 10, bias=False))
        >>> head(torch.ones(1, 6, 4, dtype=torch.bfloat16)).dtype, list(head.state_dict())
        (torch.float32, ['weight'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str = torch.float32,
        *,
        precision: LogitsPrecision = "bf16x3",
        keep_parts: bool = True,
    ) -> None:
        stored = parse_dtype(dtype)
        if precision not in PRECISIONS or num_parts_of(stored) is None:
            raise ConfigError(
                f"precision={precision!r} and dtype={dtype!r} make no LMHead; expected 'bf16x3', "
                "'bf16' or 'fp32', and fp32, fp16 or bf16."
            )
        super().__init__(in_features, out_features, bias, device, stored)
        self.precision: LogitsPrecision = precision
        self.keep_parts = keep_parts
        self._kept: tuple[WeightsWatch, WeightParts] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        precision: LogitsPrecision = "bf16x3",
        keep_parts: bool = True,
    ) -> Self:
        """A head with the parameters of a Linear, the same objects: what is tied stays tied.

        Args:
            linear: A plain Linear without hooks; not changed. Before FSDP2 or tensor parallelism.
            precision: As above.
            keep_parts: As above.

        Raises:
            ConfigError: An argument is not as described.
        """
        if not is_plain_linear(linear):
            raise ConfigError(
                f"linear={type(linear).__name__} must be a plain nn.Linear, with the forward of "
                "its class and without hooks; make the head before it is wrapped or sharded."
            )
        has_bias, dtype = linear.bias is not None, linear.weight.dtype  # pyright: ignore[reportUnnecessaryComparison]
        sizes = linear.in_features, linear.out_features, has_bias
        head = cls(*sizes, "meta", dtype, precision=precision, keep_parts=keep_parts)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Logits `[..., V]`, float32, of hidden states `[..., H]`."""
        # Looked up once: a parametrized weight is computed by that, and may be another each time.
        weight: Any = self.weight
        parts = self._parts_of(weight) if self._has_use_for_parts(weight) else None
        return logits_product(input, weight, self.bias, precision=self.precision, parts=parts)

    def parts(self) -> WeightParts:
        """The parts of the weight as it is now: those that are kept, if it has not changed since.

        With "bf16" a single one, the rounded weight. Not to be called in compiled code.
        """
        return self._parts_of(self.weight)

    def _parts_of(self, weight: Tensor) -> WeightParts:
        kept = self._kept
        if kept is not None and kept[0].are_same():
            return kept[1]
        # The old ones go first, so that there is memory for one set only.
        self._kept = kept = None
        # Made in inference mode they could not be used where gradients are wanted.
        with torch.inference_mode(False):
            found = (rounded_weight if self.precision == "bf16" else weight_parts)(weight)
        # A bfloat16 weight is its own part, which costs nothing to make; of a weight that is
        # computed, as a parametrized one, nothing tells whether it would be the same again.
        if self.keep_parts and weight.dtype != torch.bfloat16 and "weight" in self._parameters:
            watch = WeightsWatch([(self._parameters, "weight")])
            watch.take()
            self._kept = watch, found
        return found

    def _has_use_for_parts(self, weight: Tensor) -> bool:
        if self.precision == "fp32" or not self.keep_parts or not weight.is_cuda:
            return False
        if torch.compiler.is_compiling() or isinstance(weight, FakeTensor):
            return False
        return not (weight.requires_grad and torch.cuda.is_current_stream_capturing())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Its size and precision, for `repr`."""
        return f"{super().extra_repr()}, precision={self.precision!r}"
