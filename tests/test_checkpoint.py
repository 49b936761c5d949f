"""Training checkpoints: atomic, verified, and never silently from scratch (G4, G11)."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import checkpoint, errors, tree

FACTS = {"config": {"seed": 0, "rate": 1e-05}, "data": {"source": "d"}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: tree.Tree
    step: object


def state(value=0.0, dtype=jnp.float32, width=3, extra=False):
    params = {"experts": {"math": jnp.full((2, width), value, dtype)}, "scale": jnp.asarray(value, jnp.float32)}
    return State(params | ({"extra": jnp.zeros(2)} if extra else {}), jnp.asarray(7, jnp.int32))


def saved(directory, steps=(1, 2, 3), keep=10):
    found = checkpoint.Checkpoints(directory, keep)
    for step in steps:
        found.save(step, state(float(step)), FACTS)
    found.wait()
    return found


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Three committed steps, to be copied."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    saved(directory)
    return directory


@pytest.fixture
def home(pristine, tmp_path):
    subprocess.run(["cp", "-r", pristine, tmp_path / "checkpoints"], check=True)
    return tmp_path / "checkpoints"


def files_of(step_directory):
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


def test_what_was_saved_is_restored_bit_for_bit_with_its_facts(home):
    found = checkpoint.Checkpoints(home, 10)
    assert found.steps() == [1, 2, 3] and found.facts(2) == FACTS
    restored = found.restore(2, state())
    assert isinstance(restored, State)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state(2.0)), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_files_are_hashed_in_blocks(home, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.workdir, "BLOCK_BYTES", 7)
    assert max(len(block) for block in checkpoint.workdir.blocks(home / "3" / checkpoint.COMMIT)) == 7
    checkpoint.Checkpoints(home, 10).restore(3, state())
    assert checkpoint.workdir.file_digest(home / "3" / checkpoint.COMMIT) == tree.sha256(
        (home / "3" / checkpoint.COMMIT).read_bytes()
    )


def test_a_step_is_on_disk_with_every_directory_before_it_counts(tmp_path, monkeypatch):
    done, sync = [], checkpoint.workdir.sync
    monkeypatch.setattr(checkpoint.workdir, "sync", lambda path: (done.append(os.fspath(path)), sync(path)))
    found = saved(tmp_path / "c", steps=(1,))
    below = {os.path.relpath(path, tmp_path / "c" / "1") for path in (tmp_path / "c" / "1").rglob("*")} | {"."}
    pending = tmp_path / "c" / f"{checkpoint.PENDING}1"
    assert {os.path.relpath(path, pending) for path in done if path.startswith(str(pending))} == below
    assert done[-1] == os.fspath(found.directory) and done[0] == str(tmp_path)


def test_files_are_plain_slices_that_name_their_array(home):
    names = {str(path.relative_to(home / "3")) for path in files_of(home / "3")}
    layers = sorted(name for name in names if "experts.math" in name and "/c/" in name)
    assert [name[-6:] for name in layers] == ["/c/0/0", "/c/1/0"]
    for name in layers:
        data = (home / "3" / name).read_bytes()
        assert data.startswith(np.full(3, 3, np.float32).tobytes()) and len(data) == 12 + 20  # and the shard's index
    assert not any("ocdbt" in name for name in names)


def test_only_a_layer_axis_is_cut(tmp_path):
    found = checkpoint.Checkpoints(tmp_path / "c", 1)
    params = {"embed": {"embedding": jnp.ones((4, 3))}, "layers": {"attention": {"q": jnp.arange(24.0).reshape(4, 3, 2)}}}
    like = State(params, jnp.zeros((), jnp.int32))
    found.save(1, like, {})
    found.wait()
    names = sorted(
        path.relative_to(tmp_path / "c" / "1" / "state" / "state").as_posix() for path in (tmp_path / "c").rglob("0")
    )
    q = [f"params.layers.attention.q/c/{layer}/0/0" for layer in range(4)]
    assert [name for name in names if (tmp_path / "c" / "1" / "state" / "state" / name).is_file()] == [
        "params.embed.embedding/c/0/0",
        *q,
    ]
    for one, other in zip(jax.tree.leaves(found.restore(1, like)), jax.tree.leaves(like), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_the_newest_steps_are_kept_by_number_whatever_the_clock_says(tmp_path):
    found = saved(tmp_path / "c", steps=(5, 10, 15), keep=2)
    assert found.steps() == [10, 15]
    hour = time.time() - 3600
    os.utime(tmp_path / "c" / "15", (hour, hour))
    os.utime(tmp_path / "c" / "15" / checkpoint.COMMIT, (hour, hour))
    again = checkpoint.Checkpoints(tmp_path / "c", 2)
    assert again.steps()[-1] == 15
    again.save(100, state(), FACTS)
    again.save(20, state(), FACTS)  # the clock and the order of calls decide nothing
    again.wait()
    assert again.steps() == [20, 100]
    assert {entry.name for entry in (tmp_path / "c").iterdir()} == {"20", "100"}


def test_a_saved_state_is_that_of_the_call_even_if_its_buffers_are_given_away(tmp_path):
    found = checkpoint.Checkpoints(tmp_path / "c", 2)
    update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    current = update(state(1.0))
    found.save(1, current, FACTS)
    current = update(update(current))
    found.wait()
    assert float(found.restore(1, state()).params["scale"]) == 2.0 and float(current.params["scale"]) == 4.0


def test_saving_a_committed_step_again_changes_nothing(home):
    before = {path: path.read_bytes() for path in files_of(home)}
    found = checkpoint.Checkpoints(home, 10)
    found.save(3, state(99.0), FACTS)
    found.wait()
    assert {path: path.read_bytes() for path in files_of(home)} == before


@pytest.mark.parametrize(
    ("like", "array"),
    [
        (state(dtype=jnp.bfloat16), "experts.*math.* is float32.* needs bfloat16"),
        (state(width=4), r"experts.*math.* is float32\[2, 3\], this run needs float32\[2, 4\]"),
        (state(extra=True), r"extra.* is absent, this run needs float32\[2\]"),
        (
            State({"scale": jnp.zeros(())}, jnp.asarray(7, jnp.int32)),
            r"experts.*math.* is float32\[2, 3\], this run needs none",
        ),
    ],
)
def test_arrays_of_another_dtype_shape_or_name_are_refused_by_name(home, like, array):
    with pytest.raises(errors.IntegrityError, match=array):
        checkpoint.Checkpoints(home, 10).restore(3, like)


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path, rng):
    path.unlink()


def lengthen(path, rng):
    path.write_bytes(path.read_bytes() + b"\0")


def detected(home, rounds, seed):
    """Damages a random file of step 3 in a random way, `rounds` times; returns how often the file was named."""
    rng, count = random.Random(seed), 0
    files = files_of(home / "3")
    found = checkpoint.Checkpoints(home, 10)
    for _ in range(rounds):
        path = rng.choice([*files, home / "3" / checkpoint.COMMIT])
        before = path.read_bytes()
        rng.choice([flip, flip, flip, cut, delete, lengthen] if before else [delete, lengthen])(path, rng)
        try:
            found.restore(3, state())
        except errors.IntegrityError as error:
            count += str(path) in str(error)
        path.write_bytes(before)
    found.restore(3, state())
    return count


def test_every_damage_is_detected_and_its_file_named(home):
    assert detected(home, rounds=300, seed=0) == 300


@pytest.mark.reliability
def test_a_thousand_damages_are_detected_and_their_files_named(home):
    assert detected(home, rounds=1000, seed=1) == 1000


def test_every_single_bit_of_the_commit_file_counts(home):
    path = home / "3" / checkpoint.COMMIT
    data = path.read_bytes()
    found = checkpoint.Checkpoints(home, 10)
    places = [match.start() for match in re.finditer(rb"1e-05|\"seed\":0", data)]
    for place in range(places[0], places[-1] + 8):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
            with pytest.raises(errors.IntegrityError, match=re.escape(str(path))):
                found.facts(3)


def test_a_file_that_was_never_written_is_refused(home):
    (home / "3" / "state" / "note.txt").write_text("hello")
    with pytest.raises(errors.IntegrityError, match=r"note\.txt was not written by this run"):
        checkpoint.Checkpoints(home, 10).restore(3, state())


def test_a_commit_of_another_step_is_refused(home):
    (home / "2").rename(home / "9")
    with pytest.raises(errors.IntegrityError, match=r"9/commit\.json"):
        checkpoint.Checkpoints(home, 10).facts(9)


def test_uncommitted_empty_and_strange_directories_are_never_a_step(home, capsys):
    (home / "9").mkdir()
    (home / "8").mkdir()
    (home / "8" / "state").mkdir()
    for name in ("notes", "07", "²", "-1", "3.5", "3 "):
        (home / name).mkdir()
        (home / name / checkpoint.COMMIT).write_text("{}")
    (home / "11").write_text("a file")
    found = checkpoint.Checkpoints(home, 10)
    assert found.steps() == [1, 2, 3]
    said = capsys.readouterr().err
    assert [said.count(f"{home / name} was never committed") for name in ("9", "8", "11")] == [1, 1, 1]
    assert (home / "8" / "state").exists()


def test_a_step_written_where_an_uncommitted_directory_lies_replaces_it_but_deletes_nothing(home):
    (home / "4").mkdir()
    (home / "4" / "precious").write_text("x")
    found = checkpoint.Checkpoints(home, 10)
    found.save(4, state(4.0), FACTS)
    found.wait()
    assert found.steps() == [1, 2, 3, 4]
    found.restore(4, state())
    assert [path.read_text() for path in home.glob("uncommitted-4-*/precious")] == ["x"]


def test_nothing_starts_from_scratch_where_steps_lie_of_which_none_is_committed(home):
    for step in (1, 2, 3):
        (home / str(step) / checkpoint.COMMIT).unlink()
    with pytest.raises(errors.IntegrityError, match="none that was committed"):
        checkpoint.Checkpoints(home, 10)


def test_empty_step_directories_alone_are_only_warned_of(tmp_path, capsys):
    (tmp_path / "5").mkdir()
    assert checkpoint.Checkpoints(tmp_path, 2).steps() == []
    assert "5 was never committed and is ignored" in capsys.readouterr().err


def test_what_a_kill_left_half_done_is_swept(home):
    for name in ("writing-4", "discarded-1"):
        (home / name / "state" / "deep").mkdir(parents=True)
        (home / name / "state" / "deep" / "0").write_bytes(b"x")
    (home / "writing-5").write_text("a file")
    found = checkpoint.Checkpoints(home, 10)
    assert {entry.name for entry in home.iterdir()} == {"1", "2", "3"} == set(map(str, found.steps()))


def test_steps_set_aside_are_steps_no_more_and_stay_on_disk(home):
    found = checkpoint.Checkpoints(home, 10)
    found.set_aside([3])
    assert found.steps() == [1, 2] and len(list(home.glob("damaged-3-*/commit.json"))) == 1
    found.save(3, state(3.0), FACTS)
    found.wait()
    found.restore(3, state())
    assert checkpoint.Checkpoints(home, 10).steps() == [1, 2, 3]


def test_closing_waits_for_the_write_and_raises_nothing(home):
    found = checkpoint.Checkpoints(home, 10)
    found.save(4, state(4.0), FACTS)
    found.close()
    assert found.steps() == [1, 2, 3, 4]
    found.close()


def test_size_and_description_are_of_all_arrays():
    assert checkpoint.size(state(width=5)) == 2 * 5 * 4 + 4 + 4
    assert sorted(checkpoint.describe(state()).values()) == ["float32[2, 3]", "float32[]", "int32[]"]


FULL_DISK = """
import json, resource, signal, sys
import jax.numpy as jnp
from flexjax import checkpoint, errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = checkpoint.Checkpoints(sys.argv[1], 10)
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
said, step = None, found.steps()[-1] if found.steps() else 0
try:
    for step in range(step + 1, step + 200):
        found.save(step, {"embed": {"w": jnp.full((int(sys.argv[3]), 1024), float(step))}}, {})
    found.wait()
except errors.StorageError as error:
    said = str(error)
names = [entry.name for entry in found.directory.iterdir()]
left = sorted(name for name in names if not name.startswith("writing-"))  # other threads may still write; the next start sweeps
print(json.dumps({"said": said, "step": step, "steps": found.steps(), "left": left}))
"""


def fill(directory, limit, kib):
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, directory, str(limit), str(kib // 4)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def restored(directory, like):
    found = checkpoint.Checkpoints(directory, 100)
    for step in found.steps():
        found.restore(step, like)
    return found.steps()


@pytest.mark.parametrize("limit", [2**18, 100])  # an array file does not fit; not even the metadata does
def test_a_file_that_does_not_fit_stops_the_run_at_the_next_save_and_leaves_older_steps(home, limit):
    result = fill(home, limit, kib=512)
    assert f"cannot write checkpoint {home / '4'}" in result["said"] and "committed steps are intact: 1, 2, 3" in result["said"]
    assert result["step"] <= 5 and result["left"] == ["1", "2", "3"]
    assert restored(home, state()) == [1, 2, 3]


@pytest.mark.reliability
def test_a_full_file_system_stops_the_run_and_leaves_older_steps(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "flexjax-test", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        result = fill(tmp_path / "checkpoints", 0, kib=1536)
        assert f"cannot write checkpoint {tmp_path / 'checkpoints'}" in result["said"], result
        assert "ENOSPC" in result["said"] or "No space left" in result["said"] or "RESOURCE_EXHAUSTED" in result["said"]
        steps = restored(tmp_path / "checkpoints", {"embed": {"w": jnp.zeros((1536 // 4, 1024))}})
        assert len(steps) >= 5 and result["left"] == sorted(map(str, steps)) and result["step"] <= steps[-1] + 2
    finally:
        subprocess.run(["umount", tmp_path], check=True)
