"""Opt-out certificates: what can be shown of a copy of a model that an expert has left, as claims that could have failed.

Where the expert left traces that removal does not undo (its presence when the router was tuned, biases that were fitted
jointly, shared leaves that were averaged with it), no certificate is given and the reason is named. It speaks of one copy:
of other copies, backups and what people remember it knows nothing, and it says so.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from flexjax import errors, storage, tree, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, schema, store, surgery
from flexjax.governance import history, signatures
from flexjax.inference import decode
from flexjax.model import router, transformer

FORMAT = 1
PURPOSE = "certificate"
TOLERANCE = 1e-5  # of masked against removed, relative to the largest logit, in float32
PROMPTS, LENGTH, NEW_TOKENS = 4, 24, 8
NOT_NAMES = {"kind", "rows", "dtype"}  # fields whose words are never names of experts
KEYED_BY_NAME = {"/experts", "/calibration", "/shared/experts", "/evaluation"}
FILLINGS = {"normal numbers": np.float32(1), "numbers a hundred times larger": np.float32(100), "NaN": np.float32(np.nan)}


def certify(
    directory: epath.PathLike,
    removed: str,
    owners: Sequence[epath.PathLike] = (),
    key: epath.PathLike | None = None,
    out: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Checks every claim and writes the certificate beside the model.

    Args:
      directory: the model that the expert has left.
      removed: its name.
      owners: bundles as the remaining owners hold them; experts whose bundle is not given are compared with their manifest.
      key: private key to sign with; None leaves the certificate unsigned.
      out: file to write; None: `<model>.without-<name>.json`.

    Raises:
      PolicyError: the expert is in the model or never was, or left what removal does not undo.
      IntegrityError: a claim does not hold.
    """
    home = epath.Path(directory)
    model = models.open_model(home)
    if removed in model.bundles:
        raise errors.PolicyError(f"expert '{removed}' is still in {home}; remove it first")
    left = history.find_removed(history.settled(history.read(home), model.tree_digest), removed)
    digest = left.what["former"]["experts"][removed]
    _check_clean(model, removed, left.what["former"])
    models.verify(model)
    claims = {
        "remaining tensors are their owners'": _owned(model, owners),
        "every expert's anchor is this one": {name: b.manifest["anchor"] for name, b in sorted(model.bundles.items())},
        "nothing mentions the expert": _unmentioned(model, removed, digest),
        "masked, the expert cannot matter": _masked(model, removed, {part: left.what[part] for part in ("d_ff", "rank")}),
    }
    content: dict[str, Any] = {
        "kind": "opt-out certificate",
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


def _masked(model: models.Model, removed: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the model as it was with the expert masked, its slot filled in three ways, and the model as it is.

    Raises:
      IntegrityError: a filling changes a bit of an answer, or masking and removing differ by more than the tolerance.
    """
    architecture, params = models.load(model)
    names = architecture.experts
    shape = (PROMPTS, LENGTH)
    prompts = np.random.default_rng(0).integers(0, architecture.config.vocab_size, shape).astype(np.int32)
    begin, *others = FILLINGS
    wider, filled = _with_slot(architecture, params, removed, size, begin)
    runner = _Runner(wider, filled, prompts, names)
    first = runner.run(filled)
    for filling in others:
        found = runner.run(_with_slot(architecture, params, removed, size, filling)[1])
        if found[0].tobytes() != first[0].tobytes() or found[1] != first[1]:
            raise errors.IntegrityError(
                f"with '{removed}' masked, filling its slot with {filling} changes an answer; report this"
            )
    own = _Runner(architecture, params, prompts, names).run(params)[0]
    difference = float(np.abs(own - first[0]).max() / np.abs(own).max())
    if not difference <= TOLERANCE:
        raise errors.IntegrityError(
            f"masking '{removed}' and removing it differ by {difference:.2g}, more than {TOLERANCE}; report this"
        )
    return {
        "slot": size,
        "fillings": list(FILLINGS),
        "logits_bit_equal": True,
        "continuations_equal": True,
        "prompts": PROMPTS,
        "tokens": LENGTH,
        "new_tokens": NEW_TOKENS,
        "masked_against_removed": difference,
        "tolerance": TOLERANCE,
        "program": runner.program,
    }


class _Runner:
    """The programs of one architecture, compiled once: bit-identity is a promise about one program on two contents."""

    def __init__(
        self, architecture: transformer.Architecture, params: tree.Tree, prompts: np.ndarray, allowed: Sequence[str]
    ) -> None:
        self._architecture, self._prompts = architecture, prompts
        self._mask = router.allowed_mask(architecture.experts, allowed, len(prompts))
        self._requests = [decode.Request(row.tolist(), tuple(allowed)) for row in prompts]
        self._decoder = decode.Decoder(params, architecture, eos_id=0)

        def logits(params: tree.Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return transformer.logits(params, transformer.forward(params, tokens, architecture, allowed=mask).hidden)

        lowered = jax.jit(logits).lower(params, prompts, self._mask)
        self.program = tree.sha256(lowered.as_text().encode())
        self._logits = lowered.compile()

    def run(self, params: tree.Tree) -> tuple[np.ndarray, list[list[int]]]:
        """Logits of all positions, and greedy continuations by the path that generation takes."""
        self._decoder.weights = decode.serving_layout(params, self._architecture)
        answers = self._decoder.generate(self._requests, NEW_TOKENS)
        return np.asarray(self._logits(params, self._prompts, self._mask)), [ids.tolist() for ids in answers]


def _with_slot(
    architecture: transformer.Architecture, params: tree.Tree, name: str, size: Mapping[str, Any], filling: str
) -> tuple[transformer.Architecture, tree.Tree]:
    """The model with one more expert, of the size that left, that holds anything but weights."""
    config = architecture.config
    shapes = schema.expert_shapes(config.num_layers, config.d_model, size["d_ff"], biased=True, rank=size["rank"])
    rng = np.random.default_rng(1 + list(FILLINGS).index(filling))
    factor = FILLINGS[filling]
    drawn = {path.removeprefix("expert/"): factor * rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    shared, experts = surgery.split(params, architecture.banks)
    joined, banks = surgery.join(shared, {**experts, name: tree.unflatten(drawn)})
    return surgery.architecture(config, banks, architecture.top_k), joined


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
