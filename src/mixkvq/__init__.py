"""MixKVQ: a KV cache of 2 to 3 bits for transformers (arXiv 2512.19206).

Importing this package registers ``attn_implementation="mixkvq"``.
"""

from mixkvq.adapters.transformers import (
    MixKVQCache,
    MixKVQStaticCache,
    UnsupportedModelError,
    confidence_processors,
    register,
)
from mixkvq.config import ConfigError, MixKVQConfig, all_presets
from mixkvq.store.books import CacheFullError
from mixkvq.store.memory import MemoryReport

__version__ = "0.1.0"
__all__ = [
    "CacheFullError",
    "ConfigError",
    "MemoryReport",
    "MixKVQCache",
    "MixKVQConfig",
    "MixKVQStaticCache",
    "UnsupportedModelError",
    "all_presets",
    "confidence_processors",
]

register()
