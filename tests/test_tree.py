"""Trees: partition and combine are inverses, and JSON has one encoding and one meaning."""

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import errors, tree

KEYS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS, st.recursive(st.integers(), lambda t: st.dictionaries(KEYS, t, min_size=1), max_leaves=8), min_size=1
)


@given(TREES)
def test_flatten_and_unflatten_are_inverses(values):
    flat = tree.flatten(values)
    assert tree.unflatten(flat) == values and list(flat) == sorted(flat)


@given(TREES, st.integers(0, 2**8))
def test_partition_and_combine_are_inverses(values, chooser):
    paths = list(tree.flatten(values))
    chosen = [path for i, path in enumerate(paths) if chooser >> (i % 8) & 1] or paths[:1]
    inside, outside = tree.partition(values, "|".join(chosen))
    assert set(tree.flatten(inside)) == set(chosen) and set(tree.flatten(outside)) == set(paths) - set(chosen)
    assert tree.combine(inside, outside) == values == tree.combine(outside, inside)


def test_a_pattern_must_match_a_whole_path():
    values = {"a": {"b": 1, "bc": 2}, "d": 3}
    assert tree.partition(values, "a/b") == ({"a": {"b": 1}}, {"a": {"bc": 2}, "d": 3})
    assert tree.partition(values, ".*") == (values, {})
    assert tree.matches(values, "a/.*") == {"a": {"b": True, "bc": True}, "d": False}
    with pytest.raises(errors.ConfigError, match="'b' matches no parameter"):
        tree.partition(values, "b")
    with pytest.raises(errors.ConfigError, match="not a regular expression"):
        tree.partition(values, "(")


def test_combine_refuses_a_leaf_that_occurs_twice():
    with pytest.raises(errors.ConfigError, match="a/b occurs twice"):
        tree.combine({"a": {"b": 1}}, {"a": {"b": 2}})


def test_map_with_path_and_count():
    values = {"a": {"b": np.ones((2, 3))}, "c": np.zeros(())}
    assert tree.count(values) == 7
    assert tree.map_with_path(lambda path, x, y: (path, x + y), {"a": {"b": 1}}, {"a": {"b": 2}}) == {"a": {"b": ("a/b", 3)}}


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40))
def test_chunks_cover_a_tensor_and_stay_small(layers, rows, columns):
    assert tree.chunk_shape("layers/attention/q", (layers, rows, columns), 4) == (1, rows, columns)
    assert tree.chunk_shape("embed/embedding", (rows, columns), 4) == (rows, columns)


def test_big_unlayered_tensors_are_cut_into_rows():
    rows, width = tree.chunk_shape("embed/embedding", (100352, 4096), 4)
    assert width == 4096 and rows * width * 4 == tree.CHUNK_BYTES
    assert tree.chunk_shape("head/kernel", (4, 2**26), 4) == (1, 2**26)


def test_canonical_json_is_one_encoding():
    assert tree.canonical_json({"b": [1, "é"], "a": 0.5}) == b'{"a":0.5,"b":[1,"\\u00e9"]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        tree.canonical_json(float("nan"))


def test_strict_json_refuses_a_key_that_occurs_twice():
    assert tree.strict_json(b'{"a": {"b": 1}, "b": [2]}') == {"a": {"b": 1}, "b": [2]}
    for text in ('{"a": 1, "a": 1}', b'{"b": {"a": 1, "a": 2}}'):
        with pytest.raises(tree.DuplicateKey, match="a key occurs twice"):
            tree.strict_json(text)
