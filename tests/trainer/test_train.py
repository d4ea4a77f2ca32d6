"""A whole training on small generated corpora: what it leaves, what decides it, and how it goes on after a stop."""

import json
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from stopping import StopAfter

from dckt.errors import ConfigError, CorpusError, RunError
from dckt.metrics import cross_media_map
from dckt.preprocessing import image_batch, token_batch
from dckt_trainer import pretrain as pretrain_module
from dckt_trainer import train as train_module
from dckt_trainer import transfer
from dckt_trainer.checkpoint import load_tensors, load_with_metadata, save_tensors
from dckt_trainer.config import load_config
from dckt_trainer.data.corpus import read_corpus
from dckt_trainer.data.features import cached_features
from dckt_trainer.encoders import encode
from dckt_trainer.evaluate import answers
from dckt_trainer.progress import Silent
from dckt_trainer.runs import open_run
from dckt_trainer.train import resume, train
from dckt_trainer.trunk import Trunk, build_trunk
from dckt_trainer.word_cnn import text_vectors


@pytest.fixture(scope="module")
def wider(run_training, tmp_path_factory):
    """A run whose every checkpoint has other shapes than those of ``finished``."""
    changes = ("network.width=20", "text.dimension=10", "text.maps=5", "text.cnn_epochs=1", "transfer.rounds=1")
    return run_training(tmp_path_factory.mktemp("runs") / "wider", *changes)


def state(run, domain="target"):
    return run.network(domain).state_dict()


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert {"config.toml", "run.json", "metrics.jsonl", "selection.jsonl", "evaluation.json", "report.html"} <= names
    assert open_run(finished.path).complete
    evaluation = finished.evaluation
    assert [entry["round"] for entry in evaluation["validation"]] == [0, 1, 2, 3]
    assert evaluation["test"]["pairs"] == 12
    assert evaluation["test"]["model_t0"]["round"] == 0
    assert evaluation["test"]["last"]["round"] == 3
    averages = [entry["average"] for entry in evaluation["validation"]]
    assert evaluation["test"]["best"]["round"] == averages.index(max(averages))
    for figures in (evaluation["test"][key] for key in ("model_t0", "last", "best")):
        assert 0 < figures["lowest"] <= figures["average"] + 1e-9 <= figures["highest"] + 2e-9 < 1.001
    selection = finished.events("selection")
    ids = {pair.id for pair in read_corpus(finished.target).part("train")}
    assert [event["round"] for event in selection] == [1, 2, 3]
    assert all(set(event["selected"]) <= ids and len(event["selected"]) >= 2 for event in selection)
    stages = {event["stage"] for event in finished.events("metrics")}
    assert {"word-cnn/source", "word-cnn/target", "pretrain/source", "pretrain/target", "round/0", "round/3"} <= stages
    assert "data:image/jpeg" in (finished.path / "report.html").read_text(encoding="utf-8")


def test_the_saved_encoders_reproduce_the_test_figures(finished):
    """From pictures and words, through the files, to the MAP that the training printed."""
    model, pairs = finished.model(), read_corpus(finished.target).part("test")
    pixels = image_batch([pair.image for pair in pairs], model.trunk.spec)
    tokens = token_batch([model.vocabulary.encode(p.text, model.text, allow_unknown=True) for p in pairs])
    image = encode(model.image_encoder(), torch.from_numpy(pixels))["probability"].numpy()
    text = encode(model.text_encoder(), torch.from_numpy(tokens))["probability"].numpy()
    labels = np.array([model.labels.index(pair.label) for pair in pairs])
    result = cross_media_map(image, text, labels)
    expected = finished.evaluation["test"]["last"]
    assert result.image_to_text.map == pytest.approx(expected["image_to_text"], abs=1e-6)
    assert result.text_to_image.map == pytest.approx(expected["text_to_image"], abs=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run_training, finished, tmp_path):
    again = run_training(tmp_path / "again")
    assert same(state(finished), state(again))
    other = run_training(tmp_path / "other", "seed=1", "transfer.rounds=1")
    assert not same(state(finished), state(other))


@pytest.mark.parametrize("stage", ["word vectors", "Word CNN, target", "pretraining, target", "round 1", "round 3"])
def test_a_stopped_run_goes_on_to_the_same_weights(run_training, finished, cache, tmp_path, stage):
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run_training(out, reporter=StopAfter(stage))
    with pytest.raises(RunError, match=f"dckt-train --resume {out}"):
        open_run(out).model()
    run = resume(out, cache=cache, device="cpu")
    assert same(state(finished), state(run))
    assert same(state(finished, "source"), state(run, "source"))
    assert run.evaluation == finished.evaluation
    assert run.events("metrics") == finished.events("metrics")
    assert run.events("selection") == finished.events("selection")


@pytest.mark.parametrize(
    "change",
    [
        "transfer.law=all",
        "transfer.law=random",
        "transfer.law=released",
        "transfer.alpha=1.0",
        "transfer.rounds=1",
        "transfer.source_epochs=2",
        "transfer.accumulate=2",
        "pretrain.target_start=source",
        "pretrain.accumulate=2",
        "mmd.estimator=quadruple",
        "mmd.kernels=1",
        "losses.mmd_fc9=0",
        "text.target_cnn=source",
        "optimizer.inv_power=5",
        "optimizer.inv_gamma=1",
        "optimizer.momentum=0",
        "optimizer.weight_decay=0.1",
        "optimizer.bias_lr_factor=5",
        "losses.pair_source=1",
        "mmd.bandwidth=median",
        "mmd.factor=3",
        "transfer.batch=8",
        "text.dropout=0",
        "text.min_count=4",
        "text.max_tokens=3",
        "image.crop_share=0.5",
        "transfer.score=reciprocal_rank",
        "transfer.stratified=true",
        "transfer.draws=frozen",
        "transfer.order=fixed",
        "mmd.bandwidth=fixed",
        "network.moving_average=caffe",
        "optimizer.form=caffe",
        "compute.precision=bfloat16",
        "text.training=end_to_end",
    ],
)
def test_settings_take_effect(run_training, finished, tmp_path, change):
    assert not same(state(finished), state(run_training(tmp_path / "changed", change)))


def test_best_keeps_the_best_round_on_validation(run_training, tmp_path):
    run = run_training(tmp_path / "best", "transfer.keep=best", "optimizer.lr=0.3")
    best = run.evaluation["test"]["best"]["round"]
    files = list(run.checkpoints.glob("target-best-*"))
    assert [path.stem for path in files] == [f"target-best-{best}"]  # those of other rounds are gone
    assert same(state(run), load_tensors(files[0]))


def test_no_rounds_is_model_t0(run_training, tmp_path):
    run = run_training(tmp_path / "t0", "transfer.rounds=0")
    test = run.evaluation["test"]
    assert test["model_t0"] == test["last"] == test["best"]
    assert run.events("selection") == []


def test_an_existing_folder_is_kept_unless_forced(run_training, finished, tmp_path):
    with pytest.raises(RunError, match="--force"):
        run_training(finished.path)
    with pytest.raises(RunError, match="complete"):
        resume(finished.path)
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="not a run folder"):
        run_training(stranger, force=True)
    assert (stranger / "holiday.jpg").exists()
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    assert run_training(copy, "transfer.rounds=0", force=True).evaluation["test"]["last"]["round"] == 0


def test_force_on_a_link_to_a_run_replaces_the_run_and_keeps_the_link(run_training, finished, tmp_path):
    real, link = tmp_path / "disk" / "run", tmp_path / "run"
    shutil.copytree(finished.path, real)
    (real / "old").touch()
    link.symlink_to(real)
    run_training(link, "transfer.rounds=0", force=True)
    assert link.is_symlink()
    assert not (real / "old").exists()
    assert open_run(real).complete
    assert open_run(link).config.transfer.rounds == 0


def test_bad_corpora_and_devices_are_refused_before_anything_is_written(corpora, cache, small, tmp_path):
    out = tmp_path / "run"
    config = load_config("small", small)
    with pytest.raises(CorpusError):
        train(tmp_path / "absent", corpora / "target", out, config, cache=cache)
    lines = (corpora / "target" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    untested = tmp_path / "untested"
    shutil.copytree(corpora / "target", untested)
    rows = [line for line in lines if json.loads(line)["split"] != "val"]
    (untested / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(ConfigError, match="no pairs in: val"):
        train(corpora / "source", untested, out, config, cache=cache)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            train(corpora / "source", corpora / "target", out, config, cache=cache, device="cuda")
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        train(corpora / "source", corpora / "target", out, config, cache=cache, device="tpu")
    assert not out.exists()


def test_damage_is_noticed(finished, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(finished.path, copy)
    weights = copy / "target" / "network.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        open_run(copy).model()
    weights.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        open_run(copy).model()
    (copy / "target" / "vocabulary.txt").write_text("<pad>\n<unk>\nother\n", encoding="utf-8")
    with pytest.raises(RunError, match="changed after training"):
        open_run(copy).model()
    facts = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    (copy / "run.json").write_text(json.dumps({**facts, "version": 99}), encoding="utf-8")
    with pytest.raises(RunError, match="format 99"):
        open_run(copy)
    (copy / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        open_run(copy)


@pytest.mark.parametrize(
    "name", ["words", "text-source", "text-target", "source-0", "target-0", "joint", "target-best"]
)
def test_a_checkpoint_of_another_run_is_refused(run_training, finished, wider, cache, tmp_path, name):
    """Whole by its checksum, but of another shape: a file that was copied in."""
    out = tmp_path / "run"
    shutil.copytree(finished.path, out)
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (out / "run.json").write_text(json.dumps({**facts, "state": "training"}), encoding="utf-8")
    if name == "target-best":
        name = next((out / "checkpoints").glob("target-best-*")).stem
        shutil.copy(next(wider.checkpoints.glob("target-best-*")), out / "checkpoints" / f"{name}.safetensors")
    else:
        shutil.copy(wider.checkpoints / f"{name}.safetensors", out / "checkpoints")
    with pytest.raises(RunError, match=f"{name}.safetensors: does not fit") as caught:
        resume(out, cache=cache, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["momentum.target.fc8.linear.weight", "round"])
def test_a_joint_checkpoint_that_lacks_something_is_refused(run_training, finished, cache, tmp_path, lost):
    out = tmp_path / "run"
    shutil.copytree(finished.path, out)
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (out / "run.json").write_text(json.dumps({**facts, "state": "training"}), encoding="utf-8")
    path = out / "checkpoints" / "joint.safetensors"
    tensors, notes = load_with_metadata(path)
    save_tensors(path, {k: v for k, v in tensors.items() if k != lost}, {k: v for k, v in notes.items() if k != lost})
    with pytest.raises(RunError, match=f"joint.safetensors: does not fit .*{lost}"):
        resume(out, cache=cache, device="cpu")


def test_a_log_line_cut_by_a_kill_does_no_harm(run_training, finished, cache, tmp_path):
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_training(out, reporter=StopAfter("round 2"))
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "round/3", "valid')
    run = resume(out, cache=cache, device="cpu")
    assert run.events("metrics") == finished.events("metrics")


def test_a_run_with_a_term_switched_off_goes_on_to_the_same_weights(run_training, cache, tmp_path):
    whole = run_training(tmp_path / "whole", "losses.semantic_source=0", "transfer.rounds=2")
    changes = ("losses.semantic_source=0", "transfer.rounds=2")
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", *changes, reporter=StopAfter("round 2"))
    assert same(state(whole, "source"), state(resume(tmp_path / "cut", cache=cache, device="cpu"), "source"))


def test_changed_settings_or_weights_stop_a_resume(run_training, cache, tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None).features.state_dict(), weights)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", f"image.weights={weights}", reporter=StopAfter("word vectors"))
    save_file(torchvision.models.squeezenet1_1(weights=None).features.state_dict(), weights)
    with pytest.raises(RunError, match=r"weights of the trunk .* changed"):
        resume(tmp_path / "run", cache=cache)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("alpha = 0.5", "alpha = 0.6"), encoding="utf-8")
    with pytest.raises(RunError, match="changed after the run began"):
        resume(tmp_path / "run", cache=cache)


def test_a_round_that_would_minimise_nothing_is_refused_at_once(run_training, tmp_path):
    zeros = [f"losses.{name}=0" for name in vars(load_config("small").losses)]
    with pytest.raises(ConfigError, match="minimise nothing"):
        run_training(tmp_path / "run", *zeros)
    assert not (tmp_path / "run").exists()


def test_the_wiring_of_a_round(run_training, tmp_path, monkeypatch):
    """Algorithm 1: Model_s scores the target pairs as it reads them; round r goes into the law; steps carry over."""
    seen = []

    def spy(name):
        real = getattr(transfer, name)

        def called(*arguments, **options):
            seen.append((name, arguments, options))
            return real(*arguments, **options)

        monkeypatch.setattr(transfer, name, called)

    for name in ("represent", "select", "optimize"):
        spy(name)
    run = run_training(tmp_path / "run", "transfer.rounds=2", "optimizer.inv_gamma=0.1")
    by_name = {name: [(a, o) for n, a, o in seen if n == name] for name in ("represent", "select", "optimize")}
    source_cnn, target_cnn = run.model("source").reader, run.model("target").reader
    pairs = read_corpus(run.target).part("train")
    vocabulary, spec = run.model().vocabulary, run.model().text
    tokens = [vocabulary.encode(pair.text, spec, allow_unknown=True) for pair in pairs]
    by_source, by_target = (text_vectors(cnn, tokens, torch.device("cpu")) for cnn in (source_cnn, target_cnn))
    assert not torch.equal(by_source, by_target)
    first_step = 0
    # The target model is not asked: the paper scores by the source model alone.
    calls = zip(by_name["represent"], by_name["select"], by_name["optimize"], strict=True)
    for number, ((scored, _), (selected, _), (domains, options)) in enumerate(calls, 1):
        assert scored[0].classes == len(read_corpus(run.source).labels)  # Model_s
        assert torch.equal(scored[1].features["text"], by_source)  # through its own Word CNN
        assert (selected[0].law, selected[0].alpha, selected[1]) == ("paper", 0.5, number)
        assert torch.equal(domains[0]["target"].stream.pairs.features["text"], by_target)
        assert scored[0] is domains[0]["source"].network
        assert options["first_step"] == first_step
        assert options["rate"](first_step) == pytest.approx(0.01 * (1 + 0.1 * first_step) ** -0.75)
        assert options["passes"] == 4  # 50 source pairs in batches of 16
        first_step += options["passes"]  # accumulate is 1


def test_pretraining_has_a_constant_rate(run_training, tmp_path, monkeypatch):
    rates = []
    real = pretrain_module.optimize

    def spy(*arguments, **options):
        rates.extend(options["rate"](step) for step in (0, 100))
        return real(*arguments, **options)

    monkeypatch.setattr(pretrain_module, "optimize", spy)
    run_training(tmp_path / "run", "transfer.rounds=0")
    assert set(rates) == {0.01}


def test_a_changed_corpus_stops_a_resume(run_training, corpora, cache, tmp_path):
    mine = tmp_path / "corpora"
    shutil.copytree(corpora, mine)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", target=mine / "target", reporter=StopAfter("word vectors"))
    manifest = mine / "target" / "pairs.jsonl"
    manifest.write_text("\n".join(manifest.read_text(encoding="utf-8").splitlines()[1:]), encoding="utf-8")
    with pytest.raises(RunError, match=r"target corpus .* changed"):
        resume(tmp_path / "run", cache=cache)


def test_an_edited_picture_and_a_damaged_cache_are_noticed(finished, corpora, tmp_path):
    trunk = build_trunk(finished.config.image, 0)
    pictures = sorted((corpora / "target" / "images").rglob("*.png"))[:3]
    paths, cpu = [Path(shutil.copy(path, tmp_path / path.name)) for path in pictures], torch.device("cpu")
    told = []
    first = cached_features(trunk, paths, cache=tmp_path / "c", device=cpu, advance=told.append)
    assert sum(told) == 3
    again = cached_features(trunk, paths, cache=tmp_path / "c", device=cpu)
    assert np.array_equal(first, again)
    assert len(list((tmp_path / "c").glob("*.npy"))) == 1
    shutil.copy(paths[1], paths[0])
    edited = cached_features(trunk, paths, cache=tmp_path / "c", device=cpu)
    assert np.array_equal(edited[0], edited[1])
    assert not np.array_equal(edited[0], first[0])
    for path in (tmp_path / "c").glob("*.npy"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(RunError, match="damaged; delete"):
        cached_features(trunk, paths, cache=tmp_path / "c", device=cpu)


def test_the_test_split_is_encoded_once_for_each_network(run_training, tmp_path, monkeypatch):
    encoded = []

    def spy(network, pairs, device):
        encoded.append(len(pairs))
        return answers(network, pairs, device)

    monkeypatch.setattr(train_module, "answers", spy)
    run_training(tmp_path / "run", "transfer.rounds=0")
    assert encoded == [12, 12, 12]


def test_the_trunk_is_hashed_once(run_training, tmp_path, monkeypatch):
    hashed = []
    real = Trunk.__dict__["sha256"].func

    def spy(trunk):
        hashed.append(trunk)
        return real(trunk)

    counting = cached_property(spy)
    counting.__set_name__(Trunk, "sha256")
    monkeypatch.setattr(Trunk, "sha256", counting)
    run_training(tmp_path / "run", "transfer.rounds=0")
    assert len(hashed) == 1


# -- the target alone, excluded labels, a pretraining that is taken over --------------------------------------------


def test_the_target_alone(run_training, cache, tmp_path):
    out = tmp_path / "alone"
    run = run_training(out, "transfer.rounds=0", source=None)
    assert run.source is None
    assert not (out / "source").exists()
    assert {path.stem for path in run.checkpoints.iterdir()} == {"words", "text-target", "target-0", "target-best-0"}
    assert (out / "report.html").is_file()
    assert {event["stage"] for event in run.events("metrics")} == {"word-cnn/target", "pretrain/target", "round/0"}
    assert run.model().labels == read_corpus(run.target).labels
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", "transfer.rounds=0", source=None, reporter=StopAfter("Word CNN"))
    assert same(state(run), state(resume(tmp_path / "cut", cache=cache, device="cpu")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((), "transfer.rounds is 3, but there is no source"),
        (("transfer.rounds=0", "pretrain.target_start=source"), "target_start is 'source'"),
        (("transfer.rounds=0", "text.target_cnn=source"), "target_cnn is 'source'"),
        (("transfer.rounds=0", "source.exclude=['red']"), "source.exclude names labels"),
        (("pretrain.target_start=source", "text.target_cnn=source"), r"(?s)do not go together.*rounds.*start.*cnn"),
    ],
)
def test_what_takes_a_source_is_refused_without_one(run_training, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        run_training(tmp_path / "run", *changes, source=None)
    assert not (tmp_path / "run").exists()


def test_excluded_labels_leave_the_source(run_training, corpora, cache, tmp_path):
    labels = read_corpus(corpora / "source").labels
    exclude = f"source.exclude={json.dumps(labels[:2])}"
    run = run_training(tmp_path / "run", exclude, "transfer.rounds=1")
    assert run.model("source").labels == labels[2:]
    assert run.facts["source"]["classes"] == 3
    assert run.facts["source"]["pairs"]["train"] == 30
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", exclude, "transfer.rounds=1", reporter=StopAfter("pretraining, source"))
    assert same(state(run), state(resume(tmp_path / "cut", cache=cache, device="cpu")))
    with pytest.raises(ConfigError, match=f"'{labels[0]}x', which .* its labels are: {labels[0]}, {labels[1]}"):
        run_training(tmp_path / "unknown", f"source.exclude={json.dumps([labels[0] + 'x'])}")
    with pytest.raises(ConfigError, match="leaves 1 labels"):
        run_training(tmp_path / "few", f"source.exclude={json.dumps(labels[:4])}")


JOINT = ("transfer.law=all", "mmd.kernels=1", "losses.mmd_fc9=0", "optimizer.inv_gamma=1", "transfer.rounds=2")


def test_a_pretraining_that_is_taken_over_gives_the_same_weights(run_training, finished, tmp_path):
    trained = []
    reporter = Silent()
    reporter.task = lambda name, total: trained.append(name) or Silent.task(reporter, name, total)
    taken = run_training(tmp_path / "taken", *JOINT, pretrained_from=finished.path, reporter=reporter)
    assert not [name for name in trained if name.startswith(("word", "Word", "pretraining"))]
    anew = run_training(tmp_path / "anew", *JOINT)
    assert same(state(anew), state(taken))
    assert taken.evaluation == anew.evaluation
    assert taken.events("metrics") == anew.events("metrics")
    assert taken.facts["pretrained_from"] == str(finished.path.resolve())
    first, second = (run.checkpoints / "source-0.safetensors" for run in (finished, taken))
    assert first.samefile(second)


def test_a_pretraining_is_copied_where_it_cannot_be_linked(run_training, finished, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("another file system")

    monkeypatch.setattr(train_module.os, "link", refuse)
    taken = run_training(tmp_path / "taken", "transfer.rounds=0", pretrained_from=finished.path)
    first, second = (run.checkpoints / "source-0.safetensors" for run in (finished, taken))
    assert not first.samefile(second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("network.width=24", "network.width is 16 there and 24 here"),
        ("seed=1", "the weights of the trunk; seed is 0 there and 1 here"),
        ("losses.pair_source=1", "losses.pair_source is 0.0001 there and 1.0 here"),
        ("compute.precision=bfloat16", "compute.precision is 'float32' there and 'bfloat16' here"),
        ("image.side=64", "the weights of the trunk; image.side"),
        ("source.exclude=['LABEL']", r"the source corpus; source.exclude is \(\) there"),
    ],
)
def test_another_pretraining_is_not_taken_over(run_training, finished, corpora, tmp_path, change, says):
    change = change.replace("LABEL", read_corpus(corpora / "source").labels[0])
    with pytest.raises(RunError, match=f"not that of this run; different are {says}"):
        run_training(tmp_path / "run", change, pretrained_from=finished.path)
    assert not (tmp_path / "run").exists()


def test_where_only_the_target_differs_the_source_half_is_taken_over(run_training, finished, tmp_path):
    changes = ("losses.pair_target=1", "transfer.rounds=1")
    taken = run_training(tmp_path / "taken", *changes, pretrained_from=finished.path)
    assert taken.facts["taken_over"] == ["words.safetensors", "text-source.safetensors", "source-0.safetensors"]
    anew = run_training(tmp_path / "anew", *changes)
    assert same(state(anew), state(taken))
    assert not same(
        load_tensors(finished.checkpoints / "target-0.safetensors"),
        load_tensors(taken.checkpoints / "target-0.safetensors"),
    )


def test_a_pretraining_that_is_not_whole_is_not_taken_over(run_training, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "begun", reporter=StopAfter("pretraining, target"))
    with pytest.raises(RunError, match=r"missing: target-0\.safetensors; .* --resume"):
        run_training(tmp_path / "run", pretrained_from=tmp_path / "begun")
    with pytest.raises(ConfigError, match="its own pretraining"):
        run_training(finished.path, pretrained_from=finished.path, force=True)
    assert open_run(finished.path).complete


def test_threads_are_set_for_the_training_alone(run_training, tmp_path, monkeypatch):
    before, during = torch.get_num_threads(), []
    real = train_module.prepare

    def spy(*arguments, **options):
        during.append(torch.get_num_threads())
        return real(*arguments, **options)

    monkeypatch.setattr(train_module, "prepare", spy)
    run_training(tmp_path / "run", "transfer.rounds=0", f"compute.threads={before + 1}")
    assert during == [before + 1]
    assert torch.get_num_threads() == before
