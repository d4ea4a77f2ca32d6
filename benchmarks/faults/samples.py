"""What the faults are tried on: small collections with ties and metadata, an index in several states, tiny bundles."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dckt.bundle import write_bundle
from dckt.index import Index
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary
from faults.truth import Stored, Truth, Vector

WIDTH = 8
MODEL = "f" * 64
OLD = "old"  # name of the state in an older format
SHOPS = ("A", "B", "it's; DROP TABLE items --")


def items(medium: str, count: int, seed: int, first: int = 0) -> dict[str, Stored]:
    """Items by id; a third of their vectors occur several times, as those of class probabilities do."""
    generator = np.random.default_rng([seed, first])
    rows = generator.normal(size=(count, WIDTH)).astype(np.float32)
    rows[::3] = rows[generator.integers(0, max(1, count // 10), len(rows[::3]))]
    return {
        f"{medium[0]}{first + row:04d}": Stored(
            rows[row], {"shop": SHOPS[row % 3], "price": row % 40, "tags": {"row": first + row, "seed": seed}}
        )
        for row in range(count)
    }


def queries(count: int = 4, seed: int = 99) -> Vector:
    """(count, WIDTH)."""
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def add(index: Index, truth: Truth, medium: str, new: Mapping[str, Stored], *, upsert: bool = False) -> Truth:
    """Adds items to an index and to its truth."""
    index.add(
        medium,
        list(new),
        np.stack([stored.vector for stored in new.values()]),
        metadata=[stored.metadata for stored in new.values()],
        upsert=upsert,
    )
    return truth.with_items(medium, new)


def delete(index: Index, truth: Truth, medium: str, ids: list[str]) -> Truth:
    """Deletes items from an index and from its truth."""
    index.delete(medium, ids)
    return truth.without(medium, ids)


@dataclass(frozen=True)
class State:
    """A folder, and the truths that it may answer by; the first is the newest, the others are older commits."""

    name: str
    truths: tuple[Truth, ...]


def index_states(base: Path) -> list[State]:
    """Makes the folders of two indexes in several states below ``base``.

    ``live`` states were copied while the index was open, with SQLite's log; ``early`` ones before the last changes.
    """
    states = []
    for seed, name in enumerate(("one", "two")):
        working = base / "working"
        history: list[Truth] = []

        def keep(state: str, working: Path = working, history: list[Truth] = history) -> None:
            shutil.copytree(working, base / state)
            states.append(State(state, tuple(history[::-1])))

        def note(truth: Truth, history: list[Truth] = history) -> Truth:
            history.append(truth)
            return truth

        with create(working, kind="hnsw") as index:
            truth = note(Truth({}))
            truth = note(add(index, truth, "text", items("text", 36, seed)))
            truth = note(add(index, truth, "image", items("image", 20, seed)))
        keep(f"early {name}")
        with Index.open(working, threads=1) as index:
            truth = note(add(index, truth, "text", items("text", 8, seed, first=30), upsert=True))
            truth = note(delete(index, truth, "image", truth.ids("image")[::4]))
            keep(f"live {name}")
            truth = note(add(index, truth, "text", items("text", 16, seed, first=100)))
        keep(f"late {name}")
        shutil.rmtree(working)
    return states


def old_state(base: Path, folder: Path) -> State:
    """A copy of an index as it is, in whatever format, below ``base``; its truth is what it says when it is whole."""
    shutil.copytree(folder, base / OLD)
    scratch = shutil.copytree(folder, base / "scratch")
    with Index.open(scratch, threads=1) as index:
        truth = Truth(
            {
                (medium, item): Stored(index.vector(item, medium), index.get(item, medium).metadata)
                for medium in index.media
                for item in index.ids(medium)
            }
        )
    shutil.rmtree(scratch)
    return State(OLD, (truth,))


def create(path: Path, *, kind: str, dimension: int = WIDTH) -> Index:
    """An empty index whose graphs are the same in every run."""
    return Index.create(path, model_id=MODEL, representation="probability", dimension=dimension, kind=kind, threads=1)


def in_memory() -> str | None:
    """A place where files cost no disk, if there is one; for what tries the reading of files, not their durability."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def save(path: Path, value: Any) -> None:
    """For another process of this run."""
    path.write_bytes(pickle.dumps(value))


def load(path: Path) -> Any:
    """What :func:`save` wrote."""
    return pickle.loads(path.read_bytes())


# --- bundles ---

WORDS = ("red", "green", "blue", "a", "bag")
SIDE = 4


def tiny_bundle(path: Path, seed: int) -> None:
    """A bundle whose outputs are linear in a picture's mean colour and in a text's mean word, with random weights."""
    from onnx import TensorProto, helper

    generator = np.random.default_rng(seed)
    heads = {"fc9": generator.normal(size=(3, 6)), "probability": np.abs(generator.normal(size=(3, 4)))}
    image = _graph(
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", SIDE, SIDE, 3]),
        [
            helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["numbers", "axes"], ["colour"], keepdims=0),
        ],
        {"axes": np.array([1, 2]), **heads},
    )
    vocabulary = Vocabulary.of(WORDS)
    text = _graph(
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"]),
        [
            helper.make_node("Gather", ["words", "tokens"], ["numbers"]),
            helper.make_node("ReduceMean", ["numbers", "axes"], ["colour"], keepdims=0),
        ],
        {"axes": np.array([1]), "words": np.abs(generator.normal(size=(len(vocabulary.words), 3))) + 0.1, **heads},
    )
    write_bundle(
        path,
        files={"image.onnx": image, "text.onnx": text, "vocabulary.txt": vocabulary.dumps().encode()},
        image=ImageSpec(side=SIDE),
        text=TextSpec(max_tokens=8),
        labels=("k", "l", "m", "n"),
        representation="probability",
        dimensions={"probability": 4, "fc9": 6},
        produced_by={"made by": "benchmarks/faults"},
        measured={"map": {"average": 0.5}, "pairs": [1, 2, 3]},
    )


def _graph(graph_input: Any, nodes: list[Any], constants: Mapping[str, Any]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    outputs = [name for name in ("probability", "fc9") if name in constants]
    weights = {
        f"{name} weights" if name in outputs else name: value.astype(np.float32) if value.dtype.kind == "f" else value
        for name, value in constants.items()
    }
    model = helper.make_model(
        helper.make_graph(
            [*nodes, *(helper.make_node("MatMul", ["colour", f"{name} weights"], [name]) for name in outputs)],
            "tiny",
            [graph_input],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", constants[name].shape[1]])
                for name in outputs
            ],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    content: bytes = model.SerializeToString()
    return content
