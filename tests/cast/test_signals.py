from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import automodel_fn
from automodel_fn import apply, bf16, cast_plan, temporary_cast
from automodel_fn.cast import _temporary
from automodel_fn.cast._tensors import scan

SCRIPT = """
    import sys
    import torch
    from automodel_fn import apply, bf16, cast_plan

    def values():
        return (torch.full((16,), 1 + i * 2.0**-20) for i in range(20_000))

    model = torch.nn.ParameterList(values())
    plan = cast_plan(model, bf16)
    try:
        print("ready", flush=True)
        apply(plan, keep_originals=sys.argv[1] == "keep")
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
    (dtype,) = {p.dtype for p in model}
    assert all(torch.equal(p, v.to(dtype)) for p, v in zip(model, values(), strict=True))
    print(dtype, flush=True)
"""


@pytest.mark.parametrize("mode", ["stream", "keep"])
def test_ctrl_c_during_a_long_apply_leaves_a_whole_model(mode):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(automodel_fn.__file__).parents[1],
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=50)
    finally:
        process.kill()

    assert (process.returncode, err) == (0, "")
    assert out in ("torch.float32\n", "torch.bfloat16\n")


def keeping(model):
    plan = cast_plan(model, bf16)
    return lambda: apply(plan, model, keep_originals=True)


def entering(model):
    return temporary_cast(model, bf16).__enter__


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("prepare", [keeping, entering])
def test_ctrl_c_is_dealt_with_at_the_next_tensor_and_not_at_the_end(at_operator, prepare):
    model = torch.nn.ParameterList(torch.full((4,), 1.001) for _ in range(50))
    effect, fourth = prepare(model), 4
    mode = at_operator(fourth, press_ctrl_c, names={"aten::_to_copy"})

    with mode, pytest.raises(KeyboardInterrupt):
        effect()

    assert mode.seen == fourth
    assert {p.dtype for p in model} == {torch.float32}


def test_ctrl_c_before_the_first_tensor_comes_back_still_ends_a_temporary_cast(monkeypatch):
    model = torch.nn.Linear(3, 3)
    before = [tensor.detach().clone() for tensor in model.parameters()]
    context = temporary_cast(model, bf16)
    context.__enter__()

    def interrupted_scan(model):
        signal.raise_signal(signal.SIGINT)
        return scan(model)

    monkeypatch.setattr(_temporary, "scan", interrupted_scan)
    with pytest.raises(KeyboardInterrupt):
        context.__exit__(None, None, None)

    assert [tensor.dtype for tensor in model.parameters()] == [torch.float32] * 2
    assert all(map(torch.equal, model.parameters(), before))
