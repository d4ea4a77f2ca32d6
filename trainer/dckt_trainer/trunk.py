"""The frozen convolutional trunk: pixels to one feature vector.

Shape letters: B batch, S side, F features. The trunk owns the normalisation of pixels, so the exported graph takes
the same uint8 pixels that the feature cache was made from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from dckt.errors import ConfigError
from dckt.preprocessing import ImageSpec
from dckt_trainer.config import ImageConfig
from dckt_trainer.seeds import seed_of


class Trunk(nn.Module):
    """Pixels (B, S, S, 3) uint8 to features (B, F) float32.

    Args:
        body: convolutional layers, (B, 3, S, S) to (B, channels, h, w).
        grid: the last feature map is averaged to (grid, grid) and flattened.
        spec: the pictures that this trunk takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, grid: int, spec: ImageSpec) -> None:
        super().__init__()
        self.body, self.grid, self.spec = body, grid, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Trunk:
        """A frozen trunk stays in evaluation mode, so that its normalisation never moves."""
        del mode
        return super().train(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Other weights have another hash."""
        self.__dict__.pop("sha256", None)
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalises, convolves, averages to the grid, flattens."""
        # Float first: TensorRT takes uint8 for nothing but a cast.
        scaled = (pixels.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        maps: Tensor = self.body(scaled)
        if self.grid == 1:  # the same numbers as pooling, but an exported mean is one node and not eight
            means: Tensor = maps.mean((2, 3))
            return means
        pooled: Tensor = functional.adaptive_avg_pool2d(maps, self.grid)
        return pooled.flatten(1)

    @property
    def features(self) -> int:
        """F, found by sending one grey picture through."""
        with torch.inference_mode():
            side = self.spec.side
            return int(self(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=self.mean.device)).shape[1])

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides the features: weights, grid, and how pictures are prepared.

        Computed once, for the weights are frozen.
        """
        digest = hashlib.sha256(f"{self.grid} {self.spec} {type(self.body).__name__}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def build_trunk(config: ImageConfig, seed: int) -> Trunk:
    """The trunk that the configuration names, with its weights.

    Raises:
        ConfigError: torchvision has no such network, or it has no convolutional features, or its weights cannot be had.
    """
    if config.weights == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "trunk"))
            return empty_trunk(config)
    if config.weights == "torchvision":
        return _pretrained(config)
    path = Path(config.weights)
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"image.weights is {config.weights!r}; expected 'torchvision', 'random', or a .safetensors file"
        )
    return _from_file(config, path)


def empty_trunk(config: ImageConfig, spec: ImageSpec | None = None) -> Trunk:
    """The trunk's shape with untrained weights, into which a saved state can be loaded."""
    network = _network(config.trunk)
    return _trunk(config, network, spec or ImageSpec(side=config.side, crop_share=config.crop_share))


def _check_name(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = [other for other in known if name.split("_")[0][:4] in other]
        raise ConfigError(
            f"image.trunk is {name!r}; torchvision has no such network (like it: {', '.join(close or known)})"
        )


def _network(name: str) -> nn.Module:
    _check_name(name)
    builder = torchvision.models.get_model_builder(name)
    # GoogLeNet and Inception would initialise for minutes; the others do not know the switch.
    quick = {"init_weights": False} if "init_weights" in inspect.signature(builder).parameters else {}
    network: nn.Module = builder(weights=None, **quick)
    return network


def _trunk(config: ImageConfig, network: nn.Module, spec: ImageSpec) -> Trunk:
    body = _convolutions(network)
    if body is None:
        raise ConfigError(
            f"image.trunk is {config.trunk!r}, which has no plain convolutional features; "
            "use a network of the families vgg, squeezenet, mobilenet, densenet, efficientnet, convnext, resnet, regnet"
        )
    trunk = Trunk(body, config.grid or (7 if config.trunk.startswith("vgg") else 1), spec)
    try:
        if trunk.features < 1:
            raise RuntimeError("no features")
    except RuntimeError as error:
        raise ConfigError(
            f"image.side is {config.side}, too small for the trunk {config.trunk}; try 224, its usual size"
        ) from error
    return trunk


def _convolutions(network: nn.Module) -> nn.Module | None:
    if isinstance(network, torchvision.models.SwinTransformer):  # its maps have channels last
        return None
    if isinstance(network, torchvision.models.DenseNet):
        return nn.Sequential(network.features, nn.ReLU())
    features = getattr(network, "features", None)
    if isinstance(features, nn.Module):
        return features
    layers = dict(network.named_children())
    if "fc" in layers and "avgpool" in layers and ("layer4" in layers or "trunk_output" in layers):
        return nn.Sequential(*(layer for name, layer in layers.items() if name not in ("fc", "avgpool")))
    return None


def _pretrained(config: ImageConfig) -> Trunk:
    _check_name(config.trunk)
    weights = torchvision.models.get_model_weights(config.trunk)
    chosen = getattr(weights, "IMAGENET1K_V1", None) or weights.DEFAULT
    try:
        network = torchvision.models.get_model(config.trunk, weights=chosen)
    except (URLError, OSError) as error:
        raise ConfigError(
            f"torchvision cannot download the weights of {config.trunk} ({error}); with no network, give a file: "
            "--set image.weights=FILE.safetensors, or image.weights=random"
        ) from error
    transforms = chosen.transforms()
    spec = ImageSpec(
        side=config.side, crop_share=config.crop_share, mean=tuple(transforms.mean), std=tuple(transforms.std)
    )
    return _trunk(config, network, spec)


def _from_file(config: ImageConfig, path: Path) -> Trunk:
    """Weights of the whole network or of its features alone; ``mean`` and ``std`` may stand in the file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"image.weights: {path} cannot be read as safetensors ({error})") from error
    network = _network(config.trunk)
    features = getattr(network, "features", None)
    whole = set(network.state_dict())
    part = set(features.state_dict()) if isinstance(features, nn.Module) else set()
    try:
        if set(state) == part and isinstance(features, nn.Module):
            features.load_state_dict(state)
        else:
            network.load_state_dict(state)
    except RuntimeError as error:
        missing, unexpected = sorted(whole - set(state))[:5], sorted(set(state) - whole)[:5]
        raise ConfigError(
            f"image.weights: {path} does not hold weights of {config.trunk}: missing {missing or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'} (first five each)"
        ) from error
    return _trunk(config, network, _spec_from(metadata, config, path))


def _spec_from(metadata: dict[str, str], config: ImageConfig, path: Path) -> ImageSpec:
    spec = ImageSpec(side=config.side, crop_share=config.crop_share)
    if "mean" not in metadata and "std" not in metadata:
        return spec
    try:
        mean, std = (tuple(float(number) for number in _numbers(metadata[key])) for key in ("mean", "std"))
        return ImageSpec(side=config.side, crop_share=config.crop_share, mean=mean, std=std)  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"image.weights: {path} names mean {metadata.get('mean')!r} and std {metadata.get('std')!r}; "
            "expected three numbers each"
        ) from error


def _numbers(text: str) -> list[float]:
    value = json.loads(text if text.startswith("[") else f"[{text.strip('() ')}]")
    return list(value)
