"""What every handle shares: something stands until it is removed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Handle(ABC):
    """Something that was put in place, and is taken away by `remove()`; a context manager."""

    __slots__ = ()

    @abstractmethod
    def remove(self) -> None:
        """Take it away."""

    def __enter__(self) -> Self:
        """Give the handle; leaving the block removes it."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove it, also after an error."""
        self.remove()
