"""Where bytes live: the page format, and the pages, sinks and residual of a layer."""

from mixkvq.store.layout import PageLayout
from mixkvq.store.memory import MemoryReport
from mixkvq.store.paged import PagedStore

__all__ = ["MemoryReport", "PageLayout", "PagedStore"]
