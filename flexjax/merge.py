"""Experts into a model, out of it, and everything that a coordinator of owners has to know and to prove.

python -m flexjax.merge create  --model=DIR --anchor=DIR --expert=DIR [--expert=DIR ...] [--top_k=K] [--dry_run]
python -m flexjax.merge add     --model=DIR --expert=DIR [--expert=DIR ...] [--dry_run]
python -m flexjax.merge replace --model=DIR --expert=DIR [--allow_older] [--dry_run]
python -m flexjax.merge remove  --model=DIR --name=NAME [--out=DIR] [--dry_run]
python -m flexjax.merge verify  --model=DIR [--trusted_keys=FILE] [--router]   (a model, an anchor or a bundle)
python -m flexjax.merge verify  --certificate=FILE [--model=DIR] [--trusted_keys=FILE]
python -m flexjax.merge show    --model=DIR
python -m flexjax.merge diff    --model=DIR --other=DIR                        (two models, anchors or bundles)
python -m flexjax.merge log     --model=DIR
python -m flexjax.merge revert  --model=DIR [--expert=DIR ...]
python -m flexjax.merge keygen  --key=FILE
python -m flexjax.merge sign    --model=DIR --key=FILE                         (a model, an anchor or a bundle)
python -m flexjax.merge card    --model=DIR                                    (a model, an anchor or a bundle)
python -m flexjax.merge certify --model=DIR --removed=NAME [--expert=DIR ...] [--former=DIR] [--key=FILE] [--out=FILE]
python -m flexjax.merge calibrate --model=DIR --data=PATH [--share=S] [--jointly] [--validation=NAME=PATH,...]  (or --revert)
python -m flexjax.merge compress  --anchor=DIR --expert=DIR --out=DIR --rank=R | --width=F [--validation=NAME=PATH,...]

DIR may be local or gs://. With --json the last line on stdout is one JSON object.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from typing import Any

from absl import flags
from etils import epath

from flexjax import command, errors, memory, storage, workdir
from flexjax import config as config_lib
from flexjax.data import corpus, tokens
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store
from flexjax.governance import (
    calibration,
    card,
    certificate,
    compatibility,
    compression,
    differences,
    health,
    history,
    layerwise,
    merging,
    signatures,
    verification,
)

MODEL = flags.DEFINE_string("model", None, "The merged model; some verbs also take an anchor or a bundle, see above.")
ANCHOR = flags.DEFINE_string("anchor", None, "The anchor that all experts were trained beside.")
EXPERT = flags.DEFINE_multi_string("expert", [], "A bundle; repeat the flag, in any order.")
NAME = flags.DEFINE_string("name", None, "remove: the expert to remove.")
OUT = flags.DEFINE_string("out", None, "remove: leave --model as it is and write here; certify, compress: what is written.")
TOP_K = flags.DEFINE_integer("top_k", None, "Experts per token; default all, but at most 4; add and replace keep the model's.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what would happen.")
POLICY = flags.DEFINE_string("anchor_policy", "strict", "Shared leaves in bundles: strict refuses, report leaves out, average.")
TRUSTED_KEYS = flags.DEFINE_string("trusted_keys", None, "JSON: which key may sign which expert; nothing else is let in.")
READ_CONTENT = flags.DEFINE_bool("read_content", False, "From bucket to bucket, read every byte before the store copies it.")
ALLOW_OLDER = flags.DEFINE_bool("allow_older", False, "replace: a bundle of a lower version than the one in the model.")
ROUTER = flags.DEFINE_bool("router", False, "verify: also whether each expert's router row does what honest ones do.")
OTHER = flags.DEFINE_string("other", None, "diff: what --model is compared with.")
KEY = flags.DEFINE_string("key", None, "File of a private Ed25519 key; keygen makes it.")
REMOVED = flags.DEFINE_string("removed", None, "certify: the expert that left.")
FORMER = flags.DEFINE_string("former", None, "certify, after remove --out: the model that the expert left.")
CERTIFICATE = flags.DEFINE_string("certificate", None, "verify: a certificate; with --model, whether it is of that model.")
DATA = flags.DEFINE_string("data", None, "calibrate: public text, .jsonl or .jsonl.gz.")
SHARE = flags.DEFINE_float("share", calibration.SHARE, "calibrate: what an expert may take of public text beside public alone.")
JOINTLY = flags.DEFINE_bool("jointly", False, "calibrate: fit all together, to --share for all; ties them to each other.")
IGNORE_MARGINS = flags.DEFINE_bool("ignore_margins", False, "calibrate: lower biases against owners' margins too.")
REVERT = flags.DEFINE_bool("revert", False, "calibrate: back to the owners' own biases.")
VALIDATION = flags.DEFINE_list("validation", [], "calibrate, compress: NAME=PATH, text on which before and after are scored.")
MAX_KILOBYTES = flags.DEFINE_integer("max_kilobytes", 256, "Of each text of --validation, from its beginning; 0: all.")
RANK = flags.DEFINE_integer("rank", None, "compress: rank of the delta to the public expert.")
WIDTH = flags.DEFINE_integer("width", None, "compress: hidden units that are kept.")
JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object, last on stdout.")

SHOWN = ("steps", "tokens", "flops")


def main(argv: list[str]) -> None:
    """Runs one verb."""
    memory.keep_freed()
    if len(argv) != 1 or argv[0] not in VERBS:
        raise errors.ConfigError(f"give one of {', '.join(VERBS)}; for instance: merge show --model=DIR")
    verb, needed, optional = VERBS[argv[0]]
    module = flags.FLAGS.find_module_defining_flag(DRY_RUN.name)
    for flag in sorted(flag.name for flag in flags.FLAGS.get_key_flags_for_module(module) if flag.present):
        if flag not in (*needed, *optional.split(), JSON.name):
            takes = ", ".join(f"--{name}" for name in (*needed, *optional.split()))
            raise errors.ConfigError(f"{argv[0]} does not take --{flag}, only {takes}; leave it out")
    for holder, example in needed.items():
        if not flags.FLAGS[holder].value:
            also = ", ".join(f"--{flag}={word}" for flag, word in needed.items())
            raise errors.ConfigError(f"{argv[0]} needs --{holder}={example}; all that it needs: {also}")
    _result(verb())


def _result(result: dict[str, Any]) -> None:
    if JSON.value:
        print(json.dumps(result, sort_keys=True))


def create() -> dict[str, Any]:
    """Merges bundles with their anchor into a new model; the order of --expert does not matter."""
    return _operate(lambda terms: merging.create(MODEL.value, ANCHOR.value, EXPERT.value, TOP_K.value, terms))


def add() -> dict[str, Any]:
    """Adds experts: their bytes are copied, the manifest is replaced, and nothing else is touched."""
    return _operate(lambda terms: merging.add(MODEL.value, EXPERT.value, TOP_K.value, terms))


def replace() -> dict[str, Any]:
    """Exchanges an expert for another bundle of its name."""
    if len(EXPERT.value) != 1:
        raise errors.ConfigError(f"replace exchanges one expert at a time; --expert was given {len(EXPERT.value)} times")
    return _operate(lambda terms: merging.replace(MODEL.value, EXPERT.value[0], TOP_K.value, terms, ALLOW_OLDER.value))


def revert() -> dict[str, Any]:
    """Undoes the last operation; what it deleted has to be given again."""
    return _operate(lambda terms: merging.revert(MODEL.value, EXPERT.value, terms))


def _operate(operation: Callable[[merging.Terms], models.Model | None]) -> dict[str, Any]:
    """Runs an operation that lets bundles in, printing the report on which it rests."""
    said: dict[str, Any] = {"report": []}

    def announce(rows: merging.Report) -> None:
        said["report"] = [dataclasses.asdict(row) for row in rows]
        print(compatibility.table(rows))

    trust, before = _trust(), storage.traffic()
    try:
        model = operation(merging.Terms(POLICY.value, trust, READ_CONTENT.value, announce, DRY_RUN.value))
    except errors.FlexjaxError as error:
        if said["report"]:  # a script that reads the report wants it most when it refuses
            _result(said | {"refused": str(error)})
        raise
    if model is None:
        print("dry run: everything fits, nothing was written")
        return said
    print(f"{model.directory}: {_experts(model)}; top_k {model.manifest['top_k']}; tree digest {model.tree_digest}")
    if not workdir.is_local(model.directory):
        moved = storage.traffic()
        said["traffic"] = {"down": moved.down - before.down, "up": moved.up - before.up}
        print(f"through this machine: {said['traffic']['down']} bytes down, {said['traffic']['up']} up; run verify to read all")
    return said | {"tree_digest": model.tree_digest}


def _experts(model: models.Model) -> str:
    return ", ".join(["public", *sorted(model.bundles)])


def remove() -> dict[str, Any]:
    """Takes one expert out: in place its bytes are deleted; with --out the other model keeps them."""
    smaller = merging.remove(MODEL.value, str(NAME.value), OUT.value, DRY_RUN.value)
    if smaller is None:
        print(f"dry run: '{NAME.value}' would be removed from {OUT.value or MODEL.value}")
        return {}
    print(f"{smaller.directory}: removed '{NAME.value}', left {_experts(smaller)}; tree digest {smaller.tree_digest}")
    return {"tree_digest": smaller.tree_digest}


def verify() -> dict[str, Any]:
    """Reads every byte of a model, an anchor or a bundle against its manifest, and says who vouches for it."""
    trust = _trust()
    if not MODEL.value and not CERTIFICATE.value:
        raise errors.ConfigError("verify needs --model=DIR or --certificate=FILE")
    if CERTIFICATE.value:
        of = models.open_model(MODEL.value) if MODEL.value else None
        proof = certificate.verify(CERTIFICATE.value, of, trust)
        print(proof["text"])
        return {"certificate": proof}
    model, artefacts = verification.open_any(MODEL.value)
    said = verification.verify(model, artefacts, trust)
    if ROUTER.value:
        if model is None:
            raise errors.ConfigError("--router looks at a merged model; give one as --model")
        effective = models.effective(model)
        found = health.probe(effective.anchor, effective.bundles)
        print(health.table(found))
        said["router"] = found.to_dict()
        health.check(found)
    return said


def _trust() -> signatures.Trust | None:
    return None if TRUSTED_KEYS.value is None else signatures.load_trust(TRUSTED_KEYS.value)


def show() -> dict[str, Any]:
    """Prints what the manifests say."""
    model, artefacts = verification.open_any(MODEL.value)
    if model is not None:
        print(f"{model.directory}: top_k {model.manifest['top_k']}, tree digest {model.tree_digest}")
    for artefact in artefacts:
        manifest = artefact.manifest
        training = manifest.get("training", {})
        facts = [f"{key} {training[key]:.4g}" for key in SHOWN if key in training]
        if manifest["kind"] == "expert":
            size = f"rank {manifest['rank']}" if manifest["rank"] else f"width {manifest['d_ff']}"
            facts += [size, f"version {manifest['version']}", f"owner {manifest['owner'] or 'not stated'}"]
        elif memory := manifest.get("model", {}).get("router_memory"):
            facts.append(f"router memory {memory:g}")
        print(f"  {manifest.get('name', manifest['kind']):<16} {manifest['digest'][:12]}  {', '.join(facts)}")
    manifests = [artefact.manifest | {"tensors": len(artefact.manifest["tensors"])} for artefact in artefacts]
    return {"artefacts": manifests} | ({"model": model.manifest} if model else {})


def diff() -> dict[str, Any]:
    """Prints what differs between two models, anchors or bundles."""
    found = differences.compare(MODEL.value, OTHER.value)
    print(differences.table(found))
    return found


def log() -> dict[str, Any]:
    """Prints what was done to a model, from the history beside it."""
    rows = history.log(MODEL.value, manifest_lib.read(MODEL.value, "model")["digest"])
    print(history.table(rows))
    return {"history": rows}


def keygen() -> dict[str, Any]:
    """Makes a key to sign with; the private half never leaves its file."""
    public = signatures.generate_key(KEY.value)
    print(f"{KEY.value}: private key, keep it offline; {KEY.value}.pub: {public}")
    return {"key": public}


def sign() -> dict[str, Any]:
    """Signs a manifest, and by its digests every byte."""
    signature = signatures.sign(MODEL.value, KEY.value)
    print(f"{MODEL.value}: signed by {signature['key']}")
    return signature


def write_card() -> dict[str, Any]:
    """Generates README.md from the manifests."""
    path = card.write(MODEL.value)
    print(f"{path}: written")
    return {"card": str(path)}


def certify() -> dict[str, Any]:
    """Proves, as far as it can be proven, that an expert has left this copy of a model."""
    made = certificate.certify(MODEL.value, str(REMOVED.value), EXPERT.value, KEY.value, OUT.value, FORMER.value)
    print(certificate.text(made))
    return made


def calibrate() -> dict[str, Any]:
    """Sets experts' biases from public text alone, or takes that back."""
    model = models.open_model(MODEL.value)
    if REVERT.value and DRY_RUN.value:
        print(f"dry run: the calibration of {', '.join(sorted(model.manifest['calibration'])) or 'nobody'} would be taken back")
        return {}
    if REVERT.value:
        made = merging.calibrate(MODEL.value, {})
        print(f"{made.directory}: owners' own biases again; tree digest {made.tree_digest}")
        return {"tree_digest": made.tree_digest}
    if not DATA.value:
        raise errors.ConfigError("calibrate needs --data=PATH, public text; or --revert")
    anchor = models.effective(model).anchor
    seq_len = anchor.manifest["training"].get("seq_len", compression.DEFAULT_SEQ_LEN)
    files = command.named_texts(VALIDATION.value, "validation")
    how: dict[str, Any] = {"together": JOINTLY.value, "ignore_margins": IGNORE_MARGINS.value}
    with tempfile.TemporaryDirectory() as cache:
        texts = {domain: _tokenize(anchor, domain, paths, cache) for domain, paths in files.items()}
        text = layerwise.sample(_tokenize(anchor, "data", corpus.expand(DATA.value, "", "data"), cache), seq_len=seq_len)
        fits, tied = calibration.of_model(model, text, SHARE.value, **how)
        print(calibration.table(fits))
        if tied:
            why = "fitted together" if JOINTLY.value else "fitted on leaves averaged over all"
            print(f"{', '.join(tied)}: {why}, so none can be removed or replaced until calibrate --revert")
        result: dict[str, Any] = {"with": tied, "fits": {name: fit.to_dict() for name, fit in fits.items()}}
        if texts:
            plain = dataclasses.replace(model, manifest=model.manifest | {"calibration": {}})
            biases = {name: fit.bias for name, fit in fits.items()}
            limit = MAX_KILOBYTES.value * 1000
            result["confusion"] = calibration.confusion(*models.load(plain), biases, texts, seq_len=seq_len, max_bytes=limit)
            print(calibration.confusion_table(result["confusion"]))
    if DRY_RUN.value:
        print("dry run: nothing was written")
        return result
    entries = {name: calibration.entry(fit, SHARE.value, text.digest, tied) for name, fit in fits.items()}
    made = merging.calibrate(MODEL.value, entries, model)
    print(f"{made.directory}: calibrated; tree digest {made.tree_digest}")
    return result | {"tree_digest": made.tree_digest}


def compress() -> dict[str, Any]:
    """Makes a smaller expert of an expert, and says what that costs."""
    if len(EXPERT.value) != 1:
        raise errors.ConfigError(f"compress takes one expert at a time; --expert was given {len(EXPERT.value)} times")
    anchor = store.open_anchor(ANCHOR.value)
    bundle = store.open_bundle(EXPERT.value[0], store.config_of(anchor))
    texts = command.named_texts(VALIDATION.value, "validation")
    report = compression.compress(anchor, bundle, OUT.value, RANK.value, WIDTH.value)
    if texts:
        small = store.open_bundle(OUT.value, store.config_of(anchor))
        report["evaluation"] = {
            side: compression.score(anchor, found, texts, max_bytes=MAX_KILOBYTES.value * 1000)
            for side, found in {"before": bundle, "after": small}.items()
        }
    print(compression.table(report))
    return report


def _tokenize(anchor: store.Artefact, domain: str, paths: list[epath.Path], cache: str) -> tokens.TokenSource:
    vocabulary = store.config_of(anchor).vocab_size
    return tokens.tokenize(paths, store.tokenizer(anchor), config_lib.DataConfig(), vocabulary, epath.Path(cache) / domain)


LETS_IN = "dry_run anchor_policy trusted_keys read_content"
SCORES = "validation max_kilobytes"
VERBS: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, str], str]] = {  # with the flags it needs, and others it takes
    "create": (create, {"model": "DIR", "anchor": "DIR", "expert": "DIR"}, f"top_k {LETS_IN}"),
    "add": (add, {"model": "DIR", "expert": "DIR"}, f"top_k {LETS_IN}"),
    "replace": (replace, {"model": "DIR", "expert": "DIR"}, f"top_k allow_older {LETS_IN}"),
    "remove": (remove, {"model": "DIR", "name": "NAME"}, "out dry_run"),
    "verify": (verify, {}, "model certificate trusted_keys router"),
    "show": (show, {"model": "DIR"}, ""),
    "diff": (diff, {"model": "DIR", "other": "DIR"}, ""),
    "log": (log, {"model": "DIR"}, ""),
    "revert": (revert, {"model": "DIR"}, f"expert {LETS_IN}"),
    "keygen": (keygen, {"key": "FILE"}, ""),
    "sign": (sign, {"model": "DIR", "key": "FILE"}, ""),
    "card": (write_card, {"model": "DIR"}, ""),
    "certify": (certify, {"model": "DIR", "removed": "NAME"}, "expert former key out"),
    "calibrate": (calibrate, {"model": "DIR"}, f"data share jointly ignore_margins revert dry_run {SCORES}"),
    "compress": (compress, {"anchor": "DIR", "expert": "DIR", "out": "DIR"}, f"rank width {SCORES}"),
}

if __name__ == "__main__":
    command.run(main)
