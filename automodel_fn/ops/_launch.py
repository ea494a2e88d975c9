"""How a Triton kernel is launched: Triton's own way, or, on versions that were tried, directly.

Triton binds, specializes and looks up anew in every call, which costs the host more than many
kernels run. A `Launcher` remembers what was compiled for arguments alike, and hands the compiled
kernel its pointers itself. Triton is imported where it is first needed.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

_TRIED = ("3.6.0",)
# What Triton specializes integers on: 1, multiples of 16, and what needs 64 bits.
_INT32 = 2**31


@attrs.frozen
class KernelLaunch:
    """How kernels are launched here, and why.

    Args:
        name: "direct" (the compiled kernel, found by our own key) or "triton" (`kernel[grid]`).
        reason: Why this way.

    Example:
        >>> KernelLaunch("triton", reason="Triton 9.9 was not tried").name
        'triton'
    """

    name: Literal["direct", "triton"]
    reason: str = attrs.field(kw_only=True)


@cache
def kernel_launch() -> KernelLaunch:
    """How kernels are launched in this process. Imports Triton."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton import knobs  # pyright: ignore[reportMissingImports]

    if knobs.runtime.interpret:
        return KernelLaunch("triton", reason="TRITON_INTERPRET is set")
    if torch.version.cuda is None:
        return KernelLaunch("triton", reason="torch is not built for CUDA")
    if triton.__version__ not in _TRIED:
        tried = ", ".join(_TRIED)
        return KernelLaunch("triton", reason=f"Triton {triton.__version__} is none of {tried}")
    return KernelLaunch("direct", reason=f"Triton {triton.__version__}, CUDA")


@cache
def num_processors(index: int) -> int:
    """The multiprocessors of a CUDA device; 2 for the CPU (-1), where Triton interprets."""
    return 2 if index < 0 else torch.cuda.get_device_properties(index).multi_processor_count


class Launcher:
    """Launches one kernel on the device and the current stream of its first argument.

    Args:
        kernel: What `triton.jit` made; its parameters are first those of run time, then constexprs.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._knobs = _runtime_knobs()

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Tensor | int | float | None, ...],
        constants: tuple[Any, ...],
        *,
        num_warps: int,
        num_stages: int = 1,
    ) -> None:
        """Launch the kernel.

        Args:
            grid: The number of programs in each of three dimensions, at least 1.
            arguments: Tensors of one device, the first is one; ints, floats, None. No bools.
            constants: The constexprs: hashable.
            num_warps: Warps of a program.
            num_stages: Stages of software pipelines.
        """
        first: Any = arguments[0]
        index = first.get_device()
        # A device of -1 is the CPU, where Triton interprets.
        if index >= 0 and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                return self._launch(index, grid, arguments, constants, num_warps, num_stages)
        return self._launch(index, grid, arguments, constants, num_warps, num_stages)

    def _launch(
        self,
        index: int,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
    ) -> None:
        key: list[Any] = [index, constants, num_warps, num_stages]
        passed: list[Any] = []
        for value in arguments:
            # First what is quick to ask: isinstance of a Tensor goes through its metaclass.
            if type(value) is int:
                key.append((value == 1) + 2 * (value % 16 == 0) + 4 * (-_INT32 <= value < _INT32))
            elif isinstance(value, Tensor):
                pointer = value.data_ptr()
                if not pointer and value.numel():
                    # What a kernel read there would end every later use of the device.
                    raise TypeError(
                        f"a kernel was given a {type(value).__name__} of the shape "
                        f"{tuple(value.shape)}, which has no memory; expected a plain tensor."
                    )
                key.append(value.dtype)
                key.append(pointer % 16 == 0)
                value = pointer
            else:
                key.append(type(value))
            passed.append(value)
        found = self._compiled.get(tuple(key))
        is_watched = self._knobs.launch_enter_hook.calls or self._knobs.launch_exit_hook.calls
        if found is None or is_watched:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = self._kernel[grid](*arguments, *constants, **options)
            direct = _direct(compiled) if kernel_launch().name == "direct" else None
            if direct is not None:
                self._compiled[tuple(key)] = direct
            return
        launch, function, is_cooperative, is_dependent, packed = found
        stream = torch._C._cuda_getCurrentRawStream(index)
        # No scratch memory, no metadata, no hooks: see _direct, and above.
        nothing = (None, None, packed, None, None, None)
        launch(*grid, stream, function, is_cooperative, is_dependent, *nothing, *passed, *constants)


def _runtime_knobs() -> Any:
    from triton import knobs  # pyright: ignore[reportMissingImports]

    return knobs.runtime


def _direct(compiled: Any) -> tuple[Any, ...] | None:
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    flags = (run.launch_cooperative_grid, run.launch_pdl)
    return run.launch, compiled.function, *flags, compiled.packed_metadata
