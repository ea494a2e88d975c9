"""Measure everyone who computes an op on one case, in turns, in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from automodel_fn.bench._device_time import Call, calls_a_run, cuda_run, device_us, host_us
from automodel_fn.bench._observe import observed
from automodel_fn.bench._ops_spec import (
    CEILING,
    OURS,
    Exact,
    Inputs,
    Op,
    Prepare,
    Prepared,
    as_tuple,
)
from automodel_fn.bench._spec import Case, Measured

_CACHES = 3
_CPU_SETS = 2
_FORWARD, _BOTH = "forward", "forward_backward"
Tensors = tuple[Tensor, ...]


@attrs.frozen
class _Time:
    us: float
    is_graph: int | None


def measured_op(op: Op, case: Case, names: Sequence[str]) -> dict[str, Measured]:
    """What each subject takes on a case, and how exact it is.

    A peer that cannot compute the case is no error: what it raised is its `problem`.

    Args:
        op: The op.
        case: One of its cases.
        names: The subjects; ours, peers, or the ceiling.
    """
    sets = _input_sets(op, case)
    subjects, alone, problems = _subjects_alone(op, case, sets, names)
    values: dict[str, dict[str, float | None]] = {name: alone.get(name, {}) for name in subjects}
    facts: dict[str, dict[str, int | None]] = {name: {} for name in subjects}
    calls = {
        _FORWARD: {name: subject.forwards for name, subject in subjects.items()},
        _BOTH: {name: subject.both for name, subject in subjects.items()},
    }
    for what, by_name in calls.items():
        times = _times(case, case.parameter(f"{what}_bytes"), by_name)
        host = _host(case, {name: of for name, of in by_name.items() if name != CEILING})
        for name, time in times.items():
            values[name] |= {
                f"{what}_us": time.us,
                f"{what}_percent": _percent(times, name),
                f"{what}_host_us": host.get(name),
            }
            facts[name][f"is_{what}_by_graph"] = time.is_graph
        _free(case)
    found = {name: Measured(values[name], facts=facts[name]) for name in subjects}
    return {name: found[name] if name in found else problems[name] for name in names}


def _input_sets(op: Op, case: Case) -> tuple[Inputs, ...]:
    """Enough of them that what one call leaves in the cache is gone when its turn comes again."""
    num_sets = _CPU_SETS
    if case.device == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        num_sets = -(-_CACHES * cache // case.parameter("forward_bytes"))
    generator = _generator(case)
    return tuple(op.inputs(case, generator) for _ in range(num_sets))


def _generator(case: Case) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(0)


def _subjects_alone(
    op: Op, case: Case, sets: Sequence[Inputs], names: Iterable[str]
) -> tuple[dict[str, Prepared], dict[str, dict[str, float | None]], dict[str, Measured]]:
    """Each subject made ready; of all but the ceiling errors and peak memory; or a problem."""
    subjects: dict[str, Prepared] = {}
    alone: dict[str, dict[str, float | None]] = {}
    problems: dict[str, Measured] = {}
    exact = op.exact(sets[0])
    for name in names:
        if name == CEILING:
            subjects[name] = op.ceiling(case, len(sets))
            continue
        try:
            alone[name] = _alone(op.ways[name], op.inputs(case, _generator(case)), case, exact)
            subjects[name] = _made_ready(op.ways[name], sets)
        except Exception as error:
            if name.startswith(OURS):
                raise
            problems[name] = Measured((), problem=f"it raised {type(error).__name__}: {error}")
    del exact
    _free(case)
    return subjects, alone, problems


def _made_ready(prepare: Prepare, sets: Iterable[Inputs]) -> Prepared:
    forwards = [(prepare(*inputs.tensors), inputs) for inputs in sets]
    return Prepared(
        tuple(forward for forward, _ in forwards),
        both=tuple(_with_backward(forward, inputs) for forward, inputs in forwards),
    )


def _with_backward(forward: Call, inputs: Inputs) -> Callable[[], tuple[Tensors, Tensors]]:
    differentiated = inputs.differentiated

    def both() -> tuple[Tensors, Tensors]:
        outputs = as_tuple(forward())
        return outputs, torch.autograd.grad(outputs, differentiated, inputs.grads)

    return both


def _alone(prepare: Prepare, inputs: Inputs, case: Case, exact: Exact) -> dict[str, float | None]:
    """Errors and peak memory, of inputs of its own: there are peers that write into theirs."""
    both = _with_backward(prepare(*inputs.tensors), inputs)
    outputs, gradients = both()
    errors = {
        "error_relative": _relative_error(outputs, exact.outputs),
        "gradient_error_relative": _relative_error(gradients, exact.gradients),
    }
    del outputs, gradients
    if case.device == "cpu":
        return {**errors, "extra_peak_mib": None}  # what was freed before may still be resident
    _, seen = observed(both, case.device)
    return {**errors, "extra_peak_mib": seen.peak_mib}


def _relative_error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    return max(_norms(found, exact))


def _norms(found: Iterable[Tensor], exact: Iterable[Tensor]) -> Iterator[float]:
    for mine, reference in zip(found, exact, strict=True):
        assert mine.shape == reference.shape
        difference = torch.linalg.vector_norm(mine.detach().double() - reference)
        yield float(difference / torch.linalg.vector_norm(reference))


def _times(case: Case, num_bytes: int, calls: Mapping[str, Sequence[Call]]) -> dict[str, _Time]:
    if case.device == "cpu":
        return {name: _Time(us, None) for name, us in host_us(calls, "cpu").items()}
    runs = {
        name: cuda_run(of_sets, calls_a_run(num_bytes, len(of_sets)))
        for name, of_sets in calls.items()
    }
    found = device_us(runs)
    return {name: _Time(us, int(runs[name].is_graph)) for name, us in found.items()}


def _host(case: Case, calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    return host_us(calls, case.device) if case.device == "cuda" else {}


def _percent(times: Mapping[str, _Time], name: str) -> float | None:
    if name == CEILING or CEILING not in times:
        return None
    return 100 * times[CEILING].us / times[name].us


def _free(case: Case) -> None:
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
