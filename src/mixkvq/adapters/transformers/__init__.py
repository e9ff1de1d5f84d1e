"""Hugging Face transformers: cache, attention function, mask function.

A model calls ``cache.update(keys, values, layer)`` and then the attention function with what that returned, and the
cache is not among its arguments. So ``update`` returns handles instead of tensors, and the attention function takes
the layer from the handle. A model that touches keys or values in between fails loudly, instead of computing nonsense.
"""

from mixkvq.adapters.transformers.attention import NAME, register
from mixkvq.adapters.transformers.cache import MixKVQCache
from mixkvq.adapters.transformers.confidence import confidence_processors
from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.static import MixKVQStaticCache

__all__ = ["NAME", "MixKVQCache", "MixKVQStaticCache", "UnsupportedModelError", "confidence_processors", "register"]
