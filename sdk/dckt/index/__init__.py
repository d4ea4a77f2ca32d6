"""A durable index of vectors with ids and metadata; see :class:`Index`."""

from __future__ import annotations

from dckt.index.catalog import Index
from dckt.index.results import Hit, IndexInfo, Item, MediumInfo, Tuning

__all__ = ["Hit", "Index", "IndexInfo", "Item", "MediumInfo", "Tuning"]
