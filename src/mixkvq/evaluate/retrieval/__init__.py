"""Whether a model still finds things in a long context: needles and variables hidden in a text."""

from mixkvq.evaluate.retrieval.kinds import KINDS
from mixkvq.evaluate.retrieval.measure import Cell, Reply, retrieval
from mixkvq.evaluate.retrieval.problems import Haystack, RetrievalProblem, check_kind, depths
from mixkvq.evaluate.retrieval.summary import Summary, summaries

__all__ = [
    "KINDS",
    "Cell",
    "Haystack",
    "Reply",
    "RetrievalProblem",
    "Summary",
    "check_kind",
    "depths",
    "retrieval",
    "summaries",
]
