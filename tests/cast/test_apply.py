from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn import ConfigError, apply, audit, bf16, cast_plan, fp16, fp32

MODES = pytest.mark.parametrize("keep_originals", [False, True])
DTYPES = pytest.mark.parametrize("dtype", [bf16, fp16, fp32])


@MODES
@DTYPES
@pytest.mark.parametrize("buffers", ["persistent", "all", "none"])
def test_a_cast_is_that_of_torch_to_the_bit(
    zoo, tensors_of, entry_of, same_bits, keep_originals, dtype, buffers
):
    plan = cast_plan(zoo, dtype, buffers=buffers)
    expected = {n: t.detach().to(entry_of(plan, n).to_dtype) for n, t in tensors_of(zoo).items()}

    apply(plan, keep_originals=keep_originals)

    assert [n for n, t in tensors_of(zoo).items() if not same_bits(t, expected[n])] == []
    assert audit(zoo, plan) == ()


@MODES
def test_what_does_not_change_is_not_touched(zoo, tensors_of, entry_of, keep_originals):
    plan = cast_plan(zoo, bf16, keep_fp32="left", skip="special")
    unchanged = [n for n in tensors_of(zoo) if not entry_of(plan, n).changes]
    before = {n: (tensors_of(zoo)[n].data_ptr(), tensors_of(zoo)[n]._version) for n in unchanged}

    apply(plan, keep_originals=keep_originals)

    assert {"left", "right", "special", "blocks.0.norm.weight", "turn"} <= set(unchanged)
    after = tensors_of(zoo)
    assert {n: (after[n].data_ptr(), after[n]._version) for n in unchanged} == before


def test_a_pin_keeps_every_bit_where_its_storage_is_read_from_outside(special, same_bits):
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "mlp": nn.Linear(4, 4)})
    flat = special(8)
    model["norm"].weight = nn.Parameter(flat[:4])

    apply(cast_plan(model, bf16, keep_fp32="norm"))
    flat[0] = 5.0

    assert model["norm"].weight[0].item() == 5.0
    assert same_bits(model["norm"].weight, flat[:4])


@MODES
def test_every_tensor_stays_the_same_object(zoo, tensors_of, keep_originals):
    before = tensors_of(zoo)

    apply(cast_plan(zoo, bf16), keep_originals=keep_originals)

    assert all(tensor is before[name] for name, tensor in tensors_of(zoo).items())
    assert zoo.head.weight is zoo.embed.weight
    assert zoo.blocks[0].table is zoo.blocks[1].table
    assert zoo.blocks[0].table.dtype == bf16


@MODES
def test_views_of_one_storage_still_are(zoo, keep_originals):
    apply(cast_plan(zoo, bf16), keep_originals=keep_originals)

    with torch.no_grad():
        zoo.right[0] = 7.0
    assert zoo.left.dtype == zoo.right.dtype == bf16
    assert zoo.left[8].item() == 7.0


@pytest.mark.parametrize("offset", [0, 3])
def test_views_with_gaps_still_share_their_storage(make_holder, special, same_bits, offset):
    flat = special(64)[offset:]
    model = make_holder(a=nn.Parameter(flat[1:41].view(5, 8).t()), b=nn.Parameter(flat[9:31:3]))
    expected = [model.a.detach().to(fp16), model.b.detach().to(fp16)]
    strides = [model.a.stride(), model.b.stride()]

    apply(cast_plan(model, fp16))

    finite = torch.isfinite(expected[1])
    assert same_bits(model.b[finite], expected[1][finite])
    assert [model.a.stride(), model.b.stride()] == strides
    assert model.a.untyped_storage().data_ptr() == model.b.untyped_storage().data_ptr()
    with torch.no_grad():
        model.b[0] = 9.0
    assert model.a.reshape(-1).eq(9.0).any()


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, 4).t(), torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
     torch.ones(2, 3, 4).permute(2, 0, 1), torch.ones(())],
)  # fmt: skip
@MODES
def test_strides_of_dense_tensors_survive(make_holder, tensor, keep_originals):
    model = make_holder(weight=nn.Parameter(tensor.clone()))

    apply(cast_plan(model, bf16), keep_originals=keep_originals)

    assert model.weight.dtype == bf16
    assert model.weight.stride() == tensor.stride()


def test_an_expanded_tensor_becomes_dense(make_holder):
    model = make_holder(weight=torch.ones(1, 3).expand(2, 3))

    apply(cast_plan(model, bf16))

    assert torch.equal(model.weight, torch.ones(2, 3, dtype=bf16))


def test_attributes_hooks_and_weak_references_survive():
    model, calls = nn.Linear(2, 1, bias=False), []
    weight = model.weight
    weight.tag, reference = "mine", weakref.ref(weight)
    weight.register_hook(lambda grad: calls.append("hook"))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))

    apply(cast_plan(model, bf16))
    model(torch.ones(1, 2, dtype=bf16)).sum().backward()

    assert (weight.tag, reference()) == ("mine", weight)
    assert calls == ["hook", "accumulated"]
    assert weight.grad.dtype == bf16


@pytest.mark.parametrize("requires_grad", [True, False])
def test_trainability_survives(requires_grad):
    model = nn.Linear(2, 2).requires_grad_(requires_grad)

    apply(cast_plan(model, bf16))

    assert {(p.requires_grad, p.is_leaf, p.dtype) for p in model.parameters()} == {
        (requires_grad, True, bf16)
    }


def test_a_report_says_what_was_done(zoo, tensors_of):
    def size():
        return sum(t.nbytes for t in {id(t): t for t in tensors_of(zoo).values()}.values())

    before, plan = size(), cast_plan(zoo, bf16)

    report = apply(plan)

    assert report.entries == plan.entries
    assert report.rows() == plan.rows()
    assert report.notes == plan.notes
    assert (report.bytes_before, report.bytes_after) == (before, size())
    assert report.checksums == ()


def test_notes_are_logged_once_as_a_warning(zoo, caplog):
    plan = cast_plan(zoo, bf16)

    with caplog.at_level(logging.DEBUG, logger="automodel_fn"):
        apply(plan)

    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "automodel_fn")
    assert all(note in record.message for note in plan.notes)


def test_a_plan_without_notes_logs_nothing(caplog):
    model = nn.Linear(2, 2)

    with caplog.at_level(logging.DEBUG, logger="automodel_fn"):
        apply(cast_plan(model, bf16))

    assert caplog.records == []


def storages_of(tensors):
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.numel()]


@MODES
def test_only_the_report_of_an_apply_that_keeps_them_holds_originals(
    zoo, tensors_of, keep_originals
):
    plan = cast_plan(zoo, bf16, buffers="all")
    changing = {entry.name for entry in plan.entries if entry.changes}
    originals = storages_of(t for name, t in tensors_of(zoo).items() if name in changing)

    report = apply(plan, keep_originals=keep_originals)
    gc.collect()

    assert {storage.expired() for storage in originals} == {not keep_originals}
    assert report.entries == plan.entries


def test_streaming_holds_one_original_at_a_time(at_operator):
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(5)])
    originals, held = storages_of(model.parameters()), []

    def count():
        held.append(sum(not storage.expired() for storage in originals))

    with at_operator(1, count, names={"aten::_to_copy"}, times=100):
        apply(cast_plan(model, bf16))

    assert held == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("wrong", ["plan", None, 3, nn.Linear(1, 1)])
def test_what_is_no_plan_is_refused(wrong):
    with pytest.raises(ConfigError, match="is not a plan"):
        apply(wrong, nn.Linear(1, 1))


def test_a_plan_without_a_model_is_refused():
    plan = cast_plan(nn.Linear(2, 2), bf16)
    gc.collect()

    with pytest.raises(ConfigError, match="model=None"):
        apply(plan)


def test_a_plan_that_changes_nothing_can_be_applied_again():
    model = nn.Linear(2, 2).to(bf16)
    plan = cast_plan(model, bf16)

    assert apply(plan) == apply(plan)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.changes, self.reserve = [], lambda: None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if result.dtype == torch.uint8:
            self.reserve = weakref.ref(result)
        elif func._schema.name == "aten::_to_copy" and result.nbytes > bf16.itemsize:
            held = self.reserve()
            self.changes.append((result.nbytes, None if held is None else held.nbytes))
        return result


def test_streaming_holds_memory_for_the_largest_tensor_until_it_is_done():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(16, 8)])
    plan = cast_plan(model, bf16)

    with _Operators() as seen:
        apply(plan)

    largest = 16 * 8 * 2
    assert seen.changes == [(n * 2, largest) for n in (6, 2, 128, 8)]
    assert seen.reserve() is None
