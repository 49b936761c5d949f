"""Files on a disk that somebody else has prepared: nothing but the declared bytes of a regular file is ever read."""

import os
import socket

import pytest
from etils import epath

from flexjax import errors, storage, workdir

MIB = 2**20
IntegrityError, StorageError = errors.IntegrityError, errors.StorageError


@pytest.fixture
def home(tmp_path):
    directory = epath.Path(tmp_path) / "artefact"
    storage.write(directory / "tensors" / "a" / "0", [b"0123", b"456789"])
    return directory


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


def everything(path, size, root=None):
    """What the readers say of a file, which is the same."""
    whole = storage.read(path, size, root)
    assert b"".join(storage.blocks(path, size, root)) == whole == storage.read_small(path, size, root)
    return whole


def refused(path, size, message, root=None, error=IntegrityError):
    readers = [storage.read, lambda *args: list(storage.blocks(*args)), storage.read_small]
    for reader in readers:
        with pytest.raises(error, match=message) as caught:
            reader(path, size, root)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_written_is_read(home):
    path = home / "tensors" / "a" / "0"
    assert everything(path, 10) == everything(path, 10, home) == b"0123456789"
    storage.write(home / "empty", [])
    assert everything(home / "empty", 0) == b""


def test_blocks_are_small(home):
    data = os.urandom(workdir.BLOCK_BYTES * 2 + 5)
    storage.write(home / "large", [data])
    pieces = list(storage.blocks(home / "large", len(data), home))
    assert b"".join(pieces) == data
    assert [len(piece) for piece in pieces] == [workdir.BLOCK_BYTES, workdir.BLOCK_BYTES, 5]
    exact = data[: workdir.BLOCK_BYTES]
    storage.write(home / "exact", [exact])
    assert list(storage.blocks(home / "exact", len(exact))) == [exact]


def test_missing(home):
    refused(home / "tensors" / "a" / "1", 10, "is missing")
    refused(home / "tensors" / "b" / "0", 10, "is missing", home)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_another_size(home, size):
    path = home / "tensors" / "a" / "0"
    for reader in (storage.read, lambda *args: list(storage.blocks(*args))):
        with pytest.raises(IntegrityError, match=f"has 10 bytes, expected {size}"):
            reader(path, size)


def test_small_files_have_a_limit(home):
    with open(home / "huge", "wb") as file:
        file.truncate(2**40)  # a sparse file: nothing may try to hold it
    with pytest.raises(IntegrityError, match=f"has {2**40} bytes; no honest one has more than 100"):
        storage.read_small(home / "huge", 100)
    with pytest.raises(IntegrityError, match="expected 100"):
        storage.read(home / "huge", 100)


def test_link_to_a_file(home):
    os.symlink(home / "tensors" / "a" / "0", home / "link")
    os.symlink(home / "nowhere", home / "dangling")
    for root in (None, home):
        refused(home / "link", 10, "symbolic link", root)
        refused(home / "dangling", 10, "symbolic link", root)


def test_link_to_a_directory(home, tmp_path):
    """The file itself is regular: only a look at each directory on the way shows that it lies somewhere else."""
    os.rename(home / "tensors", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", home / "tensors")
    refused(home / "tensors" / "a" / "0", 10, "symbolic link", home)
    assert "tensors" in storage.files(home)
    assert not any(name.startswith("tensors/") for name in storage.files(home))


def test_the_root_itself_may_be_a_link(home, tmp_path):
    os.symlink(home, tmp_path / "current")
    current = epath.Path(tmp_path / "current")
    assert everything(current / "tensors" / "a" / "0", 10, current) == b"0123456789"
    assert list(storage.files(current)) == ["tensors/a/0"]


def test_no_way_out(home):
    storage.write(home.parent / "secret", [b"0123456789"])
    refused(home / "tensors" / ".." / ".." / "secret", 10, "leads out", home)


def test_special_files(home):
    os.mkfifo(home / "fifo")  # a reader that waited for its writer would never return
    with socket.socket(socket.AF_UNIX) as listener:
        where = os.getcwd()
        os.chdir(home)  # the address of a socket is short
        listener.bind("socket")
        os.chdir(where)
        refused(home / "socket", 10, "no regular file")
    refused(home / "fifo", 10, "no regular file")
    refused(home / "tensors", 10, "no regular file")
    refused(epath.Path("/dev/zero"), 10, "no regular file")
    assert {"fifo", "socket"} <= set(storage.files(home))


def test_a_file_instead_of_a_directory(home):
    refused(home / "tensors" / "a" / "0" / "c", 10, "symbolic link or lies behind one", home)


def test_a_file_that_changes_while_it_is_read(home):
    data = os.urandom(2 * workdir.BLOCK_BYTES)
    for name, size in (("grows", len(data) + 1), ("shrinks", len(data) - 1)):
        storage.write(home / name, [data])
        pieces = storage.blocks(home / name, len(data), home)
        assert next(pieces) == data[: workdir.BLOCK_BYTES]
        os.truncate(home / name, size)
        with pytest.raises(IntegrityError, match="changed its size"):
            list(pieces)


def test_permission_denied(home):
    os.chmod(home / "tensors" / "a" / "0", 0)
    if os.access(home / "tensors" / "a" / "0", os.R_OK):
        pytest.skip("this user may read everything")
    refused(home / "tensors" / "a" / "0", 10, "cannot read .* Permission denied", home, StorageError)
    os.chmod(home / "tensors", 0)
    try:
        with pytest.raises(StorageError, match=r"cannot list .*tensors.*Permission denied"):
            storage.files(home)
        with pytest.raises(StorageError, match="Permission denied"):
            storage.exists(home / "tensors" / "a")
        with pytest.raises(StorageError, match="Permission denied"):
            storage.delete(home)
    finally:
        os.chmod(home / "tensors", 0o755)


def test_files_are_sorted_and_links_not_followed(home):
    for name in ("z", "a/b", "a.b", "tensors/a/1"):
        storage.write(home / name, [name.encode()])
    os.symlink(home, home / "loop")
    listed = storage.files(home)
    assert list(listed) == ["a.b", "a/b", "loop", "tensors/a/0", "tensors/a/1", "z"]
    assert listed["tensors/a/0"] == storage.Entry(10, 1)
    assert storage.files(home / "nothing") == {}


def test_a_new_file_is_new(home, tmp_path):
    path = home / "tensors" / "a" / "0"
    with pytest.raises(StorageError, match="exists already"):
        storage.write(path, [b"other"])
    assert storage.read(path, 10) == b"0123456789"
    os.symlink(tmp_path / "target", home / "link")
    with pytest.raises(StorageError, match="exists already"):
        storage.write(home / "link", [b"other"])
    assert not (tmp_path / "target").exists()
    with pytest.raises(StorageError, match=r"cannot write|exists already"):
        storage.write(path / "below", [b"other"])


def test_an_error_of_the_source_is_its_own(home):
    def pieces():
        yield b"begun"
        raise IntegrityError("the source is broken")

    with pytest.raises(IntegrityError, match="the source is broken"):
        storage.write(home / "new", pieces())


def test_copy(home, tmp_path):
    target = epath.Path(tmp_path) / "copy" / "0"
    storage.copy(home / "tensors" / "a" / "0", target, 10, home)
    assert storage.read(target, 10) == b"0123456789"
    os.symlink(home / "tensors", home / "link")
    with pytest.raises(IntegrityError, match="symbolic link"):
        storage.copy(home / "link" / "a" / "0", target.parent / "1", 10, home)


def test_replace_and_generations(home):
    path = home / "manifest.json"
    assert storage.generation(path) == 0
    assert not storage.exists(path)
    storage.replace(path, b"one", 0)
    assert storage.generation(path) == 1
    with pytest.raises(StorageError, match="changed meanwhile"):
        storage.replace(path, b"two", 0)
    assert storage.read(path, 3) == b"one"
    storage.replace(path, b"two", 1)
    storage.replace(path, b"three", temporary=".unfinished")
    assert storage.read(path, 5) == b"three"
    assert list(storage.files(home)) == ["manifest.json", "tensors/a/0"]
    path.unlink()
    with pytest.raises(StorageError, match="changed meanwhile"):
        storage.replace(path, b"two", 1)


def test_delete_does_not_follow_links(home, tmp_path):
    outside = epath.Path(tmp_path) / "outside"
    storage.write(outside / "precious", [b"precious"])
    os.symlink(outside, home / "directory")
    os.symlink(outside / "precious", home / "file")
    assert storage.delete(home) == []
    assert not home.exists()
    assert storage.read(outside / "precious", 8) == b"precious"
    assert storage.delete(home) == []  # gone already


def test_delete_of_listed_files(home, tmp_path):
    storage.write(home / "tensors" / "b" / "0", [b"b"])
    listed = storage.files(home)
    storage.write(home / "tensors" / "b" / "1", [b"written meanwhile"])
    assert storage.delete(home, listed) == []
    assert list(storage.files(home)) == ["tensors/b/1"]
    assert not (home / "tensors" / "a").exists()  # empty by that
    assert storage.delete(home, listed) == []
    assert storage.delete(home, storage.files(home)) == []
    assert not home.exists()

    outside = epath.Path(tmp_path) / "outside"
    storage.write(outside / "precious", [b"precious"])
    home.mkdir()
    os.symlink(outside, home / "tensors")
    with pytest.raises(StorageError, match="symbolic link"):
        storage.delete(home, {"tensors/precious": storage.Entry(8, 1)})
    with pytest.raises(StorageError, match="symbolic link"):
        storage.delete(home, {"../outside/precious": storage.Entry(8, 1)})
    assert storage.read(outside / "precious", 8) == b"precious"


def test_a_link_is_no_directory_to_delete(home, tmp_path):
    os.symlink(home, tmp_path / "link")
    with pytest.raises(StorageError, match="cannot remove"):
        storage.delete(epath.Path(tmp_path / "link"))
    assert storage.exists(home / "tensors")


def test_a_disk_has_no_policies(home):
    assert storage.policies(home) == {}


@pytest.mark.parametrize("leads", ["to a file", "nowhere"])
def test_what_has_the_name_of_an_unfinished_file_is_not_followed(home, tmp_path, leads):
    victim = tmp_path / "victim"
    if leads == "to a file":
        victim.write_bytes(b"precious")
    os.symlink(victim, home / ".README.md.partial")
    workdir.write(home / "README.md", b"card", ".README.md.partial")
    assert storage.read(home / "README.md", 4) == b"card" and not os.path.lexists(home / ".README.md.partial")
    assert (victim.read_bytes() == b"precious") if leads == "to a file" else not victim.exists()


def test_a_directory_in_the_place_of_an_unfinished_file_is_refused(home):
    (home / ".x").mkdir()
    with pytest.raises(StorageError, match=f"cannot write {home}/x: "):
        workdir.write(home / "x", b"new", ".x")
    assert not (home / "x").exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_lock_is_a_regular_file(home, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    make = {"link": lambda path: os.symlink(victim, path), "fifo": os.mkfifo, "directory": os.mkdir}
    make[kind](home / ".lock")
    with pytest.raises(StorageError, match=f"cannot lock with {home}/.lock: ") as caught, workdir.lock(home):
        pass
    assert "\n" not in str(caught.value) and victim.read_bytes() == b"precious"
