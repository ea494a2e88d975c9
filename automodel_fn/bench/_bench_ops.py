"""The benchmark "ops": each op beside its peers, by device time, host time, memory and error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial

from automodel_fn.bench._ops_head import HEAD
from automodel_fn.bench._ops_loss import LOSS, LOSS_ON_CPU, torchs_chunked
from automodel_fn.bench._ops_measure import measured_op
from automodel_fn.bench._ops_norm import ADDED_NORM, NORM, NORM_ON_CPU
from automodel_fn.bench._ops_rope import ROPE
from automodel_fn.bench._ops_spec import (
    CEILING,
    LIGER,
    OURS,
    OURS_BF16,
    OURS_SPLIT,
    QUACK,
    TE,
    TORCH,
    TORCH_BF16,
    TORCH_CHUNKED,
    TORCH_TF32,
)
from automodel_fn.bench._ops_swiglu import SWIGLU, SWIGLU_ON_CPU
from automodel_fn.bench._spec import Benchmark, Case, Measure, Measured, Subject

OPS = (NORM, ADDED_NORM, SWIGLU, ROPE, HEAD, LOSS, NORM_ON_CPU, SWIGLU_ON_CPU, LOSS_ON_CPU)
_OF_CASE = {(case.device, case.name): op for op in OPS for case in op.cases}


def _together(case: Case, names: Sequence[str]) -> dict[str, Measured]:
    return measured_op(_OF_CASE[case.device, case.name], case, names)


def _subject(
    name: str,
    description: str,
    load: Callable[[], object] | str = "",
    package: str = "",
) -> Subject:
    """A subject, for the cases of those ops that know a way of its name.

    Args:
        name: The name.
        description: What it calls for each op.
        load: See Subject; or the module that it needs.
        package: See Subject.
    """
    cases = (case.name for op in OPS for case in op.cases if name in (*op.ways, CEILING))
    if isinstance(load, str):
        load = partial(importlib.import_module, load or "torch")
    return Subject(
        name,
        description=description,
        load=load,
        package=package,
        cases=tuple(dict.fromkeys(cases)),
    )


def _measures(prefix: str, words: str) -> tuple[Measure, ...]:
    return (
        _measure(f"{prefix}_us", "us", f"{words}, time on the device"),
        Measure(
            f"{prefix}_percent",
            unit="%",
            description=f"{words}, of the ceiling's speed",
            lower_is_better=False,
            is_drawn=True,
            is_compared=False,
        ),
        _measure(
            f"{prefix}_host_us",
            "us",
            f"{words}, time until the call has returned; on a CPU there is no other time",
        ),
    )


def _measure(name: str, unit: str, description: str) -> Measure:
    return Measure(name, unit=unit, description=description, is_compared=False)


BENCHMARK = Benchmark(
    "ops",
    description="Compute each op, forward, and forward with backward, beside its peers.",
    measures=(
        *_measures("forward", "forward"),
        *_measures("forward_backward", "forward and backward"),
        _measure(
            "error_relative",
            "",
            "distance of the outputs from float64 by the norm of these; the largest of them",
        ),
        _measure("gradient_error_relative", "", "the same of the gradients"),
        _measure(
            "extra_peak_mib",
            "MiB",
            "peak memory of forward and backward over that of the inputs, outputs and gradients "
            "included; on a GPU only",
        ),
    ),
    cases=tuple(case for op in OPS for case in op.cases),
    subjects=(
        _subject(
            OURS,
            "rms_norm_fp32, also with residual=; swiglu; apply_rope, tables in float32; "
            "lm_head_logits in bf16x3, the parts of the weight made before; lm_head_loss",
        ),
        _subject(OURS_SPLIT, "lm_head_logits in bf16x3"),
        _subject(OURS_BF16, "lm_head_logits in bf16"),
        _subject(
            TORCH,
            "nn.RMSNorm, also after an addition; silu(gate) * up; apply_rotary_pos_emb of "
            "transformers; linear in float32; cross_entropy of bf16 logits made float32",
        ),
        _subject(TORCH_TF32, "linear in float32, TF32 allowed"),
        _subject(TORCH_BF16, "linear in bf16, the weight rounded in the call"),
        _subject(
            TORCH_CHUNKED,
            "linear_cross_entropy with LinearCrossEntropyOptions()",
            load=torchs_chunked,
            package="torch",
        ),
        _subject(
            TE,
            "te.RMSNorm, also after an addition; apply_rotary_pos_emb(fused=True), q and k apart",
            load="transformer_engine.pytorch",
            package="transformer-engine",
        ),
        _subject(
            LIGER,
            "LigerRMSNorm, LigerFusedAddRMSNorm; liger_swiglu; liger_rotary_pos_emb, which writes "
            "into q and k; LigerFusedLinearCrossEntropyLoss; all by their defaults",
            load="liger_kernel.transformers",
            package="liger-kernel",
        ),
        _subject(QUACK, "rmsnorm, also with residual=", load="quack", package="quack-kernels"),
        _subject(CEILING, "what the case names: a copy kernel over as many bytes, or products"),
    ),
    ours=OURS,
    conditions=(
        "all subjects of a case take turns in one process, which serves all cases of an op; the "
        "order turns from round to round",
        "device time: the median over the turns of a CUDA graph of as many calls as read and write "
        "2 GB, by events, the device busy before the first; inputs and outputs of a graph rotate "
        "over more than three times the L2 cache",
        "a call that waits for the device cannot be in a graph: then Python makes the same calls, "
        "and the facts is_forward_by_graph and is_forward_backward_by_graph are 0",
        "host time: the median of single calls without a graph, the device idle before each",
        "on a CPU: the median of single calls",
        "a forward keeps what its backward needs",
        "warm-up: every call once before it is timed; the garbage collector is paused",
    ),
    together=_together,
)
