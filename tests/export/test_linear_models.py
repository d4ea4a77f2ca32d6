"""A linear model, from training to search."""

import numpy as np
import pytest
import torch

from dckt import Searcher
from dckt.errors import ConfigError
from dckt.preprocessing import image_batch
from dckt_export.export import export_bundle
from dckt_trainer.config import load_config
from dckt_trainer.encoders import encode
from dckt_trainer.train import train

CHANGES = ("image.trunk=squeezenet1_1", "image.weights=random", "image.side=64", "text.dimension=12", "text.epochs=3")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    config = load_config("modern", list(CHANGES))
    return train(None, corpus.root, folder / "run", config, device="cpu", cache=folder / "cache")


@pytest.fixture(scope="module")
def linear_bundle(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "linear.dckt"
    return export_bundle(run.path, out, fp16=True, seconds=0)


def test_it_is_stored_by_what_it_retrieves_by(linear_bundle, run):
    manifest = linear_bundle.manifest
    assert manifest.representation == "joined"
    assert dict(manifest.dimensions) == run.model().network.dimensions
    assert set(manifest.graphs) == {"fp32", "fp16"}


def test_it_encodes_as_the_model_does(linear_bundle, run, corpus, tmp_path):
    model, pairs = run.model(), corpus.part("test")
    pixels = torch.from_numpy(image_batch([pair.image for pair in pairs], model.trunk.spec))
    expected = encode(model.image_encoder(), pixels)["joined"].numpy()
    with Searcher.create(linear_bundle.path, tmp_path / "index", variant="onnxruntime-fp32") as searcher:
        searcher.add_images([pair.image for pair in pairs], ids=[pair.id for pair in pairs])
        found = np.stack([searcher.index.vector(pair.id, "image") for pair in pairs])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        searcher.add_texts([pair.text for pair in pairs], ids=[pair.id for pair in pairs])
        hits = searcher.search(pairs[0].image, k=3, media="text")
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)


def test_another_output_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="expected one of probability, joined"):
        export_bundle(run.path, tmp_path / "x.dckt", representation="fc9", seconds=0)
