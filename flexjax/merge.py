"""Puts experts together, takes one out, and tells what is there: surgery on directories.

python -m flexjax.merge create --model=DIR --anchor=DIR --expert=DIR [--expert=DIR ...] [--top_k=K] [--dry_run]
python -m flexjax.merge remove --model=DIR --name=NAME [--out=DIR]
python -m flexjax.merge verify --model=DIR        (a merged model, an anchor or a bundle)
python -m flexjax.merge show   --model=DIR
"""

import dataclasses
import json
from typing import Any

from absl import flags
from etils import epath

from flexjax import command, errors, workdir
from flexjax.experts import compatibility, models, store
from flexjax.experts import manifest as manifest_lib

MODEL = flags.DEFINE_string("model", None, "The merged model (verify and show also take an anchor or a bundle).")
ANCHOR = flags.DEFINE_string("anchor", None, "create: the anchor that all experts were trained beside.")
EXPERT = flags.DEFINE_multi_string("expert", [], "create: a bundle; repeat the flag, in any order.")
NAME = flags.DEFINE_string("name", None, "remove: the expert to remove.")
OUT = flags.DEFINE_string("out", None, "remove: write the smaller model here and leave --model as it is.")
TOP_K = flags.DEFINE_integer("top_k", None, "create: experts per token; default all, but at most 4.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what would happen.")
JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object, last on stdout.")

DEFAULT_TOP_K = 4  # the paper's quality levels off at four active experts


def main(argv: list[str]) -> None:
    """Runs one verb."""
    verbs = {"create": create, "remove": remove, "verify": verify, "show": show}
    if len(argv) != 1 or argv[0] not in verbs:
        raise errors.ConfigError(f"give one of {', '.join(verbs)}; for instance: merge show --model=DIR")
    if not MODEL.value:
        raise errors.ConfigError(f"{argv[0]} needs --model=DIR")
    result = verbs[argv[0]]()
    if JSON.value:
        print(json.dumps(result, sort_keys=True))


def create() -> dict[str, Any]:
    """Merges bundles with their anchor into a new model; the order of --expert does not matter."""
    if not ANCHOR.value or not EXPERT.value:
        raise errors.ConfigError("create needs --anchor=DIR and at least one --expert=DIR")
    target = epath.Path(MODEL.value)
    if (target / manifest_lib.FILE).exists():
        raise errors.StorageError(f"{target} already holds a finished artefact; choose another --model or remove it")
    anchor = store.open_anchor(ANCHOR.value)
    bundles = [store.open_bundle(path, None) for path in EXPERT.value]
    top_k = min(DEFAULT_TOP_K, len(bundles) + 1) if TOP_K.value is None else TOP_K.value
    rows = compatibility.report(anchor, bundles, top_k)
    print(compatibility.table(rows))
    compatibility.check(rows)
    bundles = [store.open_bundle(path, store.config_of(anchor)) for path in EXPERT.value]
    result: dict[str, Any] = {"report": [dataclasses.asdict(row) for row in rows]}
    if DRY_RUN.value:
        print("dry run: everything fits, nothing was written")
        return result
    model = models.write_model(target, anchor, {bundle.manifest["name"]: bundle for bundle in bundles}, top_k)
    print(f"{target}: {', '.join(['public', *sorted(model.bundles)])}; top_k {top_k}; tree digest {model.tree_digest}")
    return result | {"tree_digest": model.tree_digest}


def remove() -> dict[str, Any]:
    """Takes one expert out: in place its bytes are deleted; with --out the other model keeps them."""
    if not NAME.value:
        raise errors.ConfigError("remove needs --name=NAME")
    manifest_lib.read(MODEL.value, "model")  # what is no model is not locked either
    with workdir.lock(epath.Path(MODEL.value)):
        model = models.open_model(MODEL.value)
        models.check_known(model, NAME.value)
        if DRY_RUN.value:
            print(f"dry run: '{NAME.value}' would be removed from {OUT.value or MODEL.value}")
            return {}
        if OUT.value:
            kept = {name: bundle for name, bundle in model.bundles.items() if name != NAME.value}
            smaller = models.write_model(OUT.value, model.anchor, kept, models.remaining_top_k(model))
        else:
            smaller = models.remove_expert(model, NAME.value)
    left = ", ".join(["public", *sorted(smaller.bundles)])
    print(f"{smaller.directory}: removed '{NAME.value}', left {left}; tree digest {smaller.tree_digest}")
    return {"tree_digest": smaller.tree_digest}


def verify() -> dict[str, Any]:
    """Reads every byte of a model, an anchor or a bundle against its manifest."""
    model, artefacts = _open(epath.Path(MODEL.value))
    for artefact in artefacts:
        artefact.verify()
        print(f"{artefact.label}: {len(artefact.manifest['tensors'])} tensors sound, digest {artefact.manifest['digest']}")
    if model is not None:
        models.check_listing(model)
        print(f"{model.directory}: tree digest {model.tree_digest}")
    digests = {artefact.label: artefact.manifest["digest"] for artefact in artefacts}
    return {"sound": True, "digests": digests} | ({"tree_digest": model.tree_digest} if model else {})


def show() -> dict[str, Any]:
    """Prints what the manifests say."""
    model, artefacts = _open(epath.Path(MODEL.value))
    if model is not None:
        print(f"{model.directory}: top_k {model.manifest['top_k']}, tree digest {model.tree_digest}")
    for artefact in artefacts:
        manifest = artefact.manifest
        shown = {key: value for key, value in sorted(manifest["training"].items()) if key in SHOWN}
        facts = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        print(f"  {manifest.get('name', 'anchor'):<16} {manifest['digest'][:12]}  {facts}")
    manifests = [artefact.manifest | {"tensors": len(artefact.manifest["tensors"])} for artefact in artefacts]
    return {"artefacts": manifests} | ({"model": model.manifest} if model else {})


SHOWN = ("steps", "tokens", "flops", "documents", "public_fraction")


def _open(directory: epath.Path) -> tuple[models.Model | None, list[store.Artefact]]:
    kind = manifest_lib.kind(directory)
    if kind == "anchor":
        return None, [store.open_anchor(directory)]
    if kind == "expert":
        return None, [store.open_bundle(directory, None)]
    model = models.open_model(directory)
    return model, [model.anchor, *[model.bundles[name] for name in sorted(model.bundles)]]


if __name__ == "__main__":
    command.run(main)
