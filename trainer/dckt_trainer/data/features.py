"""Trunk features of a corpus, computed once and kept on disk.

A cache file is named by the content that it was made from: the trunk's weights and settings, and every picture's
bytes in order. So an edited picture or another trunk is another file, never a wrong answer. Files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dckt.errors import RunError
from dckt.files import atomic_file, sha256_file
from dckt.preprocessing import ImageSpec, image_array
from dckt_trainer.trunk import Trunk

# Small, so that activations stay in memory that was touched before; at 32 a third of the time went into page faults.
BATCH = 8
CHECKSUM = 64


def default_cache() -> Path:
    """``$DCKT_CACHE``, else ``dckt`` in the user's cache folder."""
    named = os.environ.get("DCKT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dckt"


def cached_features(
    trunk: Trunk,
    images: Sequence[Path],
    *,
    cache: Path,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float32]:
    """Features (N, F) float32 of N pictures, memory-mapped; writing to them changes a copy.

    Args:
        trunk: the frozen trunk, on ``device``.
        images: paths of the pictures.
        cache: folder of cache files; made when it is not there.
        device: where the trunk runs.
        advance: told how many pictures were done since the last call.

    Raises:
        RunError: a cache file is damaged or the folder cannot be written.
        ImageError: a picture cannot be decoded.
    """
    path = cache_file(trunk, images, cache)
    if path.is_file():
        _check(path)
        advance(len(images))
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _compute(path, trunk, images, device, advance)
        except OSError as error:
            raise RunError(
                f"the feature cache {cache} cannot be written ({error}); name another with --cache"
            ) from error
    features: NDArray[np.float32] = np.load(path, mmap_mode="c")
    return features


def cache_file(trunk: Trunk, images: Sequence[Path], cache: Path) -> Path:
    """Where the features of these pictures, in this order, are or will be kept; every picture is read for it."""
    digest = hashlib.sha256(trunk.sha256.encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for one in pool.map(sha256_file, images):
            digest.update(one.encode())
    return cache / f"trunk-{digest.hexdigest()[:32]}.npy"


def computed_features(trunk: Trunk, images: Sequence[Path], device: torch.device) -> Iterator[NDArray[np.float32]]:
    """Features of pictures in their order, a batch (n, F) after the other, n at most ``BATCH``.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    trunk = trunk.to(memory_format=torch.channels_last)  # as the pixels are
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    # Decoding in threads runs beside the trunk: Pillow lets go of the interpreter while it works.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = deque(pool.submit(_decode, batch, trunk.spec) for batch in batches[:2])
        for place in range(len(batches)):
            pixels = ahead.popleft().result()
            if place + 2 < len(batches):
                ahead.append(pool.submit(_decode, batches[place + 2], trunk.spec))
            with torch.inference_mode():
                rows: NDArray[np.float32] = trunk(torch.from_numpy(pixels).to(device)).float().cpu().numpy()
            yield rows


def _compute(
    path: Path, trunk: Trunk, images: Sequence[Path], device: torch.device, advance: Callable[[int], None]
) -> None:
    """Writes features straight to disk: at the paper's size they are 3.2 GB, and a full disk shows at once."""
    with atomic_file(path) as partial:
        rows = np.lib.format.open_memmap(partial, "w+", np.float32, (len(images), trunk.features))
        start = 0
        for batch in computed_features(trunk, images, device):
            rows[start : start + len(batch)] = batch
            start += len(batch)
            advance(len(batch))
        rows.flush()
        with partial.open("ab") as file:
            file.write(sha256_file(partial).encode())


def _check(path: Path) -> None:
    """The last 64 bytes are the checksum of all before them; in one file, so that no two writers can mix theirs."""
    digest, left = hashlib.sha256(), path.stat().st_size - CHECKSUM
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        if file.read() != digest.hexdigest().encode():
            raise RunError(f"the cached features {path} are damaged; delete that file and run again")


def _decode(batch: Sequence[Path], spec: ImageSpec) -> NDArray[np.uint8]:
    return np.stack([image_array(path, spec) for path in batch])
