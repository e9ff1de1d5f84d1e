"""How much of a sequence stays in the residual: its newest tokens, as they came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

#: Decimals of a number of tokens that count: a tenth of 30 is 3, and not the 4 that 3.0000000000000004 rounds up to.
DECIMALS = 6


@dataclass(frozen=True)
class RecentTokens:
    """The newest tokens of a sequence that are not packed yet.

    Attributes:
        share: of these tokens; with 0 a block is packed as soon as it is complete.
        of: what it is a share of: all tokens of the sequence ("context"), so that the same blocks are packed however
            the tokens came; or what is not packed yet ("residual"), which shrinks with every block.
    """

    share: float = 0.0
    of: Literal["context", "residual"] = "context"

    def blocks_to_pack(self, residual: int, context: int, size: int) -> int:
        """Blocks of ``size`` tokens to pack, oldest first: as many as leave at least the share.

        Args:
            residual: tokens in the residual.
            context: tokens of the sequence, sinks and packed ones included.
        """
        whole = context if self.of == "context" else residual
        kept = math.ceil(round(self.share * whole, DECIMALS))
        return max(residual - kept, 0) // size
