"""Files in a bucket, and each thing that may go wrong on the way to one by itself; all of them at once in test_faults.py."""

import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest
from etils import epath

from flexjax import errors, storage
from flexjax.bucket import attempts, objects, transfer
from tests.storage import server

IntegrityError, StorageError = errors.IntegrityError, errors.StorageError
DATA = np.random.default_rng(0).bytes(100_000)
STEP = 2**18  # the smallest that a resumable upload allows
LONG = np.random.default_rng(1).bytes(3 * STEP + 1000)


@pytest.fixture
def stepwise(monkeypatch):
    """Objects as small as LONG move as those of many steps do."""
    monkeypatch.setattr(attempts, "STEP_BYTES", STEP)
    monkeypatch.setattr(transfer, "WHOLE_BYTES", STEP)


@pytest.fixture
def brisk(monkeypatch):
    """A stall is cut early, while the deadline is far even on a busy machine."""
    monkeypatch.setattr(attempts, "STALL_SECONDS", 0.3)
    monkeypatch.setenv("FLEXJAX_STORAGE_DEADLINE", "10")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("FLEXJAX_STORAGE_DEADLINE", "0.5")


def cut(data, size=70_000):
    return [data[start : start + size] for start in range(0, len(data), size)]


def test_what_is_written_is_read(bucket, gcs):
    for name, data in (("a/x", DATA), ("b", b""), ("c d/?#%é", b"odd")):
        storage.write(bucket / name, cut(data))
        assert storage.read(bucket / name, len(data)) == data
        assert storage.read_small(bucket / name, 100_000) == data
        assert b"".join(storage.blocks(bucket / name, len(data))) == data
    assert list(storage.files(bucket)) == ["a/x", "b", "c d/?#%é"]
    assert "models/c d/?#%é" in gcs.objects()


@pytest.mark.parametrize("size", [3 * STEP - 1, 3 * STEP, 3 * STEP + 1000])
def test_long_objects_move_in_steps(bucket, gcs, stepwise, size):
    data = LONG[:size]
    storage.write(bucket / "long", cut(data))
    assert gcs.get("models/long") == data
    assert gcs.counters()["chunk"]["requests"] == size // STEP + 1
    assert b"".join(storage.blocks(bucket / "long", size)) == data
    assert gcs.counters()["download"]["requests"] == -(-size // STEP)
    assert storage.read(bucket / "long", size) == data


def test_sizes_and_missing_objects(bucket):
    storage.write(bucket / "x", [DATA])
    for reader in (storage.read, lambda *args: list(storage.blocks(*args))):
        with pytest.raises(IntegrityError, match=r"gs://.*/x has 100000 bytes, expected 99999"):
            reader(bucket / "x", 99_999)
        with pytest.raises(IntegrityError, match=r"gs://.*/y is missing"):
            reader(bucket / "y", 1)
    with pytest.raises(IntegrityError, match="no honest one has more than 5"):
        storage.read_small(bucket / "x", 5)
    with pytest.raises(IntegrityError, match="y is missing"):
        storage.copy(bucket / "y", bucket / "z", 1)
    assert storage.exists(bucket / "x")
    assert not storage.exists(bucket / "y")
    assert storage.files(bucket / "nothing") == {}


def test_a_bucket_that_is_not_there(gcs):
    where = epath.Path("gs://flexjax-nobody/models")
    for verb in (lambda: storage.files(where), lambda: storage.write(where / "x", [b"x"]), lambda: storage.policies(where)):
        with pytest.raises(StorageError, match=r"gs://flexjax-nobody.*HTTP 404.*check the bucket's name"):
            verb()


def test_other_schemes_are_refused(gcs):
    with pytest.raises(errors.ConfigError, match="expected gs://bucket/name"):
        storage.read(epath.Path("s3://bucket/name"), 1)


def test_a_list_has_pages(bucket, gcs):
    names = [f"tensors/{index:02}" for index in range(11)]
    for name in names:
        gcs.put(f"models/{name}", name.encode())
    gcs.put("models-of-another/x", b"x")
    gcs.put("models/", b"")  # what a web console makes of a folder
    gcs.put("models/folder/", b"")
    listed = storage.files(bucket)
    assert list(listed) == ["folder/", *names]
    assert all(entry.size == 10 and entry.generation > 0 for name, entry in listed.items() if name != "folder/")
    assert gcs.counters()["list"]["requests"] == 5  # 13 names, 3 a page
    assert storage.delete(bucket) == []
    assert list(gcs.objects()) == ["models-of-another/x"]


def test_copies_move_no_byte_through_here(bucket, gcs):
    gcs.reset(round=30_000)
    storage.write(bucket / "x", [DATA])
    before, counted = storage.traffic(), gcs.counters()
    storage.copy(bucket / "x", bucket / "y", len(DATA))
    assert gcs.get("models/y") == DATA
    assert storage.traffic() == before
    assert gcs.counters()["rewrite"]["requests"] == 4
    assert gcs.counters()["upload"] == counted["upload"]
    assert "download" not in gcs.counters()
    storage.copy(bucket / "x", bucket / "y", len(DATA))  # the same bytes: done before, by ourselves
    gcs.put("models/y", b"of another")
    with pytest.raises(StorageError, match=r"/y exists already with other bytes"):
        storage.copy(bucket / "x", bucket / "y", len(DATA))


def test_copies_between_disk_and_bucket(bucket, tmp_path):
    storage.write(bucket / "x", [DATA])
    before = storage.traffic()
    local = epath.Path(tmp_path) / "x"
    storage.copy(bucket / "x", local, len(DATA))
    storage.copy(local, bucket / "back", len(DATA))
    assert storage.read(bucket / "back", len(DATA)) == DATA
    after = storage.traffic()
    assert (after.down - before.down, after.up - before.up) == (2 * len(DATA), len(DATA))


def test_a_new_file_is_new(bucket, gcs, stepwise):
    for name, data in (("short", DATA), ("long", LONG)):
        gcs.put(f"models/{name}", b"of another")
        with pytest.raises(StorageError, match=name):
            storage.write(bucket / name, cut(data))
        assert gcs.get(f"models/{name}") == b"of another"


def test_replace_and_generations(bucket, gcs):
    path = bucket / "manifest.json"
    assert storage.generation(path) == 0
    storage.replace(path, b"one", 0)
    first = storage.generation(path)
    storage.replace(path, b"two", first)
    gcs.put("models/manifest.json", b"of another")
    for expected in (0, first):
        with pytest.raises(StorageError, match=r"manifest.json (was changed meanwhile|exists already)"):
            storage.replace(path, b"three", expected)
    assert gcs.get("models/manifest.json") == b"of another"
    storage.replace(path, b"three")
    assert storage.read(path, 5) == b"three"


def test_delete_leaves_newer_objects(bucket, gcs):
    for name in ("a", "b", "c"):
        storage.write(bucket / name, [name.encode()])
    listed = storage.files(bucket)
    gcs.put("models/b", b"written anew")
    storage.write(bucket / "d", [b"not listed"])
    assert storage.delete(bucket, listed) == ["b"]
    assert list(storage.files(bucket)) == ["b", "d"]
    assert storage.delete(bucket, listed) == ["b"]


def test_policies(bucket, gcs):
    assert storage.policies(bucket) == {"versioning": False, "soft_delete": 0, "retention": 0}
    gcs.reset(versioning=True, soft_delete=604800, retention=3600)
    assert storage.policies(bucket) == {"versioning": True, "soft_delete": 604800, "retention": 3600}


def test_what_does_not_pass_is_said_at_once(bucket, gcs):
    gcs.put("models/x", DATA)
    gcs.fail(("delete", "403"))
    with pytest.raises(StorageError, match=r"models/x cannot be deleted: HTTP 403 Forbidden \(subject to a retention policy\)"):
        storage.delete(bucket)
    assert gcs.counters()["delete"]["requests"] == 1


PASSING = [*((endpoint, kind) for endpoint, kinds in server.KINDS.items() for kind in kinds), ("upload", "bad_disk")]


@pytest.mark.parametrize(("endpoint", "kind"), PASSING)
def test_what_passes_is_not_seen(bucket, gcs, stepwise, brisk, endpoint, kind):
    """Every kind of trouble, once, at every endpoint: the operation succeeds, and has done exactly what it says."""
    gcs.put("models/x", DATA)
    gcs.put("models/long", LONG)
    gcs.fail((endpoint, kind), seconds=1)
    operation = {
        "get": lambda: storage.read(bucket / "x", len(DATA)) == DATA,
        "download": lambda: storage.read(bucket / "x", len(DATA)) == DATA,
        "list": lambda: list(storage.files(bucket)) == ["long", "x"],
        "bucket": lambda: storage.policies(bucket)["soft_delete"] == 0,
        "upload": lambda: storage.write(bucket / "new", cut(DATA)) is None and gcs.get("models/new") == DATA,
        "begin": lambda: storage.write(bucket / "new", cut(LONG)) is None and gcs.get("models/new") == LONG,
        "chunk": lambda: storage.write(bucket / "new", cut(LONG)) is None and gcs.get("models/new") == LONG,
        "rewrite": lambda: storage.copy(bucket / "x", bucket / "new", len(DATA)) is None and gcs.get("models/new") == DATA,
        "delete": lambda: storage.delete(bucket) == [] and gcs.objects() == {},
    }[endpoint]
    if (endpoint, kind) in (("chunk", "flip"), ("chunk", "partial"), ("chunk", "412_after")):
        with pytest.raises(StorageError, match=r"gs://flexjax-test/models/new cannot be written"):  # its source is read once
            operation()
    else:
        assert operation()


@pytest.mark.parametrize("kind", ["lost", "503_after"])
@pytest.mark.parametrize("skip", [1, 3])
def test_a_long_upload_goes_on(bucket, gcs, stepwise, kind, skip):
    gcs.fail(("chunk", kind, 1, skip))
    storage.write(bucket / "new", cut(LONG))
    assert gcs.get("models/new") == LONG


@pytest.mark.parametrize("kind", ["503", "stall", "reset_body", "short"])
def test_what_was_received_is_kept(bucket, gcs, brisk, kind):
    gcs.put("models/x", DATA)
    gcs.fail(("download", kind), seconds=1)
    before = storage.traffic().down
    assert storage.read(bucket / "x", len(DATA)) == DATA
    assert storage.traffic().down - before == len(DATA)


def test_a_lost_answer_is_not_an_error(bucket, gcs):
    path = bucket / "manifest.json"
    storage.replace(path, b"one", 0)
    for content, kind in ((b"two", "lost"), (b"three", "412_after"), (b"four", "503_after")):
        gcs.fail(("upload", kind))
        storage.replace(path, content, storage.generation(path))
        assert gcs.get("models/manifest.json") == content


def test_the_others_object_survives_a_repeated_write(bucket, gcs):
    """Our first try fails, somebody writes, our second try must not overwrite it."""
    generation = gcs.put("models/manifest.json", b"old")
    gcs.fail(("upload", "412"))
    gcs.put("models/manifest.json", b"of another")
    with pytest.raises(StorageError, match="changed meanwhile"):
        storage.replace(bucket / "manifest.json", b"ours", generation)
    assert gcs.get("models/manifest.json") == b"of another"


@pytest.mark.parametrize("kind", ["503", "429", "reset", "stall", "flip", "short", "wrong_crc", "html"])
def test_what_stays_ends_in_one_error(bucket, gcs, impatient, kind):
    gcs.put("models/x", DATA)
    gcs.fail(("get" if kind in ("wrong_crc", "html") else "download", kind, 10**6), seconds=10)
    begun = time.monotonic()
    message = r"gs://flexjax-test/models/x cannot be read within 0.5 seconds \(\d+ tries, last: .+\); check the network"
    with pytest.raises(StorageError, match=message) as caught:
        storage.read(bucket / "x", len(DATA))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10  # the stall was cut


def test_a_trickle_ends_too(bucket, gcs, impatient):
    gcs.put("models/x", DATA)
    gcs.fail(("download", "trickle", 10**6), seconds=0.08)
    with pytest.raises(StorageError, match=r"within 0.5 seconds \(\d+ tries, last: TimeoutError\)"):
        storage.read(bucket / "x", len(DATA))


@pytest.mark.parametrize("operation", ["write", "copy", "delete", "files", "generation", "replace", "policies"])
def test_every_operation_has_a_deadline(bucket, gcs, impatient, operation):
    gcs.put("models/x", DATA)
    gcs.fail(*[(endpoint, "503", 10**6) for endpoint in server.KINDS])
    call = {
        "write": lambda: storage.write(bucket / "new", [DATA]),
        "copy": lambda: storage.copy(bucket / "x", bucket / "new", len(DATA)),
        "delete": lambda: storage.delete(bucket, {"x": storage.Entry(1, 1)}),
        "files": lambda: storage.files(bucket),
        "generation": lambda: storage.generation(bucket / "x"),
        "replace": lambda: storage.replace(bucket / "x", b"new", 1),
        "policies": lambda: storage.policies(bucket),
    }[operation]
    with pytest.raises(StorageError, match=r"gs://flexjax-test/models.* within 0.5 seconds \("):
        call()
    assert list(gcs.objects()) == ["models/x"]


def test_a_long_upload_has_a_deadline(bucket, gcs, stepwise, impatient):
    for endpoint in ("begin", "chunk"):
        gcs.fail((endpoint, "503", 10**6))
        with pytest.raises(StorageError, match=r"models/new cannot be written \("):
            storage.write(bucket / "new", cut(LONG))
    assert gcs.objects() == {}


def test_long_bytes_that_are_wrong(bucket, gcs, stepwise):
    """Of an object above WHOLE_BYTES pieces were handed on before the end: the error comes instead of the last word."""
    gcs.put("models/long", LONG)
    gcs.fail(("download", "flip", 1, 1))
    pieces = storage.blocks(bucket / "long", len(LONG))
    with pytest.raises(StorageError, match=r"models/long: the bytes that came do not have the object's CRC32C"):
        list(pieces)


def test_an_object_that_is_replaced_while_it_is_read(bucket, gcs, stepwise, impatient):
    gcs.put("models/long", LONG)
    pieces = storage.blocks(bucket / "long", len(LONG))
    next(pieces)
    gcs.put("models/long", LONG[::-1])
    with pytest.raises(StorageError, match="it was replaced while it was read"):
        list(pieces)


def test_an_error_of_the_source_is_its_own(bucket, gcs, stepwise):
    def pieces():
        yield LONG
        raise IntegrityError("the source is broken")

    with pytest.raises(IntegrityError, match="the source is broken"):
        storage.write(bucket / "new", pieces())
    assert gcs.objects() == {}  # an upload that did not end leaves no object


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf"])
def test_the_deadline_is_a_number(bucket, monkeypatch, seconds):
    monkeypatch.setenv("FLEXJAX_STORAGE_DEADLINE", seconds)
    with pytest.raises(errors.ConfigError, match="FLEXJAX_STORAGE_DEADLINE"):
        storage.exists(bucket / "x")


def test_no_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(StorageError, match=r"no credentials .*run gcloud auth application-default login"):
        storage.exists(epath.Path("gs://bucket/x"))


def test_threads_share_the_client(bucket, gcs, brisk):
    contents = {f"tensors/{index}": DATA[index:] for index in range(24)}
    gcs.fail(rate=0.2, seed=3, kinds=["503", "reset", "short", "lost"])

    def there_and_back(name):
        storage.write(bucket / name, cut(contents[name]))
        storage.copy(bucket / name, bucket / "copies" / name, len(contents[name]))
        return storage.read(bucket / "copies" / name, len(contents[name]))

    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, contents)) == list(contents.values())


def test_one_client_per_process(bucket):
    storage.exists(bucket / "x")
    storage.exists(bucket / "y")
    assert objects.client() is objects.client()


def test_the_library_is_an_extra():
    """Without it, disks work and gs:// says what to install."""
    program = (
        "import sys; sys.modules['google.cloud'] = None\n"
        "from etils import epath\n"
        "from flexjax import errors, storage\n"
        "assert storage.exists(epath.Path('/')) and storage.traffic() == storage.Traffic(0, 0)\n"
        "try: storage.exists(epath.Path('gs://bucket/x'))\n"
        "except errors.ConfigError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install -e '.[gcs]'" in result.stdout
