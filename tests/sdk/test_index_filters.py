"""Filters: SQL, Python and a naive reading agree; hits are the naive ones; mistakes say what is offered."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dckt.errors import ConfigError
from dckt.index import Index, shelf
from dckt.index.filters import parse_filter

KEYS = st.sampled_from(["a", "b", "ä", 'quo"te', "back\\slash", "$", "[0]", "", " ", "'; DROP TABLE items; --"])
NUMBERS = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1), st.sampled_from([0.5, 1.0, -0.0, 1e300, 0.1]))
TEXTS = st.sampled_from(["", "5", "x", "ä", "é", "a\0b", "'", "zz", "\U0001f600", "\uffff"])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
METADATA = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=4
    ),
    max_size=4,
)
PATHS = st.lists(KEYS, min_size=1, max_size=2).map(".".join)
CONDITIONS = st.one_of(
    SCALARS,
    st.fixed_dictionaries({}, optional=dict.fromkeys(("eq", "ne"), SCALARS)).filter(bool),
    st.dictionaries(st.sampled_from(["lt", "le", "gt", "ge"]), NUMBERS | TEXTS, min_size=1, max_size=2),
    st.fixed_dictionaries({"in": st.lists(SCALARS, max_size=3)}),
    st.fixed_dictionaries({"exists": st.booleans()}),
)
LEAVES = st.dictionaries(PATHS, CONDITIONS, max_size=2)
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"or": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"and": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"not": inner}),
    ),
    max_leaves=3,
)


def kind(value):
    if isinstance(value, bool):
        return value
    return {int: "number", float: "number", str: "text", type(None): None}.get(type(value), "other")


def same(one, other):
    return kind(one) == kind(other) != "other" and one == other


def naive(where, metadata):
    """What the documentation says, word for word."""
    for key, value in where.items():
        if key == "and":
            passed = all(naive(part, metadata) for part in value)
        elif key == "or":
            passed = any(naive(part, metadata) for part in value)
        elif key == "not":
            passed = not naive(value, metadata)
        else:
            there, found = True, metadata
            for step in key.split("."):
                there = there and isinstance(found, dict) and step in found
                found = found[step] if there else None
            conditions = value if isinstance(value, dict) else {"eq": value}
            passed = all(holds(name, operand, there, found) for name, operand in conditions.items())
        if not passed:
            return False
    return True


def holds(name, operand, there, found):
    if name == "exists":
        return there == operand
    if name == "ne":
        return not (there and same(found, operand))
    if not there:
        return False
    if name == "eq":
        return same(found, operand)
    if name == "in":
        return any(same(found, one) for one in operand)
    if kind(found) != kind(operand) or kind(found) not in ("number", "text"):
        return False
    return {"lt": found < operand, "le": found <= operand, "gt": found > operand, "ge": found >= operand}[name]


@settings(max_examples=400, deadline=None)
@given(FILTERS, st.lists(METADATA, min_size=1, max_size=5))
def test_sql_and_python_and_the_naive_reading_agree(where, metadata):
    parsed = parse_filter(where)
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE items (n INTEGER, metadata TEXT)")
    texts = [json.dumps(one) for one in metadata]
    connection.executemany("INSERT INTO items VALUES (?, ?)", enumerate(texts))
    rows = connection.execute(f"SELECT n FROM items WHERE {parsed.sql} ORDER BY n", parsed.parameters).fetchall()
    connection.close()
    expected = [number for number, one in enumerate(metadata) if naive(where, one)]
    assert [number for (number,) in rows] == expected
    assert [number for number, text in enumerate(texts) if parsed.matches(json.loads(text))] == expected


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("shop", "expected a mapping"),
        ([{"shop": "A"}], "expected a mapping"),
        ({"shop": {"like": "A"}}, "'like' is no operator"),
        ({"shop": {}}, "no condition"),
        ({"price": {"lt": None}}, "takes a number or a text"),
        ({"price": {"lt": True}}, "takes a number or a text"),
        ({"price": {"in": "AB"}}, "takes a list"),
        ({"price": {"in": [[1]]}}, "not a number, a text"),
        ({"price": [1]}, "not a number, a text"),
        ({"price": float("nan")}, "not finite"),
        ({"price": 2**64}, "64 bits"),
        ({"price": "\ud800"}, "not a number, a text"),
        ({"price": {"exists": 1}}, "true or false"),
        ({"or": []}, "at least one filter"),
        ({"or": {"a": 1}}, "at least one filter"),
        ({"not": [{"a": 1}]}, "expected a mapping"),
        ({7: "A"}, "not a Unicode text"),
        ({"price": {7: "A"}}, "7 is no operator"),
    ],
)
def test_a_mistake_shows_the_filter_and_what_is_offered(where, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_filter(where)
    assert ascii(where) in str(caught.value)
    assert "eq, ne, lt, le, gt, ge, in, exists" in str(caught.value)


def test_a_filter_that_is_nested_without_end_is_refused():
    where: dict = {"a": 1}
    for _ in range(5000):
        where = {"not": where}
    with pytest.raises(ConfigError, match="nested"):
        parse_filter(where)


# --- in an index ---


def collection(folder, how, rows=1500):
    """Items of which several share a vector, with metadata that differ within one vector."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(rows, 12))
    vectors[rows // 2 :] = vectors[generator.integers(0, rows // 4, rows - rows // 2)]
    metadata = [{"shop": "ABC"[n % 3], "n": n, "rare": n % 250 == 7} for n in range(rows)]
    index = Index.create(folder, model_id="m", representation="p", dimension=12, kind=how, threads=1)
    index.add("text", [f"t{n:04d}" for n in range(rows)], vectors, metadata=metadata)
    return index, vectors, metadata


WHERES = [
    {"shop": "A"},
    {"shop": {"ne": "A"}, "n": {"lt": 700}},
    {"rare": True},
    {"n": 1234},
    {"n": {"in": [5, 900, 1499, "5"]}},
    {"n": {"ge": 0}},
    {"n": {"lt": 0}},
    {},
    {"or": [{"rare": True}, {"n": {"ge": 1490}}]},
]


@pytest.mark.parametrize("how", ["exact", "hnsw"])
@pytest.mark.parametrize("reads", [0, 50, 4000])
def test_hits_are_the_best_of_those_that_pass(tmp_path, monkeypatch, how, reads):
    monkeypatch.setattr(shelf, "_FILTER_READS", reads)
    index, metadata = collection(tmp_path / "i", how)[::2]
    queries = np.random.default_rng(1).normal(size=(4, 12))
    with index:
        scores = {hit.id: hit.score for hit in index.search(queries[:1], 10**6)[0]}
        assert len(scores) == 1500
        missed = asked = 0
        for where in WHERES:
            passing = {f"t{n:04d}" for n, one in enumerate(metadata) if naive(where, one)}
            assert index.count(where=where) == len(passing) == len(list(index.items(where=where)))
            everything = [[hit for hit in hits if hit.id in passing] for hits in index.search(queries, 10**6)]
            for k in (1, 10, 60, 2000):
                found = index.search(queries, k, where=where)
                for hits, expected in zip(found, everything, strict=True):
                    assert len(hits) == min(k, len(passing))
                    assert all(naive(where, hit.metadata) for hit in hits)
                    asked += len(hits)
                    missed += len({hit.id for hit in hits} - {hit.id for hit in expected[:k]})
                    if how == "exact" or not reads:
                        assert hits == expected[:k]
        assert missed <= 0.01 * asked


@pytest.mark.parametrize("how", ["exact", "hnsw"])
def test_a_filter_sees_what_changed(tmp_path, monkeypatch, how):
    monkeypatch.setattr(shelf, "_FILTER_READS", 0)  # so that SQLite's answer is kept
    index, vectors, _ = collection(tmp_path / "i", how)
    with index, Index.open(tmp_path / "i") as other:
        where = {"rare": True}
        assert len(index.search(vectors[:1], 50, where=where)[0]) == 6
        index.add("text", ["t0008"], vectors[8:9], metadata=[{"rare": True}], upsert=True)
        index.delete("text", ["t0007"])
        other.add("text", ["t0009"], vectors[9:10], metadata=[{"rare": True}], upsert=True)
        for one in (index, other, index):
            ids = {hit.id for hit in one.search(vectors[:1], 50, where=where)[0]}
            assert ids == {"t0008", "t0009", "t0257", "t0507", "t0757", "t1007", "t1257"}


def test_sql_in_a_filter_is_data(tmp_path):
    nasty = "x' OR 1=1; DROP TABLE items; --"
    with Index.create(tmp_path / "i", model_id="m", representation="p", dimension=2) as index:
        index.add("text", ["a", "b"], np.ones((2, 2)), metadata=[{nasty: nasty}, {}])
        assert [hit.id for hit in index.search(np.ones((1, 2)), where={nasty: nasty})[0]] == ["a"]
        assert index.count(where={nasty: {"in": [nasty]}}) == index.count(where={nasty: {"exists": False}}) == 1
        assert len(index) == 2
