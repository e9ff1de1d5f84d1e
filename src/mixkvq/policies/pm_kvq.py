"""PM-KVQ (ICLR 2026, arXiv 2505.18610): codes lose bits as the context grows, and layers end at different widths."""

from __future__ import annotations

from mixkvq.config import ConfigError, MixKVQConfig, Preset
from mixkvq.policies.kivi import KIVI
from mixkvq.quant.block import DENSE_BITS

SOURCE = "PM-KVQ, arXiv 2505.18610"
#: Bits of the first codes; before them, numbers are the model's own.
FIRST_CODES = 8
#: Widths by which a layer goes, from the start.
WIDTHS = (DENSE_BITS, FIRST_CODES, 4, 2)
FIELDS = {
    "policy": "pm-kvq",
    "sinks": 1,
    "key_group": 128,
    "value_group": 128,
    "plan_tokens": 32768,
}


class PMKVQ(KIVI):
    """Keys and values start at 16 bits; whenever they would exceed the layer's budget, all codes lose half their bits.

    The budget is what ``plan_tokens`` tokens of a sequence take at ``key_bits``, the layer's last width, so that the
    bytes are those of a fixed cache, and only a full one has as few bits (section 3.2; :mod:`mixkvq.quant.narrow`).
    ``mixkvq calibrate pm-kvq`` finds which layers end at which width.

    Differs from the paper in this: keys are quantized per channel along tokens, not per token; at 16 bits they are the
    model's own numbers, not codes.
    """

    name = "pm-kvq"
    fields = frozenset({"plan_tokens"})
    presets = {  # noqa: RUF012
        f"pm-kvq-{bits}": Preset(
            f"from 16 bits to {bits} as the context grows to plan_tokens",
            SOURCE,
            {**FIELDS, "key_bits": bits, "value_bits": bits},
        )
        for bits in (4, 2)
    }
    narrows = True
    rule = None  # type: ignore[assignment]  # widths change with the context, which no kernel decides

    @classmethod
    def check(cls, config: MixKVQConfig) -> None:
        super().check(config)
        if config.key_bits != config.value_bits or config.key_bits not in WIDTHS:
            raise ConfigError(
                f"The {cls.name} policy has one width for keys and values, the last of {', '.join(map(str, WIDTHS))} "
                f"that a layer comes to; key_bits={config.key_bits} and value_bits={config.value_bits} were given."
            )
        if config.plan_tokens is None:
            raise ConfigError(f"The {cls.name} policy needs plan_tokens, the length that its budget is for.")
        if config.key_feedback is not None:
            raise ConfigError(f"The {cls.name} policy rounds codes one by one: leave key_feedback out.")
        if config.key_rope != "after":
            raise ConfigError(
                f"The {cls.name} policy stores keys as they come before it makes codes: leave key_rope out."
            )
        if config.outliers or config.key_levels is not None or config.value_levels is not None:
            raise ConfigError(
                f"The {cls.name} policy halves even codes: leave outliers, key_levels and value_levels out."
            )
