"""``mixkvq caches``: the presets."""

from __future__ import annotations

from mixkvq.calibrate.file import shipped
from mixkvq.cli.common import output, print_table
from mixkvq.report.tables import presets_table


def caches() -> None:
    """List the caches: what each is, its source, its bits, what runs it on a GPU."""
    print_table(presets_table())
    output.print(
        "Any field can be overridden: --cache default:budget=3 or paper:tau_bf16=1.44,tau_uint4=0.79. "
        f"Calibrations for SmolLM2-135M-Instruct come with the package: {', '.join(shipped())} (docs/calibration.md). "
        "'from' marks thresholds: what they promote depends on the model and the text. "
        "GPU is the kernel that attention takes there (docs/kernels.md); torch means that no kernel serves the cache: "
        "it works on a GPU, much slower, and MixKVQStaticCache refuses it there."
    )
