"""Reads the file of a graph faster than hnswlib does.

hnswlib's ``load_index`` asks the system for its place in the file twice for every vector, which takes as long as all
else. Here the file is mapped and taken apart, and hnswlib gets the parts as it does when a graph is unpickled. Nothing
is unpickled.

Shape letters: N vectors. The file: a header, N elements of one size (links of the lowest level, vector, label), and for
every element the size of its links of higher levels and those links.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# offset of the first element, room, N, size of an element, offsets in it of label and vector, highest level and the
# element there, most links of an element in higher levels and in the lowest, M, what levels are drawn by, and the
# effort of building.
_HEADER = struct.Struct("<QQQQQQiIQQQdQ")


def read_state(path: Path, *, space: str, dimension: int, seed: int) -> dict[str, Any]:
    """What hnswlib makes a graph from, from a file whose checksum has been verified.

    Args:
        path: the file, as ``save_index`` wrote it.
        space: of the graph.
        dimension: of its vectors.
        seed: of the levels of vectors that are added.

    Raises:
        OSError: the file cannot be read.
        ValueError: its parts do not fit together.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    if len(content) < _HEADER.size:
        raise ValueError("it is too short")
    header = _HEADER.unpack(content[: _HEADER.size].tobytes())
    first, room, count, size, label, vector, top, entry, links, lowest, m, multiplier, effort = header
    end = _HEADER.size + count * size
    sound = first == 0 < count <= room and vector == 4 + 4 * lowest and entry < count
    if not sound or label != vector + 4 * dimension or size != label + 8 or end > len(content) or len(content) % 4:
        raise ValueError("its header does not fit to it")
    levels, higher = _higher_levels(content[end:].view(np.uint32), count, 1 + links)
    if levels.max() != top or levels[entry] != top:
        raise ValueError("its levels do not fit together")
    labels = np.ndarray((count,), np.uint64, content, _HEADER.size + label, (size,))
    return {
        "ser_version": 1,
        "space": space,
        "dim": dimension,
        "index_inited": True,
        "ep_added": True,
        "normalize": False,
        "num_threads": os.cpu_count() or 1,
        "seed": seed,
        "offset_level0": first,
        "max_elements": room,
        "cur_element_count": count,
        "size_data_per_element": size,
        "label_offset": label,
        "offset_data": vector,
        "max_level": top,
        "enterpoint_node": entry,
        "max_M": links,
        "max_M0": lowest,
        "M": m,
        "mult": multiplier,
        "ef_construction": effort,
        "ef": 1,
        "has_deletions": False,
        "size_links_per_element": 4 + 4 * links,
        "allow_replace_deleted": False,
        "label_lookup_external": labels.copy(),
        "label_lookup_internal": np.arange(count, dtype=np.uint32),
        "element_levels": levels,
        "data_level0": content[_HEADER.size : end].view(np.int8),
        "link_lists": higher.view(np.int8),
    }


def _higher_levels(words: NDArray[np.uint32], count: int, size: int) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """The level of every element, and all links above the lowest, one after the other.

    Args:
        words: for every element the number of bytes that follow, and those.
        count: how many elements.
        size: how many words an element has for each level.
    """
    levels = np.zeros(count, dtype=np.int32)
    edges = np.zeros(len(words) + 1, dtype=np.int8)
    # Of the words only those that can be a number of bytes; a few are links, and are passed over below.
    places = np.flatnonzero((words % np.uint32(4 * size) == 0) & (words != 0))
    numbers, filled = words[places].tolist(), places.tolist()
    # Most elements have no higher level, and so a 0: from one that has one to the next.
    element = place = at = 0
    while (at := bisect_left(filled, place, at)) < len(filled):
        element += filled[at] - place
        level = numbers[at] // (4 * size)
        begin = filled[at] + 1
        place = begin + level * size
        if place > len(words) or element >= count:
            raise ValueError("its higher levels do not fit together")
        levels[element] = level
        edges[begin], edges[place] = 1, -1
        element += 1
    if element + len(words) - place != count:
        raise ValueError("its higher levels do not fit together")
    return levels, words[edges[:-1].cumsum(dtype=np.int8).astype(bool)]
