"""The benchmark "train-step": whole training steps of Hugging Face models, by ours and by peers."""

from __future__ import annotations

from functools import partial

from automodel_fn.bench._spec import Benchmark, Measure, Promise, Subject
from automodel_fn.bench._train_step_measure import DIGITS, measured_step
from automodel_fn.bench._train_step_models import CASES
from automodel_fn.bench._train_step_ways import (
    COMPILED,
    LIGER,
    NEMO,
    OURS,
    OURS_FP8,
    PLAIN,
    TE_LINEAR,
    Way,
)

_NAME, _PLAIN_NAME = "automodel_fn", "Hugging Face"
_TIMED_ON_GPU = ("llama", "moe", "quick-llama", "quick-moe")
_ON_GPU = (*_TIMED_ON_GPU, "llama-loss", "moe-loss")
_TIMED = (*_TIMED_ON_GPU, "cpu-*", "quick-cpu-*")
_LLAMA = ("llama", "quick-llama", "cpu-llama", "quick-cpu-llama")


def _subject(
    name: str,
    description: str,
    way: Way,
    *,
    package: str = "transformers",
    claims: tuple[str, ...] = (),
    promises: tuple[Promise, ...] = (),
    cases: tuple[str, ...] = ("*",),
) -> Subject:
    return Subject(
        name,
        description=description,
        measure=partial(measured_step, way, name.startswith(_NAME)),
        load=way.load,
        package=package,
        claims=claims,
        promises=promises,
        cases=cases,
    )


def _promises(times_plain: float, gib: float) -> tuple[Promise, Promise]:
    of = ("llama",)
    return (
        Promise("throughput_tps", at_least=times_plain, peer=_PLAIN_NAME, cases=of),
        Promise("peak_gib", at_most=gib, cases=of),
    )


BENCHMARK = Benchmark(
    "train-step",
    description="Make a training step of some layers of a language model, gradients accumulated.",
    measures=(
        Measure(
            "step_ms",
            unit="ms",
            description="from the end of a step on the device to that of the next, the optimizer's "
            "included, nothing being waited for between them: median of the timed steps",
        ),
        Measure(
            "throughput_tps",
            unit="tokens/s",
            description="tokens a second",
            lower_is_better=False,
            is_drawn=True,
            is_compared=False,
        ),
        Measure(
            "peak_gib",
            unit="GiB",
            description="peak memory of a step, as PyTorch allocates it, on a GPU",
            is_drawn=True,
        ),
        Measure(
            "host_ms",
            unit="ms",
            description="time until the calls of a step had returned; on a GPU only",
            is_compared=False,
        ),
        Measure(
            "first_loss_nats",
            unit="nats",
            description="the loss of the first step",
            is_compared=False,
        ),
        Measure(
            "last_loss_nats",
            unit="nats",
            description="the loss of the last step whose loss is compared: mean over its "
            "microbatches",
            is_compared=False,
        ),
        Measure(
            "loss_distance_relative",
            unit="",
            description="the largest distance of a step's loss from the plain model's, of that",
            is_compared=False,
        ),
    ),
    cases=CASES,
    subjects=(
        _subject(
            _NAME,
            "backend_plan in bf16: norms in float32, fused rope and loss, SwiGLU computed again in "
            "the backward, masks without waiting; of a mixture of experts SwiGLU fused, grouped",
            OURS,
            claims=("is_loss_of_plain",),
            promises=_promises(1.22, 18.5),
        ),
        _subject(
            f"{_NAME}, FP8",
            "the same with te.Linear in FP8, current scaling, weights kept in a step_context",
            OURS_FP8,
            package="transformer-engine",
            # FP8 rounds to 4 bits: its losses are compared, and promise no digit.
            claims=("is_weight_kept",),
            promises=_promises(1.48, 20.5),
            cases=_ON_GPU,
        ),
        _subject(_PLAIN_NAME, "the model as it is: attention by sdpa, grouped experts", PLAIN),
        _subject(
            f"{_PLAIN_NAME}, compiled", "its body compiled, not its head", COMPILED, cases=_TIMED
        ),
        _subject(
            "Liger",
            "apply_liger_kernel_to_llama or _qwen3_moe with its defaults: rope, norms, SwiGLU "
            "or experts, linear and cross entropy by its kernels",
            LIGER,
            package="liger-kernel",
            cases=_TIMED_ON_GPU,
        ),
        _subject(
            "NeMo Automodel",
            "its own LlamaForCausalLM with attn sdpa, linear torch, rms_norm torch_fp32",
            NEMO,
            package="nemo-automodel",
            cases=_LLAMA,
        ),
        _subject(
            "te.Linear, FP8",
            "te.Linear in the place of each nn.Linear but the head, FP8 by current scaling, "
            "weights quantized in every microbatch",
            TE_LINEAR,
            package="transformer-engine",
            cases=_TIMED_ON_GPU,
        ),
    ),
    ours=_NAME,
    conditions=(
        "each measurement in a fresh process, one after another, every subject once a round",
        "weights, gradients and optimizer state in bf16; fused AdamW, learning rate 1e-5; "
        "gradients set to None after each step",
        "text: the documentation that Python's help() prints, words as ranks of their frequency",
        "each microbatch is given the number of labels of its step, as by transformers' Trainer",
        "warm-up: 3 steps; the garbage collector is paused while steps are timed",
        "losses: the plain model is trained first in the same process, from the same weights on "
        f"the same text; is_loss_of_plain is 1 if every step's loss is the same to {DIGITS} digits",
        "a case with losses and timed steps makes those of the losses first",
    ),
)
