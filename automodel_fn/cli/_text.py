"""Real text, as bytes: Python's own standard library, or what one gives."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from automodel_fn.errors import ConfigError

_MAX_BYTES = 64 * 2**20


def read_bytes(paths: Sequence[Path]) -> torch.Tensor:
    """The bytes of files, in the order of their names, as a tensor of token numbers.

    Args:
        paths: Files, and folders whose files are read; none stands for the source of Python's
            standard library. At most 64 MiB are read.

    Returns:
        Token numbers 0 to 255, uint8 [N].

    Raises:
        ConfigError: A path does not exist or cannot be read, or there is nothing in them.
    """
    chunks: list[bytes] = []
    size = 0
    for path in _files(paths):
        try:
            chunks.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"data={str(path)!r} cannot be read: {error.strerror}.") from error
        size += len(chunks[-1])
        if size >= _MAX_BYTES:
            break
    text = bytearray(b"".join(chunks)[:_MAX_BYTES])
    if not text:
        raise ConfigError(f"data={', '.join(map(str, paths))} has no text in it.")
    return torch.frombuffer(text, dtype=torch.uint8)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    if not paths:
        yield from sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        elif path.exists():
            yield path
        else:
            raise ConfigError(f"data={str(path)!r} does not exist.")


def batches(text: torch.Tensor, batch_size: int, seq_len: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end, each of pieces of the text at random places.

    Args:
        text: Token numbers [N].
        batch_size: B.
        seq_len: S, at most N.
        seed: Seed of the places.

    Yields:
        Token numbers [B, S], int64.

    Raises:
        ConfigError: The text is shorter than one sequence.
    """
    if len(text) < seq_len:
        raise ConfigError(
            f"data has {len(text)} bytes, fewer than seq_len={seq_len}; give more text."
        )
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seq_len)
    while True:
        starts = torch.randint(len(text) - seq_len + 1, (batch_size, 1), generator=generator)
        yield text[starts + offsets].long()
