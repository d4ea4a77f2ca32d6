"""Searching ready vectors: one at a time, a thousand at once, among ties and copies, and exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dckt.index import Index
from searching.data import TIES, VectorSet, embeddings, saturated, soft
from searching.measure import Spread, Times, Truth, smallest_effort, take_turns
from searching.peers import EFFORTS, Peer, Shelf, hit_rows
from searching.table import Table, verdict

TARGET = 0.99
K = 10
BATCH = 100  # among ties, where an answer may have a thousand hits


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        items: N of the big sets.
        copies: N of the sets that are made of one-hot vectors and copies.
        queries: Q.
        turns: how often each contender has its turn.
        block: queries of a turn, where they come one at a time.
    """

    items: int
    copies: int
    queries: int
    turns: int
    block: int

    @property
    def few(self) -> int:
        """Queries of a turn, where one takes long."""
        return self.block // 4


def single(shelf: Shelf, sizes: Sizes) -> Table:
    """One ready vector against the graph libraries."""
    table = Table(
        "single",
        f"`Index.search` of one ready vector, {sizes.items:,} items, k = {K}, one thread: microseconds, "
        f"{sizes.turns} turns of {sizes.block} queries",
    )
    for data, peers, index, truth in _contests(shelf, sizes):
        efforts = {peer.name: _tune(peer, truth) for peer in peers}
        calls: dict[str, Callable[[int], object]] = {peer.name: _one(peer, data, K) for peer in peers}
        calls["dckt, no metadata"] = lambda number: index.search(data.queries[number][None], K, metadata=False)  # noqa: B023
        calls["dckt"] = lambda number: index.search(data.queries[number][None], K)  # noqa: B023
        calls["dckt, hits read"] = lambda number: list(index.search(data.queries[number][None], K)[0])  # noqa: B023
        times = take_turns(calls, len(data.queries), turns=sizes.turns, block=sizes.block)
        base = times[peers[0].name]
        own = truth.recall(hit_rows([index.search(query[None], K)[0] for query in data.queries]))
        for name, taken in times.items():
            ours = name.startswith("dckt")
            effort, recall = ("", own) if ours else efforts[name]
            over = taken.over(base)
            row = {
                "set": data.name,
                "contender": name,
                "ef": effort,
                "recall@10": (f"{recall:.4f}", recall),
                "median": (f"{1e6 * taken.median:.1f}", 1e6 * taken.median),
                "p99": (f"{1e6 * taken.p99:.1f}", 1e6 * taken.p99),
                "over hnswlib (half of the turns)": (_microseconds(over), 1e6 * over.median),
                "by CPU time": _microseconds(taken.cpu.over(base.cpu)),
            }
            if ours:
                row["goal"] = verdict(1e6 * over.median <= 60 and recall >= TARGET, "≤ 60 over, recall ≥ 0.99")
            table.rows.append(row)
        fastest = min((peer.name for peer in peers[1:]), key=lambda name: times[name].median)
        ratio = times["dckt, hits read"].times(times[fastest])
        table.notes.append(
            f"{data.name}: dckt with hits read takes {ratio.show()} times as long as {fastest}, the faster of faiss "
            f"and usearch; {verdict(ratio.median <= 1, 'at most as long')}."
        )
        index.close()
    return table


def batch(shelf: Shelf, sizes: Sizes) -> Table:
    """All queries in one call."""
    table = Table(
        "batch",
        f"`Index.search` of {sizes.queries:,} vectors at once, {sizes.items:,} items, k = {K}, one thread: queries a "
        f"second, {sizes.turns} turns",
    )
    for data, peers, index, truth in _contests(shelf, sizes):
        efforts = {peer.name: _tune(peer, truth) for peer in peers}
        calls: dict[str, Callable[[int], object]] = {peer.name: _all(peer, data, K) for peer in peers}
        calls["dckt, no metadata"] = lambda _: index.search(data.queries, K, metadata=False)  # noqa: B023
        calls["dckt"] = lambda _: index.search(data.queries, K)  # noqa: B023
        calls["dckt, hits read"] = lambda _: [list(hits) for hits in index.search(data.queries, K)]  # noqa: B023
        times = take_turns(calls, 1, turns=sizes.turns, block=1)
        base = times[peers[0].name]
        own = truth.recall(hit_rows(index.search(data.queries, K)))
        for name, taken in times.items():
            ours = name.startswith("dckt")
            effort, recall = ("", own) if ours else efforts[name]
            share = base.times(taken)
            row = {
                "set": data.name,
                "contender": name,
                "ef": effort,
                "recall@10": (f"{recall:.4f}", recall),
                "queries a second": (f"{len(data.queries) / taken.median:,.0f}", len(data.queries) / taken.median),
                "of hnswlib (half of the turns)": (share.show("{:.0%}"), share.median),
                "by CPU time": base.cpu.times(taken.cpu).show("{:.0%}"),
            }
            if ours:
                row["goal"] = verdict(share.median >= 0.85 and recall >= TARGET, "≥ 85 %, recall ≥ 0.99")
            table.rows.append(row)
        index.close()
    return table


def ties(shelf: Shelf, sizes: Sizes) -> Table:
    """Where graphs fall apart: equal vectors in every amount and order."""
    table = Table(
        "ties",
        f"Ties and copies: {sizes.copies:,} items of one-hot vectors and of copies, {sizes.items:,} of saturated "
        f"probabilities, one thread; microseconds a query, {sizes.turns} turns, and in a batch of {BATCH}",
    )
    for make in TIES:
        data = make(sizes.items if make in TIES[3:] else sizes.copies, sizes.queries)
        peer, index = shelf.hnswlib(data), shelf.ours(data)
        for truth in Truth.of(data.items, data.queries, (1, 10, 100, 1000)).values():
            table.rows.append(_among_ties(peer, index, data, truth, sizes))
        index.close()
    table.notes += [
        "hnswlib runs at the smallest ef with recall ≥ 0.99; where no ef up to "
        f"{EFFORTS[-1]} reaches that, at the smallest within 0.001 of its best. A query for which it finds fewer than "
        "k raises an error; it takes its time too and counts as recall 0. A batch with such a query has no answer.",
        "The goal is for one query at a time. dckt fetches no metadata here, for hnswlib has none.",
    ]
    return table


def _among_ties(peer: Peer, index: Index, data: VectorSet, truth: Truth, sizes: Sizes) -> dict[str, Any]:
    k = truth.k
    effort, reached = _tune(peer, truth)
    alone = take_turns(
        {
            "hnswlib": _one(peer, data, k),
            "dckt": lambda number: index.search(data.queries[number][None], k, metadata=False),
        },
        len(data.queries),
        turns=sizes.turns,
        block=sizes.few,
    )
    few = replace(data, queries=data.queries[:BATCH])
    together = take_turns(
        {"hnswlib": _all(peer, few, k), "dckt": lambda _: index.search(few.queries, k, metadata=False)},
        1,
        turns=max(2, sizes.turns // 2),
        block=1,
    )
    recall = truth.recall(hit_rows([index.search(query[None], k, metadata=False)[0] for query in data.queries]))
    ratio, shared = alone["dckt"].times(alone["hnswlib"]), together["dckt"].times(together["hnswlib"])
    each = {name: 1e6 * taken.median / len(few.queries) for name, taken in together.items()}
    answered = _answers_all(peer, few, k)
    return {
        "set": data.name,
        "k": k,
        "hnswlib ef": effort,
        "hnswlib recall": (f"{reached:.4f}", reached),
        "dckt recall": (f"{recall:.4f}", recall),
        "hnswlib median / p99": _median_p99(alone["hnswlib"]),
        "dckt median / p99": _median_p99(alone["dckt"]),
        "ratio (half of the turns)": (ratio.show(), ratio.median),
        "by CPU time": alone["dckt"].cpu.times(alone["hnswlib"].cpu).show(),
        "hnswlib batch": (f"{each['hnswlib']:.1f}", each["hnswlib"]) if answered else ("error", None),
        "dckt batch": (f"{each['dckt']:.1f}", each["dckt"]),
        "ratio batch": (shared.show(), shared.median) if answered else ("", None),
        "batch by CPU time": together["dckt"].cpu.times(together["hnswlib"].cpu).show() if answered else "",
        "goal": f"{verdict(recall >= 0.999, 'recall ≥ 0.999')}; {verdict(ratio.median <= 1.2, '≤ 1.2 times')}",
    }


def exact(shelf: Shelf, sizes: Sizes) -> Table:
    """Exact search of saturated sets against a flat index."""
    table = Table(
        "exact",
        f"Exact search of one ready vector, {sizes.items:,} items, k = {K}, one thread: microseconds, {sizes.turns} "
        f"turns of {sizes.few} queries",
    )
    for classes in (10, 200):
        data = saturated(sizes.items, sizes.queries, classes)
        flat, index = shelf.flat(data), shelf.ours(data, kind="exact")
        truth = Truth.of(data.items, data.queries, [K])[K]
        calls: dict[str, Callable[[int], object]] = {
            flat.name: _one(flat, data, K),
            "dckt": lambda number: index.search(data.queries[number][None], K, metadata=False),  # noqa: B023
        }
        times = take_turns(calls, len(data.queries), turns=sizes.turns, block=sizes.few)
        recalls = {
            flat.name: truth.recall(flat.answers(data.queries, K, 0)),
            "dckt": truth.recall(hit_rows([index.search(query[None], K, metadata=False)[0] for query in data.queries])),
        }
        for name, taken in times.items():
            faster = times[flat.name].times(taken)
            row = {
                "set": data.name,
                "different vectors": (f"{(count := len(np.unique(data.items, axis=0))):,}", count),
                "contender": name,
                "recall@10": (f"{recalls[name]:.6f}", recalls[name]),
                "median": (f"{1e6 * taken.median:.1f}", 1e6 * taken.median),
                "p99": (f"{1e6 * taken.p99:.1f}", 1e6 * taken.p99),
                "times faster (half of the turns)": (faster.show("{:.1f}"), faster.median),
                "by CPU time": times[flat.name].cpu.times(taken.cpu).show("{:.1f}"),
            }
            if name == "dckt":
                row["goal"] = verdict(recalls[name] == 1 and faster.median >= 20, "recall 1, ≥ 20 times")
            table.rows.append(row)
        index.close()
    return table


def _contests(shelf: Shelf, sizes: Sizes) -> Iterator[tuple[VectorSet, list[Peer], Index, Truth]]:
    """The big sets, each with the peers, our index and the truth."""
    for data in (
        soft(sizes.items, sizes.queries, 10),
        soft(sizes.items, sizes.queries, 200),
        embeddings(sizes.items, sizes.queries, 512),
    ):
        truth = Truth.of(data.items, data.queries, [K])[K]
        yield data, [shelf.hnswlib(data), shelf.faiss(data), shelf.usearch(data)], shelf.ours(data), truth


def _tune(peer: Peer, truth: Truth) -> tuple[int, float]:
    """Sets the peer to the smallest effort with the recall that counts; returns that and what it reaches."""
    efforts = [effort for effort in EFFORTS if effort >= truth.k] or [truth.k]
    effort, recall = smallest_effort(
        lambda effort: truth.recall(peer.answers(truth.queries, truth.k, effort)), efforts, TARGET
    )
    peer.set_effort(effort)
    return effort, recall


def _one(peer: Peer, data: VectorSet, k: int) -> Callable[[int], object]:
    def call(number: int) -> None:
        with contextlib.suppress(RuntimeError):
            peer.search(data.queries[number][None], k)

    return call


def _all(peer: Peer, data: VectorSet, k: int) -> Callable[[int], object]:
    return lambda _: _answers_all(peer, data, k)


def _answers_all(peer: Peer, data: VectorSet, k: int) -> bool:
    with contextlib.suppress(RuntimeError):
        peer.search(data.queries, k)
        return True
    return False


def _median_p99(times: Times) -> tuple[str, list[float]]:
    values = [1e6 * times.median, 1e6 * times.p99]
    return " / ".join(f"{value:.1f}" for value in values), values


def _microseconds(seconds: Spread) -> str:
    return Spread(1e6 * seconds.median, 1e6 * seconds.low, 1e6 * seconds.high).show("{:+.1f}")
