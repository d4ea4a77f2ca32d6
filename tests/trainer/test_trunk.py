"""The trunk: frozen, normalising inside, and only fed with weights that fit."""

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from dckt.errors import ConfigError
from dckt_trainer.config import ImageConfig
from dckt_trainer.trunk import build_trunk

SMALL = {"trunk": "squeezenet1_1", "weights": "random", "side": 48}


def pixels(side=48, rows=2):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), dtype=np.uint8))


def test_is_frozen_and_stays_in_evaluation_mode():
    trunk = build_trunk(ImageConfig(trunk="mobilenet_v2", weights="random", side=48), 0)
    trunk.train()
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert not any(module.training for module in trunk.modules())
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    trunk(pixels())
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


def test_normalises_pixels_then_pools():
    trunk = build_trunk(ImageConfig(**SMALL), 0)
    given = pixels()
    scaled = (given.numpy().astype(np.float32) / 255 - np.float32(trunk.spec.mean)) / np.float32(trunk.spec.std)
    with torch.no_grad():
        by_hand = trunk.body(torch.from_numpy(scaled).permute(0, 3, 1, 2)).mean((2, 3))
        got = trunk(given)
    assert got.shape == (2, 512) == (2, trunk.features)
    torch.testing.assert_close(got, by_hand, atol=1e-5, rtol=1e-4)


def test_seed_grid_and_side_take_effect():
    one, same, other = (build_trunk(ImageConfig(**SMALL), seed) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    grid = build_trunk(ImageConfig(**SMALL, grid=2), 1)
    assert grid.features == 4 * 512
    assert grid.sha256 != one.sha256
    wide = build_trunk(ImageConfig(**{**SMALL, "side": 64}), 1)
    assert wide.sha256 != one.sha256
    assert build_trunk(ImageConfig(**SMALL, crop_share=1.0), 1).sha256 != one.sha256
    assert build_trunk(ImageConfig(trunk="vgg11_bn", weights="random", side=48), 1).grid == 7


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x0_5"])
def test_families(name):
    config = ImageConfig(trunk=name, weights="random", side=64)
    if name.startswith("shufflenet"):
        with pytest.raises(ConfigError, match="convolutional features"):
            build_trunk(config, 0)
    else:
        trunk = build_trunk(config, 0)
        with torch.no_grad():
            out = trunk(pixels(64))
        assert out.shape == (2, {"resnet18": 512, "densenet121": 1024}[name])
        assert (out >= 0).all()  # both end in a ReLU


def test_weights_from_files(tmp_path):
    network = torchvision.models.squeezenet1_1(weights=None)
    part, whole = tmp_path / "part.safetensors", tmp_path / "whole.safetensors"
    save_file(network.features.state_dict(), part)
    save_file(network.state_dict(), whole, metadata={"mean": "0.5,0.4,0.3", "std": "[0.2, 0.2, 0.1]"})
    a = build_trunk(ImageConfig(trunk="squeezenet1_1", weights=str(part), side=48), 0)
    b = build_trunk(ImageConfig(trunk="squeezenet1_1", weights=str(whole), side=48), 0)
    assert torch.equal(a.body[0].weight, network.features[0].weight)
    assert torch.equal(b.body[0].weight, network.features[0].weight)
    assert (b.spec.mean, b.spec.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, path)
    odd = tmp_path / "odd.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), odd, metadata={"mean": "grey"})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no")
    cases = [
        ({"weights": str(path)}, "missing .*unexpected .*conv.weight"),
        ({"weights": str(odd)}, "three numbers"),
        ({"weights": str(damaged)}, "cannot be read"),
        ({"weights": str(tmp_path / "absent.safetensors")}, "cannot be read"),
        ({"weights": "imagenet"}, "expected 'torchvision', 'random'"),
        ({"trunk": "squeezenet9", "weights": "random"}, "squeezenet1_1"),
        ({"trunk": "swin_t", "weights": "random"}, "convolutional features"),
        ({"trunk": "alexnet", "weights": "random", "side": 32}, "image.side is 32, too small"),
    ]
    for changes, says in cases:
        with pytest.raises(ConfigError, match=says):
            build_trunk(ImageConfig(**{"trunk": "squeezenet1_1", "side": 48, **changes}), 0)
