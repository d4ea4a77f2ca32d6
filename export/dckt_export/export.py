"""From a run to a bundle, past the retrieval gate."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray

from dckt import __version__
from dckt.bundle import VOCABULARY, Bundle, Graph, Variant, graph_file, write_bundle
from dckt.calibration import calibrate as calibrate_thresholds
from dckt.errors import BundleError, ConfigError, CorpusError, DcktError, ParityError, ProviderError, RunError
from dckt.files import atomic_write
from dckt.report import Table, write_report
from dckt.runtime.openvino import has_bf16
from dckt.runtime.tensorrt.build import check_profile
from dckt.runtime.tensorrt.engines import build_engines
from dckt_export.drift import INT8_TOLERANCE, TOLERANCE, Drift, first_drift, first_unlike
from dckt_export.graphs import OPSET, Part, parts, save_graph
from dckt_export.parity import Thresholds, read_thresholds
from dckt_export.precision import check_label, fp16_from_fp32, layer_precisions
from dckt_export.quantize import PASSES, calibrate, int8_from_fp32
from dckt_export.ranges import rounding, tensor_ranges
from dckt_export.report import as_json, tables, thresholds_table
from dckt_export.variants import Inputs, Outcome, expected, prepare, try_variant, with_data
from dckt_trainer.data.corpus import Corpus, Pair, Split, read_corpus
from dckt_trainer.media import MEDIA
from dckt_trainer.model import DomainModel
from dckt_trainer.progress import Reporter, Silent
from dckt_trainer.runs import Run, open_run

LIMIT = 500
CALIBRATION = 128
PROFILE = (1, 8, 32)
SECONDS = 1.0
# Shares of a graph's layers whose data stays float, the most sensitive first, until the gate lets int8 pass.
WEIGHTS_ONLY = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class _Graphs:
    """The graphs of one precision, by medium.

    Attributes:
        files: what is served.
        seconds: how long making them took.
        compared: what the gate runs in their place; see :func:`dckt_export.ranges.rounding`.
    """

    files: Mapping[str, Path]
    seconds: float
    compared: Mapping[str, Path] | None = None


@dataclass(frozen=True)
class _Gate:
    """All that a variant is tried with."""

    model: DomainModel
    parts: Mapping[str, Part]
    inputs: Inputs
    vectors: Mapping[str, Mapping[str, NDArray[Any]]]
    thresholds: Mapping[str, Thresholds]
    representation: str
    seconds: float
    reporter: Reporter

    def tried(self, variant: Variant, graphs: _Graphs) -> Outcome:
        rows = len(self.inputs.ids) * len(graphs.files) * len(self.vectors)
        with self.reporter.task(f"comparing {variant.name}", rows) as advance:
            return try_variant(
                variant,
                graphs.files,
                self.inputs,
                self.vectors,
                self.thresholds[variant.precision],
                compared=graphs.compared,
                representation=self.representation,
                seconds=self.seconds,
                build_seconds=graphs.seconds,
                advance=advance,
            )


def export_bundle(
    run: str | Path,
    out: str | Path,
    *,
    fp16: bool = False,
    int8: bool = False,
    tensorrt: bool = False,
    profile: tuple[int, int, int] = PROFILE,
    representation: str | None = None,
    pairs: str | Path | None = None,
    split: Split = "val",
    limit: int = LIMIT,
    calibration: int = CALIBRATION,
    thresholds: str | Path | None = None,
    seconds: float = SECONDS,
    opset: int = OPSET,
    force: bool = False,
    reporter: Reporter | None = None,
    told: Callable[[Sequence[Table]], None] | None = None,
) -> Bundle:
    """Exports a run's target model, and writes the bundle only if it retrieves as the PyTorch model does.

    Both encode the same real pairs, the exported one as it will be served, behind the SDK's own preprocessing, and
    both representations must keep to the thresholds of the precision. The bundle always holds float32 graphs. Where
    OpenVINO is installed, its variants are tried too, and offered if they pass.

    Args:
        run: folder of a finished run.
        out: the bundle to write, by custom ``NAME.dckt``.
        fp16: add graphs that compute in float16, for GPUs.
        int8: add graphs that compute in 8 bits, for CPUs and GPUs.
        tensorrt: build TensorRT engines for this machine's GPU when the bundle is written.
        profile: batch sizes for which engines are built: least, usual, most.
        representation: what an index of this model stores: ``probability`` or ``fc9`` of a network, ``probability`` or
            ``joined`` of a linear model; None is what its training compared items by.
        pairs: corpus to compare and calibrate on; None is the run's target corpus.
        split: part of that corpus to compare on.
        limit: at most so many of its pairs, spread evenly over it.
        calibration: how many training pairs tell the ranges of float16 and 8 bits.
        thresholds: a TOML file with other thresholds; see :func:`dckt_export.parity.read_thresholds`.
        seconds: how long to time each batch size of each variant; 0 is three runs.
        opset: version of the ONNX operators.
        force: replace a bundle that is there already.
        reporter: told how far the work is.
        told: given the tables of the report when the bundle is written.

    Raises:
        ParityError: the exported model differs; nothing was written but a report of it, ``OUT.refused.html``.
        RunError: the run is missing, unfinished, damaged, or of a newer version, or its weights are not finite.
        CorpusError: the pairs cannot be read, or there are none.
        ConfigError: an argument with a value that is not offered.
        BundleError: ``out`` exists, the network cannot be exported, or the disk refuses the bundle.
        ProviderError: ``tensorrt``, and this machine builds no engine; the bundle was written without.
    """
    out, reporter = Path(out), reporter or Silent()
    kept = read_thresholds(Path(thresholds) if thresholds is not None else None)
    _check_arguments(out, limit, calibration, profile, seconds, force)
    opened = open_run(run)
    model, trained = opened.model(), _trained(opened)
    _check_weights(model, opened)
    representation = _representation(representation, model)
    corpus = _corpus(opened, pairs, model.network.inputs)
    chosen = _some(corpus, split, limit, "compare the models on; name another --split or --pairs")
    samples = _some(corpus, "train", calibration, "calibrate on; name others with --pairs") if fp16 or int8 else []
    with _temporary_folder(out) as folder:
        made = parts(model)
        gate = _gate(model, made, chosen, kept, representation, seconds, reporter)
        graphs = {"fp32": _fp32(made, folder, opset, reporter)}
        outcomes = [gate.tried(variant, graphs["fp32"]) for variant in _variants("fp32")]
        _must_pass(outcomes, gate, graphs, out)
        if samples:
            with reporter.task("reading training pairs", len(samples)) as advance:
                calibrated = prepare(model, samples, made, advance)
        if fp16:
            graphs["fp16"] = _fp16(graphs["fp32"], calibrated, folder, reporter)
            outcomes += [gate.tried(variant, graphs["fp16"]) for variant in _variants("fp16")]
            _must_pass(outcomes, gate, graphs, out)
        if int8:
            graphs["int8"], tried = _int8(gate, graphs["fp32"], calibrated, folder)
            outcomes += tried
            _must_pass(outcomes, gate, graphs, out)
        pairs_facts = {"corpus": corpus.name, "split": split, "count": len(chosen)}
        passed = sorted((outcome for outcome in outcomes if not outcome.refused), key=lambda one: one.milliseconds)
        report = folder / "report.html"
        found = tables(outcomes, f"{len(chosen)} {split} pairs of {corpus.name}")
        _write_report(report, f"Export of {opened.path.name}", [*found, thresholds_table(kept)])
        files = {file.name: file for of in graphs.values() for path in of.files.values() for file in with_data(path)}
        bundle = write_bundle(
            out,
            files={**files, VOCABULARY: model.vocabulary.dumps().encode(), report.name: report},
            image=model.trunk.spec,
            text=model.text,
            labels=model.labels,
            representation=representation,
            dimensions=model.network.dimensions,
            graphs={precision: _described(of) for precision, of in graphs.items()},
            variants=[outcome.variant for outcome in passed],
            profile=profile,
            calibration=calibrate_thresholds(
                gate.vectors, gate.inputs.labels, representation=representation, pairs=pairs_facts
            ),
            produced_by=_produced_by(opened, opset),
            measured={
                "pairs": pairs_facts,
                "calibration": len(samples),
                "machine": _machine(),
                "thresholds": {precision: asdict(one) for precision, one in kept.items()},
                "variants": {outcome.variant.name: as_json(outcome) for outcome in outcomes},
                **trained,
            },
            force=force,
        )
    for suffix in (".html", ".json"):  # of an earlier try
        _refused(out, suffix).unlink(missing_ok=True)
    if told:
        told(found)
    if tensorrt:
        _build_engines(bundle, reporter)
    return bundle


# --- what is asked for ----------------------------------------------------------------------------------------


def _check_arguments(
    out: Path,
    limit: int,
    calibration: int,
    profile: tuple[int, int, int],
    seconds: float,
    force: bool,
) -> None:
    for name, value in (("limit", limit), ("calibration", calibration)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1 pair")
    check_profile(profile)
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"seconds is {seconds}; expected 0 or more")
    if out.exists() and not force:
        raise BundleError(f"{out}: exists already; choose another name, or replace it with --force")


def _representation(wanted: str | None, model: DomainModel) -> str:
    if wanted is None:
        return model.network.retrieves_by
    if wanted not in model.network.outputs:
        raise ConfigError(f"representation is {wanted!r}; expected one of {', '.join(model.network.outputs)}")
    return wanted


def _check_weights(model: DomainModel, run: Run) -> None:
    for name, part in (("trunk", model.trunk), ("reader of texts", model.reader), ("network", model.network)):
        for tensor, values in part.state_dict().items():
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise RunError(
                    f"{run.path}: {tensor} of the {name} holds numbers that are not finite; train again, or export a "
                    "run whose losses stayed finite"
                )


def _corpus(run: Run, pairs: str | Path | None, widths: Mapping[str, int]) -> Corpus:
    """The pairs to compare and calibrate on, with what the network takes beside pictures and texts."""
    vectors = {medium: width for medium, width in widths.items() if medium not in MEDIA}
    corpus = _read(run, pairs, tuple(vectors))
    if corpus.widths != vectors:
        raise CorpusError(f"{corpus.root}: its vectors have {corpus.widths} numbers; the model takes {vectors}")
    return corpus


def _read(run: Run, pairs: str | Path | None, vectors: Sequence[str]) -> Corpus:
    labels = run.config.target.labels
    if pairs is not None:
        return read_corpus(pairs, vectors=vectors, labels=labels, check_images="exists")
    try:
        path, skip = run.target, run.facts["target"]["on_bad_pair"] == "skip"
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}: run.json does not name the target corpus; name one with --pairs") from error
    try:
        # Only the pictures that are compared need decoding; but what training left out is to be left out again.
        return read_corpus(
            path,
            vectors=vectors,
            labels=labels,
            on_bad_pair="skip" if skip else "raise",
            check_images="decode" if skip else "exists",
        )
    except CorpusError as error:
        raise CorpusError(
            f"{error}\nthis is the target corpus that the run was trained on; if it has moved, name it with --pairs"
        ) from error


def _some(corpus: Corpus, split: Split, limit: int, use: str) -> list[Pair]:
    """At most ``limit`` pairs, evenly spaced, because manifests are often sorted by class."""
    pairs = corpus.part(split)
    if not pairs:
        raise CorpusError(f"{corpus.root}: no {split} pairs to {use}")
    count = min(limit, len(pairs))
    return [pairs[place * len(pairs) // count] for place in range(count)]


# --- graphs ---------------------------------------------------------------------------------------------------


def _fp32(made: Mapping[str, Part], folder: Path, opset: int, reporter: Reporter) -> _Graphs:
    files, start = {}, time.perf_counter()
    with reporter.task("exporting graphs", len(made)) as advance:
        for medium, part in made.items():
            name = graph_file(medium, "fp32")
            save_graph(part.onnx(opset), folder, name)
            files[medium] = folder / name
            advance(1)
    return _Graphs(files, time.perf_counter() - start)


def _fp16(fp32: _Graphs, calibrated: Inputs, folder: Path, reporter: Reporter) -> _Graphs:
    files, compared, start = {}, {}, time.perf_counter()
    with reporter.task("ranges for fp16", len(calibrated.ids) * len(fp32.files)) as advance:
        for medium, graph in fp32.files.items():
            ranges = tensor_ranges(graph, calibrated.batches[medium], advance=advance)
            half = fp16_from_fp32(onnx.load(graph), ranges)
            check_label(half, "fp16")
            name = graph_file(medium, "fp16")
            # ONNX Runtime's CPU computes float16 in float32 and rounds too seldom, so overflow would not show.
            rounded = rounding(half)
            save_graph(half, folder, name)
            save_graph(rounded, folder, f"rounded.{name}")
            files[medium], compared[medium] = folder / name, folder / f"rounded.{name}"
    return _Graphs(files, time.perf_counter() - start, compared)


def _int8(gate: _Gate, fp32: _Graphs, calibrated: Inputs, folder: Path) -> tuple[_Graphs, list[Outcome]]:
    """Quantised graphs, and what came of them; the data of as few layers as possible stays float."""
    start = time.perf_counter()
    batches = sum(len(calibrated.batches[medium]) for medium in fp32.files)
    with gate.reporter.task("calibrating int8", PASSES * batches) as advance:
        calibrations = {
            medium: calibrate(graph, _feed(calibrated, medium), advance=advance) for medium, graph in fp32.files.items()
        }
    for share in WEIGHTS_ONLY:
        files = {}
        for medium, graph in fp32.files.items():
            sensitive = calibrations[medium].most_sensitive
            files[medium] = folder / graph_file(medium, "int8")
            left = sensitive[: math.ceil(share * len(sensitive))]
            int8_from_fp32(graph, files[medium], calibrations[medium], weights_only=left)
            check_label(onnx.load(files[medium], load_external_data=False), "int8")
        graphs = _Graphs(files, time.perf_counter() - start)
        outcomes = [gate.tried(variant, graphs) for variant in _variants("int8")]
        if not any(outcome.refused for outcome in outcomes):
            break
        gate.reporter.say(f"int8 refused with the data of {share:.0%} of the layers in float; trying more")
    return graphs, outcomes


def _feed(inputs: Inputs, medium: str) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: iter(inputs.batches[medium])


def _variants(graph: str) -> list[Variant]:
    """The ways to serve graphs of a precision on this machine's CPU; ONNX Runtime, which everybody has, first."""
    found = [Variant(name=f"onnxruntime-{graph}", runtime="onnxruntime", graph=graph, precision=graph)]
    if importlib.util.find_spec("openvino") is not None:
        # Half precision is for GPUs: OpenVINO on a CPU would turn it back into one of these.
        precisions = {"fp32": ["fp32", "bf16"] if has_bf16() else ["fp32"], "int8": ["int8"]}.get(graph, [])
        found += [
            Variant(name=f"openvino-{precision}", runtime="openvino", graph=graph, precision=precision)
            for precision in precisions
        ]
    return found


def _described(graphs: _Graphs) -> dict[str, Graph]:
    return {
        medium: Graph(file=path.name, layers=layer_precisions(onnx.load(path, load_external_data=False)))
        for medium, path in graphs.files.items()
    }


# --- the gate -------------------------------------------------------------------------------------------------


def _gate(
    model: DomainModel,
    made: Mapping[str, Part],
    pairs: Sequence[Pair],
    thresholds: Mapping[str, Thresholds],
    representation: str,
    seconds: float,
    reporter: Reporter,
) -> _Gate:
    with reporter.task("reading pairs", len(pairs)) as advance:
        inputs = prepare(model, pairs, made, advance)
    with reporter.task("encoding with PyTorch", len(pairs) * len(made)) as advance:
        vectors = expected(inputs, made, advance)
    return _Gate(model, made, inputs, vectors, thresholds, representation, seconds, reporter)


def _must_pass(outcomes: Sequence[Outcome], gate: _Gate, graphs: Mapping[str, _Graphs], out: Path) -> None:
    """Ends the export if graphs that were asked for rank otherwise, served by the runtime that everybody has."""
    for outcome in outcomes:
        if not outcome.refused or outcome.variant.runtime != "onnxruntime":
            continue
        drifts = _drifts(outcome, gate, graphs)
        facts = {"variant": outcome.variant.name, "drift": drifts, **as_json(outcome)}
        report, data = _refused(out, ".html"), _refused(out, ".json")
        atomic_write(data, json.dumps(facts, indent=1) + "\n")
        rows = list(drifts.items())
        where = Table("Where it begins: the first layer that drifts, for the worst row", ["medium", "layer"], rows)
        found = tables(outcomes, f"{len(gate.inputs.ids)} pairs")
        _write_report(report, f"Refused: {out.name}", [where, *found, thresholds_table(gate.thresholds)])
        raise ParityError(
            f"{outcome.variant.name} differs from the PyTorch model; no bundle was written:"
            + "".join(f"\n  {line}" for line in outcome.refused)
            + "".join(f"\n  {medium}: first layer that drifts: {text}" for medium, text in drifts.items())
            + f"\nreport: {report}\ndocs/export.md says what to do"
        )


def _drifts(outcome: Outcome, gate: _Gate, graphs: Mapping[str, _Graphs]) -> dict[str, str]:
    """The first layer that drifts in each medium, in words, for the row that differs most."""
    found = {}
    for medium, graph in graphs[outcome.variant.graph].files.items():
        worst = min(
            (one.media[medium].worst[0] for one in outcome.parity.values()), key=lambda row: row[1], default=None
        )
        place = gate.inputs.ids.index(worst[0]) if worst else 0
        batch = gate.inputs.rows(medium)[place : place + 1]
        drift: Drift | None
        if outcome.variant.graph == "fp32":
            drift = first_unlike(graph, gate.parts[medium].encoder, batch)
        else:
            tolerance = {"fp16": TOLERANCE, "int8": INT8_TOLERANCE}[outcome.variant.graph]
            drift = first_drift(graphs["fp32"].files[medium], graph, batch, tolerance=tolerance)
        if drift is not None:
            found[medium] = f"{drift}, pair {gate.inputs.ids[place]}"
    return found


def _refused(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.refused{suffix}")


def _write_report(path: Path, title: str, sections: Sequence[Table]) -> None:
    write_report(path, title=title, subtitle=f"dckt {__version__}, {_machine()['cpu']}", sections=sections)


# --- around it ------------------------------------------------------------------------------------------------


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="dckt-export-") as name:
            yield Path(name)
    except OSError as error:
        raise BundleError(
            f"{out}: could not be written ({error}); is there room on the disk, also for the temporary folder?"
        ) from error


def _build_engines(bundle: Bundle, reporter: Reporter) -> None:
    told: set[str] = set()

    def progress(phase: str, done: int, total: int) -> None:
        del done, total
        if phase not in told:  # phases overlap, and there are many; a line for each is enough
            told.add(phase)
            reporter.say(f"engine: {phase}")

    try:
        build_engines(bundle, progress=progress)
    except DcktError as error:
        raise ProviderError(
            f"{bundle.path} was written whole, without TensorRT engines: {error}\n"
            f"build them on the machine that will serve: dckt engine {bundle.path}"
        ) from error


def _machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": os.cpu_count()}


def _produced_by(run: Run, opset: int) -> dict[str, str]:
    packages = ["torch", "onnx", "onnxscript", "onnxruntime"]
    if importlib.util.find_spec("openvino") is not None:
        packages.append("openvino")
    return {
        "dckt": __version__,
        **{name: version(name) for name in packages},
        "opset": str(opset),
        "config_sha256": run.facts["config_sha256"],
        "seed": str(run.config.seed),
    }


def _trained(run: Run) -> dict[str, Any]:
    """MAP on the test split, as training measured it; nothing if training left no evaluation."""
    if not (run.path / "evaluation.json").exists():
        return {}
    try:
        test = run.evaluation["test"]
        return {"test": {"pairs": test["pairs"], **test[run.evaluation["kept"]]}}
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}: evaluation.json is not what dckt-train writes ({error}); train again") from error
