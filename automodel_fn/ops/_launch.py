"""How a Triton kernel is launched: Triton's own way, or, on versions that were tried, directly.

Triton binds, specializes and looks up anew in every call, which costs the host more than many
kernels run. A `Launcher` remembers what was compiled for arguments alike, and hands the compiled
kernel its pointers itself; a `Relaunch` remembers all arguments but tensors, for an operation that
knows which of its calls are alike. Triton is imported where it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

_TRIED = ("3.6.0",)
# What Triton specializes integers on: 1, multiples of 16, and what needs 64 bits.
_INT32 = 2**31
# What is remembered of calls, after which all is forgotten: shapes that never come again pile up.
_MOST_RELAUNCHES = 1024


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


def ceil_div(size: int, block: int) -> int:
    """How many blocks a size takes. Triton's own function of it takes longer than a launch.

    Example:
        >>> ceil_div(5, 2)
        3
    """
    return -(-size // block)


class Launcher:
    """Launches one kernel on the device and the current stream of its first argument.

    Args:
        kernel: What `triton.jit` made; its parameters are first those of run time, then constexprs.

    Attributes:
        again: Gives what launches the kernel as an earlier call did that was given `alike`; None
            if none was.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._relaunches: dict[Hashable, Relaunch] = {}
        self.again: Callable[[Hashable], Relaunch | None] = self._relaunches.get
        self._knobs = _runtime_knobs()

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Tensor | int | float | None, ...],
        constants: tuple[Any, ...],
        *,
        num_warps: int,
        num_stages: int = 1,
        alike: Hashable = None,
    ) -> None:
        """Launch the kernel.

        Args:
            grid: The number of programs in each of three dimensions, at least 1.
            arguments: Tensors of one device, the first is one; ints, floats, None. No bools.
            constants: The constexprs: hashable.
            num_warps: Warps of a program.
            num_stages: Stages of software pipelines.
            alike: What all of the above follows from, the device too, but where tensors lie and,
                of those that come first among the arguments, which they are. `again` finds by it.
        """
        first: Any = arguments[0]
        index = first.get_device()
        # A device of -1 is the CPU, where Triton interprets.
        if index >= 0 and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                found = self._launch(index, grid, arguments, constants, num_warps, num_stages)
        else:
            found = self._launch(index, grid, arguments, constants, num_warps, num_stages)
        if alike is not None and found is not None:
            self._remember(alike, index, grid, arguments, constants, found)

    def _remember(
        self,
        alike: Hashable,
        index: int,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        compiled: tuple[Any, ...],
    ) -> None:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if any(tensor.data_ptr() % 16 for tensor in tensors):
            return
        if len(self._relaunches) >= _MOST_RELAUNCHES:
            self._relaunches.clear()
        rest = tuple(value for value in arguments if not isinstance(value, Tensor | None))
        self._relaunches[alike] = Relaunch(self._knobs, index, grid, compiled, (*rest, *constants))

    def _launch(
        self,
        index: int,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
    ) -> tuple[Any, ...] | None:
        # What was compiled, where it can be launched directly.
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
        if found is None or _is_hooked(self._knobs):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = self._kernel[grid](*arguments, *constants, **options)
            direct = _direct(compiled) if kernel_launch().name == "direct" else None
            if direct is not None:
                self._compiled[tuple(key)] = direct
            return direct
        launch, *how = found
        launch(*grid, torch._C._cuda_getCurrentRawStream(index), *how, *passed, *constants)
        return found


class Relaunch:
    """Launches a kernel on other tensors, in all else as it was launched before.

    Args:
        knobs: Triton's, which say whether somebody watches launches.
        index: The device.
        grid: The number of programs.
        compiled: What `_direct` made.
        rest: The arguments behind the tensors.
    """

    __slots__ = ("_how", "_index", "_knobs", "_launch", "_rest", "_x", "_y", "_z")

    def __init__(
        self,
        knobs: Any,
        index: int,
        grid: tuple[int, int, int],
        compiled: tuple[Any, ...],
        rest: tuple[Any, ...],
    ) -> None:
        self._knobs, self._index, self._rest = knobs, index, rest
        self._x, self._y, self._z = grid
        self._launch, *self._how = compiled

    def __call__(self, *tensors: Tensor | None) -> bool:
        """Launch on these; False, and nothing is launched, where it has to be done anew.

        That is: on another current device, while launches are watched, and where a tensor has no
        memory or does not begin at a multiple of 16 bytes.
        """
        if self._index != torch._C._cuda_getDevice() or _is_hooked(self._knobs):
            return False
        passed: list[int | None] = []
        for tensor in tensors:
            if tensor is None:
                passed.append(None)
                continue
            pointer = tensor.data_ptr()
            if not pointer or pointer % 16:
                return False
            passed.append(pointer)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        self._launch(self._x, self._y, self._z, stream, *self._how, *passed, *self._rest)
        return True


def _is_hooked(knobs: Any) -> bool:
    return bool(knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls)


def _runtime_knobs() -> Any:
    from triton import knobs  # pyright: ignore[reportMissingImports]

    return knobs.runtime


def _direct(compiled: Any) -> tuple[Any, ...] | None:
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    flags = (run.launch_cooperative_grid, run.launch_pdl)
    # No scratch memory, no metadata, no hooks: with any of them Triton launches.
    return run.launch, compiled.function, *flags, None, None, compiled.packed_metadata, *(None,) * 3
