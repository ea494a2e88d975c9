"""English text as token numbers, without a network: the standard library's own documentation."""

from __future__ import annotations

import re
from collections import Counter
from itertools import cycle, islice
from pydoc_data.topics import topics

import torch
from torch import Tensor

_TOKEN = re.compile(r"\w+|[^\w\s]")


def ids_by_rank(text: str, vocabulary: int) -> tuple[int, ...]:
    """The words and punctuation marks of a text as ranks of their frequency, 0 the most frequent.

    Words that are as frequent as one another are ranked by the alphabet. Those with no number left
    all get the last one. Pure.

    Args:
        text: The text.
        vocabulary: How many numbers there are.

    Example:
        >>> ids_by_rank("a rose is a rose.", 4)
        (0, 1, 3, 0, 1, 2)
        >>> ids_by_rank("a rose is a rose.", 2)
        (0, 1, 1, 0, 1, 1)
    """
    tokens = _TOKEN.findall(text)
    counts = Counter(tokens)
    by_rank = sorted(counts, key=lambda token: (-counts[token], token))
    ids = {token: min(rank, vocabulary - 1) for rank, token in enumerate(by_rank)}
    return tuple(ids[token] for token in tokens)


def prose() -> str:
    """What `help()` prints about Python's keywords and topics, about half a million characters."""
    return "\n".join(topics[name] for name in sorted(topics))


def text_batches(num_batches: int, num_tokens: int, vocabulary: int, device: str) -> list[Tensor]:
    """Microbatches of the prose, [1, S] each, one after another; at its end it begins again.

    Args:
        num_batches: How many.
        num_tokens: S.
        vocabulary: How many token numbers the model knows.
        device: Where they are put.
    """
    ids = list(islice(cycle(ids_by_rank(prose(), vocabulary)), num_batches * num_tokens))
    return list(torch.tensor(ids, device=device).reshape(num_batches, 1, num_tokens))
