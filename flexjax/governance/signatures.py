"""Signatures by keys that owners keep offline, and the coordinator's list of whom to trust with what.

    BUNDLE/  manifest.json  signature.json   {"algorithm": "ed25519", "format": 1, "key": hex, "signature": hex}

What is signed is a prefix that names the purpose, then the canonical bytes of the manifest. These cover name, owner, version
and the anchor's digest, and by its digests every byte of the tensors; so a signature fits one artefact and nothing else.

A trust file says which key stands for which owner, and which names it may sign:

    {"keys": {hex: {"owner": "Clinic A", "names": ["hospital-*", "math"]}},
     "revoked": [hex of a key or of a manifest's digest], "least_version": {"math": 3}}

`names` are names of experts, or their beginnings and `*`. Anchors and models have no names: `anchor:*` and `model:*` let a key
sign any, `anchor:` and a digest (or its beginning and `*`) that one. `*` alone is every expert, and neither anchor nor model.
"""

import dataclasses
import os
import re
import stat
from typing import Any

from cryptography import exceptions
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from etils import epath

from flexjax import errors, storage, tree, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance
from flexjax.inference import access

FORMAT = 1
ALGORITHM = "ed25519"
MANIFEST = "manifest"  # the purpose of an artefact's signature
SIGNED_KINDS = ("anchor", "expert", "model")  # what a model averaged (kind `shared`) is covered by the model's own
MAX_BYTES = 4096  # of a signature file, and of a key file
FIELDS = {"algorithm": ALGORITHM, "format": str(FORMAT), "key": "[0-9a-f]{64}", "signature": "[0-9a-f]{128}"}
TRUST_FIELDS = {"keys", "revoked", "least_version"}
PATTERN = re.compile(r"\*|[a-z0-9][a-z0-9._-]{0,62}\*?|(anchor|model):([0-9a-f]{64}|[0-9a-f]{0,63}\*)")

PRIME = 2**255 - 19  # of the field of edwards25519 (RFC 8032, section 5.1)
ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826  # y of points of order 8
SMALL_ORDER = {0, 1, PRIME - 1, ORDER_8, PRIME - ORDER_8}  # y of all points whose order divides 8


@dataclasses.dataclass(frozen=True)
class Holder:
    """Whom a key stands for, and the names that it may sign."""

    owner: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trust:
    """A trust file: holders by public key, revoked keys and digests, the least version by expert."""

    keys: dict[str, Holder]
    revoked: frozenset[str]
    least_version: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Status:
    """Who vouches for an artefact: "unsigned", "signed" (rightly, by a key of nobody knows whom) or "trusted".

    `key` is hex, `owner` the one that the trust file names, each empty if there is none; `text` says it to a reader.
    """

    state: str
    key: str
    owner: str
    text: str


def generate_key(private_path: epath.PathLike) -> str:
    """Makes a key pair: the private key as PEM (PKCS8, mode 0600), and `<path>.pub` with the public key.

    Returns the public key, 64 hex digits. Raises StorageError if one of the files exists or cannot be written.
    """
    private = ed25519.Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw().hex()
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = private.private_bytes(encoding, form, serialization.NoEncryption())
    path = os.fspath(private_path)
    made: list[str] = []
    try:
        for name, content, mode in ((path, pem, 0o600), (f"{path}.pub", f"{public}\n".encode(), 0o644)):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            made.append(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
        workdir.sync(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        for name in made:  # a pair or nothing
            os.unlink(name)
        where, reason = error.filename or path, error.strerror or error
        raise errors.StorageError(
            f"cannot make key {where}: {reason}; a key is never overwritten, choose another path"
        ) from None
    return public


def sign(directory: epath.PathLike, private_key: epath.PathLike) -> dict[str, Any]:
    """Signs the manifest of an anchor, expert or model; the signature replaces one that is there.

    The tensors are not read: whoever loads them compares each with the manifest. Returns the content of `signature.json`.

    Raises:
      ConfigError: the key cannot be used. IntegrityError: the manifest is broken. StorageError: nothing can be written.
    """
    home = epath.Path(directory)
    kind = manifest_lib.kind(home)
    if kind not in SIGNED_KINDS:
        raise errors.ConfigError(f"{home} is of kind '{kind}'; sign the model it belongs to, whose manifest covers it")
    manifest = manifest_lib.read(home, kind)
    _subject(manifest)  # refuses a name that nobody could check
    signature = sign_bytes(tree.canonical_json(manifest), MANIFEST, private_key)
    storage.replace(home / manifest_lib.SIGNATURE, tree.canonical_json(signature) + b"\n")
    return signature


def sign_bytes(content: bytes, purpose: str, private_key: epath.PathLike) -> dict[str, Any]:
    """Signs bytes for one purpose, one word, such as "certificate": no signature for one is any good for another.

    Raises:
      ConfigError: the file is no private Ed25519 key, or others can read it.
    """
    key = _private_key(os.fspath(private_key))
    return {
        "algorithm": ALGORITHM,
        "format": FORMAT,
        "key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(_payload(content, purpose)).hex(),
    }


def verify_bytes(content: bytes, purpose: str, signature: Any, where: str) -> str:
    """Returns the public key, hex, that signed these bytes for this purpose; `where` the signature stands is for messages.

    Raises:
      IntegrityError: it is not exactly what `sign_bytes` returns, or of something else.
    """
    if not isinstance(signature, dict) or set(signature) != set(FIELDS):
        raise errors.IntegrityError(f"{where} is no signature: it must have exactly {', '.join(FIELDS)}; refused")
    for field, form in FIELDS.items():
        value = signature[field]
        if type(value) is not (int if field == "format" else str) or not re.fullmatch(form, str(value)):
            raise errors.IntegrityError(f"{where}: field '{field}' is {str(value)[:20]!r}, expected {form}; refused")
    key = signature["key"]
    if is_weak(key):
        raise errors.IntegrityError(f"{where}: key {key} is a weak one, whose signatures anybody can make; refused")
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature["signature"]), _payload(content, purpose))
    except (exceptions.InvalidSignature, ValueError):
        raise errors.IntegrityError(
            f"{where}: the signature by key {key} does not fit what it stands beside; ask the owner for a sound copy"
        ) from None
    return key


def is_weak(key: str) -> bool:
    """Whether a public key is of small order, for which anybody can sign, or not canonical; `cryptography` takes both."""
    y = int.from_bytes(bytes.fromhex(key), "little") & (2**255 - 1)
    return y >= PRIME or y in SMALL_ORDER


def load_trust(path: epath.PathLike) -> Trust:
    """Reads a trust file; `keys` must be there, the others may.

    Raises:
      ConfigError: it cannot be read or is not exactly of the form above.
    """
    _, stated = access.read_rules(path, "trust file", TRUST_FIELDS)
    keys, revoked, least = stated.get("keys"), stated.get("revoked", []), stated.get("least_version", {})
    if not isinstance(keys, dict) or not isinstance(revoked, list) or not isinstance(least, dict):
        raise errors.ConfigError(f"trust file {path}: keys must be an object, revoked a list and least_version an object")
    for entry in [*keys, *revoked]:
        if not isinstance(entry, str) or not provenance.DIGEST.fullmatch(entry):
            raise errors.ConfigError(f"trust file {path}: {str(entry)[:70]!r} must be 64 lower-case hex digits")
    for name, version in least.items():
        if not manifest_lib.NAME.fullmatch(name) or type(version) is not int or version < 1:
            raise errors.ConfigError(f"trust file {path}: least_version of {name[:63]!r} must be a whole number from 1")
    holders = {key: _holder(key, holder, f"trust file {path}") for key, holder in keys.items()}
    return Trust(holders, frozenset(revoked), least)


def _holder(key: str, stated: Any, where: str) -> Holder:
    if is_weak(key):
        raise errors.ConfigError(f"{where}: key {key} is a weak one, whose signatures anybody can make; remove it")
    if not isinstance(stated, dict) or set(stated) != {"owner", "names"}:
        raise errors.ConfigError(f"{where}: key {key} must have exactly owner and names")
    owner, names = stated["owner"], stated["names"]
    if not isinstance(owner, str) or not 0 < len(owner) <= provenance.LONGEST_WORD or not owner.isprintable():
        raise errors.ConfigError(f"{where}: the owner of key {key} must be 1 to {provenance.LONGEST_WORD} printable characters")
    if not isinstance(names, list) or not all(isinstance(name, str) and PATTERN.fullmatch(name) for name in names):
        forms = "a list of names of experts, of beginnings and '*', of 'anchor:*' or 'model:*'"
        raise errors.ConfigError(f"{where}: the names of key {key} must be {forms}")
    return Holder(owner, tuple(names))


def check(directory: epath.PathLike, manifest: manifest_lib.Manifest, trust: Trust | None) -> Status:
    """Says who vouches for an artefact, and refuses it if a trust file does not let them.

    Args:
      directory: where the signature lies.
      manifest: of this directory, as `manifest.read` returned it: what was checked is what is used.
      trust: whom to trust with what; None: a signature must be right, but need not be there.

    Raises:
      IntegrityError: there is a signature, and it is broken or of something else.
      PolicyError: the trust file does not vouch for it: unsigned, unknown or revoked key, name, owner, version.
    """
    path = epath.Path(directory) / manifest_lib.SIGNATURE
    subject = _subject(manifest)
    label = f"expert '{subject}' in {directory}" if manifest["kind"] == "expert" else f"{manifest['kind']} {directory}"
    if not storage.exists(path):
        if trust is not None:
            raise errors.PolicyError(f"{label} is unsigned; its owner must sign it with a key of the trust file")
        return Status("unsigned", "", "", "unsigned: nobody vouches for it")
    key = verify_bytes(tree.canonical_json(manifest), MANIFEST, _read(path), str(path))
    if trust is None:
        return Status("signed", key, "", f"signed by key {key}, which nobody vouched for")
    _check_trust(trust, manifest, key, subject, f"{label}, signed by key {key}")
    owner = trust.keys[key].owner
    return Status("trusted", key, owner, f"signed by {owner} with key {key}")


def _check_trust(trust: Trust, manifest: manifest_lib.Manifest, key: str, subject: str, label: str) -> None:
    """Raises PolicyError for the first rule that does not allow this key to sign this artefact."""
    for what, digest in {"key": key, "digest": manifest["digest"]}.items():
        if digest in trust.revoked:
            raise errors.PolicyError(f"{label}: {what} {digest} is revoked; ask the owner for another release")
    holder = trust.keys.get(key)
    if holder is None:
        raise errors.PolicyError(f"{label}: the trust file does not know this key; add it once its owner has confirmed it")
    if not any(_covers(pattern, subject) for pattern in holder.names):
        allowed = ", ".join(holder.names) or "nothing"
        raise errors.PolicyError(f"{label}: {holder.owner!r} may not sign '{subject}', only {allowed}")
    if manifest["kind"] != "expert":
        return
    if manifest["owner"] != holder.owner:
        raise errors.PolicyError(f"{label}: the manifest says owner {manifest['owner'][:128]!r}, the key is {holder.owner!r}'s")
    least = trust.least_version.get(subject, 1)
    if manifest["version"] < least:
        raise errors.PolicyError(
            f"{label}: it is version {manifest['version']}, expected at least {least}; ask for a newer one"
        )


def _covers(pattern: str, subject: str) -> bool:
    """Whether a name, or a beginning and `*`, stands for a subject of the same kind."""
    if (":" in pattern) != (":" in subject):
        return False
    return subject.startswith(pattern[:-1]) if pattern.endswith("*") else subject == pattern


def _subject(manifest: manifest_lib.Manifest) -> str:
    """What a key must be allowed to sign: an expert's name, or the kind and digest of what has no name."""
    kind = manifest["kind"]
    return manifest_lib.check_name(manifest["name"]) if kind == "expert" else f"{kind}:{manifest['digest']}"


def _payload(content: bytes, purpose: str) -> bytes:
    return f"flexjax {purpose} signature {FORMAT}\n".encode() + content


def _read(path: epath.Path) -> Any:
    """A signature file that a stranger may have written."""
    data = storage.read_small(path, MAX_BYTES)
    try:
        stated = tree.strict_json(data)
        if tree.canonical_json(stated) + b"\n" != data:
            raise ValueError("its bytes are not canonical JSON")
    except (ValueError, RecursionError) as error:
        raise errors.IntegrityError(f"{path} is no signature: {error}; refused") from None
    return stated


def _private_key(path: str) -> ed25519.Ed25519PrivateKey:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_BYTES)
    except OSError as error:
        raise errors.ConfigError(f"private key {path} cannot be read: {error.strerror or error}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise errors.ConfigError(f"private key {path} is open to others (mode {stat.S_IMODE(mode):o}); chmod 600 it first")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise errors.ConfigError(f"{path} is no private Ed25519 key in PEM without a password; make one with keygen")
    return key
