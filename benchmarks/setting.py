"""What the benchmarks on real corpora share: where the data is, and what a table must say about how it was made."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

from dckt_trainer.sweep_table import Estimate

TRUNK = "mobilenet_v2"  # where a benchmark takes one
VECTORS = "word_vectors/glove.6B.50d.subset.txt"

PACKAGES = ("dckt", "torch", "torchvision", "gensim", "numpy")


def data_folder(parser: argparse.ArgumentParser) -> Path:
    """The folder of corpora; without it the program ends with a word about it."""
    return Path(os.environ.get("DCKT_DATA") or parser.error("set DCKT_DATA to the folder of corpora"))


def trunk_changes(data: Path, trunk: str) -> list[str]:
    """The settings of a trunk whose trained weights lie beside the corpora."""
    return [f"image.trunk={trunk}", f"image.weights={data / 'weights' / trunk}_features.safetensors"]


def input_changes(data: Path, trunk: str = TRUNK) -> list[str]:
    """The settings of a trunk and of word vectors that lie beside the corpora."""
    return [*trunk_changes(data, trunk), f"text.vectors={data / VECTORS}"]


def interval(found: Estimate, sign: str = "", digits: int = 3) -> str:
    """A mean with its interval, if there is one."""
    shown = [f"{value:{sign}.{digits}f}" for value in (found.mean, found.low, found.high) if value is not None]
    return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def machine() -> str:
    """Versions and cores, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores"
