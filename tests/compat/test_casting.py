import copy
from contextlib import contextmanager, suppress
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from automodel_fn import ConfigError
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._tensors import scan
from automodel_fn.compat import nemo
from automodel_fn.testing import models
from automodel_fn.testing._twin import bits_of, tensors_of, twin_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = st.sampled_from([BF16, FP16, FP32])
KEYWORDS = st.lists(
    st.sampled_from(["norm", "wo", "bias", "scale", "weight", "linear"]), max_size=2
)


def is_compared(model):
    """Whether the original does not lose, split or overlook anything in it."""
    tensors = scan(model).tensors
    has_one_name_each = all(len(item.raw_names) == 1 for item in tensors)
    is_real = not any(item.tensor.is_complex() for item in tensors)
    return has_one_name_each and is_real and not storage_groups(tensors)


comparable = models().filter(is_compared)
property_test = settings(suppress_health_check=list(HealthCheck))


def state(model):
    return {
        name: (tensor.dtype, tensor.shape, bits_of(tensor).tolist())
        for name, tensor in tensors_of(model)
    }


def grads(model):
    return [(p, p.grad.dtype) for _, p in tensors_of(model) if p.is_leaf and p.grad is not None]


@contextmanager
def answering(module, is_sharded):
    with mock.patch.object(module, "_has_dtensor_params", return_value=is_sharded):
        yield


@pytest.fixture(scope="session")
def compare(original, outcome):
    """Run the same on twins of a model, and demand the same tensors, errors and log records."""

    def both(model, call, *, sharded=False):
        twins, ends = [], []
        for module in (nemo, original):
            twin = twin_of(model)
            with answering(module, sharded):
                ends.append(outcome(module, lambda module, twin=twin: call(module, twin)))
            twins.append(twin)
        assert ends[0] == ends[1], [end.message for end in ends]
        assert state(twins[0]) == state(twins[1])
        assert ends[0].value == ends[1].value
        assert all(dtype == parameter.dtype for parameter, dtype in grads(twins[0]))

    return both


@property_test
@given(comparable, DTYPES, st.sampled_from([(), ("wo",), ("wo", "norm"), None]), st.booleans())
def test_a_cast_gives_what_the_original_gives(compare, model, dtype, skip, sharded):
    compare(model, lambda u, m: u.cast_model_to_dtype(m, dtype, skip), sharded=sharded)


@property_test
@given(comparable, st.none() | DTYPES, st.booleans(), st.booleans())
def test_a_model_is_fp32_within_and_as_the_original_has_it_after(
    compare, model, dtype, edited, sharded
):
    def call(u, m):
        with u.yield_fp32_model(m, dtype) as same, torch.no_grad():
            assert same is m
            within = state(m)
            for _, tensor in tensors_of(m):
                if edited and tensor.is_floating_point():
                    tensor.mul_(1.001)
        return within

    compare(model, call, sharded=sharded)


@property_test
@given(comparable, st.none() | DTYPES)
def test_an_error_within_yield_fp32_model_ends_in_the_same_state(compare, model, dtype):
    def call(u, m):
        with suppress(OSError), u.yield_fp32_model(m, dtype):
            raise OSError("within")

    compare(model, call)


@property_test
@given(comparable, st.none() | DTYPES)
def test_a_frozen_cast_gives_what_the_original_gives(compare, model, dtype):
    compare(model, lambda u, m: u.cast_frozen_modules_to_compute_dtype(m, dtype))


def preserved(model):
    return {name: vars(part).get("_preserve_parameter_dtypes") for name, part in walk(model)}


def walk(module, name=""):
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{name}.{key}")


@property_test
@given(comparable, st.none() | DTYPES, DTYPES, st.booleans(), st.booleans())
def test_prepared_parameters_keep_their_dtypes_as_in_the_original(
    compare, model, compute_dtype, dtype, ignored, sharded
):
    def call(u, m):
        u.prepare_frozen_parameters_for_sharding(m, compute_dtype)
        seen = [state(m), preserved(m)]
        u.cast_model_to_dtype(m, dtype, ignore_preserved_dtypes=ignored)
        seen.append(state(m))
        with u.yield_fp32_model(m, dtype):
            seen.append(state(m))
        return seen

    compare(model, call, sharded=sharded)


@property_test
@given(comparable, DTYPES, KEYWORDS)
def test_what_is_brought_up_to_fp32_is_what_the_original_brings_up(
    original, model, dtype, keywords
):
    for name in ("_restore_fp32_modules", "_restore_fp32_buffers"):
        twins = [twin_of(model) for _ in range(2)]
        for module, twin in zip((nemo, original), twins, strict=True):
            twin.to(dtype)
            getattr(module, name)(twin, keywords)
        ours, theirs = (
            {key: held for key, held in state(twin).items() if key in floating(model)}
            for twin in twins
        )
        assert ours == theirs, name


def floating(model):
    return {name for name, tensor in tensors_of(model) if tensor.is_floating_point()}


@property_test
@given(comparable, DTYPES, KEYWORDS, KEYWORDS)
def test_snapshots_hold_and_bring_back_what_those_of_the_original_do(
    compare, model, dtype, of_parameters, of_buffers
):
    def call(u, m):
        held = u._snapshot_fp32_tensors(
            m, parameter_keywords=of_parameters, buffer_keywords=of_buffers
        )
        copies = [{k: (v.dtype, bits_of(v).tolist()) for k, v in part.items()} for part in held]
        m.to(dtype)
        u._restore_fp32_tensor_snapshots(m, parameter_snapshots=held[0], buffer_snapshots=held[1])
        u._restore_fp32_tensor_snapshots(
            m, parameter_snapshots={"nowhere": torch.ones(1)}, buffer_snapshots={"no.where": None}
        )
        return copies

    compare(model, call)


def test_a_snapshot_goes_back_by_names_with_wrappers_where_one_without_is_the_same():
    part = nn.Module()
    part.register_buffer("weight", torch.ones(2))
    part.module = nn.Linear(1, 2, bias=False)
    model = nn.DataParallel(part)
    held = nemo._snapshot_fp32_tensors(model, parameter_keywords=[], buffer_keywords=["weight"])

    model.to(torch.bfloat16)
    nemo._restore_fp32_tensor_snapshots(
        model, parameter_snapshots=held[0], buffer_snapshots=held[1]
    )

    assert part.weight.dtype == torch.float32
    assert part.module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "bf16"])
def test_a_dtype_that_no_model_can_have_is_the_same_error(original, outcome, dtype):
    model = nn.Linear(2, 2)
    before = state(model)
    ends = [outcome(u, lambda u: u.cast_model_to_dtype(model, dtype)) for u in (nemo, original)]
    assert ends[0] == ends[1]
    assert ends[0].error is not None
    assert state(model) == before


def test_no_dtype_casts_nothing_but_pins(compare):
    model = nn.ModuleDict({"norm": nn.Linear(2, 2), "wo": nn.Linear(2, 2)}).to(BF16)
    model._keep_in_fp32_modules = ["norm"]
    compare(model, lambda u, m: u.cast_model_to_dtype(m, None))


@pytest.mark.parametrize("declared", ["norm", None, [""], (), {"norm": 1}, ["norm", "norm"]])
def test_declarations_count_as_in_the_original(original, declared):
    model = nn.ModuleDict({"norm": nn.Linear(2, 2)})
    model._keep_in_fp32_modules = declared
    model._keep_in_fp32_modules_strict = ["wo"]
    for name in ("_get_fp32_module_keywords", "_get_strict_fp32_module_keywords"):
        assert getattr(nemo, name)(model) == getattr(original, name)(model)


def test_a_sharded_model_with_plain_keywords_is_told_alike(original, outcome):
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "head": nn.Linear(2, 2)})
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = ["norm"], ["head"]
    for module in (nemo, original):
        twin = copy.deepcopy(model)
        with answering(module, True):
            end = outcome(module, lambda u, twin=twin: u.cast_model_to_dtype(twin))
        assert end.log_levels == (30,)
        assert (twin["norm"].weight.dtype, twin["head"].weight.dtype) == (BF16, FP32)


# What differs, each with what the original does.


def pinning(keyword, **modules):
    model = nn.ModuleDict(modules)
    model._keep_in_fp32_modules = [keyword]
    return model


def test_complex_tensors_are_not_cast_to_real_ones(original, outcome):
    for module, kept in ((original, [1.0]), (nemo, [1 + 2j])):
        model = pinning("norm", norm=nn.Module(), other=nn.Module())
        for part in model.values():
            part.register_buffer("freqs", torch.tensor([1 + 2j]))
        outcome(module, lambda u, model=model: u.cast_model_to_dtype(model))
        # A pin does not save it from the original.
        assert [part.freqs.tolist() for part in model.values()] == [kept, kept]


@pytest.mark.parametrize("restore", ["_restore_fp32_modules", "_restore_fp32_buffers"])
def test_integer_buffers_stay_integers(restore, original):
    found = {}
    for module in (original, nemo):
        model = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
        getattr(module, restore)(model, ["norm"])
        found[module] = model["norm"].num_batches_tracked.dtype
    assert found == {original: FP32, nemo: torch.int64}


def tied():
    model = pinning("head", embed=nn.Embedding(3, 3), head=nn.Linear(3, 3, bias=False))
    model["head"].weight = model["embed"].weight
    return model


def test_a_pin_holds_under_a_second_name(original):
    for module, dtype in ((original, BF16), (nemo, FP32)):
        model = tied()
        weight, before = model["embed"].weight, model["embed"].weight.detach().clone()
        module.cast_model_to_dtype(model)
        assert model["head"].weight is model["embed"].weight is weight
        assert weight.dtype == dtype
        assert torch.equal(weight, before) is (dtype == FP32)
    names = {
        module: list(
            module._snapshot_fp32_tensors(tied(), parameter_keywords=["head"], buffer_keywords=[])[
                0
            ]
        )
        for module in (original, nemo)
    }
    assert names == {original: [], nemo: ["head.weight"]}


def test_a_pin_holds_under_a_second_name_in_a_frozen_cast(original):
    for module, dtype in ((original, BF16), (nemo, FP32)):
        model = tied().requires_grad_(False)
        module.cast_frozen_modules_to_compute_dtype(model, BF16)
        assert model["head"].weight.dtype == dtype


def test_a_pin_holds_for_a_module_under_two_names(original):
    for module, dtype in ((original, BF16), (nemo, FP32)):
        layer = nn.Linear(2, 2)
        module.cast_model_to_dtype(pinning("second", first=layer, second=layer))
        assert layer.weight.dtype == dtype


def test_a_skipped_module_is_skipped_under_every_name(original):
    for module, dtype in ((original, BF16), (nemo, FP32)):
        model = tied()
        del model._keep_in_fp32_modules
        module.cast_model_to_dtype(model, skip_modules=("head",))
        assert model["head"].weight.dtype == dtype


def test_a_keyword_matches_across_a_wrapper(original):
    for module, dtype in ((original, BF16), (nemo, FP32)):
        inner = nn.ModuleDict({"gate": nn.Linear(2, 2)})
        model = pinning("mlp.gate", mlp=checkpoint_wrapper(inner))
        module.cast_model_to_dtype(model)
        assert inner["gate"].weight.dtype == dtype


def test_a_shared_buffer_stays_one_object(original):
    found = {}
    for module in (original, nemo):
        model = pinning("norm", norm=nn.Module(), other=nn.Module())
        shared = torch.ones(2)
        model["norm"].register_buffer("scale", shared)
        model["other"].register_buffer("scale", shared)
        module.cast_model_to_dtype(model)
        scales = model["norm"].scale, model["other"].scale
        found[module] = scales[0] is scales[1], *(scale.dtype for scale in scales)
    # The original splits it, and the pin holds under one of its names.
    assert found == {original: (False, FP32, BF16), nemo: (True, FP32, FP32)}


def test_a_buffer_keeps_its_identity(original):
    for module, same in ((original, False), (nemo, True)):
        norm = nn.BatchNorm1d(2)
        mean = norm.running_mean
        module.cast_model_to_dtype(norm)
        assert norm.running_mean.dtype == BF16
        assert (norm.running_mean is mean) is same


def views(dtype):
    flat = torch.linspace(1, 2, 6, dtype=dtype)
    model = pinning("norm", norm=nn.Module(), other=nn.Module())
    model["norm"].weight = nn.Parameter(flat[:4])
    model["other"].weight = nn.Parameter(flat[2:])
    return model, [model["norm"].weight, model["other"].weight]


def storages(tensors):
    return {tensor.untyped_storage()._cdata for tensor in tensors}


@pytest.mark.parametrize("stored", [FP32, BF16])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_views_of_one_storage_stay_so_and_are_never_half_pinned(stored, dtype, original):
    found = {}
    for module in (original, nemo):
        model, tensors = views(stored)
        module.cast_model_to_dtype(model, dtype)
        found[module] = len(storages(tensors)), *(tensor.dtype for tensor in tensors)
    assert found == {original: (2, FP32, dtype), nemo: (1, FP32, FP32)}


def test_views_that_no_pin_names_are_cast_together(original):
    for module, count in ((original, 2), (nemo, 1)):
        model, tensors = views(FP32)
        del model._keep_in_fp32_modules
        module.cast_model_to_dtype(model)
        assert {tensor.dtype for tensor in tensors} == {BF16}
        assert len(storages(tensors)) == count


def test_views_of_which_one_is_skipped_are_left_alone(original):
    for module, dtypes in ((original, [FP32, BF16]), (nemo, [FP32, FP32])):
        model, tensors = views(FP32)
        del model._keep_in_fp32_modules
        module.cast_model_to_dtype(model, skip_modules=("norm",))
        assert [tensor.dtype for tensor in tensors] == dtypes


def test_an_error_leaves_the_model_as_it_was(original):
    found = {}
    for module in (original, nemo):
        model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Module()})
        packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        model["second"].register_buffer("packed", packed)
        with pytest.raises(NotImplementedError):
            module.cast_model_to_dtype(model)
        found[module] = model["first"].weight.dtype
    assert found == {original: BF16, nemo: FP32}


class Stubborn(torch.Tensor):
    """A subclass that cannot be cast."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            raise NotImplementedError("no other dtype")
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def test_an_error_of_a_tensor_subclass_leaves_the_model_as_it_was(original):
    found = {}
    for module in (original, nemo):
        model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Module()})
        model["second"].register_buffer("odd", torch.ones(2).as_subclass(Stubborn))
        with pytest.raises(NotImplementedError, match="no other dtype"):
            module.cast_model_to_dtype(model)
        found[module] = model["first"].weight.dtype
    assert found == {original: BF16, nemo: FP32}


def test_where_an_exchange_fails_tensors_of_a_subclass_are_as_they_were(monkeypatch):
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Module()})
    sparse = torch.eye(2).to_sparse()
    model["second"].register_buffer("sparse", sparse)

    def fails(*args, **kwargs):
        assert model["second"].sparse.dtype == BF16
        raise MemoryError

    monkeypatch.setattr("automodel_fn.compat._retype.exchange", fails)
    with pytest.raises(MemoryError):
        nemo.cast_model_to_dtype(model)
    assert model["second"].sparse.dtype == model["first"].weight.dtype == FP32


def test_a_gradient_goes_with_its_parameter(original):
    found = {}
    for module in (original, nemo):
        model = pinning("norm", norm=nn.Linear(2, 2, bias=False))
        weight = model["norm"].weight
        weight.grad = torch.full((2, 2), 1.001)
        module.cast_model_to_dtype(model)
        found[module] = weight.dtype, weight.grad.dtype
    assert found == {original: (FP32, BF16), nemo: (FP32, FP32)}


def test_a_gradient_goes_with_its_frozen_parameter(original):
    for module, dtype in ((original, FP32), (nemo, BF16)):
        layer = nn.Linear(2, 2, bias=False).requires_grad_(False)
        layer.weight.grad = torch.ones(2, 2)
        module.cast_frozen_modules_to_compute_dtype(layer, BF16)
        assert layer.weight.dtype == BF16
        assert layer.weight.grad.dtype == dtype


def test_parameters_that_are_not_initialized_are_refused(original):
    model = nn.LazyLinear(2)
    original.cast_model_to_dtype(model)
    with pytest.raises(ConfigError, match="not initialized yet"):
        nemo.cast_model_to_dtype(nn.LazyLinear(2))


def test_a_pinned_tensor_is_not_touched_and_keeps_its_strides(original):
    for module, strides in ((original, (1,)), (nemo, (2,))):
        model = pinning("weight")
        data = torch.arange(4.0)[::2]
        model.weight = nn.Parameter(data)
        module.cast_model_to_dtype(model)
        assert model.weight.stride() == strides
        assert (model.weight.data_ptr() == data.data_ptr()) is (module is nemo)


def test_a_meta_model_is_cast_alike(original):
    for module in (original, nemo):
        model = pinning(
            "norm", norm=nn.LayerNorm(2, device="meta"), wo=nn.Linear(2, 2, device="meta")
        )
        module.cast_model_to_dtype(model)
        assert (model["norm"].weight.dtype, model["wo"].weight.dtype) == (FP32, BF16)
        assert model["wo"].weight.is_meta


@attrs.frozen
class Optimized:
    model: nn.Module
    optimizer: torch.optim.Optimizer


def test_an_optimizer_goes_on_after_a_cast_with_gradients(original):
    def stepped(module):
        torch.manual_seed(0)
        model = pinning("norm", norm=nn.Linear(2, 2), wo=nn.Linear(2, 2))
        made = Optimized(model, torch.optim.AdamW(model.parameters()))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        module.cast_model_to_dtype(model)
        made.optimizer.step()
        return [parameter.dtype for parameter in model.parameters()]

    assert stepped(nemo) == [FP32, FP32, BF16, BF16]
    with pytest.raises(RuntimeError, match="dtype"):
        stepped(original)


def test_a_frozen_cast_takes_the_trainable_adapters_of_a_mixed_module_along(module):
    mixed = torch.nn.Linear(4, 4)
    mixed.weight.requires_grad_(False)
    mixed.adapter = torch.nn.Linear(4, 2)
    model = torch.nn.ModuleDict({"mixed": mixed, "head": torch.nn.Linear(4, 2)})

    module.cast_frozen_modules_to_compute_dtype(model, torch.bfloat16)

    assert {p.dtype for p in mixed.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model["head"].parameters()} == {torch.float32}


def test_a_keyword_may_name_a_wrapper(module):
    model = torch.nn.Module()
    model._orig_mod, model.other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model._keep_in_fp32_modules = ["_orig_mod"]

    module.cast_model_to_dtype(model)

    assert model._orig_mod.weight.dtype == torch.float32
    assert model.other.weight.dtype == torch.bfloat16
