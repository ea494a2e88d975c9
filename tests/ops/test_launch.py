"""How kernels are launched, with stand-ins for Triton, its kernels and CUDA's stream."""

import sys
from types import SimpleNamespace

import pytest
import torch

from automodel_fn.ops import _launch
from automodel_fn.ops._launch import Launcher, kernel_launch


class Kernel:
    """Notes launches by `kernel[grid]`, and what compiled ones are launched with."""

    def __init__(self, scratch=0):
        self.by_triton, self.direct, self.scratch = [], [], scratch

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.by_triton.append((grid, arguments, options))
            number = len(self.by_triton)
            launcher = SimpleNamespace(
                global_scratch_size=self.scratch,
                profile_scratch_size=0,
                launch_cooperative_grid=False,
                launch_pdl=False,
                launch=lambda *given: self.direct.append((number, given)),
            )
            return SimpleNamespace(run=launcher, function=17, packed_metadata="packed")

        return run


@pytest.fixture
def hooks(monkeypatch):
    return use_triton(monkeypatch, "3.6.0")


def use_triton(monkeypatch, version, interpret=False):
    runtime = SimpleNamespace(
        interpret=interpret,
        launch_enter_hook=SimpleNamespace(calls=[]),
        launch_exit_hook=SimpleNamespace(calls=[]),
    )
    knobs = SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version, knobs=knobs))
    monkeypatch.setitem(sys.modules, "triton.knobs", knobs)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    kernel_launch.cache_clear()
    return runtime


@pytest.fixture(autouse=True)
def _forget():
    yield
    kernel_launch.cache_clear()


def aligned(length, dtype=torch.float32):
    tensor = torch.ones(length, dtype=dtype)
    assert tensor.data_ptr() % 16 == 0
    return tensor


def launch_all(kernel, *calls):
    launch = Launcher(kernel)
    for arguments, constants in calls:
        launch((2, 1, 1), arguments, constants, num_warps=4)


@pytest.mark.usefixtures("hooks")
def test_arguments_alike_are_launched_directly_the_second_time():
    kernel, x, y = Kernel(), aligned(8), aligned(8)
    launch_all(kernel, ((x, 32, 0.5, None), (7, True)), ((y, 48, 0.25, None), (7, True)))

    assert kernel.by_triton == [
        ((2, 1, 1), (x, 32, 0.5, None, 7, True), {"num_warps": 4, "num_stages": 1})
    ]
    nothing = (None, None, "packed", None, None, None)
    given = (2, 1, 1, 99, 17, False, False, *nothing, y.data_ptr(), 48, 0.25, None, 7, True)
    assert kernel.direct == [(1, given)]


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((aligned(8), 32), (aligned(8, torch.bfloat16), 32)),
        ((aligned(8), 32), (aligned(8)[1:], 32)),
        ((aligned(8), 32), (aligned(8), 33)),
        ((aligned(8), 3), (aligned(8), 1)),
        ((aligned(8), 32), (aligned(8), 2**31)),
        ((aligned(8), 32), (aligned(8), None)),
        ((aligned(8), 2.0), (aligned(8), 2)),
    ],
)
def test_what_triton_specializes_on_is_compiled_anew(first, second):
    kernel = Kernel()
    launch_all(kernel, (first, ()), (second, ()), (first, ()), (second, ()))

    assert len(kernel.by_triton) == 2
    assert [number for number, _ in kernel.direct] == [1, 2]


@pytest.mark.usefixtures("hooks")
def test_other_constants_and_warps_are_compiled_anew():
    kernel, x = Kernel(), aligned(8)
    launch = Launcher(kernel)
    for constants, num_warps in (((1, 2), 4), ((1, 3), 4), ((1, 2), 8)):
        launch((1, 1, 1), (x,), constants, num_warps=num_warps)

    assert len(kernel.by_triton) == 3


def test_a_profiler_that_hooks_into_launches_sees_them(hooks):
    kernel, x = Kernel(), aligned(8)
    launch = Launcher(kernel)
    launch((1, 1, 1), (x,), (), num_warps=4)
    for calls in (hooks.launch_enter_hook.calls, hooks.launch_exit_hook.calls):
        calls.append("a profiler")
        launch((1, 1, 1), (x,), (), num_warps=4)
        calls.clear()
    launch((1, 1, 1), (x,), (), num_warps=4)

    assert (len(kernel.by_triton), len(kernel.direct)) == (3, 1)


@pytest.mark.usefixtures("hooks")
def test_a_kernel_that_needs_scratch_memory_is_left_to_triton():
    kernel, x = Kernel(scratch=128), aligned(8)
    launch_all(kernel, ((x,), ()), ((x,), ()))

    assert (len(kernel.by_triton), len(kernel.direct)) == (2, 0)


@pytest.mark.usefixtures("hooks")
def test_a_tensor_without_memory_is_refused_before_any_launch_and_an_empty_one_is_not():
    kernel, x = Kernel(), aligned(8)
    launch_all(kernel, ((x, torch.empty(0)), ()))
    assert len(kernel.by_triton) == 1

    with pytest.raises(TypeError, match=r"a Tensor of the shape \(8,\), which has no memory"):
        launch_all(kernel, ((x, torch.empty(8, device="meta")), ()))
    assert len(kernel.by_triton) == 1


@pytest.mark.parametrize(
    ("version", "interpret", "cuda", "name", "reason"),
    [
        ("3.6.0", False, "13.0", "direct", "Triton 3.6.0, CUDA"),
        ("9.9.9", False, "13.0", "triton", "Triton 9.9.9 is none of 3.6.0"),
        ("3.6.0", True, "13.0", "triton", "TRITON_INTERPRET is set"),
        ("3.6.0", False, None, "triton", "torch is not built for CUDA"),
    ],
)
def test_how_kernels_are_launched_is_said(monkeypatch, version, interpret, cuda, name, reason):
    use_triton(monkeypatch, version, interpret)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    assert (kernel_launch().name, kernel_launch().reason) == (name, reason)


def test_a_version_that_was_not_tried_is_launched_by_triton(monkeypatch):
    use_triton(monkeypatch, "9.9.9")
    kernel, x = Kernel(), aligned(8)
    launch_all(kernel, ((x,), ()), ((x,), ()))

    assert (len(kernel.by_triton), len(kernel.direct)) == (2, 0)


def test_the_processors_of_no_gpu_are_two():
    assert _launch.num_processors(-1) == 2
