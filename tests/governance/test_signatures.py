"""Signatures and trust: what a key vouches for, and everything that it does not."""

import functools
import json
import os
import stat

import hypothesis
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import strategies as st

from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance
from flexjax.governance import signatures

P = signatures.PRIME
ZEROS, ONES = "0" * 64, "1" * 64


def expert(name="math", owner="Clinic A", version=1, **changed):
    fields = {
        "kind": "expert", "name": name, "anchor": ZEROS, "config": ZEROS, "tokenizer": ZEROS, "d_ff": 8, "rank": 0,
        "tensors": {}, "training": {"steps": 4}, **provenance.Provenance(owner=owner, version=version).fields(),
    }  # fmt: skip
    return manifest_lib.seal(fields | changed)


def model(**changed):
    fields = {"kind": "model", "anchor": ZEROS, "experts": {"math": ONES}, "top_k": 2, "calibration": {}, "shared": None}
    return manifest_lib.seal(fields | changed)


def put(directory, manifest):
    directory.mkdir(parents=True, exist_ok=True)
    manifest_lib.write(directory, manifest)
    return directory


def check(directory, trust=None):
    return signatures.check(directory, manifest_lib.read(directory, manifest_lib.kind(directory)), trust)


@pytest.fixture
def key(tmp_path):
    signatures.generate_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def public(key):
    return (key.parent / "key.pem.pub").read_text().strip()


@pytest.fixture
def bundle(tmp_path, key):
    directory = put(tmp_path / "math", expert())
    signatures.sign(directory, key)
    return directory


@pytest.fixture
def trusted(tmp_path, public):
    """Writes and reads a trust file in which the key belongs to Clinic A, unless told otherwise."""

    def load(owner="Clinic A", names=("math",), key=public, **others):
        path = tmp_path / "trust.json"
        path.write_text(json.dumps({"keys": {key: {"owner": owner, "names": list(names)}}, **others}))
        return signatures.load_trust(path)

    return load


def test_a_key_is_a_private_file_and_a_public_one(tmp_path):
    public = signatures.generate_key(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert (tmp_path / "key.pub").read_text() == public + "\n"
    private = serialization.load_pem_private_key((tmp_path / "key").read_bytes(), None)
    assert private.public_key().public_bytes_raw().hex() == public
    assert (tmp_path / "key").read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert signatures.generate_key(tmp_path / "other") != public


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_a_key_is_never_overwritten(tmp_path, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(errors.StorageError, match="never overwritten"):
        signatures.generate_key(tmp_path / "key")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {there: "precious"}, "a pair or nothing"


def test_a_key_needs_a_place(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in ("missing/key", "link"):
        with pytest.raises(errors.StorageError, match=str(tmp_path)):
            signatures.generate_key(tmp_path / place)
    assert not (tmp_path / "elsewhere").exists()


def test_states(tmp_path, bundle, public, trusted):
    unsigned = check(put(tmp_path / "unsigned", expert()))
    assert (unsigned.state, unsigned.key, unsigned.owner) == ("unsigned", "", "")
    signed = check(bundle)
    assert (signed.state, signed.key, signed.owner) == ("signed", public, "")
    assert public in signed.text and "nobody vouched for" in signed.text
    vouched = check(bundle, trusted())
    assert (vouched.state, vouched.key, vouched.owner) == ("trusted", public, "Clinic A")
    assert public in vouched.text and "Clinic A" in vouched.text


def test_signing_again_replaces_and_is_the_same(bundle, key, tmp_path):
    before = (bundle / "signature.json").read_bytes()
    assert tree.canonical_json(signatures.sign(bundle, key)) + b"\n" == before == (bundle / "signature.json").read_bytes()
    other = signatures.generate_key(tmp_path / "other")
    signatures.sign(bundle, tmp_path / "other")
    assert check(bundle).key == other
    assert {path.name for path in bundle.iterdir()} == {"manifest.json", "signature.json"}


def test_a_new_manifest_needs_a_new_signature(bundle, key, trusted):
    manifest_lib.write(bundle, expert(version=2))
    with pytest.raises(errors.IntegrityError, match=r"signature\.json.*does not fit"):
        check(bundle)
    signatures.sign(bundle, key)
    assert check(bundle, trusted()).state == "trusted"


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"key": ONES}, "does not know this key"),
        ({"names": []}, "may not sign 'math', only nothing"),
        ({"names": ["code", "mat", "maths", "math-*", "model:*", "anchor:*"]}, "may not sign 'math'"),
        ({"owner": "Clinic B"}, "manifest says owner 'Clinic A', the key is 'Clinic B''s"),
        ({"owner": "clinic a"}, "manifest says owner 'Clinic A'"),
        ({"least_version": {"math": 2}}, "version 1, expected at least 2"),
        ({"revoked": ["KEY"]}, "key KEY is revoked"),
        ({"revoked": ["DIGEST"]}, "digest DIGEST is revoked"),
    ],
)
def test_trust_refuses(bundle, public, trusted, rules, says):
    """Each rule alone: unknown key, name, owner, version, revoked key and manifest; the expert and the key are named."""
    digest = manifest_lib.read(bundle, "expert")["digest"]
    words = {"KEY": public, "DIGEST": digest}
    if "revoked" in rules:
        rules = {"revoked": [words[word] for word in rules["revoked"]]}
    with pytest.raises(errors.PolicyError) as refused:
        check(bundle, trusted(**rules))
    message = str(refused.value)
    for word, value in words.items():
        says = says.replace(word, value)
    assert says.removesuffix("'s") in message and "expert 'math'" in message and public in message
    assert check(bundle).state == "signed", "without trust it is a sound signature"


def test_trust_refuses_what_is_unsigned(tmp_path, trusted):
    with pytest.raises(errors.PolicyError, match=r"expert 'math'.*unsigned"):
        check(put(tmp_path / "unsigned", expert()), trusted(names=["*"]))


@pytest.mark.parametrize("names", [["math"], ["m*"], ["math*"], ["*"], ["code", "math"]])
def test_trust_allows(bundle, trusted, names):
    assert check(bundle, trusted(names=names, least_version={"math": 1, "code": 9}, revoked=[ONES])).state == "trusted"


def test_models_have_no_names(tmp_path, key, trusted):
    """`*` is every expert and no model; no name of an expert can stand for a model."""
    directory = put(tmp_path / "model", model())
    signatures.sign(directory, key)
    digest = manifest_lib.read(directory, "model")["digest"]
    for names in (["*"], ["model*"], ["anchor:*"], [f"model:{ONES}"]):
        with pytest.raises(errors.PolicyError, match="may not sign 'model:"):
            check(directory, trusted(names=names))
    for names in (["model:*"], [f"model:{digest}"], [f"model:{digest[:5]}*"]):
        assert check(directory, trusted(names=names)).state == "trusted"


@pytest.mark.parametrize("name", ["model:x", "anchor:" + ZEROS, "Math", "ma/th", "public", "m\u0430th", ""])
def test_a_name_that_nobody_could_check_is_refused(tmp_path, key, name):
    directory = put(tmp_path / "bundle", expert(name=name))
    with pytest.raises(errors.ConfigError, match="expert name"):
        signatures.sign(directory, key)
    with pytest.raises(errors.ConfigError, match="expert name"):
        check(directory)


def test_what_a_model_averaged_is_signed_with_the_model(tmp_path, key):
    shared = manifest_lib.seal({"kind": "shared", "anchor": ZEROS, "experts": {"math": ONES}, "tensors": {}})
    with pytest.raises(errors.ConfigError, match="sign the model"):
        signatures.sign(put(tmp_path / "shared", shared), key)


def test_replays(tmp_path, bundle, key):
    """The signature of another release, name, owner, kind or purpose fits nothing else."""
    others = [expert(version=2), expert(name="code"), expert(owner="Clinic B"), expert(anchor=ONES), expert(d_ff=9), model()]
    for number, other in enumerate(others):
        directory = put(tmp_path / str(number), other)
        (directory / "signature.json").write_bytes((bundle / "signature.json").read_bytes())
        with pytest.raises(errors.IntegrityError, match="does not fit"):
            check(directory)
    content = tree.canonical_json(manifest_lib.read(bundle, "expert"))
    certificate = signatures.sign_bytes(content, "certificate", key)
    assert signatures.verify_bytes(content, "certificate", certificate, "c") == certificate["key"]
    with pytest.raises(errors.IntegrityError, match="does not fit"):
        signatures.verify_bytes(content, "manifest", certificate, "c")
    (bundle / "signature.json").write_bytes(tree.canonical_json(certificate) + b"\n")
    with pytest.raises(errors.IntegrityError, match="does not fit"):
        check(bundle)


def test_a_forged_manifest_that_keeps_its_digest(bundle):
    """The digest is of the manifest; somebody who passes another one with the old digest is caught by the signature alone."""
    forged = manifest_lib.read(bundle, "expert") | {"owner": "Clinic B"}
    with pytest.raises(errors.IntegrityError, match="does not fit"):
        signatures.check(bundle, forged, None)


def refused_bytes(bundle, file, data):
    """Whether a bundle with another content of a file is refused; the file is restored."""
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        check(bundle)
    except errors.IntegrityError:
        return True
    finally:
        file.write_bytes(before)
    return False


CHANGES = [
    lambda byte: bytes([byte ^ 0x20]),  # upper case
    lambda byte: bytes([byte ^ 1]),
    lambda byte: bytes([byte ^ 0x80]),
    lambda byte: b"",
    lambda byte: bytes([byte, byte]),
]


@pytest.mark.parametrize("name", ["manifest.json", "signature.json"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.reliability)])
def test_every_changed_byte_is_refused(bundle, name, every):
    """At every place, a flipped bit, a byte less or a byte more: one of them, or each."""
    data = (bundle / name).read_bytes()
    for i, byte in enumerate(data):
        for change in CHANGES if every else [CHANGES[i % len(CHANGES)]]:
            changed = data[:i] + change(byte) + data[i + 1 :]
            assert refused_bytes(bundle, bundle / name, changed), f"byte {i}: {byte:#x} became {change(byte)!r}"
    assert check(bundle).state == "signed"


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=100)
@hypothesis.given(data=st.data())
def test_any_change_is_refused(bundle, data):
    """Any number of any bytes, put anywhere in the place of any others."""
    file = bundle / data.draw(st.sampled_from(["manifest.json", "signature.json"]))
    before = file.read_bytes()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(before))] * 2)))
    changed = before[:start] + data.draw(st.binary(max_size=8)) + before[stop:]
    hypothesis.assume(changed != before)
    assert refused_bytes(bundle, file, changed)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "upper"}, {"signature": "upper"}, {"algorithm": "ED25519"}, {"algorithm": "none"}, {"format": 2},
        {"format": True}, {"format": 1.0}, {"format": "1"}, {"key": None}, {"signature": [1]}, {"key": ""}, {"more": 1},
        {"key": 7}, {"signature": "0" * 128}, {"key": ZEROS[:-1]}, {"key": ZEROS + "\n"},
    ],
)  # fmt: skip
def test_forms_of_a_signature(bundle, change):
    signature = json.loads((bundle / "signature.json").read_bytes())
    changed = {field: signature[field].upper() if value == "upper" else value for field, value in change.items()}
    data = tree.canonical_json(signature | changed) + b"\n"
    assert refused_bytes(bundle, bundle / "signature.json", data)
    for field in set(change) & set(signature):
        rest = {name: value for name, value in signature.items() if name != field}
        assert refused_bytes(bundle, bundle / "signature.json", tree.canonical_json(rest) + b"\n"), "a field is missing"


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"null\n", b"[]\n", b'""\n', b"[" * 4000, b"9" * 4000, b"\xff\xfe", b'{"key":NaN}\n', b"{}\n" + b" " * 5000],
)
def test_what_is_no_signature_at_all(bundle, data):
    assert refused_bytes(bundle, bundle / "signature.json", data)


@pytest.mark.parametrize(
    "form", [lambda data: data.rstrip(), lambda data: data + b"\n", lambda data: data.replace(b":", b": ")]
)
def test_a_signature_file_has_one_form(bundle, form):
    data = (bundle / "signature.json").read_bytes()
    assert form(data) != data and json.loads(form(data)) == json.loads(data)
    assert refused_bytes(bundle, bundle / "signature.json", form(data))


def test_a_field_said_twice(bundle):
    data = (bundle / "signature.json").read_bytes()
    assert refused_bytes(bundle, bundle / "signature.json", data.replace(b"{", b'{"algorithm":"ed25519",'))


def test_links_and_pipes_are_refused(bundle, tmp_path, trusted):
    file = bundle / "signature.json"
    file.rename(tmp_path / "elsewhere")
    makers = {
        "link": lambda: file.symlink_to(tmp_path / "elsewhere"),
        "dangling link": lambda: file.symlink_to(tmp_path / "missing"),
        "pipe": lambda: os.mkfifo(file),
    }
    for what, make in makers.items():
        make()
        for trust in (None, trusted()):
            with pytest.raises(errors.IntegrityError):
                print(what, check(bundle, trust))
        file.unlink()


def test_signing_replaces_a_link_and_not_what_it_leads_to(bundle, tmp_path, key):
    (tmp_path / "elsewhere").write_text("precious")
    (bundle / "signature.json").unlink()
    (bundle / "signature.json").symlink_to(tmp_path / "elsewhere")
    signatures.sign(bundle, key)
    assert (tmp_path / "elsewhere").read_text() == "precious" and check(bundle).state == "signed"


# Points of edwards25519, slowly: (x, y) with -x^2 + y^2 = 1 + d x^2 y^2 over the integers modulo P.
D = -121665 * pow(121666, -1, P) % P
BASE_Y = 4 * pow(5, -1, P) % P


def add(one, two):
    (x1, y1), (x2, y2) = one, two
    t = D * x1 * x2 * y1 * y2
    return (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P


def times(n, point):
    total = (0, 1)
    while n:
        total = add(total, point) if n & 1 else total
        point, n = add(point, point), n >> 1
    return total


def points(y):
    """The points with this y, none to two."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
    return {(x, y), (-x % P, y)} if x * x % P == square else set()


def encode(point):
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


@functools.cache
def small():
    return sorted(set.union(*(points(y) for y in signatures.SMALL_ORDER)))


def test_the_points_of_small_order_are_all_eight():
    """The torsion group has eight elements; the weak keys are they, in any encoding."""
    found = small()
    assert len(found) == 8 and all(times(8, point) == (0, 1) for point in found)
    assert {add(one, two) for one in found for two in found} == set(found)
    assert all(signatures.is_weak(encode(point).hex()) for point in found)
    assert all(signatures.is_weak((y | sign << 255).to_bytes(32, "little").hex()) for y in (0, 1, P, P + 1) for sign in (0, 1))
    base = max(points(BASE_Y), key=lambda point: point[0] % 2 == 0)
    assert not signatures.is_weak(encode(base).hex())
    assert not any(signatures.is_weak(encode(add(base, point)).hex()) for point in found)


def test_weak_keys_sign_everything_and_are_refused(bundle, trusted, tmp_path):
    """With a key of small order, anybody makes a signature that the library takes for this manifest, and we do not."""
    base = next(point for point in points(BASE_Y) if point[0] % 2 == 0)
    content = tree.canonical_json(manifest_lib.read(bundle, "expert"))
    payload = b"flexjax manifest signature 1\n" + content
    forged = 0
    for weak in small():
        for s in range(1, 60):  # [s]B fits wherever the hash is a multiple of the key's order
            signature = encode(times(s, base)) + s.to_bytes(32, "little")
            try:
                ed25519.Ed25519PublicKey.from_public_bytes(encode(weak)).verify(signature, payload)
            except Exception:
                continue
            forged += 1
            stated = {"algorithm": "ed25519", "format": 1, "key": encode(weak).hex(), "signature": signature.hex()}
            (bundle / "signature.json").write_bytes(tree.canonical_json(stated) + b"\n")
            with pytest.raises(errors.IntegrityError, match="weak"):
                check(bundle)
            with pytest.raises(errors.ConfigError, match="weak"):
                trusted(key=encode(weak).hex())
            break
    assert forged == 8, "the attack works on the library alone, for every weak key"


def test_a_signature_has_one_form(bundle):
    """Adding the group's order to its second half makes no other signature of the same manifest."""
    signature = json.loads((bundle / "signature.json").read_bytes())
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(bytes.fromhex(signature["signature"][64:]), "little") + order
    signature["signature"] = signature["signature"][:64] + s.to_bytes(32, "little").hex()
    assert refused_bytes(bundle, bundle / "signature.json", tree.canonical_json(signature) + b"\n")


HOLDER = {"owner": "A", "names": ["math"]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "JSON"),
        ("[]", "not an object"),
        ("{}", "keys must be an object"),
        ('{"keys": []}', "keys must be an object"),
        ('{"keys": {}, "keys": {}}', "twice"),
        ('{"keys": {}, "revoke": []}', "'revoke' is unknown"),
        ('{"keys": {}, "revoked": {}}', "revoked a list"),
        ('{"keys": {}, "revoked": ["ab"]}', "64 lower-case hex"),
        ('{"keys": {}, "revoked": [7]}', "64 lower-case hex"),
        ('{"keys": {}, "least_version": {"math": 0}}', "'math' must be a whole number"),
        ('{"keys": {}, "least_version": {"math": true}}', "'math' must be a whole number"),
        ('{"keys": {}, "least_version": {"Math": 1}}', "'Math'"),
        (json.dumps({"keys": {"AB" * 32: HOLDER}}), "64 lower-case hex"),
        (json.dumps({"keys": {ONES: {"owner": "A"}}}), "exactly owner and names"),
        (json.dumps({"keys": {ONES: HOLDER | {"admin": True}}}), "exactly owner and names"),
        (json.dumps({"keys": {ONES: HOLDER | {"owner": ""}}}), "owner of key"),
        (json.dumps({"keys": {ONES: HOLDER | {"owner": "a\nb"}}}), "owner of key"),
        (json.dumps({"keys": {ONES: HOLDER | {"names": "math"}}}), "names of key"),
        *((json.dumps({"keys": {ONES: HOLDER | {"names": [n]}}}), "names of key") for n in ("m*h", "", "**", "Ma*", "x:*")),
        (json.dumps({"keys": {"0" * 64: HOLDER}}), "weak"),
        ("[" * 100_000, "JSON"),
        (" " * 2**20 + "{}", "more than"),
    ],
)  # fmt: skip
def test_trust_files_are_strict(tmp_path, content, says):
    (tmp_path / "trust.json").write_text(content)
    with pytest.raises(errors.ConfigError, match=says) as refused:
        signatures.load_trust(tmp_path / "trust.json")
    assert str(tmp_path / "trust.json") in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_trust_file(tmp_path):
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        signatures.load_trust(tmp_path / "trust.json")


def test_keys_that_cannot_sign(tmp_path, bundle, key):
    def pem(private, encryption=None):
        pkcs8 = serialization.PrivateFormat.PKCS8
        return private.private_bytes(serialization.Encoding.PEM, pkcs8, encryption or serialization.NoEncryption())

    bad = {
        "rsa": pem(rsa.generate_private_key(65537, 1024)),
        "locked": pem(ed25519.Ed25519PrivateKey.generate(), serialization.BestAvailableEncryption(b"password")),
        "public": (tmp_path / "key.pem.pub").read_bytes(),
        "empty": b"",
        "random": os.urandom(5000),
    }
    before = (bundle / "signature.json").read_bytes()
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
        with pytest.raises(errors.ConfigError, match=rf"{name}.*no private Ed25519 key"):
            signatures.sign(bundle, tmp_path / name)
    key.chmod(0o640)
    with pytest.raises(errors.ConfigError, match="mode 640"):
        signatures.sign(bundle, key)
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        signatures.sign(bundle, tmp_path / "missing")
    assert (bundle / "signature.json").read_bytes() == before
