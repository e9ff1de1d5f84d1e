"""Measuring configurations on text, each once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.calibrate.trials import Trials, key_of
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.fidelity import fidelity, reference_log_probs


class Judge:
    """KL and bits of configurations over some windows.

    Args:
        model: any that :func:`mixkvq.evaluate.fidelity.fidelity` takes.
        windows: ``[N, W]`` tokens.
        trials: keep what was measured.
        part: a name for the windows, by which measurements are told from those over others.
        keep: also keep what full precision says of every token, which saves a pass for every configuration and takes
            four bytes for each token and word of the vocabulary.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, trials: Trials, part: str, *, keep: bool = False
    ) -> None:
        self.model, self.windows, self.trials, self.part, self.keep = model, windows, trials, part, keep

    @cached_property
    def _references(self) -> list[Tensor] | None:
        if not self.keep:
            return None
        return [reference_log_probs(self.model, window) for window in self.windows.to(self.model.device)]

    def __call__(self, config: MixKVQConfig, advance: Callable[[], None] = lambda: None) -> dict[str, float]:
        """KL, perplexity, bits of codes, and the honest ones that caches are compared by.

        Args:
            advance: called after each pass.
        """

        def read() -> dict[str, float]:
            row = fidelity(self.model, self.windows, {"": config}, lambda _: advance(), self._references)[0]
            names = ("kl", "perplexity", "key_bits_codes", "value_bits_codes")
            return {**{name: getattr(row, name) for name in names}, "bits": row.size_bits}

        return self.trials.once(key_of(self.part, config), read)
