"""Figure G16: under random faults on every request, an operation ends in exactly the right bytes or in one error that names
the object, within its deadline. What a test believes of the bucket comes from the service itself, past all faults."""

import collections
import hashlib
import random
import time

import pytest

from flexjax import errors, storage
from flexjax.bucket import attempts, transfer
from tests.storage import server

DEADLINE = 1.5
STEP = 2**18
ROOT = f"gs://{server.BUCKET}/models"


class Walk:
    """Random operations, each compared with what the bucket then really holds."""

    def __init__(self, bucket, gcs, seed):
        self.bucket, self.gcs, self.random = bucket, gcs, random.Random(seed)
        self.held = {}  # name: bytes that the bucket holds
        self.outcomes = collections.Counter()
        self.slowest = (0.0, "", "")

    def name(self, new=False):
        taken = sorted(self.held)
        return f"{self.random.choice('ab')}/{self.random.randrange(10**9)}" if new or not taken else self.random.choice(taken)

    def data(self):
        size = self.random.choice([0, 1, 1000, 60_000, 3 * STEP + 5])
        return self.random.randbytes(size)

    def pieces(self, data):
        size = self.random.choice([1 + len(data) // 3, 100_000])
        return [data[start : start + size] for start in range(0, len(data), size)]

    def step(self):
        """One operation; the kind, and what it may change: {name: contents allowed afterwards, None for no object}."""
        kind = self.random.choice(["write", "read", "blocks", "copy", "replace", "stale", "delete", "files", "generation"])
        if not self.held and kind not in ("files",):
            kind = "write"
        name, fresh, data = self.name(), self.name(new=True), self.data()
        old, path = self.held.get(name, b""), self.bucket / name
        after = dict(self.held)
        if kind == "write":
            after[fresh] = data
            return kind, fresh, lambda: storage.write(self.bucket / fresh, self.pieces(data)), None, after
        if kind == "read":
            reader = storage.read if self.random.random() < 0.5 else storage.read_small
            return kind, name, lambda: reader(path, len(old)), old, after
        if kind == "blocks":
            return kind, name, lambda: b"".join(storage.blocks(path, len(old))), old, after
        if kind == "copy":
            after[fresh] = old
            return kind, fresh, lambda: storage.copy(path, self.bucket / fresh, len(old)), None, after
        if kind == "files":
            expected = {name: len(content) for name, content in sorted(self.held.items())}
            return kind, "", lambda: {n: entry.size for n, entry in storage.files(self.bucket).items()}, expected, after
        generation = self.gcs.objects()[f"models/{name}"][0]
        if kind == "generation":
            return kind, name, lambda: storage.generation(path), generation, after
        if kind == "replace":
            after[name] = data = data[:60_000]
            return kind, name, lambda: storage.replace(path, data, generation), None, after
        if kind == "delete":
            del after[name]
            return kind, name, lambda: storage.delete(self.bucket, {name: storage.Entry(0, generation)}), [], after
        self.held[name] = after[name] = b"of another " + name.encode()
        self.gcs.put(f"models/{name}", after[name])
        if self.random.random() < 0.5:
            return kind, name, lambda: storage.delete(self.bucket, {name: storage.Entry(0, generation)}), [name], after
        return kind, name, lambda: storage.replace(path, b"ours", generation), "refused", after

    def check(self):
        """Runs one operation; a wrong result or a wrong change is an assertion, and so is any other exception."""
        kind, name, operation, expected, after = self.step()
        before, begun = dict(self.held), time.monotonic()
        try:
            result = operation()
            assert result == expected, f"{kind} {name}: wrong, and nobody said so"
        except (errors.StorageError, errors.IntegrityError) as error:
            assert f"{ROOT}/{name}".rstrip("/") in str(error), error
            assert "\n" not in str(error)
            outcome = "refused" if expected == "refused" and "changed meanwhile" in str(error) else "error"
        else:
            outcome = "done"
        steps = -(-len(after.get(name, b"")) // STEP)
        allowed = DEADLINE * (1 if steps <= 1 else steps + 2)  # a long object: a look before or after, and each step by itself
        self.slowest = max(self.slowest, ((time.monotonic() - begun) / allowed, kind, outcome))
        self.outcomes[kind, outcome] += 1
        self.compare(kind, name, outcome, before, after)

    def compare(self, kind, name, outcome, before, after):
        really = {key.removeprefix("models/"): digest for key, (_, digest) in self.gcs.objects().items()}
        for other in really.keys() | before.keys() | after.keys():
            digests = {hashlib.sha256(state[other]).hexdigest() if other in state else None for state in (before, after)}
            if other != name:
                assert really.get(other) in digests, f"{kind} {name} changed {other}"
            elif outcome == "done":
                assert really.get(name) == (hashlib.sha256(after[name]).hexdigest() if name in after else None), (kind, name)
            elif kind not in ("write", "copy"):  # after an error a new object may hold anything: it is not committed
                assert really.get(name) in digests, f"{kind} {name} was neither done nor left alone"
        self.held = after if outcome == "done" else {n: self.gcs.get(f"models/{n}") for n in really}


def walk(bucket, gcs, monkeypatch, seed, steps, rate, deadline=DEADLINE):
    monkeypatch.setenv("FLEXJAX_STORAGE_DEADLINE", str(deadline))
    monkeypatch.setattr(attempts, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(attempts, "STEP_BYTES", STEP)
    monkeypatch.setattr(transfer, "WHOLE_BYTES", STEP)
    gcs.reset(round=20_000)
    gcs.fail(rate=rate, seed=seed, seconds=1)
    found = Walk(bucket, gcs, seed)
    for _ in range(steps):
        found.check()
    assert sum(found.outcomes.values()) == steps
    return found


@pytest.mark.parametrize(("rate", "steps"), [(0.0, 60), (0.3, 30)])
def test_no_silent_error(bucket, gcs, monkeypatch, rate, steps):
    found = walk(bucket, gcs, monkeypatch, 1, steps, rate, deadline=10)
    failed = sum(count for (_, outcome), count in found.outcomes.items() if outcome == "error")
    assert failed <= rate * steps / 3, found.outcomes  # most faults pass


@pytest.mark.reliability
@pytest.mark.parametrize(("rate", "seed"), [(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1), (0.3, 2), (0.6, 0), (0.6, 1)])
def test_no_silent_error_in_many(bucket, gcs, monkeypatch, seed, rate):
    """G16: seven walks of 200 operations."""
    found = walk(bucket, gcs, monkeypatch, 100 + seed, 200, rate)
    print(f"rate {rate} seed {seed}: {dict(found.outcomes)}, slowest {found.slowest}")
    assert found.slowest[0] < 1.5  # a try that began in time may end one stall, a quarter of the deadline, after it
