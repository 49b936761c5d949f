"""History: every edited, lost or moved line is named; an operation that was killed is shown, and the next one goes on."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from flexjax import errors, tree
from flexjax.governance import history
from tests.storage import server


def manifest(top_k=2, calibration=None, shared=None, **experts):
    """A model's manifest, as far as history looks at it."""
    fields = {
        "anchor": "a" * 64,
        "experts": {name: tree.sha256(value.encode()) for name, value in experts.items()},
        "top_k": top_k,
        "calibration": calibration or {},
        "shared": shared,
    }
    return fields | {"digest": tree.sha256(tree.canonical_json(fields))}


CREATED = manifest(math="m1")
ADDED = manifest(math="m1", code="c1")
REPLACED = manifest(math="m2", code="c1")
CALIBRATED = manifest(math="m2", code="c1", calibration={"math": {"bias": [-1.5, 0.0], "share": 0.1}})
REMOVED = manifest(math="m2", top_k=1, calibration=CALIBRATED["calibration"])
LIFE = [
    ("create", None, CREATED, ""),
    ("add", CREATED, ADDED, "code"),
    ("replace", ADDED, REPLACED, "math"),
    ("calibrate", REPLACED, CALIBRATED, ""),
    ("remove", CALIBRATED, REMOVED, "code"),
]


def live(model, life=LIFE):
    for step in life:
        history.record(model, history.entry(*step))
    return life[-1][2]["digest"]


def lines_of(model):
    return history.path(model).read_bytes().splitlines(keepends=True)


def states(model, current):
    return [row["state"] for row in history.log(model, current)]


def test_a_life_is_told_as_it_was(tmp_path):
    current = live(tmp_path / "model")
    assert history.path(tmp_path / "model") == tmp_path / "model.history.jsonl" and not (tmp_path / "model").exists()
    entries = history.read(tmp_path / "model")
    assert [entry.operation for entry in entries] == ["create", "add", "replace", "calibrate", "remove"]
    assert entries[-1].experts == REMOVED["experts"] and entries[-1].after == current
    assert entries[-1].what == {
        "name": "code",
        "digest": ADDED["experts"]["code"],
        "former": {"experts": CALIBRATED["experts"], "top_k": 2},
    }
    rows = history.log(tmp_path / "model", current)
    assert {row["state"] for row in rows} == {"done"} and rows[2]["digest"] == REPLACED["experts"]["math"]
    table = history.table(rows).splitlines()
    assert len(table) == 6 and table[5].split()[-1] == "done" and "remove" in table[5] and "code" in table[5]
    assert history.log(tmp_path / "other", None) == [] and "no history" in history.table([])
    assert list(tmp_path.iterdir()) == [tmp_path / "model.history.jsonl"]


def test_sizes_of_those_who_leave_are_kept(tmp_path):
    sizes = {"math": {"d_ff": 6, "rank": 0, "tensors": 9}, "code": {"d_ff": 6, "rank": 2}}
    history.record(tmp_path / "model", history.entry("create", None, ADDED, sizes=sizes))
    history.record(tmp_path / "model", history.entry("remove", ADDED, CREATED, "code", {"d_ff": 6, "rank": 2}, sizes))
    created, removed = history.read(tmp_path / "model")
    assert "sizes" not in created.what and removed.what["sizes"] == {"code": {"d_ff": 6, "rank": 2}}
    assert removed.what["d_ff"] == 6 and removed.what["rank"] == 2
    assert "sizes" not in history.entry("replace", ADDED, REPLACED, "math", sizes={}).what
    assert "sizes" not in history.entry("calibrate", REPLACED, CALIBRATED, sizes=sizes).what


@pytest.mark.parametrize(
    "fact",
    [
        {"d_ff": "6"}, {"rank": -1}, {"d_ff": True}, {"rank": 1.0}, {"sizes": []}, {"sizes": {"../x": {"d_ff": 1, "rank": 0}}},
        {"sizes": {"code": {"d_ff": 1}}}, {"sizes": {"code": {"d_ff": 1, "rank": None}}}, {"sizes": {"code": [1, 0]}},
    ],
)  # fmt: skip
def test_sizes_that_are_none_are_refused(tmp_path, fact):
    entry = history.entry("remove", ADDED, CREATED, "code")
    with pytest.raises(errors.IntegrityError, match="what"):
        history.record(tmp_path / "model", dataclasses.replace(entry, what=entry.what | fact))
    assert not history.path(tmp_path / "model").exists()


def test_lines_are_chained_as_sha256sum_sees_them(tmp_path):
    live(tmp_path / "model")
    lines = lines_of(tmp_path / "model")
    for before, line in itertools.pairwise(lines):
        assert json.loads(line)["previous"] == tree.sha256(before.rstrip(b"\n"))
    assert json.loads(lines[0])["previous"] is None


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    model = tmp_path_factory.mktemp("lived") / "model"
    return model, live(model)


@given(data=st.data())
def test_any_edited_line_is_detected_and_named(lived, data):
    """One byte of any line becomes another; also where it stays valid JSON."""
    model, current = lived
    sound = history.path(model).read_bytes()
    place = data.draw(st.integers(0, len(sound) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != sound[place]))
    number = sound[:place].count(b"\n") + 1
    history.path(model).write_bytes(sound[:place] + bytes([byte]) + sound[place + 1 :])
    try:
        # The last line feed, made another character, is a cut: what remains of the line is not believed.
        with pytest.raises(errors.IntegrityError, match=rf"line {number}\b|line {number - 1}: it leads to"):
            history.log(model, current)
    finally:
        history.path(model).write_bytes(sound)


def edited(line, **fields):
    """A line with other content and a valid digest of its own."""
    entry = json.loads(line) | fields
    entry.pop("digest")
    return tree.canonical_json(entry | {"digest": tree.sha256(tree.canonical_json(entry))}) + b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: [*lines[:2], edited(lines[2], time="2020-01-01T00:00:00+00:00"), *lines[3:]],
            "line 4: it does not follow",
        ),
        (lambda lines: lines[1:], "line 1: it does not follow"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3: it does not follow"),
        (lambda lines: [*lines[:2], lines[3], lines[2], lines[4]], "line 3: it does not follow"),
        (lambda lines: [*lines, lines[-1]], "line 6: it does not follow"),
        (lambda lines: [*lines[:3], b"\n", *lines[3:]], "line 4"),
        (lambda lines: lines[:4], "line 4: it leads to model .* but the model is"),
        (lambda lines: [], ""),
        (lambda lines: [*lines[:4], edited(lines[4], after="f" * 64)], "line 5: it leads to model ffffffffffff"),
        (lambda lines: [*lines[:4], edited(lines[4], before="f" * 64)], "line 4: it leads to model .* but line 5 begins"),
        (lambda lines: [*lines[:4], edited(lines[4], extra=1)], "line 5: it must have the fields"),
        (lambda lines: [*lines[:4], edited(lines[4], time="yesterday")], "line 5: field 'time'"),
        (lambda lines: [*lines[:4], edited(lines[4], experts={"../x": "0" * 64})], "line 5: field 'experts'"),
        (lambda lines: [*lines[:4], edited(lines[4], what={"former": {"code": 1}})], "line 5: field 'what'"),
        (lambda lines: [*lines[:4], lines[4].replace(b":", b": ", 1)], "line 5: it is no object in canonical JSON"),
        (lambda lines: [*lines[:4], b"[" * 100_000 + b"\n"], "line 5"),
        (lambda lines: [b"\xff\xfe\n"], "line 1"),
    ],
)
def test_tampering_is_refused(tmp_path, change, message):
    current = live(tmp_path / "model")
    history.path(tmp_path / "model").write_bytes(b"".join(change(lines_of(tmp_path / "model"))))
    if not message:  # a whole file that is gone cannot be told from one that never was
        assert history.log(tmp_path / "model", current) == []
        return
    with pytest.raises(errors.IntegrityError, match=message):
        history.log(tmp_path / "model", current)


def test_a_last_line_that_was_cut_is_left_out_with_a_note(tmp_path, capfd):
    live(tmp_path / "model", LIFE[:3])
    target = history.path(tmp_path / "model")
    whole, last = target.read_bytes(), lines_of(tmp_path / "model")[-1]
    for keep in (1, len(last) // 2, last.rindex(b"}") - 1, last.index(b"}") + 1, len(last) - 2):
        target.write_bytes(whole[: len(whole) - len(last) + keep])
        assert len(history.read(tmp_path / "model")) == 2
        assert "line 3 was cut" in capfd.readouterr().err
        assert states(tmp_path / "model", ADDED["digest"]) == ["done", "done"]
    history.record(tmp_path / "model", history.entry(*LIFE[2]))
    assert [entry.operation for entry in history.read(tmp_path / "model")] == ["create", "add", "replace"]
    target.write_bytes(whole[:-1])  # an editor took the last line feed away: nothing is lost
    assert len(history.read(tmp_path / "model")) == 3


def test_an_interrupted_operation_is_shown_and_does_not_block(tmp_path):
    model = tmp_path / "model"
    live(model, LIFE[:3])
    assert states(model, ADDED["digest"]) == ["done", "done", "interrupted"]  # its manifest was never committed
    assert [entry.operation for entry in history.settled(history.read(model), ADDED["digest"])] == ["create", "add"]
    history.record(model, history.entry(*LIFE[2]))  # the same again
    assert states(model, ADDED["digest"]) == ["done", "done", "interrupted", "interrupted"]
    assert states(model, REPLACED["digest"]) == ["done", "done", "interrupted", "done"]
    other = manifest(code="c1")
    history.record(model, history.entry("remove", REPLACED, other, "math"))
    history.record(model, history.entry("calibrate", REPLACED, CALIBRATED))  # the removal was interrupted
    history.record(model, history.entry(*LIFE[4]))
    assert states(model, REMOVED["digest"]) == ["done", "done", "interrupted", "done", "interrupted", "done", "done"]
    with pytest.raises(errors.IntegrityError, match="but the model is"):
        history.log(model, other["digest"])


def test_an_interrupted_first_creation(tmp_path):
    model = tmp_path / "model"
    history.record(model, history.entry(*LIFE[0]))
    assert states(model, None) == ["interrupted"]
    history.record(model, history.entry(*LIFE[0]))
    assert states(model, CREATED["digest"]) == ["interrupted", "done"]
    live(model, LIFE[1:3])
    history.record(model, history.entry("create", None, ADDED))  # somebody removed the directory and began anew
    assert states(model, ADDED["digest"]) == ["interrupted", "done", "done", "done", "done"]


def test_two_writers_of_a_bucket_of_whom_one_commits(tmp_path):
    """Without a lock both may record; the manifest's precondition lets one commit, and the history tells which."""
    model = tmp_path / "model"
    live(model, LIFE[:2])
    history.record(model, history.entry(*LIFE[2]))
    history.record(model, history.entry("remove", ADDED, CREATED, "code"))
    assert states(model, REPLACED["digest"]) == ["done", "done", "done", "interrupted"]
    history.record(model, history.entry(*LIFE[3]))
    assert states(model, CALIBRATED["digest"]) == ["done", "done", "done", "interrupted", "done"]


def test_back_and_forth(tmp_path):
    model = tmp_path / "model"
    live(model, LIFE[:2])
    for _ in range(3):
        history.record(model, history.entry("remove", ADDED, CREATED, "code"))
        history.record(model, history.entry("add", CREATED, ADDED, "code"))
    history.record(model, history.entry("replace", ADDED, ADDED, "code"))  # with itself
    assert states(model, ADDED["digest"]) == ["done"] * 9


def test_an_operation_that_does_not_begin_at_the_model_is_not_recorded(tmp_path):
    live(tmp_path / "model", LIFE[:2])
    before = history.path(tmp_path / "model").read_bytes()
    with pytest.raises(errors.IntegrityError, match=r"line 2: it leads to model .* but line 3 begins at"):
        history.record(tmp_path / "model", history.entry(*LIFE[4]))
    with pytest.raises(errors.IntegrityError, match="line 3: field 'operation'"):
        history.record(tmp_path / "model", history.entry("Remove!", ADDED, CREATED, "code"))
    assert history.path(tmp_path / "model").read_bytes() == before


def test_a_model_that_is_older_than_its_history(tmp_path):
    history.record(tmp_path / "model", history.entry(*LIFE[2]))
    assert states(tmp_path / "model", REPLACED["digest"]) == ["done"]


def test_a_history_that_another_process_wrote_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    live(tmp_path / "model", LIFE[:2])
    monkeypatch.setattr(history.storage, "generation", lambda path: 0)  # as it was before the other one created it
    with pytest.raises(errors.StorageError, match="meanwhile"):
        history.record(tmp_path / "model", history.entry(*LIFE[2]))


@pytest.fixture
def bucket(monkeypatch):
    running = server.Server()
    with server.connected(running, monkeypatch):
        yield epath.Path(f"gs://{server.BUCKET}/models")
    running.close()


def test_in_a_bucket_two_who_write_at_once_do_not_lose_a_line(bucket, monkeypatch):
    model, replace = bucket / "one", history.storage.replace
    current = live(model, LIFE[:2])
    assert states(model, current) == ["done", "done"] and history.storage.exists(bucket / "one.history.jsonl")

    def too_late(*arguments):
        monkeypatch.setattr(history.storage, "replace", replace)
        history.record(model, history.entry(*LIFE[2]))  # somebody else is faster
        replace(*arguments)

    monkeypatch.setattr(history.storage, "replace", too_late)
    with pytest.raises(errors.StorageError, match=r"one\.history\.jsonl"):
        history.record(model, history.entry("remove", ADDED, CREATED, "code"))
    assert [entry.operation for entry in history.read(model)] == ["create", "add", "replace"]


def test_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    expected = tmp_path / "real.history.jsonl"
    monkeypatch.chdir(tmp_path / "real")
    for model in (tmp_path / "real", f"{tmp_path}/real/", ".", "../real", "../link"):
        assert os.fspath(history.path(model)) == os.fspath(expected)
    assert os.fspath(history.path("gs://bucket/models/one/")) == "gs://bucket/models/one.history.jsonl"
    assert os.fspath(history.path("gs://bucket/one")) == "gs://bucket/one.history.jsonl"
    for nowhere in ("/", "gs://bucket"):
        with pytest.raises(errors.ConfigError, match="no place beside"):
            history.path(nowhere)


def test_a_linked_history_is_not_followed(tmp_path):
    live(tmp_path / "model")
    history.path(tmp_path / "model").rename(tmp_path / "elsewhere")
    os.symlink("elsewhere", history.path(tmp_path / "model"))
    with pytest.raises(errors.IntegrityError, match=r"model\.history\.jsonl"):
        history.read(tmp_path / "model")


def plan_of(*life):
    """What would revert the last step of a life."""
    entries = [history.entry(*step) for step in life]
    return history.revert_plan(history.settled(entries, life[-1][2]["digest"]))


def test_what_would_undo_each_operation():
    removed = plan_of(*LIFE)
    digest = ADDED["experts"]["code"]
    assert removed["add"] == {"code": digest} and removed["remove"] == [] and removed["restore"] == {"top_k": 2}
    assert removed["expect"] == CALIBRATED["digest"]
    assert f"expert 'code' with digest {digest} must be given" in removed["text"] and "bytes are gone" in removed["text"]
    added = plan_of(*LIFE[:2])
    assert (added["add"], added["remove"], added["restore"], added["expect"]) == ({}, ["code"], {}, CREATED["digest"])
    replaced = plan_of(*LIFE[:3])
    assert (replaced["add"], replaced["remove"]) == ({"math": CREATED["experts"]["math"]}, [])
    calibrated = plan_of(*LIFE[:4])
    assert (calibrated["add"], calibrated["remove"], calibrated["restore"]) == ({}, [], {"calibration": {}})
    for life, message in (((), "no operation"), (LIFE[:1], "remove its directory")):
        with pytest.raises(errors.PolicyError, match=message):
            history.revert_plan([history.entry(*step) for step in life])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "1", "2"])), min_size=1, max_size=12))
def test_a_plan_leads_back(steps):
    """Whatever was added, replaced or removed: with what the plan asks for, the model is the former one."""
    experts, before, entries = {}, manifest(), []
    for name, version in steps:
        experts = {other: v for other, v in experts.items() if other != name} | ({name: version} if version else {})
        after = manifest(top_k=len(experts) + 1, calibration={n: {"share": 0.1} for n in experts}, **experts)
        entries.append(history.entry("replace", before, after, name))
        plan = history.revert_plan(history.settled(entries, after["digest"]))
        again = {n: d for n, d in after["experts"].items() if n not in plan["remove"]} | plan["add"]
        fields = {key: value for key, value in (after | plan["restore"] | {"experts": again}).items() if key != "digest"}
        assert tree.sha256(tree.canonical_json(fields)) == before["digest"] == plan["expect"]
        before = after


def test_finding_an_expert_that_left():
    entries = [history.entry(*step) for step in LIFE]
    found = history.find_removed(entries, "code")
    assert (found.operation, found.what["digest"]) == ("remove", ADDED["experts"]["code"])
    with pytest.raises(errors.PolicyError, match="is in the model"):
        history.find_removed(entries, "math")
    with pytest.raises(errors.PolicyError, match="no removal of an expert 'law'"):
        history.find_removed(entries, "law")
    again = history.entry("add", REMOVED, CALIBRATED, "code")
    with pytest.raises(errors.PolicyError, match="is in the model"):
        history.find_removed([*entries, again], "code")


CHILD = textwrap.dedent("""
    import sys
    from flexjax import tree
    from flexjax.governance import history
    model, number = sys.argv[1], int(sys.argv[2])
    print("ready", flush=True)
    def digest(n):
        return tree.sha256(str(n).encode())
    while True:
        entry = history.Entry("add", {"a": digest(-number)}, {"former": {}}, digest(number), digest(number + 1))
        history.record(model, entry)
        number += 1
        print(number, flush=True)
""")


@pytest.mark.reliability
def test_a_kill_while_recording_loses_nothing_and_leaves_nothing(tmp_path):
    """Real SIGKILLs: every line that was announced is there, the chain is whole, and the next record goes on."""
    model, number, dice = tmp_path / "model", 0, random.Random(4)
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(model), str(number)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        for _ in range(dice.randrange(1, 12)):
            number = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        said, _ = child.communicate()
        number = max([number, *(int(line) for line in said.split("\n")[:-1])])
        entries = history.read(model)
        assert len(entries) in (number, number + 1)  # recorded, killed before it could say so
        number = len(entries)
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"model.history.jsonl", ".model.history.jsonl.partial"}
