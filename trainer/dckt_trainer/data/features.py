"""Trunk features of a corpus, computed once and kept on disk.

A cache file is named by the content that it was made from: the trunk's weights and settings, and every picture's
bytes in order. So an edited picture or another trunk is another file, never a wrong answer. Files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dckt.errors import RunError
from dckt.files import atomic_write, sha256_file
from dckt.preprocessing import ImageSpec, image_array
from dckt_trainer.trunk import Trunk

# Small, so that activations stay in memory that was touched before; at 32 a third of the time went into page faults.
BATCH = 8


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
    """Features (N, F) float32 of N pictures, memory-mapped, read-only.

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
    digest = hashlib.sha256(trunk.sha256.encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for one in pool.map(sha256_file, images):
            digest.update(one.encode())
    path = cache / f"features-{digest.hexdigest()[:32]}.npy"
    mark = path.with_suffix(".sha256")
    if not (path.is_file() and mark.is_file()):
        computed = _compute(trunk, images, device, advance)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _save(path, computed)
            atomic_write(mark, sha256_file(path))
        except OSError as error:
            raise RunError(
                f"the feature cache {cache} cannot be written ({error}); name another with --cache"
            ) from error
    else:
        if sha256_file(path) != mark.read_text(encoding="utf-8"):
            raise RunError(f"the cached features {path} are damaged; delete that file and run again")
        advance(len(images))
    features: NDArray[np.float32] = np.load(path, mmap_mode="c")
    return features


def _save(path: Path, features: NDArray[np.float32]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.save(file, features)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _compute(
    trunk: Trunk, images: Sequence[Path], device: torch.device, advance: Callable[[int], None]
) -> NDArray[np.float32]:
    spec: ImageSpec = trunk.spec
    trunk = trunk.to(memory_format=torch.channels_last)  # as the pixels are
    rows: list[NDArray[np.float32]] = []
    # Decoding in threads runs beside the trunk: Pillow lets go of the interpreter while it works.
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        ahead = [pool.submit(_decode, batch, spec) for batch in batches[:2]]
        for place, batch in enumerate(batches):
            pixels = ahead[place].result()
            if place + 2 < len(batches):
                ahead.append(pool.submit(_decode, batches[place + 2], spec))
            rows.append(trunk(torch.from_numpy(pixels).to(device)).float().cpu().numpy())
            advance(len(batch))
    return np.concatenate(rows) if rows else np.zeros((0, trunk.features), np.float32)


def _decode(batch: Sequence[Path], spec: ImageSpec) -> NDArray[np.uint8]:
    return np.stack([image_array(path, spec) for path in batch])
