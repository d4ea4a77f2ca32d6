"""One domain's complete model, from pixels and words to the common representation, and its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dckt.errors import DcktError, RunError, TextError
from dckt.files import atomic_write
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary
from dckt_trainer.checkpoint import load_tensors, save_tensors
from dckt_trainer.config import ImageConfig
from dckt_trainer.encoders import CommonSpace, ImageEncoder, TextEncoder
from dckt_trainer.linear import LinearModel
from dckt_trainer.network import DomainNetwork
from dckt_trainer.trunk import Trunk, empty_trunk
from dckt_trainer.word_bag import WordBag
from dckt_trainer.word_cnn import WordCNN


@dataclass(frozen=True)
class DomainModel:
    """A trained domain.

    Attributes:
        trunk: pixels to image features.
        reader: token ids to text vectors.
        network: both to the common representation.
        vocabulary: the words that the ids stand for.
        labels: the C class names, in the order of the outputs.
        text: limits of texts; those of pictures are ``trunk.spec``.
    """

    trunk: Trunk
    reader: WordCNN | WordBag
    network: CommonSpace
    vocabulary: Vocabulary
    labels: tuple[str, ...]
    text: TextSpec

    def image_encoder(self) -> ImageEncoder:
        """Pixels to the common representation, in evaluation mode."""
        return ImageEncoder(self.trunk, self.network)

    def text_encoder(self) -> TextEncoder:
        """Token ids to the common representation, in evaluation mode."""
        return TextEncoder(self.reader, self.network)


def save_model(model: DomainModel, folder: Path, image: ImageConfig) -> None:
    """Writes a model's files into a folder; ``model.json`` comes last, so a half-written model cannot be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "trunk.safetensors", model.trunk.state_dict())
    save_tensors(folder / "text.safetensors", model.reader.state_dict())
    atomic_write(folder / "vocabulary.txt", model.vocabulary.dumps())
    encoders = {
        "image": dataclasses.asdict(model.trunk.spec),
        "trunk": {"name": image.trunk, "grid": model.trunk.grid},
        "text": dataclasses.asdict(model.text),
        **({"topics": model.reader.topics} if isinstance(model.reader, WordBag) else {"windows": model.reader.windows}),
        "vocabulary_sha256": model.vocabulary.sha256,
    }
    save_network(model.network, model.labels, folder, encoders)


def save_network(
    network: CommonSpace, labels: Sequence[str], folder: Path, encoders: Mapping[str, Any] | None = None
) -> None:
    """Writes a network and ``model.json``, which says what stands before it.

    Args:
        network: both media to the common representation.
        labels: the C class names, in the order of the outputs.
        folder: made when it is not there.
        encoders: the shapes of trunk and Word CNN; None for a network of ready features, which has neither.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "network.safetensors", network.state_dict())
    shape = {
        **(encoders or {"trunk": None, "text": None}),
        **({"kind": "linear"} if isinstance(network, LinearModel) else {"moving_average": network.average}),
        "inputs": network.inputs,
        "width": network.width,
        "labels": labels,
    }
    atomic_write(folder / "model.json", json.dumps(shape, indent=1, ensure_ascii=False))


def load_model(folder: Path) -> DomainModel:
    """Reads the files that :func:`save_model` wrote.

    Raises:
        RunError: a file is missing, damaged, or does not fit the others.
    """
    try:
        shape = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if shape["trunk"] is None:
            raise RunError(
                f"{folder}: was trained on ready features, so it has no trunk and no Word CNN, and cannot encode or be "
                "exported; train on a corpus of pictures and texts for that"
            )
        vocabulary = Vocabulary.load(folder / "vocabulary.txt")
        if vocabulary.sha256 != shape["vocabulary_sha256"]:
            raise RunError(f"{folder / 'vocabulary.txt'} was changed after training; restore it or train again")
        image: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in shape["image"].items()}
        config = ImageConfig(trunk=shape["trunk"]["name"], grid=shape["trunk"]["grid"])
        trunk = empty_trunk(config, ImageSpec(**image))
        trunk.load_state_dict(load_tensors(folder / "trunk.safetensors"))
        reader = _reader(load_tensors(folder / "text.safetensors"), shape)
        network = _network(shape, folder)
        return DomainModel(trunk, reader, network, vocabulary, tuple(shape["labels"]), TextSpec(**shape["text"]))
    except _UNREADABLE as error:
        raise _unreadable(folder, error) from error


def load_network(folder: Path) -> CommonSpace:
    """The network alone, in evaluation mode, of any model, also of one that was trained on ready features.

    Raises:
        RunError: a file is missing, damaged, or does not fit the others.
    """
    try:
        return _network(json.loads((folder / "model.json").read_text(encoding="utf-8")), folder)
    except _UNREADABLE as error:
        raise _unreadable(folder, error) from error


def _network(shape: Mapping[str, Any], folder: Path) -> CommonSpace:
    if shape.get("kind") == "linear":
        linear = LinearModel(shape["inputs"], shape["width"], len(shape["labels"]))
        linear.load_state_dict(load_tensors(folder / "network.safetensors"))
        return linear.eval()
    average = shape.get("moving_average", "torch")  # runs of before had no other
    network = DomainNetwork(shape["inputs"], shape["width"], len(shape["labels"]), average)
    network.load_state_dict(load_tensors(folder / "network.safetensors"))
    return network.eval()


# A file that is whole but does not fit the others shows in many ways.
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError)


def _unreadable(folder: Path, error: Exception) -> DcktError:
    if isinstance(error, OSError | TextError):
        return RunError(f"{folder}: holds no whole model ({error}); did the training finish?")
    return (
        error
        if isinstance(error, DcktError)
        else RunError(f"{folder}: the model's files do not fit together ({error})")
    )


def _reader(state: Mapping[str, torch.Tensor], shape: Mapping[str, Any]) -> WordCNN | WordBag:
    if "topics" in shape:
        return WordBag(state["embedding.weight"], state["scale"], shape["topics"]).eval()
    cnn = WordCNN(state["embedding.weight"], shape["windows"], len(state["convolutions.0.bias"]))
    cnn.load_state_dict(state)
    return cnn.eval()
