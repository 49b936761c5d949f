"""Manifests of people we do not trust: read strictly, refused in one line, before any tensor is opened."""

import json
import os
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib

MODEL = {
    "kind": "model", "anchor": "0" * 64, "experts": {"math": "1" * 64}, "top_k": 2, "calibration": {}, "shared": None
}  # fmt: skip


def put(directory, data):
    (directory / manifest_lib.FILE).write_bytes(data if isinstance(data, bytes) else tree.canonical_json(data) + b"\n")
    return directory


def test_write_and_read_are_inverses(tmp_path):
    sealed = manifest_lib.seal(MODEL)
    manifest_lib.write(tmp_path, sealed)
    assert manifest_lib.read(tmp_path, "model") == sealed
    assert manifest_lib.kind(tmp_path) == "model"
    assert os.listdir(tmp_path) == [manifest_lib.FILE]
    assert sealed["digest"] == manifest_lib.digest_of({**sealed, "digest": "x"})


def resealed(**changes):
    manifest = {**MODEL, "format": manifest_lib.FORMAT, **changes}
    return {**manifest, "digest": manifest_lib.digest_of(manifest)}


GOOD = tree.canonical_json(resealed()) + b"\n"
HOSTILE = {
    "unknown field": (resealed(extra=1), "field 'extra' is unknown"),
    "missing field": ({k: v for k, v in resealed().items() if k != "top_k"}, "field 'top_k' is missing"),
    "wrong kind": (resealed(kind="expert"), "describes kind 'expert', expected 'model'"),
    "kind of another type": (resealed(kind=["model"]), "describes kind"),
    "later format": (resealed(format=3), "has format 3, this version reads 2"),
    "changed content": ({**resealed(), "top_k": 1}, "content has digest"),
    "changed digest": ({**resealed(), "digest": "f" * 64}, "content has digest"),
    "experts of another type": (resealed(experts=["math"]), "'experts' is of type list"),
    "anchor of another type": (resealed(anchor=7), "'anchor' is of type int"),
    "top_k of another type": (resealed(top_k=True), "'top_k' is of type bool"),
    "duplicate key": (GOOD.replace(b'"top_k":2', b'"top_k":2,"top_k":2'), "a key occurs twice"),
    "nested duplicate key": (GOOD.replace(b'{"math"', b'{"math":"a","math"'), "a key occurs twice"),
    "too deep": (b"[" * 21 + b"]" * 21, "nested deeper than 20"),
    "very deep": (b"[" * 500_000, "nested deeper than 20"),
    "too large": (b" " * (manifest_lib.MAX_BYTES + 1), "no honest one has more than"),
    "not an object": (b"[]\n", "not an object"),
    "no JSON": (b"\x00\xff", "is no manifest"),
    "empty": (b"", "is no manifest"),
    "NaN": (GOOD.replace(b'"top_k":2', b'"top_k":NaN'), "is no manifest"),
    "infinity": (GOOD.replace(b'"top_k":2', b'"top_k":1e999'), "is no manifest"),
    "huge number": (GOOD.replace(b'"top_k":2', b'"top_k":' + b"9" * 5000), "is no manifest"),
    "lone surrogate": (GOOD.replace(b'"math"', b'"\\ud800"'), "content has digest"),
    "pretty printed": (json.dumps(resealed(), indent=1).encode(), "not canonical"),
    "cut by its newline": (GOOD[:-1], "not canonical"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not canonical"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path, case):
    content, message = HOSTILE[case]
    with pytest.raises(errors.IntegrityError, match=message) as refusal:
        manifest_lib.read(put(tmp_path, content), "model")
    assert str(tmp_path / manifest_lib.FILE) in str(refusal.value) and len(str(refusal.value)) < 1000


def test_a_file_that_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", GOOD)
    for name, make in {
        "link": lambda path: os.symlink(tmp_path / "elsewhere" / manifest_lib.FILE, path),
        "fifo": os.mkfifo,
        "directory": os.mkdir,
    }.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / manifest_lib.FILE)
        with pytest.raises(errors.IntegrityError, match=r"regular file|bytes|symbolic link"):
            manifest_lib.read(tmp_path / name, "model")


def test_absence_says_what_is_missing(tmp_path):
    with pytest.raises(errors.StorageError, match="the directory does not exist"):
        manifest_lib.read(tmp_path / "nowhere", "anchor")
    with pytest.raises(errors.StorageError, match=r"the directory has no manifest\.json"):
        manifest_lib.read(tmp_path, "anchor")


def test_what_we_write_has_the_fields_of_its_kind():
    with pytest.raises(errors.IntegrityError, match="field 'experts' is missing"):
        manifest_lib.seal({key: value for key, value in MODEL.items() if key != "experts"})


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True))
def test_plain_names_pass(name):
    if name == "public" or ".." in name:
        with pytest.raises(errors.ConfigError):
            manifest_lib.check_name(name)
    else:
        assert manifest_lib.check_name(name) == name
        assert os.path.basename(name) == name and name.casefold() == name


@given(
    st.text(
        st.sampled_from(string.ascii_letters + string.digits + "._-/\\ \n\x00\u00e9\u0430\u0131\u017f\u212a\uff11"), max_size=70
    )
)
def test_no_other_name_passes(name):
    try:
        manifest_lib.check_name(name)
    except errors.ConfigError:
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name, re.ASCII) and ".." not in name and name != "public"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc", "a..b", "A", "Math", "-x", ".x", "_x", "math\n", "m\x00", "m\u0430th", "\ufb01",
     "x" * 64, "public", "math ", "ma\u200bth", "\uff11"],
)  # fmt: skip
def test_bad_names_are_refused(name):
    with pytest.raises(errors.ConfigError, match="expert name"):
        manifest_lib.check_name(name)
