"""Which ways to choose pairs, classes or a text encoder help: validation MAP, on real and on generated corpora.

    DCKT_DATA=... OMP_NUM_THREADS=1 python benchmarks/selection.py --seeds 5

Every switch is a change of DCKT that is compared with "all" (every pair in every round) and with "random" (as many
pairs as the paper's law takes), seed by seed, after the last round. A seed chooses the target's training pairs, too.
Runs are trials: no test pair is read. They stay in --out and are not repeated.

Three switches are not in the trainer and are made here: adversarial alignment in place of MMD, source classes weighted
by what the source takes the target for, and the curriculum over categories of TPCKT (the paper's successor). Each
begins from "all", which is what it should be compared with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adversarial import reversal_schedule, reverse_gradient
from dckt.files import atomic_write
from dckt_trainer.config import Config
from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.evaluate import represent
from dckt_trainer.losses import Batch, Term, joint_terms
from dckt_trainer.markdown import markdown_table
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Solver
from dckt_trainer.pairs import PairSet
from dckt_trainer.plan import DOMAINS
from dckt_trainer.progress import Bars
from dckt_trainer.runs import Run
from dckt_trainer.seeds import numpy_generator, seed_of
from dckt_trainer.selection import everything
from dckt_trainer.sweep import Row, Sweep
from dckt_trainer.sweep_jobs import Options
from dckt_trainer.sweep_run import SweepResult, run_sweep
from dckt_trainer.sweep_table import estimate
from dckt_trainer.transfer import JointData, RoundLog, transfer_round
from setting import VECTORS, data_folder, input_changes, interval, machine

GENERATED = "generated"
SETTINGS: dict[str, tuple[str, str, int]] = {  # source, target, training pairs of each class
    "caltech101 → pascal_sentences, 5 per class": ("caltech101", "pascal_sentences", 5),
    "generated, 5 per class": (f"{GENERATED}/source", f"{GENERATED}/target", 5),
    "caltech101 → pascal_sentences, 40 per class": ("caltech101", "pascal_sentences", 40),
}
TARGET_EPOCHS, MOST_PAIRS = 47, 40  # in pretraining; with fewer pairs so many more that the steps are as many

ALL, RANDOM = "all", "random"
NO_MMD = tuple(f"losses.mmd_fc{layer}=0" for layer in (6, 7, 8, 9))
AT_FC7_AND_FC9 = ("losses.mmd_fc6=0", "losses.mmd_fc8=0")
SELECTION = Sweep(
    name="selection",
    rows=tuple(
        Row(title=title, changes=changes, network="last")
        for title, changes in {
            ALL: ("transfer.law=all",),
            RANDOM: ("transfer.law=random",),
            "consistency, paper law": (),
            "consistency, released law": ("transfer.law=released",),
            "stratified draws": ("transfer.stratified=true",),
            "reciprocal rank": ("transfer.score=reciprocal_rank",),
            "all, source classes weighted": ("transfer.law=selection:weighted_source",),
            "all, category curriculum": ("transfer.law=selection:category_curriculum",),
            "all, adversarial (.1) for MMD": (
                "transfer.law=selection:adversarial",
                *AT_FC7_AND_FC9,
                "losses.mmd_fc7=0.1",
                "losses.mmd_fc9=0.1",
            ),
            "all, adversarial (1) for MMD": (
                "transfer.law=selection:adversarial",
                *AT_FC7_AND_FC9,
                "losses.mmd_fc7=1",
                "losses.mmd_fc9=1",
            ),
            "all, no MMD": ("transfer.law=all", *NO_MMD),
        }.items()
    ),
)
NO_TRANSFER = "no transfer, Model_t(0)"  # every run has it, before its first round

# -- switches that the trainer does not have -----------------------------------------------------------------------

Change: TypeAlias = Callable[[int, DomainNetwork, DomainNetwork, JointData, Config, torch.device], JointData]

# Laws by name, each of which takes every pair; what else a run with one of them does is said below.
weighted_source = category_curriculum = adversarial = everything


def weigh_source(
    number: int, source: DomainNetwork, _: DomainNetwork, data: JointData, config: Config, device: torch.device
) -> JointData:
    """Source pairs drawn anew, as often as the source model takes target items for their class (PADA's weight)."""
    likely = np.mean([rows.mean(0) for rows in represent(source, data.target_for_source, device).values()], axis=0)
    chances = likely[data.source.labels.numpy()]
    generator = numpy_generator(config.seed, "source classes", number)
    places = generator.choice(len(chances), len(chances), p=chances / chances.sum())
    return replace(data, source=_rows(data.source, places))


def hold_back_categories(
    number: int, source: DomainNetwork, target: DomainNetwork, data: JointData, _: Config, device: torch.device
) -> JointData:
    """Both domains without the classes that are least like the other domain's: a fifth in round 1, then a 25th, ..."""
    centres = [_centres(source, data.source, device), _centres(target, data.target, device)]
    alike = centres[0] @ centres[1].T
    kept = [np.argsort(fit)[int(0.2**number * len(fit)) :] for fit in (alike.sum(1), alike.sum(0))]
    target_places = np.flatnonzero(np.isin(data.target.labels.numpy(), kept[1]))
    return JointData(
        _rows(data.source, np.flatnonzero(np.isin(data.source.labels.numpy(), kept[0]))),
        _rows(data.target, target_places),
        _rows(data.target_for_source, target_places),
    )


def _centres(network: DomainNetwork, pairs: PairSet, device: torch.device) -> NDArray[np.float64]:
    """(C, D) the mean fc9 of each class over all media, of length 1."""
    network.eval()
    with torch.inference_mode():
        parts = [network.represent(medium, rows.to(device))[1].cpu() for medium, rows in pairs.features.items()]
    middle, labels = torch.stack(parts).mean(0).double().numpy(), pairs.labels.numpy()
    means = np.array([middle[labels == number].mean(0) for number in range(network.classes)])
    unit: NDArray[np.float64] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def _rows(pairs: PairSet, places: NDArray[np.int64]) -> PairSet:
    features = {medium: rows[places] for medium, rows in pairs.features.items()}
    return PairSet(features, pairs.labels[places], tuple(pairs.ids[place] for place in places))


CHANGES: Mapping[str, Change] = {
    "selection:weighted_source": weigh_source,
    "selection:category_curriculum": hold_back_categories,
}


class Judges(nn.ModuleDict):
    """At each place where MMD would be, a network that tells source rows from target rows."""

    def terms(self, made: Sequence[Term], progress: float) -> list[Term]:
        """The terms with judges in place of MMD: they learn at full weight, what they look at as the term says."""
        return [self._versus(term, progress) if term.name.startswith("mmd/") else term for term in made]

    def _versus(self, term: Term, progress: float) -> Term:
        place = term.name.removeprefix("mmd/")
        judge, scale = self[place.replace(".", "_")], term.weight * reversal_schedule(progress)

        def value(batches: dict[str, Batch]) -> Tensor:
            judge.zero_grad(set_to_none=False)  # a step's passes are one, so this is once a step
            sides = [dict(batches[domain].activations.named())[place] for domain in DOMAINS]
            said = judge(reverse_gradient(torch.cat(sides), scale))[..., 0]
            truth = torch.cat([torch.full_like(rows[..., 0], float(side)) for side, rows in enumerate(sides)])
            return functional.binary_cross_entropy_with_logits(said, truth)

        return Term(term.name, 1.0, value)


def _judges(optimizer: Solver, config: Config, media: Sequence[str]) -> Judges:
    """New judges, which learn with the networks, ten times as fast: a training has few steps."""
    width = config.network.width
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(config.seed, "judges"))
        places = [*(f"{medium}_fc7" for medium in media), "common_fc9"]
        judges = Judges(
            {place: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) for place in places}
        )
    group = {**optimizer.param_groups[0], "params": list(judges.parameters()), "factor": 10.0, "weight_decay": 0.0}
    optimizer.add_param_group(group)
    return judges


@contextmanager
def extra_switches() -> Iterator[None]:
    """Runs whose law is named above do in each round what it stands for."""
    judges: dict[Solver, Judges] = {}

    def changed_round(
        number: int,
        source: DomainNetwork,
        target: DomainNetwork,
        data: JointData,
        optimizer: Solver,
        config: Config,
        *,
        device: torch.device,
        **rest: Any,
    ) -> RoundLog:
        law = config.transfer.law
        if law in CHANGES:
            data = CHANGES[law](number, source, target, data, config, device)
        if law != "selection:adversarial":
            return transfer_round(number, source, target, data, optimizer, config, device=device, **rest)
        if optimizer not in judges:
            judges.clear()
            judges[optimizer] = _judges(optimizer, config, list(source.inputs))
        terms, progress = judges[optimizer].terms, number / config.transfer.rounds
        with patch("dckt_trainer.transfer.joint_terms", lambda *given: terms(joint_terms(*given), progress)):
            return transfer_round(number, source, target, data, optimizer, config, device=device, **rest)

    with patch("dckt_trainer.train.transfer_round", changed_round):
        yield


# -- text encoders -------------------------------------------------------------------------------------------------


def text_sweep(no_vectors: Path) -> Sweep:
    """Encoders of texts before one network without transfer; ``no_vectors`` knows the words and nothing of them."""
    bag = "text.encoder=bag"
    rows = {
        "Word CNN": (),
        "bag: word vectors beside tf-idf topics": (bag,),
        "mean of word vectors, by idf": (bag, "text.topics=0"),
        "tf-idf topics": (bag, f"text.vectors={no_vectors}"),
    }
    return Sweep(
        name="texts",
        rows=tuple(
            Row(title=title, changes=(*changes, "transfer.rounds=0"), network="last") for title, changes in rows.items()
        ),
    )


def without_vectors(vectors: Path, made: Path) -> Path:
    """A file of the same words whose vectors are all zero."""
    words = [line.partition(" ")[0] for line in vectors.read_text(encoding="utf-8").split("\n") if line]
    atomic_write(made, "\n".join(f"{word} 0 0" for word in words) + "\n")
    return made


# -- runs and tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trials(Options):
    """Runs that are judged on validation; the sweep hands this on to each of them."""

    trial: bool = True


def _average(run: Run, place: int) -> float:
    """Validation MAP of a round, by its place among all of them."""
    average: float = run.evaluation["validation"][place]["average"]
    return average


def _by_row(result: SweepResult) -> dict[str, dict[int, Run]]:
    found: dict[str, dict[int, Run]] = {row.title: {} for row in result.sweep.rows}
    for outcome in result.outcomes:
        if outcome.run:
            found[outcome.row.title][outcome.seed] = outcome.run
    return found


def table(values: Mapping[str, Mapping[int, float]], compared: Sequence[str]) -> str:
    """Rows of values by seed as Markdown, with the differences to some of the rows."""
    head = ["", "validation MAP", *(f"to {name}" for name in compared), "seeds"]
    lines = []
    for title, by_seed in values.items():
        cells = [interval(estimate(list(by_seed.values()))) if by_seed else "–"]
        for name in compared:
            apart = [value - values[name][seed] for seed, value in by_seed.items() if seed in values[name]]
            cells.append(interval(estimate(apart), "+") if apart and title != name else "–")
        lines.append([title, *cells, str(len(by_seed))])
    return markdown_table(head, lines)


def selection_table(result: SweepResult) -> str:
    """Validation MAP of the last round of each row, and of the pretrained target network."""
    runs = _by_row(result)
    first = {NO_TRANSFER: {seed: _average(run, 0) for seed, run in runs[ALL].items()}}
    last = {title: {seed: _average(run, -1) for seed, run in of.items()} for title, of in runs.items()}
    failed = [f"Not in the table: {path.name} failed: {why}" for path, why in result.failures.items()]
    return "\n\n".join([table({**first, **last}, (ALL, RANDOM)), *failed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rows", nargs="+", default=[row.title for row in SELECTION.rows], help="switches by title")
    parser.add_argument("--preset", default="paper", help="of the switches")
    parser.add_argument("--text-pairs", nargs="*", type=int, default=[5, 40], help="pairs a class, for the encoders")
    parser.add_argument("--text-preset", default="small")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    args = parser.parse_args()
    data = data_folder(parser).resolve()
    shared = ["network.width=128", "compute.threads=1"]
    places = input_changes(data)
    generated = args.out.resolve() / "corpora"
    sections = []

    def folder(name: str) -> Path:
        return data / name if not name.startswith(GENERATED) else generated / name.removeprefix(f"{GENERATED}/")

    def trained(
        sweep: Sweep, source: str | None, target: str, pairs: int, preset: str, own: Sequence[str]
    ) -> SweepResult:
        epochs = f"pretrain.target_epochs={TARGET_EPOCHS * MOST_PAIRS // pairs}"
        name = "-".join([sweep.name, *([Path(source).parts[0]] if source else []), f"{pairs}-pairs", preset])
        return run_sweep(
            sweep,
            folder(source) if source else None,
            folder(target),
            args.out / name,
            preset=preset,
            changes=[*shared, *own, epochs, f"target.pairs_per_class={pairs}", *places],
            seeds=args.seeds,
            options=Trials(device="cpu"),
            reporter=Bars(),
        )

    def section(title: str, preset: str, own: Sequence[str], text: str) -> None:
        told = f"Preset `{preset}` with {', '.join(f'`{change}`' for change in [*shared, *own])}."
        sections.append("\n\n".join([f"### {title}", told, text]))
        atomic_write(args.out / "table.md", "\n\n".join([heading, *sections]) + "\n")

    heading = (
        f"{machine()}. Validation MAP, mean of both directions, after the last round: mean over seeds, and differences "
        "seed by seed, each with the 95 % interval of Student's t, which tells of the chance in training and in the "
        "choice of training pairs, not of that in the choice of validation pairs."
    )
    if any(SETTINGS[name][0].startswith(GENERATED) for name in args.settings) and not (generated / "target").exists():
        write_synthetic(generated, target_pairs_per_class=MOST_PAIRS, force=True)
    sweep = replace(SELECTION, rows=tuple(row for row in SELECTION.rows if row.title in (ALL, RANDOM, *args.rows)))
    with extra_switches():
        for name in args.settings:
            own = ["pretrain.source_epochs=40"]
            section(name, args.preset, own, selection_table(trained(sweep, *SETTINGS[name], args.preset, own)))
    texts = text_sweep(without_vectors(data / VECTORS, args.out.resolve() / "no-vectors.txt"))
    for pairs in args.text_pairs:
        result = trained(texts, None, "pascal_sentences", pairs, args.text_preset, [])
        values = {title: {s: _average(run, -1) for s, run in of.items()} for title, of in _by_row(result).items()}
        title = f"Text encoders, no transfer, pascal_sentences, {pairs} per class"
        section(title, args.text_preset, [], table(values, ("Word CNN",)))
    print(f"\n{args.out / 'table.md'}\n\n" + "\n\n".join([heading, *sections]))


if __name__ == "__main__":
    main()
