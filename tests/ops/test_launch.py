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


@pytest.fixture
def current(monkeypatch):
    """The current device, which may be changed."""
    device = [-1]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: device[0], raising=False)
    return device


def launched_once(kernel, *tensors):
    launch = Launcher(kernel)
    launch((3, 2, 1), (*tensors, 32, 0.5), (7, True), num_warps=4, alike="these")
    return launch


@pytest.mark.usefixtures("hooks", "current")
def test_calls_alike_are_launched_again_with_all_arguments_but_the_tensors_of_the_first():
    kernel, x, y, z = Kernel(), aligned(8), aligned(8), aligned(8)
    launch = launched_once(kernel, x, None, y)

    assert launch.again("others") is None
    assert launch.again(None) is None
    assert launch.again("these")(z, None, x)
    nothing = (None, None, "packed", None, None, None)
    passed = (z.data_ptr(), None, x.data_ptr(), 32, 0.5, 7, True)
    assert kernel.direct == [(1, (3, 2, 1, 99, 17, False, False, *nothing, *passed))]
    assert len(kernel.by_triton) == 1


def test_what_has_to_be_done_anew_is_not_launched_again(hooks, current):
    kernel, x = Kernel(), aligned(9)
    again = launched_once(kernel, x).again("these")

    for elements in (1, 2, 3):
        assert not again(x[elements:])
    assert not again(torch.empty(0))
    assert not again(torch.empty(8, device="meta"))
    for calls in (hooks.launch_enter_hook.calls, hooks.launch_exit_hook.calls):
        calls.append("a profiler")
        assert not again(x)
        calls.clear()
    current[0] = 1
    assert not again(x)
    assert kernel.direct == []
    current[0] = -1
    assert again(x)


@pytest.mark.usefixtures("hooks")
def test_a_call_that_another_one_could_not_repeat_is_not_remembered(monkeypatch):
    for elements in (1, 2, 3):
        assert launched_once(Kernel(), aligned(9)[elements:]).again("these") is None
    assert launched_once(Kernel(scratch=128), aligned(8)).again("these") is None
    assert launched_once(Kernel(), aligned(8)).again("these") is not None
    use_triton(monkeypatch, "9.9.9")
    assert launched_once(Kernel(), aligned(8)).again("these") is None


@pytest.mark.usefixtures("hooks")
def test_calls_that_never_come_again_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_RELAUNCHES", 3)
    launch, x = Launcher(Kernel()), aligned(8)
    for number in range(7):
        launch((1, 1, 1), (x,), (), num_warps=4, alike=number)

    assert [number for number in range(7) if launch.again(number)] == [6]


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
