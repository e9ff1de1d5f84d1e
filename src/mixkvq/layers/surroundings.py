"""What a model's surroundings do to torch, and how the cache keeps out of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def ordinary_tensors(method: Callable[P, T]) -> Callable[P, T]:
    """Run without gradients or autocast, and outside inference mode, whose tensors could not be written to later."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # In this order: leaving inference mode switches gradients on again.
        with torch.inference_mode(False), torch.no_grad(), autocast_off():
            return method(*args, **kwargs)

    return run


@contextmanager
def autocast_off() -> Iterator[None]:
    """The cache computes in float32 whatever the model around it is cast to."""
    with torch.autocast("cpu", enabled=False):
        if not torch.cuda.is_available():
            yield
            return
        with torch.autocast("cuda", enabled=False):
            yield
