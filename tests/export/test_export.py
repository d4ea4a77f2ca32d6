"""From a run to a bundle that ranks as the run's model does, or to nothing."""

import hashlib
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dckt import __version__
from dckt.bundle import Bundle
from dckt.errors import BundleError, ConfigError, CorpusError, ParityError, ProviderError, RunError
from dckt.metrics import cross_media_map
from dckt.preprocessing import image_batch, register_tokenizer, text, token_batch
from dckt.runtime.choice import open_encoders
from dckt.runtime.onnx import OnnxEncoder
from dckt_export import export as export_module
from dckt_export import graphs as graphs_module
from dckt_export import variants as variants_module
from dckt_export.graphs import parts
from dckt_export.precision import layer_precisions
from dckt_trainer.checkpoint import load_tensors, save_tensors
from dckt_trainer.config import dump_config
from dckt_trainer.encoders import encode
from dckt_trainer.model import load_model, save_model
from dckt_trainer.network import DomainNetwork

# Latency is measured in the shortest way; test_latency.py has the rest.
export_bundle = partial(export_module.export_bundle, seconds=0)


@pytest.fixture(scope="module")
def bundle(finished_run, tmp_path_factory):
    """Exported once, with every default. Do not write into it."""
    return export_bundle(finished_run, tmp_path_factory.mktemp("bundles") / "colours.dckt")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def served(bundle, pairs, output):
    """Vectors of pairs as an application gets them: from the bundle alone."""
    spec, vocabulary = bundle.manifest.text, bundle.vocabulary
    pixels = image_batch([pair.image for pair in pairs], bundle.manifest.image)
    tokens = token_batch([vocabulary.encode(pair.text, spec, allow_unknown=True) for pair in pairs])
    with (
        OnnxEncoder.open(bundle.graph("image"), output=output, device="cpu") as image,
        OnnxEncoder.open(bundle.graph("text"), output=output, device="cpu") as text,
    ):
        return {"image": image.run(pixels), "text": text.run(tokens)}


def trained(model, pairs, output):
    pixels = image_batch([pair.image for pair in pairs], model.trunk.spec)
    tokens = token_batch([model.vocabulary.encode(pair.text, model.text, allow_unknown=True) for pair in pairs])
    return {
        "image": encode(model.image_encoder(), torch.from_numpy(pixels))[output].numpy(),
        "text": encode(model.text_encoder(), torch.from_numpy(tokens))[output].numpy(),
    }


def cosines(left, right):
    return [
        float(a @ b / np.sqrt((a @ a) * (b @ b)))
        for a, b in zip(left.astype(np.float64), right.astype(np.float64), strict=True)
    ]


@pytest.mark.usefixtures("quick")
def test_the_tokenizer_goes_into_the_bundle(run_copy, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_registered", {})
    file = run_copy / "target" / "model.json"
    shape = json.loads(file.read_text())
    shape["text"]["tokenizer"] = "blanks"
    file.write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match="no tokenizer 'blanks'"):
        export_bundle(run_copy, tmp_path / "blanks.dckt")
    assert not (tmp_path / "blanks.dckt").exists()
    register_tokenizer("blanks", lambda text: ["unheard-of", *text.split()])
    bundle = export_bundle(run_copy, tmp_path / "blanks.dckt")
    assert bundle.manifest.text == replace(model.text, tokenizer="blanks")
    trained = load_model(run_copy / "target")
    for pair in corpus.part("test"):
        ids = bundle.vocabulary.encode(pair.text, bundle.manifest.text)
        assert ids == trained.vocabulary.encode(pair.text, trained.text)
        assert ids == [1, *model.vocabulary.encode(pair.text, model.text)]


@pytest.mark.parametrize("output", ["probability", "fc9"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_bundle_ranks_as_the_model_does(bundle, model, corpus, output, split):
    pairs = corpus.part(split)
    expected, found = trained(model, pairs, output), served(Bundle.open(bundle.path), pairs, output)
    for medium in ("image", "text"):
        assert min(cosines(expected[medium], found[medium])) >= 0.9999
    labels = [pair.label for pair in pairs]
    before, after = (cross_media_map(each["image"], each["text"], labels) for each in (expected, found))
    assert after.image_to_text.map == pytest.approx(before.image_to_text.map, abs=5e-4)
    assert after.text_to_image.map == pytest.approx(before.text_to_image.map, abs=5e-4)
    assert before.average > 0.35  # chance is about 0.23: the rankings mean something


def test_a_bundle_is_calibrated_on_the_pairs_that_it_was_compared_on(bundle, model, corpus):
    pairs, calibration = corpus.part("val"), bundle.manifest.calibration
    assert calibration.pairs == {"corpus": corpus.name, "split": "val", "count": len(pairs)}
    assert set(calibration.thresholds) == {"image_to_text", "text_to_image", "image_to_image", "text_to_text"}
    found = trained(model, pairs, "probability")
    measured = cross_media_map(found["image"], found["text"], [pair.label for pair in pairs])
    ranking = calibration.ranking["probability"]
    assert ranking["image_to_text"].map == pytest.approx(measured.image_to_text.map, abs=1e-4)
    assert ranking["text_to_image"].map == pytest.approx(measured.text_to_image.map, abs=1e-4)
    assert set(calibration.ranking) == {"probability", "fc9", "probability then fc9"}


def test_a_bundle_says_what_it_is(bundle, model, config):
    manifest = bundle.manifest
    assert sorted(manifest.files) == ["image.onnx", "report.html", "text.onnx", "vocabulary.txt"]
    assert {name: sorted(of) for name, of in manifest.graphs.items()} == {"fp32": ["image", "text"]}
    assert "onnxruntime-fp32" in [variant.name for variant in manifest.variants]
    assert manifest.profile == (1, 8, 32)
    assert manifest.representation == "probability"
    assert manifest.dimensions == {"probability": 5, "fc9": 16}
    assert manifest.labels == model.labels
    assert (manifest.image, manifest.text) == (model.trunk.spec, model.text)
    assert bundle.vocabulary == model.vocabulary
    assert manifest.produced_by["dckt"] == __version__
    assert manifest.produced_by["torch"] == torch.__version__.partition("+")[0]
    assert manifest.produced_by.keys() >= {"onnx", "onnxscript", "onnxruntime"}
    assert (manifest.produced_by["opset"], manifest.produced_by["seed"]) == ("20", "3")
    assert len(manifest.produced_by["config_sha256"]) == 64


def test_a_bundle_keeps_what_was_measured(bundle, model, corpus):
    measured = bundle.manifest.measured
    assert measured["pairs"] == {"corpus": "colours", "split": "val", "count": 30}
    assert measured["thresholds"]["fp32"] == {"cosine_min": 0.9999, "cosine_median": 0.9999, "map_change": 0.0005}
    assert measured["test"] == {"pairs": 10, "image_to_text": 0.75, "text_to_image": 0.5, "average": 0.625}
    assert measured["machine"]["cores"] == os.cpu_count()
    pairs = corpus.part("val")
    reference = measured["variants"]["onnxruntime-fp32"]
    for output in ("probability", "fc9"):
        expected, found = trained(model, pairs, output), served(bundle, pairs, output)
        for medium in ("image", "text"):
            figures = reference["parity"][output]["media"][medium]
            assert figures["rows"] == 30
            assert figures["cosine_min"] == pytest.approx(min(cosines(expected[medium], found[medium])), abs=1e-6)
            assert figures["max_difference"] <= 1e-4
        result = cross_media_map(expected["image"], expected["text"], [pair.label for pair in pairs])
        directions = reference["parity"][output]["directions"]
        assert directions["image_to_text"]["map_torch"] == pytest.approx(result.image_to_text.map, abs=1e-3)
        assert directions["text_to_image"]["map_torch"] == pytest.approx(result.text_to_image.map, abs=1e-3)
    assert reference["bytes"] == sum(bundle.manifest.files[name].size for name in ("image.onnx", "text.onnx"))
    assert set(reference["latency"]) == {"image", "text"}
    assert set(reference["latency"]["image"]) == {"1", "8", "32"}
    assert reference["pairs_per_second"] > 0


def test_variants_are_in_order_of_their_speed(bundle):
    measured = bundle.manifest.measured["variants"]
    times = [measured[variant.name]["latency"]["image"]["1"]["p50"] for variant in bundle.manifest.variants]
    assert times == sorted(times)


@pytest.mark.usefixtures("quick")
def test_the_configuration_has_another_hash_when_it_differs(bundle, run_copy, config, tmp_path):
    text = dump_config(config).replace("seed = 3", "seed = 4")
    (run_copy / "config.toml").write_text(text)
    facts = json.loads((run_copy / "run.json").read_text())
    facts["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (run_copy / "run.json").write_text(json.dumps(facts))
    other = export_bundle(run_copy, tmp_path / "b.dckt", limit=2).manifest
    assert other.produced_by["seed"] == "4"
    assert other.produced_by["config_sha256"] != bundle.manifest.produced_by["config_sha256"]
    assert other.model_id == bundle.manifest.model_id  # the model is the same


def test_options_have_their_effect(bundle, finished_run, corpus, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(corpus.root, other)
    out = tmp_path / "b.dckt"
    manifest = export_bundle(
        finished_run, out, representation="fc9", pairs=other, split="test", limit=7, opset=21
    ).manifest
    assert manifest.representation == "fc9"
    assert manifest.measured["pairs"] == {"corpus": "elsewhere", "split": "test", "count": 7}
    assert manifest.produced_by["opset"] == "21"
    assert manifest.model_id != bundle.manifest.model_id


@pytest.mark.usefixtures("quick")
def test_a_limit_spreads_over_the_split(finished_run, tmp_path, monkeypatch):
    compared = []
    real = variants_module.measure
    monkeypatch.setattr(variants_module, "measure", lambda *given: compared.append(given) or real(*given))
    export_bundle(finished_run, tmp_path / "b.dckt", limit=5)
    *_, labels, ids = compared[0]
    # 30 pairs sorted by class, 6 of each: every sixth.
    assert labels == ["blue", "green", "grey", "red", "yellow"]
    assert ids == ["blue8", "green8", "grey8", "red8", "yellow8"]


@pytest.mark.usefixtures("quick")
def test_progress_is_told(finished_run, tmp_path):
    told = []

    class Reporter:
        def task(self, name, total):
            from contextlib import nullcontext

            return nullcontext(lambda count: told.append((name, total, count)))

        def say(self, text):
            raise AssertionError(text)

    export_bundle(finished_run, tmp_path / "b.dckt", limit=20, reporter=Reporter())
    assert told[:6] == [
        ("reading pairs", 20, 16),
        ("reading pairs", 20, 4),
        *[("encoding with PyTorch", 40, 16), ("encoding with PyTorch", 40, 4)] * 2,
    ]
    assert told[6:8] == [("exporting graphs", 2, 1)] * 2
    # Two media in two representations.
    assert told[8:16] == [("comparing onnxruntime-fp32", 80, rows) for rows in (16, 4)] * 4


def nothing_is_left(tmp_path, temporary_folder, *but):
    left = sorted(path.name for path in tmp_path.iterdir())
    return list(temporary_folder.iterdir()) == [] and left == sorted(["temporary", *but])


REPORTS = ("b.dckt.refused.html", "b.dckt.refused.json")


def corrupt(graph, name):
    """Turns the sign of one weight of a layer, the largest one."""
    (tensor,) = (each for each in graph.graph.initializer if each.name == name)
    values = numpy_helper.to_array(tensor).copy()
    place = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[place] = -values[place]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return graph


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("input_name", "medium"), [("pixels", "image"), ("tokens", "text")])
def test_one_corrupt_weight_is_refused(finished_run, tmp_path, temporary_folder, monkeypatch, input_name, medium):
    real = graphs_module.onnx_from_encoder

    def spoilt(encoder, example, **options):
        graph = real(encoder, example, **options)
        return corrupt(graph, "network.fc9.linear.weight") if options["input_name"] == input_name else graph

    monkeypatch.setattr(graphs_module, "onnx_from_encoder", spoilt)
    with pytest.raises(
        ParityError, match=rf"fc9, {medium}: cosine of 30 rows down to 0\.\d+ .* worst rows: \w+ \("
    ) as caught:
        export_bundle(finished_run, tmp_path / "b.dckt")
    other = {"image": "text", "text": "image"}[medium]
    assert f"fc9, {other}: cosine" not in str(caught.value)
    assert nothing_is_left(tmp_path, temporary_folder, *REPORTS)
    # The report says which layer it is, and for which pair that was looked at.
    facts = json.loads((tmp_path / REPORTS[1]).read_text())
    assert facts["variant"] == "onnxruntime-fp32"
    assert list(facts["drift"]) == [medium]
    graph = real(load_model(finished_run / "target").image_encoder(), None, input_name=input_name)
    (spoilt_layer,) = (node.name for node in graph.graph.node if "network.fc9.linear.weight" in node.input)
    assert facts["drift"][medium].startswith(f"{spoilt_layer} (Gemm): relative error")
    worst = facts["parity"]["fc9"]["media"][medium]["worst"][0][0]
    page = (tmp_path / REPORTS[0]).read_text()
    assert worst in str(caught.value)
    assert spoilt_layer in page
    assert spoilt_layer in str(caught.value)


@pytest.mark.usefixtures("quick")
def test_a_report_of_a_refusal_goes_when_the_export_passes(finished_run, tmp_path):
    for name in REPORTS:
        (tmp_path / name).write_text("of an earlier try")
    export_bundle(finished_run, tmp_path / "b.dckt", limit=4)
    assert [path.name for path in tmp_path.iterdir()] == ["b.dckt"]


@pytest.mark.usefixtures("quick")
def test_numbers_that_are_not_finite_are_refused(finished_run, tmp_path, temporary_folder, monkeypatch):
    real = graphs_module.onnx_from_encoder

    def spoilt(encoder, example, **options):
        graph = real(encoder, example, **options)
        (tensor,) = (each for each in graph.graph.initializer if each.name == "network.fc9.linear.weight")
        values = np.full_like(numpy_helper.to_array(tensor), np.nan)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return graph

    monkeypatch.setattr(graphs_module, "onnx_from_encoder", spoilt)
    with pytest.raises(ParityError, match=r"image\.onnx, pairs blue8 to grey11: .*not finite"):
        export_bundle(finished_run, tmp_path / "b.dckt")
    assert nothing_is_left(tmp_path, temporary_folder, *REPORTS)


def test_a_checkpoint_with_nan_is_refused(run_copy, tmp_path):
    file = run_copy / "target" / "network.safetensors"
    tensors = load_tensors(file)
    tensors["fc9.linear.weight"][0, 0] = np.nan
    save_tensors(file, tensors)
    with pytest.raises(RunError, match=r"fc9\.linear\.weight of the network holds numbers that are not finite"):
        export_bundle(run_copy, tmp_path / "b.dckt")
    assert not (tmp_path / "b.dckt").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("moment", ["exporting graphs", "reading pairs", "comparing onnxruntime-fp32"])
def test_an_interrupt_leaves_nothing(finished_run, tmp_path, temporary_folder, moment):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner's worker may ignore it

    class Reporter:
        def task(self, name, total):
            from contextlib import nullcontext

            def advance(count):
                if name == moment:
                    os.kill(os.getpid(), signal.SIGINT)

            return nullcontext(advance)

    try:
        with pytest.raises(KeyboardInterrupt):
            export_bundle(finished_run, tmp_path / "b.dckt", reporter=Reporter())
    finally:
        signal.signal(signal.SIGINT, before)
    assert nothing_is_left(tmp_path, temporary_folder)


@pytest.mark.usefixtures("quick")
def test_an_existing_bundle_stays_unless_forced(finished_run, bundle, tmp_path):
    out = tmp_path / "b.dckt"
    shutil.copytree(bundle.path, out)
    with pytest.raises(BundleError, match=r"b\.dckt: exists already; .*--force"):
        export_bundle(finished_run, out, representation="fc9")
    assert Bundle.open(out).manifest.representation == "probability"
    export_bundle(finished_run, out, representation="fc9", limit=3, force=True)
    assert Bundle.open(out).manifest.representation == "fc9"
    assert [path.name for path in tmp_path.iterdir()] == ["b.dckt"]


@pytest.fixture(scope="module")
def all_precisions(finished_run, tmp_path_factory):
    """Exported with fp16 and int8. Do not write into it."""
    out = tmp_path_factory.mktemp("bundles") / "all.dckt"
    return export_bundle(finished_run, out, fp16=True, int8=True, profile=(1, 2, 4))


def test_every_precision_has_graphs_of_its_own(all_precisions, bundle):
    manifest = all_precisions.manifest
    assert set(manifest.graphs) == {"fp32", "fp16", "int8"}
    assert manifest.model_id == bundle.manifest.model_id  # one model, however it is served
    assert manifest.profile == (1, 2, 4)
    assert manifest.measured["calibration"] == 40
    names = [variant.name for variant in manifest.variants]
    assert {"onnxruntime-fp32", "onnxruntime-fp16", "onnxruntime-int8"} <= set(names)
    sizes = {
        precision: manifest.measured["variants"][f"onnxruntime-{precision}"]["bytes"] for precision in manifest.graphs
    }
    for precision, graphs in manifest.graphs.items():
        files = {graph.file for graph in graphs.values()}
        assert sizes[precision] == sum(manifest.files[name].size for name in files)
        for medium, graph in graphs.items():
            layers = layer_precisions(onnx.load(all_precisions.graph(medium, precision)))
            assert layers == graph.layers
            assert {name.partition(" ")[0] for name in layers} <= {precision, "fp32"}
    assert sizes["fp16"] <= 0.51 * sizes["fp32"]
    assert sizes["int8"] < 0.3 * sizes["fp32"]  # a small graph is mostly names


def test_every_variant_serves_what_the_gate_measured(all_precisions, corpus):
    pairs = corpus.part("val")
    manifest = all_precisions.manifest
    rows = {
        "image": image_batch([pair.image for pair in pairs], manifest.image),
        "text": token_batch([all_precisions.vocabulary.encode(pair.text, manifest.text) for pair in pairs]),
    }
    vectors = {}
    for variant in manifest.variants:
        encoders = open_encoders(all_precisions, variant=variant.name, device="cpu", output="fc9")
        vectors[variant.name] = {medium: encoder.run(rows[medium]) for medium, encoder in encoders.items()}
        for encoder in encoders.values():
            encoder.close()
    for name, of in vectors.items():
        for medium, found in of.items():
            least = manifest.measured["variants"][name]["parity"]["fc9"]["media"][medium]["cosine_min"]
            assert min(cosines(vectors["onnxruntime-fp32"][medium], found)) >= least - 5e-3
    assert not np.array_equal(vectors["onnxruntime-fp32"]["image"], vectors["onnxruntime-int8"]["image"])


def test_the_report_and_the_manifest_agree(all_precisions):
    page = (all_precisions.path / "report.html").read_text()
    for variant in all_precisions.manifest.variants:
        assert variant.name in page
    assert "Thresholds of the gate" in page


def scale_up(run, factor):
    """Makes the first convolution's output larger and takes it back in the second: the same model, other numbers."""
    file = run / "target" / "trunk.safetensors"
    tensors = load_tensors(file)
    first, second = "body.0", "body.3.squeeze"
    for name in (f"{first}.weight", f"{first}.bias"):
        tensors[name] = tensors[name] * factor
    tensors[f"{second}.weight"] = tensors[f"{second}.weight"] / factor
    save_tensors(file, tensors)


def test_layers_that_would_overflow_stay_in_float32(run_copy, tmp_path):
    scale_up(run_copy, 1e5)
    manifest = export_bundle(run_copy, tmp_path / "b.dckt", fp16=True).manifest
    assert manifest.graphs["fp16"]["image"].layers["fp32"] in (1, 2)
    assert "onnxruntime-fp16" in [variant.name for variant in manifest.variants]


def test_a_forced_overflow_is_refused_by_name(run_copy, tmp_path, monkeypatch):
    scale_up(run_copy, 1e5)
    real = export_module.tensor_ranges
    monkeypatch.setattr(export_module, "tensor_ranges", lambda *given, **more: dict.fromkeys(real(*given, **more), 1.0))
    with pytest.raises(ParityError, match=r"onnxruntime-fp16 differs .*no bundle was written") as caught:
        export_bundle(run_copy, tmp_path / "b.dckt", fp16=True)
    fp32 = onnx.load_from_string(parts(load_model(run_copy / "target"))["image"].onnx(20).SerializeToString())
    first = next(node.name for node in fp32.graph.node if node.op_type == "Conv")
    assert f"image: first layer that drifts: {first} (Conv): numbers that are not finite" in str(caught.value)
    assert not (tmp_path / "b.dckt").exists()


def test_a_float32_graph_cannot_be_called_fp16(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "fp16_from_fp32", lambda graph, ranges: graph)
    with pytest.raises(BundleError, match=r"0 of \d+ layers are in fp16"):
        export_bundle(finished_run, tmp_path / "b.dckt", fp16=True)
    assert not (tmp_path / "b.dckt").exists()


def test_int8_leaves_more_in_float_until_it_passes(finished_run, tmp_path, monkeypatch):
    tried = []
    real = export_module.int8_from_fp32

    def noted(graph, out, calibration, *, weights_only):
        tried.append((graph.name, len(weights_only), len(calibration.whole)))
        real(graph, out, calibration, weights_only=weights_only)

    monkeypatch.setattr(export_module, "int8_from_fp32", noted)
    strict = tmp_path / "strict.toml"
    strict.write_text("[int8]\ncosine_min = 1.0\n")
    with pytest.raises(ParityError, match="onnxruntime-int8 differs"):
        export_bundle(finished_run, tmp_path / "b.dckt", int8=True, limit=4, thresholds=strict)
    shares = [count / layers for name, count, layers in tried if name == "image.onnx"]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1], len(shares)) == (0, 1, len(export_module.WEIGHTS_ONLY))


def test_a_third_medium_is_exported_too(run_copy, model, config, corpus, tmp_path):
    torch.manual_seed(0)
    network = DomainNetwork({**model.network.inputs, "audio": 12}, 16, len(model.labels))
    network.load_state_dict(model.network.state_dict(), strict=False)
    save_model(replace(model, network=network.eval()), run_copy / "target", config.image)
    with pytest.raises(CorpusError, match=r"vectors/audio\.npy: there is no such file"):
        export_bundle(run_copy, tmp_path / "b.dckt", limit=4)
    pairs = shutil.copytree(corpus.root, tmp_path / "pairs")
    (pairs / "vectors").mkdir()
    rows = np.random.default_rng(1).standard_normal((len(corpus.pairs), 12), np.float32)
    np.save(pairs / "vectors/audio.npy", rows[:, :7])
    with pytest.raises(CorpusError, match=r"'audio': 7.*the model takes \{'audio': 12\}"):
        export_bundle(run_copy, tmp_path / "b.dckt", pairs=pairs, limit=4)
    np.save(pairs / "vectors/audio.npy", rows)
    bundle = export_bundle(run_copy, tmp_path / "b.dckt", fp16=True, int8=True, pairs=pairs, limit=4, calibration=8)
    for precision in ("fp32", "fp16", "int8"):
        assert set(bundle.manifest.graphs[precision]) == {"image", "text", "audio"}
    with OnnxEncoder.open(bundle.graph("audio"), output="fc9", device="cpu") as encoder:
        found = encoder.run(rows)
    expected = network.represent("audio", torch.from_numpy(rows))[1].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    parity = bundle.manifest.measured["variants"]["onnxruntime-fp32"]["parity"]["fc9"]
    assert set(parity["media"]) == {"image", "text", "audio"}
    assert {"audio_to_image", "text_to_audio"} < set(parity["directions"])
    assert "audio_to_text" in bundle.manifest.calibration.ranking["fc9"]


@pytest.mark.usefixtures("quick")
def test_engines_without_a_gpu(finished_run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(
        ProviderError, match=r"(?s)b\.dckt was written whole, without TensorRT engines: .*no NVIDIA.*\n.*dckt engine"
    ):
        export_bundle(finished_run, tmp_path / "b.dckt", limit=2, tensorrt=True)
    assert Bundle.open(tmp_path / "b.dckt").manifest.representation == "probability"


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_nothing(finished_run, tmp_path, temporary_folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(BundleError, match=r"b\.dckt: could not be written .*is there room on the disk"):
            export_bundle(finished_run, tmp_path / "b.dckt", limit=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert nothing_is_left(tmp_path, temporary_folder)


def edit_facts(run, **changes):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, **changes}))


def test_an_unfinished_run_is_refused(run_copy, tmp_path):
    edit_facts(run_copy, state="training")
    with pytest.raises(RunError, match=r"has not finished .*dckt-train --resume"):
        export_bundle(run_copy, tmp_path / "b.dckt")


def test_a_run_of_a_newer_version_is_refused(run_copy, tmp_path):
    edit_facts(run_copy, version=99)
    with pytest.raises(RunError, match="run format 99"):
        export_bundle(run_copy, tmp_path / "b.dckt")


@pytest.mark.parametrize("name", ["network.safetensors", "trunk.safetensors", "model.json", "vocabulary.txt"])
def test_a_half_written_run_is_refused(run_copy, tmp_path, name):
    (run_copy / "target" / name).unlink()
    with pytest.raises(RunError, match=r"no whole model|cannot be read"):
        export_bundle(run_copy, tmp_path / "b.dckt")
    assert not (tmp_path / "b.dckt").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        export_bundle(tmp_path, tmp_path / "b.dckt")


@pytest.mark.usefixtures("quick")
def test_a_run_without_an_evaluation_is_exported(run_copy, tmp_path):
    (run_copy / "evaluation.json").unlink()
    assert "test" not in export_bundle(run_copy, tmp_path / "b.dckt", limit=2).manifest.measured


@pytest.mark.usefixtures("quick")
def test_a_damaged_evaluation_is_refused(run_copy, tmp_path):
    (run_copy / "evaluation.json").write_text('{"kept": "best"}')
    with pytest.raises(RunError, match=r"evaluation\.json is not what dckt-train writes"):
        export_bundle(run_copy, tmp_path / "b.dckt", limit=2)
    assert not (tmp_path / "b.dckt").exists()


@pytest.mark.usefixtures("quick")
def test_a_missing_corpus_asks_for_pairs(run_copy, corpus, tmp_path):
    edit_facts(run_copy, target={"path": str(tmp_path / "gone"), "on_bad_pair": "raise"})
    with pytest.raises(CorpusError, match=r"(?s)gone.*name it with --pairs"):
        export_bundle(run_copy, tmp_path / "b.dckt")
    edit_facts(run_copy, target={})
    with pytest.raises(RunError, match=r"does not name the target corpus; name one with --pairs"):
        export_bundle(run_copy, tmp_path / "b.dckt")
    manifest = export_bundle(run_copy, tmp_path / "b.dckt", pairs=corpus.root, limit=2).manifest
    assert manifest.measured["pairs"]["corpus"] == "colours"


@pytest.mark.usefixtures("quick")
def test_pairs_that_training_left_out_are_left_out_again(run_copy, corpus, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus.root, damaged)
    (damaged / "blue8.png").write_bytes(b"no picture")
    edit_facts(run_copy, target={"path": str(damaged), "on_bad_pair": "skip"})
    assert export_bundle(run_copy, tmp_path / "b.dckt").manifest.measured["pairs"]["count"] == 29


def test_an_empty_split_is_refused(run_copy, corpus, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(corpus.root, small)
    rows = [line for line in (small / "pairs.jsonl").read_text().splitlines() if '"val"' not in line]
    (small / "pairs.jsonl").write_text("\n".join(rows))
    with pytest.raises(CorpusError, match="no val pairs to compare"):
        export_bundle(run_copy, tmp_path / "b.dckt", pairs=small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"representation": "fc8"}, "representation is 'fc8'; expected one of probability, fc9"),
        ({"limit": 0}, "limit is 0"),
        ({"split": "all"}, "split is 'all'"),
        ({"opset": 12}, "opset is 12"),
    ],
)
def test_settings_that_are_not_offered_are_refused(finished_run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_bundle(finished_run, tmp_path / "b.dckt", **options)
    assert list(tmp_path.iterdir()) == []
