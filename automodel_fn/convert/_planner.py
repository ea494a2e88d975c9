"""From a model and a backend to a plan; reads only, and needs no tensor data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from automodel_fn.backend._availability import Availability
from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._probe import probe
from automodel_fn.backend._reasons import FUSED_LOSS, GMM_IN_BF16, TE_IN_FLOAT32
from automodel_fn.backend._resolve import Resolution, resolve
from automodel_fn.convert._around import Around, look_around
from automodel_fn.convert._entries import SKIP, ModuleSwap
from automodel_fn.convert._experts import GROUPED, GROUPED_EXPERTS_RULE
from automodel_fn.convert._head_sizes import has_wide_te_attention, stored_dtype
from automodel_fn.convert._misfits import is_other_half, misfits, words
from automodel_fn.convert._parts import scanned, skipped_parts
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.convert._recipes import recipe_word
from automodel_fn.convert._rulebook import CONFIG_RULES, MODULE_RULES
from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import BackendUnavailableError, ConfigError, itemized
from automodel_fn.plans import WeakObjects

_GROUPED = GROUPED_EXPERTS_RULE.field


def backend_plan(
    model: nn.Module,
    backend: BackendConfig | Resolution,
    *,
    skip: str | Iterable[str] = (),
    availability: Availability | None = None,
) -> BackendPlan:
    """What a backend will make of each module of a model. Does not touch the model.

    The modules stay the same objects: `apply` exchanges their classes for subclasses that run by
    another backend, and settings of their configs. Parameters, ties, hooks, names, devices, dtypes
    and the state dict are what they were, and `plan.inverse()` brings the own classes back.

    Args:
        model: A model of transformers, or of modules that are built as its are; on any device,
            also on meta.
        backend: What is asked for; resolved for this machine, if it was not yet.
        skip: Modules that are left alone, and all beneath them: exact FQNs, globs (`*` crosses
            dots), or "re:" with a full match.
        availability: The machine that the model will run on; None for this one.

    Returns:
        The plan, to read, compare, write to JSON, and `apply`.

    Raises:
        BackendUnavailableError: What was asked for by name cannot run there, or no module of the
            model has the sizes or the dtype for it; all of it is listed. Where some modules have
            them, the others stay as they are, and the plan says why.
        ConfigError: A pattern that matches no module, or an argument of another kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16))
        >>> for entry in backend_plan(model, BackendConfig(linear="torch"), skip="0").entries:
        ...     print(entry.name, entry.field, entry.action, entry.reason)
        0 linear skip skip='0'
    """
    found = probe() if availability is None else availability
    resolution = _resolved(backend, found)
    model_scan, parts = scanned(model)
    asked = asked_of(resolution.backend)
    around = look_around(
        parts,
        model_scan,
        asked,
        chosen=_chosen(resolution),
        skipped=skipped_parts(parts, skip),
        has_gpu=bool(found.devices),
    )
    entries = tuple(_entries(around))
    by_field: dict[str, list[ModuleSwap]] = {}
    for entry in entries:
        by_field.setdefault(entry.field, []).append(entry)
    unfit = list(misfits(around, by_field))
    if unfit:
        raise BackendUnavailableError(itemized("this backend cannot run in this model", unfit))
    return BackendPlan(
        entries,
        notes=tuple(_notes(resolution.backend, around, by_field)),
        model_ref=WeakObjects(model),
    )


def _resolved(backend: BackendConfig | Resolution, availability: Availability) -> Resolution:
    if isinstance(backend, Resolution):
        return backend
    if not isinstance(backend, BackendConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"backend={type(backend).__name__} must be a BackendConfig or a Resolution; "
            "write backend_plan(model, BackendConfig(...))."
        )
    return resolve(backend, availability)


def asked_of(backend: BackendConfig) -> dict[str, str]:
    """What a backend without "auto" asks for, by field of a plan, as text.

    Example:
        >>> asked_of(BackendConfig(attn="sdpa", gate_precision="fp32"))["gate_precision"]
        'float32'
    """
    precision, experts = backend.gate_precision, backend.experts
    # What transformers has no forward for needs nothing of its configs either.
    by_config = {} if experts in ("te", "gmm") else {"experts": experts}
    return {
        # Transformer Engine's function takes the masks that transformers makes for sdpa.
        "attn": "sdpa" if backend.attn == "te" else backend.attn,
        "te_attn": str(backend.attn == "te"),
        "linear": backend.linear,
        "rms_norm": backend.rms_norm,
        **by_config,
        _GROUPED: experts if experts in GROUPED else "none",
        "rope_fusion": str(backend.rope_fusion),
        "async_masks": str(backend.async_masks),
        "swiglu": backend.swiglu,
        "loss": backend.loss,
        "lm_head_precision": backend.lm_head_precision or "none",
        "gate_precision": "none" if precision is None else dtype_name(precision),
        "fake_balanced_gate": _fake_gate(backend),
        "compile_attn": str(backend.compile_attn),
        "te_fp8": recipe_word(backend.te_fp8),
    }


def _fake_gate(backend: BackendConfig) -> str:
    if not backend.fake_balanced_gate:
        return "False"
    return f"noise {backend.fake_gate_noise}" if backend.fake_gate_noise else "balanced"


def _chosen(resolution: Resolution) -> frozenset[str]:
    """The fields of a plan whose choice was left to "auto"."""
    chosen = {each.name for each in resolution.fields if each.is_chosen}
    followers = {"attn": "te_attn", "experts": _GROUPED}
    return frozenset(chosen | {followers[name] for name in chosen & followers.keys()})


def _entries(around: Around) -> Iterator[ModuleSwap]:
    """One for each module and field, and one for each config, where its first reader stands."""
    by_first: dict[int, list[ModuleSwap]] = {}
    for rule in CONFIG_RULES.values():
        for readers in rule.readers(around.parts) if rule.field in around.asked else ():
            by_first.setdefault(id(readers[0].module), []).append(rule.entry(readers, around))
    for part in around.parts:
        yield from by_first.get(id(part.module), ())
        for rule in MODULE_RULES.values():
            entry = rule.entry(part, around)
            if entry is not None:
                yield entry


def _notes(
    backend: BackendConfig, around: Around, by_field: Mapping[str, list[ModuleSwap]]
) -> Iterator[str]:
    """What is asked for by name and comes to nothing, and what "auto" takes away."""
    for field, choice in around.asked.items():
        found = by_field.get(field, [])
        if field not in around.chosen and not is_other_half(field, around):
            yield from _in_vain(field, choice, found)
        elif field == "loss" and any(entry.changes and entry.after == "fused" for entry in found):
            yield FUSED_LOSS
    te_attention = {entry.name for entry in by_field.get("te_attn", []) if entry.changes}
    if any(has_wide_te_attention(around.by_name[name], around) for name in te_attention):
        yield TE_IN_FLOAT32
    gmm = {entry.name for entry in by_field.get(_GROUPED, []) if entry.after == "gmm"}
    if any(stored_dtype(around.by_name[name].module) != torch.bfloat16 for name in gmm):
        yield GMM_IN_BF16
    yield from _without_modules(backend, around)


def _in_vain(field: str, choice: str, entries: Sequence[ModuleSwap]) -> Iterator[str]:
    asked = "=".join(words(field, choice))
    if entries and all(entry.action == SKIP for entry in entries):
        yield f"{asked} was asked for, and no module got it: {entries[0].reason}"
    rule = MODULE_RULES.get(field)
    if not entries and not (rule is not None and choice == rule.own):
        yield f"{asked} has nothing to act on in this model"


def _without_modules(backend: BackendConfig, around: Around) -> Iterator[str]:
    """Fields that no module of transformers reads."""
    if backend.dispatcher != "torch" and "dispatcher" not in around.chosen:
        yield (
            f"dispatcher={backend.dispatcher} has nothing to act on: transformers' experts get "
            "their tokens without one"
        )
    if not backend.enable_hf_state_dict_adapter:
        yield "enable_hf_state_dict_adapter=False has no effect: names stay Hugging Face's"
    if backend.enable_fsdp_optimizations:
        yield (
            "enable_fsdp_optimizations=True is not a matter of modules: hold gradients back with "
            "gradient_sync(model, step)"
        )
