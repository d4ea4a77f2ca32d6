"""dckt: search a collection of pictures and texts with either one, without PyTorch.

>>> from dckt import Searcher                                                    # doctest: +SKIP
>>> with Searcher.open("shop.dckt", "catalog.index") as searcher:                # doctest: +SKIP
...     for hit in searcher.search("photo.jpg", k=10):
...         print(hit.id, hit.score)

The names below are imported when they are first used, so ``import dckt`` itself loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dckt.bundle import Bundle
    from dckt.errors import DcktError
    from dckt.searcher import Hit, Searcher, SearchResult

    __version__: str

__all__ = ["Bundle", "DcktError", "Hit", "SearchResult", "Searcher", "__version__"]

_HOME = {
    "Bundle": "dckt.bundle",
    "DcktError": "dckt.errors",
    "Hit": "dckt.searcher",
    "SearchResult": "dckt.searcher",
    "Searcher": "dckt.searcher",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("dckt")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
