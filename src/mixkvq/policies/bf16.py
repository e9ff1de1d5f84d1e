"""No quantization, on the same path: what everything else is compared with."""

from __future__ import annotations

from mixkvq.config import ConfigError, MixKVQConfig, Preset
from mixkvq.policies.kivi import KIVI
from mixkvq.quant.block import DENSE_BITS


class BF16(KIVI):
    """Pages hold keys and values in the model's own type."""

    name = "bf16"
    presets = {  # noqa: RUF012
        "bf16": Preset(
            "not quantized: pages in the model's own type",
            "the stock cache, on this package's path",
            {"policy": "bf16", "key_bits": DENSE_BITS, "value_bits": DENSE_BITS},
        ),
    }

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if (config.key_bits, config.value_bits) != (DENSE_BITS, DENSE_BITS):
            raise ConfigError("The bf16 policy quantizes nothing: key_bits and value_bits are 16.")
