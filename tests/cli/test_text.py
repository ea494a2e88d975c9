from itertools import islice

import pytest
import torch

from automodel_fn.cli import _text
from automodel_fn.cli._text import batches, read_bytes
from automodel_fn.errors import ConfigError


def test_files_and_folders_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("sub/b", "two"), ("a", "one"), ("z", "three")):
        (tmp_path / name).write_text(text)

    assert bytes(read_bytes([tmp_path]).tolist()) == b"onetwothree"
    assert bytes(read_bytes([tmp_path / "z", tmp_path / "a"]).tolist()) == b"threeone"


def test_without_paths_it_is_the_source_of_the_standard_library():
    text = bytes(read_bytes([])[: 2**16].tolist())

    assert b"import" in text


def test_at_most_a_fixed_amount_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_text, "_MAX_BYTES", 5)
    for name in "abc":
        (tmp_path / name).write_text("1234")

    assert bytes(read_bytes([tmp_path]).tolist()) == b"12341"


def test_batches_are_pieces_of_the_text():
    text = torch.arange(40, dtype=torch.uint8)
    for batch in islice(batches(text, 3, 8, seed=1), 5):
        assert batch.shape == (3, 8)
        assert batch.dtype == torch.int64
        assert torch.equal(batch, batch[:, :1] + torch.arange(8))


def test_the_seed_decides_the_pieces():
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (next(batches(text, 4, 8, seed=seed)).tolist() for seed in (1, 1, 2))

    assert first == again != other


def test_a_text_of_one_sequence_is_enough_and_less_is_not():
    text = torch.arange(8, dtype=torch.uint8)
    assert next(batches(text, 1, 8, seed=0)).tolist() == [list(range(8))]

    with pytest.raises(ConfigError, match="8 bytes, fewer than seq_len=9"):
        next(batches(text, 1, 9, seed=0))
