# Run as a script, this file makes a device, and autograd gives it a thread as it does to a GPU.
# What is seen is a list of pairs: on the main thread?, which first_microbatch.
import asyncio
import json
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch.utils import backend_registration
from torch.utils.checkpoint import checkpoint

from automodel_fn import bind, checkpoint_context_fn, current_step, step_context

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch makes no devices in Python",
)


@pytest.fixture(scope="module")
def seen():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


modes = pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])


@modes
def test_a_recompute_on_a_device_thread_sees_the_forwards_step(seen, mode):
    assert seen[f"1f1b {mode}"] == [[True, True], [True, False], [False, True], [False, False]]


@modes
@pytest.mark.parametrize("when", ["inside", "after"])
def test_a_recompute_inside_the_scope_or_after_it_sees_the_forwards_step(seen, mode, when):
    assert seen[f"{when} {mode}"] == [[True, True], [False, True]]


def test_nested_checkpoints_that_are_not_reentrant_see_the_forwards_step(seen):
    forward, *recomputes = seen["nested non_reentrant"]
    assert forward == [True, True]
    assert recomputes
    assert all(recompute == [False, True] for recompute in recomputes)


@modes
def test_a_second_backward_sees_the_forwards_step(seen, mode):
    assert seen[f"again {mode}"] == [[True, True], [False, True], [False, True]]


@pytest.mark.parametrize(
    ("how", "recompute"), [("free", None), ("bound", True), ("context_fn", True)]
)
def test_a_backward_from_another_thread_is_off_or_right_with_what_carries_it(seen, how, recompute):
    assert seen[f"from a thread {how}"] == [[True, True], [False, recompute]]


@modes
def test_two_threads_that_recompute_at_once_each_see_their_own_forwards_step(seen, mode):
    forwards, recomputes = seen[f"at once {mode}"][:2], seen[f"at once {mode}"][2:]
    assert forwards == [[True, True], [True, False]]
    assert sorted(recomputes) == [[False, False], [True, True]]


@modes
def test_bind_is_right_on_a_device_thread(seen, mode):
    assert seen[f"bound {mode}"] == [[True, True], [False, True]]


def test_checkpoint_context_fn_is_right_on_a_device_thread(seen):
    assert seen["context_fn"] == [[True, True], [False, True]]


def test_a_hook_on_a_device_thread_sees_the_step_of_its_forward(seen):
    assert seen["hook"] == [[False, True]]


def test_the_inner_part_of_nested_reentrant_checkpoints_is_off_on_a_device_thread(seen):
    assert seen["nested"] == [[True, True], [False, True], [False, None]]


def test_the_inner_part_of_nested_reentrant_checkpoints_is_right_with_bind(seen):
    assert seen["nested bound"] == [[True, True], [False, True], [False, True]]


def test_a_device_part_inside_a_reentrant_checkpoint_of_the_host_is_off_or_right(seen):
    forward, outer_recompute, inner_recompute = seen["device in host"]
    assert [forward, outer_recompute] == [[True, True], [True, True]]
    assert inner_recompute in ([False, True], [False, None])


def test_tasks_that_take_turns_are_never_given_each_others_step(seen):
    of_first, of_later = seen["tasks"]
    assert of_first in ([False, True], [False, None])
    assert of_later in ([False, False], [False, None])


def test_a_scope_entered_on_a_device_thread_changes_no_other_thread(seen):
    assert seen["main after"] is None


def make_device():
    class Device(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

    setup = backend_registration._setup_privateuseone_for_python_backend
    setup("device_of_a_test", backend_module=Device())
    # The steps are looked at, not the numbers: every tensor of this device is an empty one.
    library = torch.library.Library("aten", "IMPL")
    for name in ("mul.Tensor", "add.Tensor", "detach"):
        library.impl(name, lambda *_, **__: on_device(), "PrivateUse1")
    library.impl("add_.Tensor", lambda tensor, *_, **__: tensor, "PrivateUse1")
    return library


def on_device():
    return torch._C._acc.create_empty_tensor((), torch.float32)


class ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return on_device()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones(())


class ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ones(())

    @staticmethod
    def backward(ctx, grad):
        return on_device()


class Looker:
    def __init__(self):
        self.seen = []

    def look(self, *_):
        is_main = threading.current_thread() is threading.main_thread()
        self.seen.append((is_main, current_step().first_microbatch))

    def block(self, x):
        self.look()
        return x * x


def run(use_reentrant, wrap=lambda function: function, **options):
    looker = Looker()
    outs = []
    for first in (True, False)[: options.pop("forwards", 2)]:
        with step_context(first_microbatch=first):
            x = on_device().requires_grad_()
            block = wrap(looker.block)
            outs.append(checkpoint(block, x, use_reentrant=use_reentrant, **options))
    with step_context(first_microbatch=False):
        for out in outs:
            out.backward(on_device())
    return looker.seen


def inside_or_after(use_reentrant, is_inside):
    looker = Looker()
    with step_context(first_microbatch=True):
        x = on_device().requires_grad_()
        out = checkpoint(looker.block, x, use_reentrant=use_reentrant, preserve_rng_state=False)
        if is_inside:
            out.backward(on_device())
    if not is_inside:
        out.backward(on_device())
    return looker.seen


def again(use_reentrant):
    looker = Looker()
    with step_context(first_microbatch=True):
        x = on_device().requires_grad_()
        out = checkpoint(looker.block, x, use_reentrant=use_reentrant, preserve_rng_state=False)
    with step_context(first_microbatch=False):
        out.backward(on_device(), retain_graph=True)
        out.backward(on_device())
    return looker.seen


def nested_non_reentrant():
    looker = Looker()

    def once(block, x):
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)

    with step_context(first_microbatch=True):
        out = once(partial(once, looker.block), on_device().requires_grad_())
    with step_context(first_microbatch=False):
        out.backward(on_device())
    return looker.seen


def from_a_thread(wrap=lambda function: function, **options):
    looker = Looker()
    with step_context(first_microbatch=True):
        x = on_device().requires_grad_()
        block = wrap(looker.block)
        out = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **options)
    thread = threading.Thread(target=out.backward, args=(on_device(),))
    thread.start()
    thread.join()
    return looker.seen


def at_once(use_reentrant):
    """One backward of two recomputes, on the main thread and the device's, under way at once."""
    looker, meeting = Looker(), threading.Barrier(2, timeout=60)

    def block(x):
        is_recompute = len(looker.seen) >= 2
        if is_recompute:
            meeting.wait()
        looker.look()
        if is_recompute:
            meeting.wait()
        return x * x

    options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    with step_context(first_microbatch=True):
        on_host = checkpoint(block, torch.ones((), requires_grad=True), **options)
    with step_context(first_microbatch=False):
        there = checkpoint(block, on_device().requires_grad_(), **options)
    torch.autograd.backward([on_host, there], [torch.ones(()), on_device()])
    return looker.seen


def hooked():
    looker = Looker()
    with step_context(first_microbatch=True):
        x = on_device().requires_grad_()
        out = x * x
        out.register_hook(looker.look)
    with step_context(first_microbatch=False):
        out.backward(on_device())
    return looker.seen


def nested(block, x, wrap=lambda function: function):
    return checkpoint(wrap(block), x, use_reentrant=True, preserve_rng_state=False)


def device_in_host():
    looker = Looker()

    def on_host(x):
        return ToHost.apply(nested(looker.block, ToDevice.apply(x)))

    with step_context(first_microbatch=True):
        out = checkpoint(on_host, torch.ones((), requires_grad=True), use_reentrant=True)
    with step_context(first_microbatch=False):
        out.backward()
    return looker.seen


async def silent_turn(looker, first, turns):
    with step_context(first_microbatch=first):
        for _ in range(turns):
            await asyncio.sleep(0)
        # It reads no step in the forward, so that nothing tells that another task had its turn.
        out = on_device().requires_grad_() * on_device()
        out.register_hook(looker.look)
        out.backward(on_device())


async def tasks_that_take_turns(looker):
    await asyncio.gather(silent_turn(looker, True, 1), silent_turn(looker, False, 2))


def hooked_in_tasks():
    looker = Looker()
    asyncio.run(tasks_that_take_turns(looker))
    return looker.seen


def look_at_all():
    library = make_device()
    assert library is not None
    options = {"preserve_rng_state": False}
    one = options | {"forwards": 1}
    seen = {"hook": hooked()}
    for mode, use_reentrant in (("reentrant", True), ("non_reentrant", False)):
        seen[f"1f1b {mode}"] = run(use_reentrant, **options)
        seen[f"bound {mode}"] = run(use_reentrant, bind, **one)
        seen[f"at once {mode}"] = at_once(use_reentrant)
        seen[f"inside {mode}"] = inside_or_after(use_reentrant, True)
        seen[f"after {mode}"] = inside_or_after(use_reentrant, False)
        seen[f"again {mode}"] = again(use_reentrant)
    seen["nested non_reentrant"] = nested_non_reentrant()
    seen["from a thread free"] = from_a_thread()
    seen["from a thread bound"] = from_a_thread(bind)
    seen["from a thread context_fn"] = from_a_thread(context_fn=checkpoint_context_fn)
    seen["context_fn"] = run(False, context_fn=checkpoint_context_fn, **one)
    seen["nested"] = run(True, lambda block: partial(nested, block), **one)
    seen["nested bound"] = run(True, lambda block: partial(nested, block, wrap=bind), **one)
    seen["device in host"] = device_in_host()
    seen["tasks"] = hooked_in_tasks()
    seen["main after"] = current_step().first_microbatch
    return seen


if __name__ == "__main__":
    print(json.dumps(look_at_all()))
