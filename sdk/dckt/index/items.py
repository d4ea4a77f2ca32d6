"""Checks ids and metadata before anything is stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dckt.errors import ItemError

# json.dumps makes an encoder for every call, which takes longer than a small mapping does.
_encode = json.JSONEncoder(allow_nan=False).encode


def listed(ids: Iterable[str]) -> list[str]:
    """Ids as a list.

    Raises:
        ItemError: they are one text, nothing that can be iterated, or hold what is no text of Unicode.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ItemError(f"the ids are a {type(ids).__name__}, {ascii(ids)[:80]}; expected a list of texts")
    ids = list(ids)
    if bad := [item for item in ids if item != "" and not is_id(item)]:
        raise ItemError(
            f"{len(bad)} ids are no texts, or not Unicode: {shown(list(map(str, bad)))}; expected a list of texts"
        )
    return ids


def check_ids(ids: Sequence[str]) -> None:
    """Refuses ids that cannot be stored.

    Raises:
        ItemError: an id is no text, empty, not Unicode, or given twice; each is named.
    """
    bad = [item for item in ids if not is_id(item)]
    if bad:
        raise ItemError(
            f"{len(bad)} ids are no texts, empty or not Unicode: {shown(list(map(str, bad)))}; "
            "expected one text for each item"
        )
    twice = sorted(item for item, times in Counter(ids).items() if times > 1)
    if twice:
        raise ItemError(f"{len(twice)} ids were given more than once: {shown(twice)}; give each item its own")


def dump_metadata(ids: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Metadata as JSON, a text for each id.

    Raises:
        ItemError: not one mapping for each id, or one that JSON cannot hold; its id is named.
    """
    if metadata is None:
        return ["{}"] * len(ids)
    if isinstance(metadata, str | bytes | Mapping) or not isinstance(metadata, Collection):
        raise ItemError(f"the metadata are a {type(metadata).__name__}; expected a list of mappings, one for each id")
    if len(metadata) != len(ids):
        raise ItemError(f"{len(ids)} ids came with {len(metadata)} metadata; expected one for each")
    texts = []
    for item, value in zip(ids, metadata, strict=True):
        if not isinstance(value, Mapping):
            raise ItemError(f"the metadata of {item!r} is a {type(value).__name__}; expected a mapping")
        try:
            texts.append(_encode(dict(value)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ItemError(f"the metadata of {item!r} cannot be stored as JSON ({error})") from error
    return texts


def check_contents(ids: Sequence[str], contents: object) -> None:
    """Refuses contents that cannot be stored.

    Raises:
        ItemError: not one for each id, or one that is neither a text of Unicode nor None.
    """
    if isinstance(contents, str) or not isinstance(contents, Collection) or len(contents) != len(ids):
        raise ItemError(f"{len(ids)} ids came with the contents {ascii(contents)[:80]}; expected a list, one for each")
    bad = [item for item, content in zip(ids, contents, strict=True) if content is not None and not is_id(content)]
    if bad:
        raise ItemError(
            f"the contents of {shown(bad)} are no texts of Unicode; expected one text or None for each item"
        )


def shown(ids: Sequence[str]) -> str:
    """Ids for an error message, the first ten of them."""
    more = f" and {len(ids) - 10:,} more" if len(ids) > 10 else ""
    return ", ".join(map(ascii, ids[:10])) + more


def is_id(item: object) -> bool:
    """Whether something can be an id: a text of Unicode, not empty."""
    try:
        return isinstance(item, str) and bool(item.encode())
    except UnicodeEncodeError:  # half a surrogate pair, as in a file name that is not UTF-8
        return False
