"""Whose turn it is: every forward pass goes through the layers of a model in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Layers ``0 .. count - 1``, over and over. What was interrupted is noticed by whoever comes next."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._next = 0

    def reset(self) -> None:
        """It is the first layer's turn."""
        self._next = 0

    def check(self, layer: int) -> None:
        """Raise a ``ValueError`` if it is not this layer's turn."""
        if layer != self._next:
            turn = f"it was the turn of layer {self._next}" if self._next < self.count else "a layer was not finished"
            raise ValueError(
                f"Layer {layer} of this cache got tokens when {turn}: the last forward pass was interrupted, the model "
                "shares keys and values between layers, or the cache was built for another model. reset() the cache, "
                "or use MixKVQCache."
            )

    @contextmanager
    def take(self, layer: int) -> Iterator[None]:
        """Store one layer's tokens. If that is interrupted, it is nobody's turn until :meth:`reset`."""
        self.check(layer)
        self._next = self.count
        yield
        self._next = (layer + 1) % self.count
