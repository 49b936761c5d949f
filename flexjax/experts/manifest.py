"""Manifests: what an anchor, a bundle or a merged model says of itself, as canonical JSON that its digest covers.

    anchor   kind, format, code, model (shapes), tokenizer {file, digest} or null, rows (method), tensors, training
    expert   kind, format, code, name, anchor, config, tokenizer (digests), d_ff, rank, tensors, training, and what its owner
             states (`provenance`): owner, version, data, evaluation, privacy, margins, parent
    model    kind, format, anchor (digest), experts {name: digest}, top_k,
             calibration {name: {bias, share, text, with}}, shared {digest, experts} or null
    shared   kind, format, anchor, experts {name: digest}, tensors: shared leaves averaged over experts

`digest` is the SHA-256 of the rest of the manifest; since `tensors` lists the SHA-256 of every slice, it covers every byte.
A manifest from somebody else is read strictly: bounded size and depth, no duplicate key, no unknown or missing field.
A signature (SIGNATURE), a generated card (CARD) and a model's history lie beside it, outside the digest.
"""

import dataclasses
import functools
import re
from importlib import metadata
from typing import Any

from etils import epath

from flexjax import config as config_lib
from flexjax import errors, storage, tree, workdir
from flexjax.experts import provenance

FORMAT = 2
FILE = "manifest.json"
SIGNATURE = "signature.json"
CARD = "README.md"
LOCK = ".lock"  # of whoever works on the directory
BESIDE = (SIGNATURE, CARD)  # files that an artefact may have beside its manifest
PARTIAL = ".manifest.json.partial"  # marks a directory that is still being written
MAX_BYTES = 2**20
MAX_DEPTH = 20
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
STATED = set(provenance.STATEMENTS)
FIELDS = {
    "anchor": {"kind", "format", "code", "model", "tokenizer", "rows", "tensors", "training", "digest"},
    "expert": STATED
    | {"kind", "format", "code", "name", "anchor", "config", "tokenizer", "d_ff", "rank", "tensors", "training", "digest"},
    "model": {"kind", "format", "anchor", "experts", "top_k", "calibration", "shared", "digest"},
    "shared": {"kind", "format", "anchor", "experts", "tensors", "digest"},
}
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("digest", "anchor", "config", "name", "rows", "code"), (str,)),
    **dict.fromkeys(("model", "experts", "tensors", "training", "calibration"), (dict,)),
    **dict.fromkeys(("d_ff", "rank", "top_k"), (int,)),
    "tokenizer": (dict, str, type(None)),
    "shared": (dict, type(None)),
}
Manifest = dict[str, Any]


def check_name(name: str) -> str:
    """Returns the name if it may label an owner's expert.

    Raises:
      ConfigError: it is empty, a path, reserved, or not of `[a-z0-9][a-z0-9._-]{0,62}`.
    """
    if name == config_lib.PUBLIC:
        raise errors.ConfigError(f"expert name '{name}' is reserved for the anchor's own expert; choose another name")
    if not NAME.fullmatch(name) or ".." in name:
        raise errors.ConfigError(
            f"expert name {name[:80]!r} must be 1 to 63 characters of a-z, 0-9, '.', '_', '-', starting with a letter or digit"
        )
    return name


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of the canonical JSON of everything but the digest itself."""
    return tree.sha256(tree.canonical_json({key: value for key, value in manifest.items() if key != "digest"}))


def seal(manifest: Manifest) -> Manifest:
    """Adds format, digest and, to what was computed, the code's version; refuses fields that the kind does not have."""
    sealed = {**manifest, "format": FORMAT} | ({"code": code()} if "code" in FIELDS[manifest["kind"]] else {})
    sealed["digest"] = digest_of(sealed)
    _check_stated(sealed, "the manifest to be written")
    return sealed


@functools.cache
def code() -> str:
    """Name and version of this code."""
    try:
        return f"flexjax {metadata.version('flexjax')}"
    except metadata.PackageNotFoundError:
        return "flexjax unknown"  # run from a checkout that was not installed


def encode(manifest: Manifest) -> bytes:
    """The bytes of a manifest's file."""
    return tree.canonical_json(manifest) + b"\n"


def write(directory: epath.PathLike, manifest: Manifest, generation: int | None = None) -> None:
    """Writes the manifest last of all files: it is the commit point of its directory, all of which is on disk by then.

    Args:
      directory, manifest: of an artefact.
      generation: in a bucket, of the manifest that this one replaces (0: none); the write fails if it is another by now.
    """
    home = epath.Path(directory)
    data = encode(manifest)
    if len(data) > MAX_BYTES:
        raise errors.IntegrityError(f"the manifest of {home} would have {len(data)} bytes; none may have more than {MAX_BYTES}")
    if not workdir.is_local(home):
        storage.replace(home / FILE, data, generation)
        storage.delete(home, {name: entry for name, entry in storage.files(home).items() if name == PARTIAL})
        return
    try:
        workdir.sync_below(home)
        workdir.write(home / FILE, data, PARTIAL)
        workdir.sync(home.parent)
    except OSError as error:
        raise errors.StorageError(f"cannot write {home}: {error.strerror or error}; check space and permissions") from None


def fresh(directory: epath.PathLike) -> epath.Path:
    """An empty directory to write to, holding the manifest's partial file until the manifest replaces it.

    What an interrupted write left behind is known by that file and swept; anything else is never overwritten.
    """
    home = epath.Path(directory)
    check_free(home)
    storage.delete(home, {name: entry for name, entry in storage.files(home).items() if name != LOCK})
    storage.write(home / PARTIAL, [b""])
    return home


def check_free(directory: epath.PathLike) -> None:
    """Raises StorageError if a new artefact cannot be written to a directory, since it holds what is finished or not ours."""
    home = epath.Path(directory)
    if storage.exists(home / FILE):
        raise errors.StorageError(f"{home} already holds a finished artefact; choose another directory or remove it")
    found = storage.files(home)
    if PARTIAL not in found and set(found) - {LOCK}:
        raise errors.StorageError(f"{home} is not empty and not ours; choose another directory")


def kind(directory: epath.PathLike) -> str:
    """What a directory holds: "anchor", "expert" or "model".

    Raises:
      StorageError: it has no manifest. IntegrityError: the manifest is broken or of no kind.
    """
    stated = _load(epath.Path(directory), "artefact").get("kind")
    if not isinstance(stated, str) or stated not in FIELDS:
        raise errors.IntegrityError(
            f"{epath.Path(directory) / FILE} describes kind {str(stated)[:20]!r}, expected {', '.join(FIELDS)}"
        )
    return str(stated)


def read(directory: epath.PathLike, kind: str) -> Manifest:
    """Reads and checks the manifest of a directory.

    Raises:
      StorageError: there is none. IntegrityError: it is not what it should be, or its digest is another.
    """
    manifest = _load(epath.Path(directory), kind)
    path = epath.Path(directory) / FILE
    if manifest.get("kind") != kind:
        raise errors.IntegrityError(f"{path} describes kind {str(manifest.get('kind'))[:20]!r}, expected '{kind}'")
    if manifest.get("format") != FORMAT:
        raise errors.IntegrityError(
            f"{path} has format {str(manifest.get('format'))[:20]}, this version reads {FORMAT}; "
            "make it again with this version: a run's checkpoints can still be used"
        )
    _check_stated(manifest, str(path))
    found = digest_of(manifest)
    if manifest["digest"] != found:
        raise errors.IntegrityError(
            f"{path}: content has digest {found[:12]}, the manifest says {str(manifest['digest'])[:12]}"
        )
    return manifest


def _load(directory: epath.Path, kind: str) -> Manifest:
    path = directory / FILE
    if not storage.exists(path):
        present = storage.exists(directory) if workdir.is_local(directory) else bool(storage.files(directory))
        hint = "the directory has no manifest.json" if present else "the directory does not exist"
        places = {"anchor": ("anchor", "public/anchor"), "expert": ("expert",), "model": ("model",), "shared": ()}
        places["artefact"] = tuple(name for names in places.values() for name in names)
        inside = [str(directory / name) for name in places[kind] if storage.exists(directory / name / FILE)]
        advice = f"did you mean {' or '.join(inside)}?" if inside else "give the directory that a run wrote"
        raise errors.StorageError(f"{directory} is no flexjax {kind}: {hint}; {advice}")
    return _parse(storage.read_small(path, MAX_BYTES), path)


def lineage(anchor: Manifest) -> dict[str, str]:
    """The digests by which a bundle names the anchor it belongs to."""
    tokenizer = anchor["tokenizer"]
    return {
        "anchor": anchor["digest"],
        "config": tree.sha256(tree.canonical_json(anchor["model"])),
        "tokenizer": str(tokenizer["digest"]) if isinstance(tokenizer, dict) else "",
    }


MODEL_LIMITS = {"router_memory": 1}


def model_config(anchor: Manifest, where: epath.PathLike) -> config_lib.ModelConfig:
    """The shapes an anchor's manifest states; unknown, missing or mistyped fields are refused."""
    fields: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(config_lib.ModelConfig)}
    stated, needed = anchor["model"], config_lib.to_dict(config_lib.ModelConfig())
    if not isinstance(stated, dict) or not set(needed) <= set(stated) <= set(fields):
        raise errors.IntegrityError(f"{where}: the manifest's model must have exactly the fields {', '.join(sorted(needed))}")
    for name, value in stated.items():
        kind = fields[name]
        whole = type(value) is int
        plausible = {
            bool: type(value) is bool,
            int: whole and 0 < value <= 2**24,
            float: (whole or type(value) is float) and 0 <= value < MODEL_LIMITS.get(name, 1e12),
        }
        if not plausible[kind]:
            raise errors.IntegrityError(f"{where}: model.{name} is {str(value)[:20]}, expected a plausible {kind.__name__}")
    return config_lib.ModelConfig(**stated)


def _check_stated(manifest: Manifest, where: str) -> None:
    """Raises IntegrityError unless a manifest has the fields of its kind, each of its form."""
    _check_fields(manifest, where)
    if "training" in manifest:
        provenance.check_training(manifest["training"], where)
    if manifest["kind"] == "expert":
        provenance.check(manifest, where)


def _check_fields(manifest: Manifest, where: str) -> None:
    expected = FIELDS[manifest["kind"]]
    for field in sorted(expected ^ set(manifest)):
        state = "is missing" if field in expected else "is unknown"
        raise errors.IntegrityError(
            f"{where}: field '{field[:40]}' {state}; a {manifest['kind']} manifest has {sorted(expected)}"
        )
    for field in sorted(expected & set(TYPES)):
        if not isinstance(manifest[field], TYPES[field]) or isinstance(manifest[field], bool):
            raise errors.IntegrityError(f"{where}: field '{field}' is of type {type(manifest[field]).__name__}; refused")
    digests = {"anchor", "config", "digest"} | ({"tokenizer"} if manifest["kind"] == "expert" else set())
    for field in sorted(digests & expected):
        value = manifest[field]
        if not isinstance(value, str) or not (provenance.DIGEST.fullmatch(value) or (field == "tokenizer" and not value)):
            raise errors.IntegrityError(f"{where}: field '{field}' is no SHA-256; refused")
    if "code" in expected and not re.fullmatch(r"flexjax [0-9A-Za-z.+-]{1,40}", manifest["code"]):
        raise errors.IntegrityError(
            f"{where}: field 'code' is {manifest['code'][:20]!r}, expected a version of flexjax; refused"
        )


def _parse(data: bytes, path: epath.Path) -> Manifest:
    try:
        depth = deepest = 0
        for byte in data:
            depth += (byte in b"[{") - (byte in b"]}")
            deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        manifest = tree.strict_json(data)
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        if tree.canonical_json(manifest) + b"\n" != data:
            raise ValueError("its bytes are not canonical JSON; manifests are not edited by hand")
    except (ValueError, RecursionError) as error:
        raise errors.IntegrityError(f"{path} is no manifest: {error}") from None
    return manifest
