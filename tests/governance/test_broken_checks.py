"""Checks that are broken on purpose, one at a time: the corpus must notice each (G7), and the judge of masks too (G1)."""

import dataclasses
import functools
import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import storage, tree
from flexjax.experts import copying, manifest, provenance, schema, slices, store
from flexjax.governance import compatibility, health, merging, signatures
from flexjax.model import dispatch, moe, router
from tests.governance import hostile
from tests.model import test_moe


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return hostile.build(tmp_path_factory.mktemp("hostile"))


class Agreeable(str):
    """A digest that equals every other."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def agreeable_digests(patch):
    digest = tree.sha256
    patch.setattr(tree, "sha256", lambda data: Agreeable(digest(data)))
    real = copying.hashlib.sha256

    class Digest:
        def __init__(self):
            self.real = real()
            self.update = self.real.update

        def hexdigest(self):
            return Agreeable(self.real.hexdigest())

    patch.setattr(copying, "hashlib", type("Hashes", (), {"sha256": Digest}))


def followed_links(patch):
    """Links are opened and listed as what they lead to."""
    patch.setattr(os, "O_NOFOLLOW", 0)
    found = storage.files

    def files(directory):
        listed = dict(found(directory))
        for name in listed:
            status = os.stat(os.path.join(directory, name))
            if stat.S_ISREG(status.st_mode):
                listed[name] = storage.Entry(status.st_size, 1)
        return listed

    patch.setattr(storage, "files", files)


def any_json(patch):
    patch.setattr(manifest, "_parse", lambda data, path: json.loads(data))


def any_size(patch):
    patch.setattr(slices.Magnitude, "rms", property(lambda self: np.inf))  # no difference is more than that
    patch.setattr(store.Artefact, "check_magnitude", lambda *_: None)


def any_product(patch):
    patch.setattr(compatibility, "MOST_RMS", 1e9)
    patch.setattr(compatibility, "MOST_MAX", 1e9)


def replaced(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def nothing(*_, **__):
    return []


TRUSTED = signatures.Status("trusted", "", "", "")
BROKEN = {  # what is broken, and a kind that then gets further than it may
    "schema": (replaced(schema, "check", nothing), "smuggled: path out of the directory"),
    "schema, shapes": (replaced(schema, "_check_entry", nothing), "shapes: giant shape"),
    "content of routers": (replaced(store, "check_content", nothing), "content: positive bias"),
    "content, sizes": (any_size, "content: NaN in a matrix"),
    "content, statements": (any_size, "content: understated max"),
    "content, subnormals": (replaced(store, "MOST_SUBNORMAL", 2.0), "content: subnormal flood"),
    "digests of slices": (agreeable_digests, "content: flipped bit in a matrix"),
    "digests of manifests": (agreeable_digests, "manifest: forged digest"),
    "lineage": (replaced(compatibility, "LINEAGE", ()), "lineage: other anchor"),
    "lineage, tokenizer": (replaced(compatibility, "LINEAGE", ("config", "anchor")), "lineage: other tokenizer"),
    "names": (replaced(manifest, "check_name", lambda name: name), "names: name in Cyrillic"),
    "names, reserved": (replaced(manifest, "check_name", lambda name: name), "names: reserved name"),
    "fields": (replaced(manifest, "_check_fields", nothing), "text: field of its own"),
    "canonical JSON": (any_json, "manifest: pretty-printed manifest"),
    "duplicate keys": (any_json, "manifest: twice the same key"),
    "depth": (replaced(manifest, "MAX_DEPTH", 10**9), "manifest: deep manifest"),
    "size of a manifest": (replaced(manifest, "MAX_BYTES", 2**50), "manifest: large manifest"),
    "statements": (replaced(provenance, "check", nothing), "text: owner of 10 kB"),
    "statements on training": (replaced(provenance, "check_training", nothing), "text: prose as a training fact"),
    "signatures": (replaced(signatures, "check", lambda *_: TRUSTED), "signature: unsigned"),
    "signatures, trust": (replaced(signatures, "_check_trust", nothing), "signature: revoked key"),
    "signatures, weak keys": (replaced(signatures, "is_weak", lambda key: False), "signature: weak key"),
    "findings on routers": (replaced(health, "_judge", nothing), "content: row a thousand times as long"),
    "findings on routers, unread": (replaced(merging, "_claims", nothing), "content: row of another expert"),
    "magnitudes": (replaced(compatibility, "_magnitudes", nothing), "numbers: huge weights, honestly stated"),
    "magnitudes of products": (any_product, "numbers: huge product of factors"),
    "carried leaves": (
        replaced(compatibility, "_carried", lambda bundle, policy: compatibility.Row("", "", "", "", compatibility.OK)),
        "smuggled: carried leaf under a strict policy",
    ),
    "links": (followed_links, "files: link to the same bytes"),
    "listing": (replaced(store, "check_listing", nothing), "files: pickle"),
    "the report's verdict": (replaced(compatibility, "check", nothing), "names: name of another expert"),
    "older versions": (
        replaced(merging, "replace", functools.partial(merging.replace, allow_older=True)),
        "replace: older version than the model's",
    ),
}


@pytest.mark.parametrize("check", BROKEN)
def test_the_corpus_catches_broken_checks(house, tmp_path, monkeypatch, check):
    break_it, name = BROKEN[check]
    kind = hostile.KINDS[name]
    break_it(monkeypatch)
    assert hostile.judge(kind, house, tmp_path, kind.verbs[0]) != []


# Masks: the mixture layer as it is used, with the mask broken in one place.

BANKS = test_moe.banks_of(test_moe.BY_WIDTH, test_moe.NAMES)
ALLOWED = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0]], bool)


def layer(arrays, allowed, top_k):
    ffns = [
        {part: jnp.stack([arrays[f"{name}/{part}"] for name in bank.experts]) for part in ("gate", "up", "down")}
        for bank in BANKS
    ]
    routing = router.route(arrays["h"], arrays["rows"], arrays["bias"], top_k, allowed)
    return moe.apply(arrays["h"], ffns, BANKS, routing, allowed)


def spoilt(request, fill):
    """A request alone, and in everything that it may not use `fill`."""
    arrays = {key: value.astype(np.float32) for key, value in test_moe.draw(test_moe.BY_WIDTH, 5, 3, 4).items()}
    arrays["h"] = arrays["h"][request : request + 1]
    for e in np.flatnonzero(~ALLOWED[request]):
        arrays["rows"][e], arrays["bias"][e] = fill, -abs(fill)
        for part in ("gate", "up", "down"):
            arrays[f"{test_moe.NAMES[e]}/{part}"][:] = fill
    return arrays


def leaks(top_k):
    """Whether anything that a request may not use is seen in its answer."""
    run = jax.jit(functools.partial(layer, top_k=top_k))
    for request in range(len(ALLOWED)):
        allowed = ALLOWED[request : request + 1]
        first, second, broken = (np.asarray(run(spoilt(request, fill), allowed)) for fill in (0.5, -3.0, np.nan))
        if not (np.array_equal(first, second) and np.array_equal(first, broken) and np.isfinite(first).all()):
            return True
    return False


DENSE, SPARSE = 5, 2  # experts per token, by which the path is chosen
route, dense, dropless = router.route, moe.dense, dispatch.dropless


def masked_after_softmax(h, rows, bias, top_k, allowed):
    found = route(h, rows, bias, top_k, None)
    p = jnp.where(allowed[:, None], found.probabilities, 0)
    gates, indices = jax.lax.top_k(p, min(top_k, p.shape[-1]))
    return dataclasses.replace(found, probabilities=p, gates=gates, indices=jnp.where(gates == 0, p.shape[-1], indices))


def multiplied_mask(h, rows, bias, top_k, allowed):
    found = route(h, rows, bias, top_k, None)
    p = found.probabilities * allowed[:, None].astype(jnp.float32)
    gates, indices = jax.lax.top_k(p, min(top_k, p.shape[-1]))
    return dataclasses.replace(found, probabilities=p, gates=gates, indices=indices)


def no_mask(h, rows, bias, top_k, allowed):
    return route(h, rows, bias, top_k, None)


def dense_by_products(h, ffns, banks, gates, allowed, **_):
    """Sums gate times expert, 0 times NaN too."""
    total = jnp.zeros(h.shape, jnp.float32)
    for e, (_, ffn, slot) in enumerate(moe._ordered(ffns, banks)):
        total += gates[..., e, None] * moe.swiglu(h, *(ffn[part][slot] for part in ("gate", "up", "down")))
    return total.astype(h.dtype)


def sparse_without_sentinel(h, ffns, banks, routing, *rest):
    """What no allowed expert fills goes to the last expert, with a gate."""
    E = routing.probabilities.shape[-1]
    spare = routing.indices == E
    filled = dataclasses.replace(
        routing, indices=jnp.where(spare, E - 1, routing.indices), gates=jnp.where(spare, 1e-3, routing.gates)
    )
    return dropless(h, ffns, banks, filled, *rest)


MASKS = {
    "after softmax, dense": (router, "route", masked_after_softmax, DENSE),
    "after softmax, sparse": (router, "route", masked_after_softmax, SPARSE),
    "by a product, dense": (router, "route", multiplied_mask, DENSE),
    "missing, dense": (router, "route", no_mask, DENSE),
    "missing, sparse": (router, "route", no_mask, SPARSE),
    "missing in the dense path alone": (moe, "dense", dense_by_products, DENSE),
    "missing in the sparse path alone": (dispatch, "dropless", sparse_without_sentinel, SPARSE),
    "gates of all experts": (router, "dense_gates", lambda routing: jnp.full_like(routing.probabilities, 0.2), DENSE),
}


@pytest.mark.parametrize("top_k", [DENSE, SPARSE])
def test_what_is_forbidden_is_not_seen(top_k):
    assert not leaks(top_k)


@pytest.mark.parametrize("mask", MASKS)
def test_broken_masks_are_caught(monkeypatch, mask):
    module, name, broken, top_k = MASKS[mask]
    monkeypatch.setattr(module, name, broken)
    assert leaks(top_k)
