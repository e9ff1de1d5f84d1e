"""What a cache gives out instead of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from mixkvq.adapters.transformers.errors import UnsupportedModelError

if TYPE_CHECKING:
    from mixkvq.adapters.transformers.layer import MixKVQLayer
    from mixkvq.adapters.transformers.static_layer import MixKVQStaticLayer


class KVHandle:
    """Stands for a layer's keys or values between ``update`` and the attention function.

    Has ``shape`` (with all tokens seen, or in a cache of a fixed size with the new ones), ``dtype`` and ``device``;
    anything else raises.
    """

    def __init__(self, layer: MixKVQLayer | MixKVQStaticLayer, tensor: Tensor, length: int) -> None:
        self.layer = layer
        self.tensor = tensor
        self.shape = torch.Size((*tensor.shape[:2], length, tensor.shape[3]))
        self.dtype = tensor.dtype
        self.device = tensor.device

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedModelError(
            "The model was not loaded with attn_implementation='mixkvq', or its architecture does not go through "
            "transformers' attention interface and cannot use MixKVQCache: it works on keys or values where the packed "
            "cache has no tensors."
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copying, pickling and the like ask for these and expect a plain no
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls._refuse(None)  # type: ignore[arg-type]

    __getitem__ = __matmul__ = __rmatmul__ = __add__ = __mul__ = __len__ = __iter__ = _refuse
