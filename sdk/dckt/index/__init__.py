"""A durable index of vectors with ids and metadata; see :class:`Index`."""

from __future__ import annotations

from dckt.index.catalog import Index
from dckt.index.results import Hit, IndexInfo, MediumInfo

__all__ = ["Hit", "Index", "IndexInfo", "MediumInfo"]
