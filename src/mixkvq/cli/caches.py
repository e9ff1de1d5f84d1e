"""``mixkvq caches``: the presets."""

from __future__ import annotations

from mixkvq.calibrate.file import shipped
from mixkvq.cli.common import output
from mixkvq.report.tables import presets_table


def caches() -> None:
    """List the caches: what each is, its source, its bits."""
    output.print(presets_table())
    output.print(
        "Any field can be overridden: --cache default:budget=3 or paper:tau_bf16=1.44,tau_uint4=0.79. "
        f"Calibrations for SmolLM2-135M-Instruct come with the package: {', '.join(shipped())} (docs/calibration.md). "
        "'from' marks thresholds: what they promote depends on the model and the text. 'conf-kv', 'conf-kv-l' and "
        "'window-512' evict tokens: bits are of those that are packed. They are served by plain torch operations, on a "
        "GPU too, and by no kernel (docs/conf_kv.md)."
    )
