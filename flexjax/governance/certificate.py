"""Opt-out certificates: what can be shown of a copy of a model that an expert has left, as claims that could have failed.

Where the expert left traces that removal does not undo (its presence when the router was tuned, biases that were fitted
jointly, shared leaves that were averaged with it), no certificate is given and the reason is named. It speaks of one copy:
of other copies, backups and what people remember it knows nothing, and it says so.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from flexjax import errors, storage, tree, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, provenance, store
from flexjax.governance import history, masking, merging, signatures

FORMAT = 1
KIND, PURPOSE = "opt-out certificate", "certificate"
NOT_NAMES = {"kind", "rows", "dtype"}  # fields whose words are never names of experts
KEYED_BY_NAME = {"/experts", "/calibration", "/shared/experts", "/evaluation"}


def certify(
    directory: epath.PathLike,
    removed: str,
    owners: Sequence[epath.PathLike] = (),
    key: epath.PathLike | None = None,
    out: epath.PathLike | None = None,
    former: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Checks every claim and writes the certificate beside the model.

    Needs the memory of `masking.compare`.

    Args:
      directory: the model that the expert has left.
      removed: its name.
      owners: bundles as the remaining owners hold them; experts whose bundle is not given are compared with their manifest.
      key: private key to sign with; None leaves the certificate unsigned.
      out: file to write; None: `<model>.without-<name>.json`.
      former: the model that it left, where it was removed into another directory, whose history does not know it.

    Raises:
      PolicyError: the expert is in the model or never was, or left what removal does not undo; or `former` is not the same
        model with this expert.
      IntegrityError: a claim does not hold.
    """
    home = epath.Path(directory)
    model = models.open_model(home)
    if removed in model.bundles:
        raise errors.PolicyError(f"expert '{removed}' is still in {home}; remove it first")
    was, size = _as_recorded(model, removed) if former is None else _as_it_was(model, removed, epath.Path(former))
    digest = was["experts"][removed]
    _check_clean(model, removed, was)
    models.verify(model)
    claims = {
        "remaining tensors are their owners'": _owned(model, owners),
        "every expert's anchor is this one": {name: b.manifest["anchor"] for name, b in sorted(model.bundles.items())},
        "nothing mentions the expert": _unmentioned(model, removed, digest),
        "masked, the expert cannot matter": masking.compare(model, removed, size),
    }
    content: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "removed": {"name": removed, "digest": digest},
        "model": {
            "tree_digest": model.tree_digest,
            "anchor": model.anchor.manifest["digest"],
            "experts": model.manifest["experts"],
        },
        "claims": claims,
        "run": {
            "code": manifest_lib.code(),
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
        },
        "storage": _kept_elsewhere(home),
        "scope": "this copy of the model only: no other copy, no backup, nothing that was generated before",
    }
    signature = None if key is None else signatures.sign_bytes(tree.canonical_json(content), PURPOSE, key)
    made = content | {"signature": signature}
    path = epath.Path(out) if out is not None else home.parent / f"{home.name}.without-{removed}.json"
    storage.replace(path, tree.canonical_json(made) + b"\n")
    return made | {"file": str(path)}


def check(certificate: Mapping[str, Any], where: str) -> str:
    """Returns the key that signed a certificate, "" if none did.

    Raises:
      IntegrityError: the signature is not of this content.
    """
    content = {field: value for field, value in certificate.items() if field not in ("signature", "file")}
    if certificate.get("signature") is None:
        return ""
    return signatures.verify_bytes(tree.canonical_json(content), PURPOSE, certificate["signature"], where)


def verify(file: epath.PathLike, model: models.Model | None = None, trust: signatures.Trust | None = None) -> dict[str, Any]:
    """Reads a certificate that somebody hands over: whether it is as it was signed, of whom, and of this model.

    Returns:
      removed {name, digest}, tree_digest, key ("" if unsigned), owner ("" unless a trust file names one), text.

    Raises:
      IntegrityError: it is no certificate, was changed, or is of another model. PolicyError: the trust file does not know the
      key, or revokes it, or there is no signature.
    """
    path = epath.Path(file)
    stated = _read(path)
    key, removed, of = check(stated, str(path)), stated["removed"], stated["model"]["tree_digest"]
    if model is not None and model.tree_digest != of:
        raise errors.IntegrityError(f"{path} is of model {of}, but {model.directory} is {model.tree_digest}; ask for another")
    owner = ""
    if trust is not None:
        if key not in trust.keys or key in trust.revoked:
            why = f"its key {key} is revoked or unknown to the trust file" if key else "it is unsigned"
            raise errors.PolicyError(f"certificate {path}: {why}; ask who made it to sign it with a key that you trust")
        owner = trust.keys[key].owner
    who = f"signed by {owner} with key {key}" if owner else f"signed by key {key}, which nobody vouched for"
    text = f"{path}: expert '{removed['name']}' ({removed['digest']}) has left model {of}; "
    text += who if key else "unsigned: nobody vouches for it"
    return {"removed": removed, "tree_digest": of, "key": key, "owner": owner, "text": text}


def _read(path: epath.Path) -> dict[str, Any]:
    """A certificate that a stranger may have written; of its fields, those that `verify` uses are checked."""
    try:
        stated = tree.strict_json(storage.read_small(path, manifest_lib.MAX_BYTES))
        digests = stated["removed"]["digest"], stated["model"]["tree_digest"]
        sound = stated["kind"] == KIND and stated["format"] == FORMAT and manifest_lib.check_name(stated["removed"]["name"])
        if not sound or not all(isinstance(digest, str) and provenance.DIGEST.fullmatch(digest) for digest in digests):
            raise ValueError("kind, format or digests are not those of one")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise errors.IntegrityError(f"{path} is no {KIND} ({type(error).__name__}: {str(error)[:80]}); refused") from None
    return dict(stated)


def _as_recorded(model: models.Model, removed: str) -> tuple[Mapping[str, Any], dict[str, int]]:
    """What the history says of the model before the expert left, and the expert's size."""
    left = history.find_removed(history.settled(history.read(model.directory), model.tree_digest), removed)
    size = left.what.get("sizes", {}).get(removed)
    if size is None:
        raise errors.PolicyError(
            f"the history of {model.directory} does not tell the size of '{removed}'; give that model as --former=DIR"
        )
    return left.what["former"], {part: size[part] for part in ("d_ff", "rank")}


def _as_it_was(model: models.Model, removed: str, directory: epath.Path) -> tuple[Mapping[str, Any], dict[str, int]]:
    """The same from the model that the expert left."""
    former = models.open_model(directory)
    merging.check_known(former, removed)
    others = {name: digest for name, digest in former.manifest["experts"].items() if name != removed}
    if (former.manifest["anchor"], others) != (model.manifest["anchor"], model.manifest["experts"]):
        raise errors.PolicyError(
            f"{directory} without '{removed}' is not {model.directory}: its anchor or other experts differ; "
            "give the model that the expert left as --former=DIR"
        )
    manifest = former.bundles[removed].manifest
    return former.manifest, {part: manifest[part] for part in ("d_ff", "rank")}


def _check_clean(model: models.Model, removed: str, former: Mapping[str, Any]) -> None:
    """Raises PolicyError if something that stays was made while the expert was there."""

    def refuse(what: str) -> errors.PolicyError:
        return errors.PolicyError(
            f"no certificate that '{removed}' has left {model.directory}: {what}; make a model without that"
        )

    for name, bundle in sorted(model.bundles.items()):
        if removed in bundle.manifest["training"].get("router_tuned_with", []):
            raise refuse(f"the router row of '{name}' was tuned while it was there")
    for name, entry in sorted(model.manifest["calibration"].items()):
        if removed in entry["with"]:
            raise refuse(f"the bias of '{name}' was fitted jointly with it")
    averages = [model.manifest["shared"], former.get("shared")]
    if any(average and removed in average["experts"] for average in averages):
        raise refuse("shared leaves were averaged with it, so that what it did reached every answer")


def _owned(model: models.Model, owners: Sequence[epath.PathLike]) -> dict[str, str]:
    """With what each remaining expert was compared; all bytes have been read against the manifests by now."""
    held = [store.open_bundle(path, store.config_of(model.anchor)) for path in owners]
    found = {}
    for bundle in held:
        name = bundle.manifest["name"]
        if name not in model.bundles:
            raise errors.ConfigError(f"{bundle.label} is not in {model.directory}; give bundles of the experts that remain")
        ours = model.bundles[name].manifest
        for path, entry in bundle.manifest["tensors"].items():
            if ours["tensors"].get(path) != entry:
                raise errors.IntegrityError(
                    f"{model.bundles[name].label}: tensor {path} is not the one that {bundle.directory} holds"
                )
        if bundle.manifest["digest"] != ours["digest"]:
            raise errors.IntegrityError(f"{model.bundles[name].label} has another manifest than {bundle.directory}")
        found[name] = "the owner's bundle, tensor by tensor"
    for name, bundle in model.bundles.items():
        status = signatures.check(bundle.directory, bundle.manifest, None)
        found.setdefault(name, f"its manifest, {status.text}; the owner's bundle was not given")
    return dict(sorted(found.items()))


def _unmentioned(model: models.Model, removed: str, digest: str) -> dict[str, int]:
    """Looks through every name and every readable file of a model.

    Raises:
      IntegrityError: one of them mentions the expert.
    """

    def refuse(where: str) -> errors.IntegrityError:
        return errors.IntegrityError(f"{where} still mentions expert '{removed}' or its digest; remove it from there")

    names = set(storage.files(model.directory))
    if workdir.is_local(model.directory):  # also directories that are empty by now
        root = os.fspath(model.directory)
        names |= {os.path.relpath(os.path.join(where, name), root) for where, below, _ in os.walk(root) for name in below}
    fields = 0
    for name in sorted(names):
        if digest in name or removed in name.split("/"):
            raise refuse(str(model.directory / name))
    for name in sorted(n for n in names if n.endswith((".json", *manifest_lib.BESIDE)) and not n.endswith("zarr.json")):
        if os.path.basename(name).startswith("tokenizer"):
            continue
        data = storage.read_small(model.directory / name, manifest_lib.MAX_BYTES)
        if digest.encode() in data or f"`{removed}`".encode() in data or f"'{removed}'".encode() in data:
            raise refuse(str(model.directory / name))
        if name.endswith(".json"):
            found, count = _mention(tree.strict_json(data), removed)
            fields += count
            if found:
                raise refuse(f"{model.directory / name}, field {found}")
    return {"files": len(names), "fields": fields}


def _mention(value: Any, removed: str, where: str = "") -> tuple[str, int]:
    """The first field that names the expert, and how many were looked at; keys of fixed fields are no names."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    count = 0
    for key, member in members:
        count += 1
        named = key == removed and where in KEYED_BY_NAME
        if named or (member == removed and key not in NOT_NAMES):
            return f"{where}/{key}", count
        found, below = _mention(member, removed, f"{where}/{key}")
        count += below
        if found:
            return found, count
    return "", count


def _kept_elsewhere(home: epath.Path) -> dict[str, Any]:
    """What the place where a model lies keeps of deleted bytes."""
    if workdir.is_local(home):
        return {"kind": "file system", "known": "snapshots and backups of this file system are not known to this program"}
    return {
        "kind": "bucket",
        **storage.policies(home),
        "known": "while these keep deleted objects, their bytes can be brought back",
    }


def text(certificate: Mapping[str, Any]) -> str:
    """The certificate for people."""
    claims = certificate["claims"]
    masked = claims["masked, the expert cannot matter"]
    lines = [
        f"certificate: expert '{certificate['removed']['name']}' ({certificate['removed']['digest'][:12]}) has left "
        f"model {certificate['model']['tree_digest'][:12]}",
        *(f"  '{name}': compared with {what}" for name, what in claims["remaining tensors are their owners'"].items()),
        f"  the anchor of every expert is {certificate['model']['anchor'][:12]}",
        "  no file or field mentions it: {files} names, {fields} fields".format(**claims["nothing mentions the expert"]),
        f"  masked, its slot filled with {', '.join(masked['fillings'])}: answers equal to the last bit",
        f"  masked against removed: {masked['masked_against_removed']:.2g} of the largest logit, at most {masked['tolerance']}",
        "  run: " + ", ".join(f"{key} {value}" for key, value in certificate["run"].items()),
        "  storage: " + ", ".join(f"{key} {value}" for key, value in certificate["storage"].items()),
        f"  covers {certificate['scope']}",
        f"  {'signed by ' + certificate['signature']['key'] if certificate['signature'] else 'unsigned; --key signs it'}",
        f"  written to {certificate['file']}",
    ]
    return "\n".join(lines)
