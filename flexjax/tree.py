"""The vocabulary for trees of parameters: paths, partition and combine, and digests.

A parameter tree is a nested dict of arrays. A path joins its keys by "/": `experts/math/ffn/gate`. Everything that selects
parameters (what is trained, what decays) is a regular expression that must match a whole path.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flexjax import errors

Tree = dict[str, Any]
CHUNK_BYTES = 64 * 2**20


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {path: leaf}, sorted by path."""
    flat = {}
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], Mapping):
            flat.update(flatten(tree[key], path))
        else:
            flat[path] = tree[key]
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Applies `function(path, leaf, *leaves)` to every leaf."""
    rest = [flatten(other) for other in others]
    return unflatten({p: function(p, leaf, *(o[p] for o in rest)) for p, leaf in flatten(tree).items()})


def partition(tree: Tree, pattern: str) -> tuple[Tree, Tree]:
    """Splits a tree into (leaves whose path matches, all others); neither half mentions the other's leaves.

    Raises:
      ConfigError: the pattern is no regular expression, or matches nothing.
    """
    regex, flat = _compiled(pattern), flatten(tree)
    chosen = {path: leaf for path, leaf in flat.items() if regex.fullmatch(path)}
    if not chosen:
        raise errors.ConfigError(f"'{pattern}' matches no parameter; the paths are {', '.join(flat)}")
    return unflatten(chosen), unflatten({path: leaf for path, leaf in flat.items() if path not in chosen})


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise errors.ConfigError(f"'{pattern}' is not a regular expression: {error}") from None


def combine(*trees: Tree) -> Tree:
    """Inverse of `partition`: the union of trees that share no leaf."""
    union: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in union:
                raise errors.ConfigError(f"parameter {path} occurs twice; the trees to combine must be disjoint")
            union[path] = leaf
    return unflatten(union)


def matches(tree: Tree, pattern: str) -> Tree:
    """Returns the same tree with True where the path matches, False elsewhere."""
    regex = _compiled(pattern)
    return map_with_path(lambda path, _: regex.fullmatch(path) is not None, tree)


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in flatten(tree).values())


def summary(tree: Tree) -> str:
    """The parents of all leaves, each once: "experts/math/ffn, experts/math/router"."""
    return ", ".join(sorted({path.rpartition("/")[0] for path in flatten(tree)}))


def is_stacked(path: str) -> bool:
    """Whether the first axis of this parameter runs over layers."""
    return not path.removeprefix("shared/").startswith(("embed/", "head/", "statistics/projection"))


def chunk_shape(path: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The slice in which a tensor is stored, hashed and read: one layer, or at most 64 MiB of rows of an unlayered one."""
    if not shape:
        return ()
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
    rows = 1 if is_stacked(path) else min(shape[0], max(1, CHUNK_BYTES // row_bytes))
    return (rows, *shape[1:])


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one encoding of a JSON value that digests and signatures are taken of: sorted keys, no blanks, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def strict_json(data: bytes | str) -> Any:
    """Parses JSON of which no part may be said twice; raises DuplicateKey, or ValueError as `json.loads`."""
    return json.loads(data, object_pairs_hook=_unique)


class DuplicateKey(ValueError):
    """A JSON object has the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise DuplicateKey("a key occurs twice in one object")
    return members
