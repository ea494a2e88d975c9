from __future__ import annotations

import pytest
import torch

from automodel_fn import bf16, fp16, fp32
from automodel_fn.cast._bits import bits, checksum, merged
from automodel_fn.cast._bits import same_bits as ours

DTYPES = [
    bf16, fp16, fp32, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e8m0fnu,
]  # fmt: skip


def pattern(bits_, dtype):
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return torch.tensor([bits_], dtype=integer).view(dtype)


def test_zeros_of_both_signs_differ_and_a_nan_equals_itself():
    nan = pattern(0x7FC00001, fp32)

    assert not ours(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert ours(nan, nan.clone())
    assert not ours(nan, pattern(0x7FC00002, fp32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_bits(dtype):
    ones = torch.ones(3).to(dtype)

    assert ours(ones, ones.clone())
    assert not ours(ones, torch.tensor([1.0, 1.0, 0.0]).to(dtype))


def test_bits_are_a_view():
    tensor = torch.zeros(2)

    bits(tensor)[0] = 1

    assert tensor[0] != 0


def test_shape_and_dtype_are_part_of_the_comparison():
    zeros = torch.zeros(4)

    assert not ours(zeros, zeros.view(2, 2))
    assert not ours(zeros, zeros.view(torch.int32))


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_merging_an_unedited_cast_brings_every_bit_back(special, same_bits, dtype):
    original = special(7, 9)

    assert same_bits(merged(original, original.to(dtype), fp32), original)


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_merging_a_widened_cast_brings_every_pattern_back(same_bits, dtype):
    original = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)

    assert same_bits(merged(original, original.to(fp32), dtype), original)


def test_merging_takes_edits_and_nothing_else(special, same_bits):
    original = special(20)
    current = original.to(bf16)
    current[7], current[13] = 3.0, -0.0

    result = merged(original, current, fp32)

    expected = original.clone()
    expected[7], expected[13] = 3.0, -0.0
    assert same_bits(result, expected)


def test_an_edit_of_a_wider_cast_is_rounded(same_bits):
    original = torch.ones(2, dtype=bf16)
    current = original.float()
    current[1] = 1.001

    assert same_bits(merged(original, current, bf16), torch.tensor([1.0, 1.001]).to(bf16))


@pytest.mark.parametrize("sign", [1, -1])
def test_an_edit_of_the_sign_of_zero_counts(same_bits, sign):
    original = torch.tensor([sign * 0.0])
    current = -original.to(bf16)

    assert same_bits(merged(original, current, fp32), -original)


def test_merging_gives_the_dtype_that_is_asked_for(special, same_bits):
    original = special(20)

    assert same_bits(merged(original, original.to(bf16), fp16), original.to(fp16))


def test_merging_after_a_change_of_shape_takes_what_is_there(same_bits):
    current = torch.tensor([[1.5, -0.0]], dtype=bf16)

    assert same_bits(merged(torch.ones(2), current, fp32), current.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_any_one_element_changes_the_checksum(dtype):
    tensor = torch.ones(5).to(dtype)

    raw = tensor.view(torch.uint8)
    sums = {checksum(tensor)}
    for place in range(raw.numel()):
        raw[place] ^= 1
        sums.add(checksum(tensor))
        raw[place] ^= 1

    assert len(sums) == 1 + raw.numel()


def test_swapped_elements_change_the_checksum():
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0]))


def test_a_longer_row_of_zeros_has_another_checksum():
    assert checksum(torch.zeros(2)) != checksum(torch.zeros(3))


def test_the_checksum_is_of_the_logical_order():
    tensor = torch.arange(6.0).view(2, 3)

    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(tensor.t()) != checksum(tensor)


def test_the_checksum_of_what_is_longer_than_a_chunk_sees_its_end():
    long = torch.zeros(2**20 + 1, dtype=torch.int8)
    before = checksum(long)

    long[-1] = 1

    assert checksum(long) != before


def test_a_checksum_is_an_unsigned_64_bit_number():
    sums = [checksum(torch.full((n,), -1.0)) for n in range(1, 20)]

    assert all(0 <= value < 2**64 for value in sums)
    assert max(sums) >= 2**62


def test_a_meta_tensor_has_the_bits_of_any_other():
    meta = torch.empty(2, device="meta")

    assert ours(meta, torch.empty(2, device="meta"))
    assert checksum(meta) == 0


def test_bits_are_of_the_values_where_pytorch_conjugates_or_negates_on_reading():
    turned = torch.tensor([1 + 2j, -0.0j]).conj()

    assert turned.is_conj()
    assert turned.imag.is_neg()
    for tensor in (turned, turned.imag):
        assert torch.equal(bits(tensor), bits(torch.tensor(tensor.tolist(), dtype=tensor.dtype)))
        assert checksum(tensor) == checksum(tensor.clone().resolve_conj().resolve_neg())


def sparse(values, places=(0, 2, 0)):
    return torch.sparse_coo_tensor(torch.tensor([places]), values, (4, 2), check_invariants=True)


def test_bits_of_sparse_tensors_are_compared_as_they_are_stored(special):
    values = special(3, 2)

    assert ours(sparse(values), sparse(values.clone()))
    assert not ours(sparse(values), sparse(values.flip(0)))
    assert not ours(sparse(values), sparse(values, places=(0, 1, 0)))
    assert not ours(sparse(values), sparse(values[:2], places=(0, 2)))
    assert not ours(sparse(values), torch.zeros(4, 2))
    assert not ours(torch.zeros(4, 2), sparse(values))


def test_merging_an_unedited_sparse_cast_brings_every_bit_back(special, same_bits):
    original = sparse(special(3, 2))

    back = merged(original, original.to(bf16), fp32)
    edited = merged(original, sparse(torch.ones(3, 2, dtype=bf16)), fp32)

    assert same_bits(back._values(), original._values())
    assert torch.equal(edited._values(), torch.ones(3, 2))


def test_a_checksum_sees_where_an_element_is_across_pieces(monkeypatch):
    monkeypatch.setattr("automodel_fn.cast._bits._CHUNK", 4)
    values = torch.arange(12.0)

    assert checksum(values) != checksum(values.roll(4))


@pytest.mark.parametrize("place", range(4))
def test_a_checksum_sees_the_highest_bit_of_every_element(place):
    zeros = torch.zeros(4, dtype=torch.float64)
    negated = zeros.clone()
    negated[place] = -0.0

    assert checksum(zeros) != checksum(negated)
