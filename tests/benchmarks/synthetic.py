"""Rows whose truth is known: documents of four domains, methods that are so much better than the anchor."""

import math

import numpy as np

DOMAINS = ("public", "code", "educational", "math")
DOCUMENTS = 40


def texts(rng, domains, documents=DOCUMENTS):
    """By domain: bytes of each document, and how hard each is (bits per byte of the anchor)."""
    sizes = {domain: rng.integers(500, 6000, documents) for domain in domains}
    hardness = {domain: (2 + 0.3 * place) * rng.lognormal(0, 0.2, documents) for place, domain in enumerate(domains)}
    return {domain: (sizes[domain], hardness[domain]) for domain in domains}


def scored(found, factors, rng=None, noise=0.0):
    """Nats and bytes by document, of a model that needs `factors[domain]` of the anchor's bits."""
    result = {}
    for domain, (sizes, hardness) in found.items():
        other = np.ones(len(sizes)) if rng is None else rng.lognormal(0, noise, len(sizes))
        nats = sizes * hardness * factors[domain] * other * math.log(2)
        result[domain] = {"nats": nats.tolist(), "bytes": sizes.tolist()}
    return result


def row(method, seed, scores, group="core", title="", flops=4e12, forwards=1.0, **more):
    """A finished row."""
    entry = {"tokens": 800_000, "flops": 1e12, "seconds": 60.0, "steps": 400, "device": "cpu"}
    runs = {f"expert-{domain}": dict(entry) for domain in DOMAINS[1:]}
    return {
        "suite": "table1",
        "size": "cpu",
        "seed": seed,
        "method": method,
        "title": title or method,
        "group": group,
        "status": "ok",
        "error": "",
        "corpus": "c" * 64,
        "commit": "abc1234",
        "device": "2 CPU cores",
        "jax": "0.12.0.1",
        "time": "2026-01-01T00:00:00Z",
        "ledger": {
            "runs": runs,
            "anchor_flops": 4e13,
            "training_flops": flops,
            "inference_flops_per_token": 1e7 * forwards,
            "forwards": forwards,
        },
        "scores": {"report": scores},
        **more,
    }


def failed(method, seed, error, group="core"):
    """A row of a method that failed."""
    found = row(method, seed, {}, group) | {"status": "failed", "error": error}
    del found["scores"], found["ledger"]
    return found


def suite(methods, seeds=(0,), noise=0.02, seed_noise=0.0, documents=DOCUMENTS, truth=0):
    """Rows of methods that need these factors (of all domains) of the anchor's bits, each document and seed a little other."""
    rng = np.random.default_rng(truth)
    found = texts(rng, DOMAINS, documents)
    return [
        row(method, seed, scored(found, dict.fromkeys(DOMAINS, factor * (1 + seed_noise * rng.normal())), rng, noise))
        for seed in seeds
        for method, factor in methods.items()
    ]
