"""The hostile corpus: what an owner whom nobody has to trust can hand in, made by code from honest bundles.

A kind takes a fresh copy of an honest bundle and makes it hostile. `judge` runs the merge on it and says what was wrong
about its refusal: not refused, refused too late (structural kinds before any tensor is opened, hostile routers before any
other tensor), refused unclearly, something published or changed, slow, or large.
"""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import numpy as np

from flexjax import errors, storage, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance, publishing, slices, store, surgery
from flexjax.governance import compatibility, merging, signatures
from flexjax.model import transformer
from tests.experts import forging
from tests.governance import parts
from tests.model import noise

CONFIG = parts.CONFIG
PARAMS = noise.params(transformer.Architecture(CONFIG, parts.BANKS, 2), std=0.1)
SHARED, EXPERTS = surgery.split(PARAMS, parts.BANKS)
MEAN = np.random.default_rng(2).normal(size=CONFIG.d_model)  # the direction that all public states have in common
STATES = (parts.STATES + 2 * MEAN).astype(np.float32)
ROUTING = re.compile("/tensors/(expert/router|statistics)/")  # what one has to read to judge a router
SECONDS = 2.0  # of a processor, for a structural kind
MEMORY = 200 * 2**20
PROSE = "Mrs Example, born 1961, was admitted on Monday with "
ZEROS = "0" * 64
ROW, BIAS, UP = "expert/router/row", "expert/router/bias", "expert/ffn/up"
Integrity, Config, Policy = errors.IntegrityError, errors.ConfigError, errors.PolicyError


@dataclasses.dataclass
class House:
    """Honest things, never changed: anchors, bundles by name, keys, and models to add to and to replace in."""

    home: pathlib.Path

    def __getattr__(self, name):
        return self.home / name

    def key(self, owner):
        return (self.home / f"{owner}.key.pub").read_text().strip()


def build(home):
    """Makes the house in a directory."""
    house = House(home)
    anchor = write_anchor(home / "anchor", STATES)
    bare = write_anchor(home / "bare_anchor", None)
    for name in EXPERTS:
        if name != "public":
            write(home / name, name, anchor)
    write(home / "bare_alpha", "alpha", bare)
    write(home / "carrying", "alpha", anchor, shared=moved())
    write(home / "newer", "alpha", anchor, version=3)
    for owner in ("a", "b"):
        signatures.generate_key(home / f"{owner}.key")
    merging.create(home / "model", home / "anchor", [home / "beta", home / "gamma"], None)
    merging.create(home / "newer_model", home / "anchor", [home / "newer"], None)
    return house


def write_anchor(directory, states, dtype=np.float32):
    extra = {} if states is None else {"statistics": {"states": states}}
    source = directory.parent / "tokenizer.model"
    source.write_bytes(b"any bytes")
    leaves = {**SHARED, "expert": EXPERTS["public"]}
    cast = tree.map_with_path(lambda _, leaf: leaf.astype(dtype), leaves)
    return publishing.write_anchor(
        directory, CONFIG, source, lambda writer: writer.put_tree(cast | extra), rows="mean", training={"steps": 3}
    )


def write(directory, name, anchor, expert=None, shared=None, training=None, **stated):
    """An honest bundle of owner Clinic A."""
    facts = {"steps": 4, "tokens": 1024, "seed": 1, **(training or {})}
    said = provenance.Provenance(**({"owner": "Clinic A", "data": {"licence": "CC-BY-4.0", "documents": 1010}} | stated))
    return publishing.write_bundle(directory, name, anchor, EXPERTS[name] if expert is None else expert, facts, said, shared)


def moved():
    """An embedding as a recipe that unfroze it leaves it."""
    table = SHARED["embed"]["embedding"]
    return {"embed": {"embedding": (table * np.float32(1.1)).astype(np.float32)}}


@dataclasses.dataclass
class Case:
    """One attempt: a copy of a bundle to spoil, and with what it is to be merged."""

    house: House
    home: pathlib.Path
    bundle: pathlib.Path
    anchor: pathlib.Path
    others: tuple[str, ...] = ("beta", "gamma")
    model: str = "model"
    policy: str = "strict"
    trust: dict | None = None

    @property
    def target(self):
        return self.home / "target"

    def sign(self, owner="a", **rules):
        """Signs the bundle, and trusts the key with all names of Clinic A unless told otherwise."""
        signatures.sign(self.bundle, self.house.home / f"{owner}.key")
        key = self.house.key("a")
        self.trust = {"keys": {key: {"owner": "Clinic A", "names": ["*"]}}} | rules
        self.others = ()

    def file(self, path=UP, index=0):
        """A slice's file."""
        rank = {BIAS: 1, ROW: 2}.get(path, 3)
        return self.bundle / "tensors" / path / slices.slice_file(index, rank)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to be hostile.

    Attributes:
      attack: spoils a case.
      error: the class of the refusal.
      says: what its message names; {bundle} is the directory.
      when: "structural" (before any tensor is opened), "router" (before any but row and bias), or "content".
      base: the bundle of the house that it begins with.
      verbs: what lets bundles in.
    """

    attack: Callable[[Case], object]
    error: type[errors.FlexjaxError]
    says: tuple[str, ...]
    when: str = "structural"
    base: str = "alpha"
    verbs: tuple[str, ...] = ("create", "add")


MANIFEST = "{bundle}/manifest.json"


def forged(change, *says, error=Integrity, base="alpha", **options):
    """A manifest that says something else, with a digest that fits."""
    return Kind(lambda case: forging.forge(case.bundle, change), error, says, base=base, **options)


def stated(field, value, *says):
    """A statement that is not of its form, in a manifest that is otherwise sound."""
    return forged(lambda m: m.update({field: value}), MANIFEST, *(says or (field,)))


def tensor(path=UP, says=(), **entry):
    return forged(lambda m: m["tensors"][path].update(entry), "expert 'alpha'", path, *says)


def named(name, error=Config):
    return forged(lambda m: m.update(name=name), "name", error=error)


def extra_tensor(name, source=UP):
    """A tensor that an expert does not have, under a shape that it could have."""
    return forged(lambda m: m["tensors"].update({name: m["tensors"][source]}), "expert 'alpha'", "unexpected tensor")


LINEAGE = {
    "other anchor": forged(lambda m: m.update(anchor="e" * 64), "'alpha'", "anchor"),
    "other config": forged(lambda m: m.update(config="e" * 64), "'alpha'", "config"),
    "other tokenizer": forged(lambda m: m.update(tokenizer="e" * 64), "'alpha'", "tokenizer"),
    "no tokenizer": forged(lambda m: m.update(tokenizer=None), "tokenizer"),
    "tokenizer as an object": forged(lambda m: m.update(tokenizer={"file": "../../x", "digest": ZEROS}), "tokenizer"),
    "terminal codes as a digest": forged(lambda m: m.update(anchor="\x1b[2J\x1b[H ok\n"), "anchor"),
}
SMUGGLED = {
    "shared tensor as one of the expert": extra_tensor("expert/embed/embedding"),
    "shared tensor under its own name": extra_tensor("embed/embedding"),
    "statistics": extra_tensor("statistics/states"),
    "public's own matrix": extra_tensor("expert/public/ffn/up"),
    "path out of the directory": extra_tensor("../../x"),
    "path out behind an honest beginning": extra_tensor("expert/ffn/up/../../../../x"),
    "absolute path": extra_tensor("/etc/passwd"),
    "terminal codes in a tensor's name": extra_tensor("\x1b[1Aexpert/ffn/up\r\n"),
    "look-alike of a tensor's name": extra_tensor("expert/ffn/u\u0440"),
    "tensor's name in capitals": extra_tensor("expert/ffn/UP"),
    "path out as a carried leaf": Kind(
        lambda case: (
            setattr(case, "policy", "report"),
            forging.forge(case.bundle, lambda m: m["tensors"].update({"shared/../../../x": m["tensors"][UP]})),
        ),
        Integrity,
        ("'alpha'", "unexpected tensor"),
    ),
    "carried leaf under a strict policy": Kind(lambda case: None, Policy, ("'alpha'", "embed/embedding"), base="carrying"),
    "carried leaf of another shape": Kind(
        lambda case: (
            setattr(case, "policy", "average"),
            forging.forge(case.bundle, lambda m: m["tensors"]["shared/embed/embedding"].update(shape=[2**24, 8])),
        ),
        Integrity,
        ("'alpha'", "shared/embed/embedding"),
        base="carrying",
    ),
}


def wide(case):
    """A width that is plausible in itself, with files of that size which hold nothing."""

    def change(m):
        m["d_ff"] = 2**19
        for path in ("gate", "up", "down"):
            shape = [2, 2**19, 8] if path == "down" else [2, 8, 2**19]
            m["tensors"][f"expert/ffn/{path}"]["shape"] = shape

    forging.forge(case.bundle, change)
    for path in ("gate", "up", "down"):
        for index in range(2):
            os.truncate(case.file(f"expert/ffn/{path}", index), 2**24)


SHAPES = {
    "giant shape": tensor(shape=[2, 2**40, 6]),
    "negative shape": tensor(shape=[-2, 8, 6]),
    "zero shape": tensor(shape=[2, 0, 6]),
    "float shape": tensor(shape=[2.0, 8, 6]),
    "true as a shape": tensor(shape=[True, 8, 6]),
    "words as a shape": tensor(shape="\x1b[2J"),
    "too many dimensions": tensor(shape=[2, 8, 6, 1]),
    "exchanged dimensions": tensor(shape=[2, 6, 8]),
    "other number of layers": forged(lambda m: m["tensors"][ROW].update(shape=[2**13, 8]), "'alpha'", "8192 layers"),
    "giant row": forged(lambda m: m["tensors"][ROW].update(shape=[2, 10**400]), "'alpha'"),
    "giant width": forged(lambda m: m.update(d_ff=2**40), "'alpha'", "d_ff"),
    "plausible width with files that hold nothing": Kind(wide, Integrity, ("'alpha'", "d_ff")),
    "no width": forged(lambda m: m.update(d_ff=0), "'alpha'", "d_ff"),
    "negative width": forged(lambda m: m.update(d_ff=-6), "'alpha'", "d_ff"),
    "giant rank": forged(lambda m: m.update(rank=2**40), "'delta'", "rank", base="delta"),
    "negative rank": forged(lambda m: m.update(rank=-1), "'delta'", "rank", base="delta"),
    "rank of another expert": forged(lambda m: m.update(rank=3), "'delta'", "expert/ffn", base="delta"),
    "rank with another width": forged(lambda m: m.update(d_ff=5), "'delta'", base="delta"),
    "rank of full matrices": forged(lambda m: m.update(rank=2), "'alpha'", "expert/ffn"),
    "object dtype": tensor(dtype="object"),
    "double precision": tensor(dtype="float64"),
    "integers": tensor(dtype="int8"),
    "missing matrix": forged(lambda m: m["tensors"].pop(UP), "'alpha'", UP, "missing"),
    "missing bias": forged(lambda m: m["tensors"].pop(BIAS), "'alpha'", BIAS, "missing"),
    "too few slices": tensor(slices=[ZEROS]),
    "too many slices": tensor(slices=[ZEROS] * 9),
    "path out as a slice's digest": tensor(slices=["../../../../x", ZEROS]),
    "entry with an address": tensor(url="https://example.org/up"),
}
NUMBERS = {
    "huge max": tensor(max=1e308, says=("largest weight",)),
    "negative max": tensor(max=-1.0, says=("max",)),
    "max beyond every float": tensor(max=10**400, says=("max",)),
    "rms beyond every float": tensor(rms=10**400, says=("rms",)),
    "max in words": tensor(max="\x1b[2Jsmall", says=("max",)),
    "true as rms": tensor(rms=True, says=("rms",)),
    "huge rms": tensor(rms=1e30, says=("root mean square",)),
    "huge weights, honestly stated": Kind(
        lambda case: forging.implant(case.bundle, UP, lambda x: 1e3 * x), Integrity, ("'alpha'", "largest weight", UP)
    ),
    "huge product of factors": Kind(
        lambda case: [forging.implant(case.bundle, f"{UP}/{side}", lambda x: 30 * x) for side in "ab"],
        Integrity,
        ("'delta'", UP),
        base="delta",
    ),
    "evaluation beyond every float": stated("evaluation", {"math": {"bits_per_byte": 10**400}}),
    "margins beyond every float": stated("margins", {"quantiles": [0.5, 0.9], "values": [[10**400, 0.0], [0.0, 0.0]]}),
    "epsilon beyond every float": stated("privacy", {"dp": "dp-sgd", "epsilon": 10**400, "delta": 1e-5}),
    "operations beyond every float": stated("training", {"flops": 10**400}),
    "evaluation below nothing": stated("evaluation", {"math": {"bits_per_byte": -1.0, "anchor": 2.0}}),
    "quantiles that are none": stated("margins", {"quantiles": [-7.0, 0.5], "values": [[0.0, 0.0]] * 2}),
    "huge margins": stated("margins", {"quantiles": [0.5, 0.9], "values": [[1e308, 1e308]] * 2}),
    "margins of another number of layers": forged(
        lambda m: m.update(margins={"quantiles": [0.5, 0.9], "values": [[0.0, 1.0]] * 3}), "'alpha'", "margins"
    ),
    "ragged margins": stated("margins", {"quantiles": [0.5, 0.9], "values": [[0.0, 1.0], [0.0]]}),
    "margins without a median": stated("margins", {"quantiles": [0.1, 0.9], "values": [[0.0, 1.0]] * 2}),
    "margins of every token": stated("margins", {"quantiles": [i / 100 for i in range(100)], "values": [[0.0] * 100] * 2}),
    "negative epsilon": stated("privacy", {"dp": "dp-sgd", "epsilon": -1.0, "delta": 1e-5}),
    "no privacy, dressed up": stated("privacy", {"dp": "none", "epsilon": 0.1, "delta": 1e-9}),
    "empty privacy": stated("privacy", {"dp": ""}),
    "version zero": stated("version", 0),
    "true as a version": stated("version", True),
    "giant version": stated("version", 2**40),
    "fractional documents": stated("data", {"documents": 0.5}),
    "negative documents": stated("data", {"documents": -5}),
}
TEXT = {
    "owner of 10 kB": stated("owner", "x" * 10_000),
    "terminal codes in the owner": stated("owner", "\x1b]0;root\x07Clinic A"),
    "owner written backwards": stated("owner", "Clinic \u202eA"),
    "two lines of owner": stated("owner", "Clinic A\nerror: none"),
    "no owner at all": stated("owner", None),
    "licence of two lines": stated("data", {"licence": "MIT\nlicense: apache-2.0"}),
    "licence with markup": stated("data", {"licence": "<script>alert(1)</script>"}),
    "licence that tells a story": stated("data", {"licence": PROSE * 2}),
    "data with excerpts": stated("data", {"documents": 1, "sample": PROSE}),
    "prose as the text's digest": stated("data", {"digest": PROSE}),
    "prose as a training fact": stated("training", {"note": PROSE}, "note"),
    "prose as the key of a training fact": stated("training", {PROSE * 9: 1}, "training"),
    "terminal codes as the key of a training fact": stated("training", {"\x1b[2J": 1}, "training"),
    "prose as a number of steps": stated("training", {"steps": PROSE}, "steps"),
    "prose as a tuned neighbour": stated("training", {"router_tuned_with": [PROSE] * 100}, "router_tuned_with"),
    "prose as keys of an imported config": stated("training", {"huggingface": {PROSE * 900: 1}}, "huggingface"),
    "prose as the code's version": stated("code", PROSE * 900),
    "terminal codes as the code's version": stated("code", "flexjax \x1b[2J"),
    "prose as an evaluated domain": stated("evaluation", {PROSE * 9: {"bits_per_byte": 1.0}}),
    "a thousand domains": stated("evaluation", {f"d{i}": {} for i in range(1000)}),
    "evaluation with excerpts": stated("evaluation", {"math": {"bits_per_byte": 1.0, "text": PROSE}}),
    "parent with a path": stated("parent", {"digest": "../../anchor", "by": "compress"}),
    "parent with a story": stated("parent", {"digest": ZEROS, "by": PROSE * 9}),
    "field of its own": stated("hook", "import os", "hook"),
    "terminal codes as a field": stated("\x1b[2J", 1, "unknown"),
    "no statement of privacy": forged(lambda m: m.pop("privacy"), MANIFEST, "privacy"),
}
NAMES = {
    "path as a name": named("../evil"),
    "absolute path as a name": named("/etc"),
    "reserved name": named("public"),
    "name in capitals": named("Alpha"),
    "name in Cyrillic": named("\u0430lpha"),
    "full-width name": named("\uff41lpha"),
    "name with a line break": named("alpha\n"),
    "name with nothing between dots": named("a..b"),
    "long name": named("x" * 64),
    "empty name": named(""),
    "null as a name": named(None, Integrity),
    "name of another expert": forged(lambda m: m.update(name="gamma"), "'gamma'", error=Config),
}


def raw(change, *says):
    """The bytes of a manifest, changed."""

    def attack(case):
        path = case.bundle / "manifest.json"
        path.write_bytes(change(path.read_bytes()))

    return Kind(attack, Integrity, (MANIFEST, *says))


def instead(make, *says, name="manifest.json"):
    """Something else in a file's place."""

    def attack(case):
        path = case.bundle / name
        path.unlink(missing_ok=True)
        make(path)

    return Kind(attack, Integrity, (f"{{bundle}}/{name}", *says))


def sparse(path):
    path.write_bytes(b"{")
    os.truncate(path, 2**40)


def link(path, target="/etc/hostname"):
    path.symlink_to(target)


def deep_behind_brackets(data):
    manifest = json.loads(data)
    return tree.canonical_json(manifest | {"code": "]" * 150_000}).replace(b'"d_ff":6', b'"d_ff":' + b"[" * 150_000)


MANIFESTS = {
    "forged digest": raw(lambda data: data.replace(b"Clinic A", b"Clinic B"), "digest"),
    "digest of something else": raw(lambda data: data.replace(json.loads(data)["digest"].encode(), b"e" * 64), "digest"),
    "terminal codes as the digest": raw(
        lambda data: tree.canonical_json(json.loads(data) | {"digest": "\x1b[2J\n"}) + b"\n", "digest"
    ),
    "later format": forged(lambda m: m.update(format=3), MANIFEST, "format"),
    "former format": forged(lambda m: m.update(format=1), MANIFEST, "format"),
    "kind of a model": forged(lambda m: m.update(kind="model"), MANIFEST, "expected 'expert'"),
    "kind of its own": forged(lambda m: m.update(kind="__class__"), MANIFEST, "expected 'expert'"),
    "missing field": forged(lambda m: m.pop("d_ff"), MANIFEST, "d_ff"),
    "list of tensors": stated("tensors", [], "tensors"),
    "twice the same key": raw(lambda data: data.replace(b'"d_ff":6', b'"d_ff":6,"d_ff":6'), "twice"),
    "twice the same tensor": raw(lambda data: data.replace(b'{"expert/ffn/down":', b'{"expert/ffn/down":1,"expert/ffn/down":')),
    "pretty-printed manifest": raw(lambda data: json.dumps(json.loads(data), indent=1).encode(), "canonical"),
    "something behind the manifest": raw(lambda data: data + b"import os\n"),
    "NaN in the manifest": raw(lambda data: data.replace(b'"d_ff":6', b'"d_ff":NaN')),
    "infinity in the manifest": raw(lambda data: data.replace(b'"d_ff":6', b'"d_ff":1e999')),
    "number of a million digits": raw(lambda data: data.replace(b'"d_ff":6', b'"d_ff":' + b"9" * 1_000_000)),
    "deep manifest": raw(lambda _: b"[" * 500_000, "nested"),
    "deep manifest that closes before it opens": raw(deep_behind_brackets),
    "large manifest": raw(lambda data: data.replace(b"Clinic A", b"x" * 2**20), "no honest one has more"),
    "manifest of a terabyte": instead(sparse, "no honest one has more"),
    "empty manifest": raw(lambda _: b""),
    "pickle as a manifest": raw(lambda _: pickle.dumps({"kind": "expert"})),
    "UTF-16 manifest": raw(lambda data: data.decode().encode("utf-16")),
    "linked manifest": instead(link, "symbolic link"),
    "fifo as a manifest": instead(os.mkfifo),
    "directory as a manifest": instead(os.mkdir),
    "device as a manifest": instead(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))),
    "anchor as an expert": Kind(lambda case: None, Integrity, (MANIFEST, "expected 'expert'"), base="anchor"),
    "model as an expert": Kind(lambda case: None, Integrity, (MANIFEST, "expected 'expert'"), base="model"),
}


def on_file(attack, says="{file}", path=UP, when="structural"):
    """Something done to the file of a slice."""
    return Kind(lambda case: attack(case.file(path)), Integrity, (says,), when)


def replaced(make):
    def attack(file):
        file.unlink()
        make(file)

    return attack


def linked_to_copy(file):
    elsewhere = file.parents[1] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def linked_to_the_same(case):
    """A link that is as long as its slice must be, to a slice of the same bytes: nothing is wrong but that it is one."""
    forging.implant(case.bundle, BIAS, lambda bias: np.full_like(bias, -0.5))
    file = case.file(BIAS)
    file.unlink()
    file.symlink_to(".//1")
    assert os.lstat(file).st_size == 4 and file.read_bytes() == case.file(BIAS, 1).read_bytes()


def linked_directory(directory):
    moved = directory.with_name("elsewhere")
    directory.rename(moved)
    directory.symlink_to(moved.resolve())


def bound_socket(file):
    here = os.getcwd()
    os.chdir(file.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(file.name)
    finally:
        os.chdir(here)


def added(name, content=b"import os\n"):
    def attack(case):
        path = case.bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return Kind(attack, Integrity, (f"{{bundle}}/{name}",))


FILES = {
    "linked slice": on_file(linked_to_copy, "{bundle}/tensors/expert/ffn/up"),
    "link to the same bytes": Kind(linked_to_the_same, Integrity, ("{bundle}/tensors/expert/router/bias",)),
    "link to a device": on_file(replaced(lambda file: link(file, "/dev/zero"))),
    "linked directory of slices": Kind(
        lambda case: linked_directory(case.bundle / "tensors" / UP / "c"), Integrity, ("{bundle}/tensors/expert/ffn/up",)
    ),
    "linked directory of tensors": Kind(lambda case: linked_directory(case.bundle / "tensors"), Integrity, ("{bundle}/",)),
    "fifo as a slice": on_file(replaced(os.mkfifo)),
    "socket as a slice": on_file(replaced(bound_socket)),
    "directory as a slice": on_file(replaced(os.mkdir)),
    "device as a slice": on_file(replaced(lambda file: os.mknod(file, stat.S_IFCHR | 0o666, os.makedev(1, 5)))),
    "slice of a terabyte": on_file(lambda file: os.truncate(file, 2**40)),
    "slice that is cut": on_file(lambda file: os.truncate(file, 100)),
    "slice that is longer": on_file(lambda file: file.write_bytes(file.read_bytes() + b"\0")),
    "empty slice": on_file(lambda file: os.truncate(file, 0)),
    "missing slice": on_file(lambda file: file.unlink()),
    "missing bias": on_file(lambda file: file.unlink(), path=BIAS),
    "extra file": added("notes.txt", PROSE.encode()),
    "pickle": added("tensors/expert.pkl", pickle.dumps({"up": [1.0]})),
    "Python module": added("expert/__init__.py"),
    "module to be imported": added("sitecustomize.py"),
    "shared object": added("tensors/libexpert.so", b"\x7fELF"),
    "hidden file": added("tensors/.hidden"),
    "slice more than there are": added("tensors/expert/ffn/up/c/2/0/0", b"\0" * 192),
    "file of another tensor": added("tensors/embed/embedding/c/0/0", b"\0" * 8),
    "look-alike of the manifest": added("Manifest.json", b"{}"),
    "mark of an unfinished write": added(".manifest.json.partial", b""),
}


def signed(change, *says, error=Policy, **rules):
    """A signed bundle that the trust file does not vouch for."""

    def attack(case):
        case.sign(**rules)
        change(case)

    return Kind(attack, error, says)


def trust_digest(case):
    case.trust["revoked"] = [manifest_lib.read(case.bundle, "expert")["digest"]]


def signature_of(other):
    def attack(case):
        case.sign()
        shutil.copytree(case.house.home / other, case.home / "other")
        signatures.sign(case.home / "other", case.house.home / "a.key")
        shutil.copy(case.home / "other" / "signature.json", case.bundle)

    return Kind(attack, Integrity, ("'alpha'", "signature.json"))


def signature(content, owner_knows=False):
    """A signature file that is none."""

    def attack(case):
        case.sign()
        path = case.bundle / "signature.json"
        path.write_bytes(content(json.loads(path.read_bytes())))
        if owner_knows:
            case.trust = None

    return Kind(attack, Integrity, ("'alpha'", "signature.json"))


def encoded(**changes):
    return lambda found: tree.canonical_json(found | changes) + b"\n"


def other_purpose(case):
    case.sign()
    content = tree.canonical_json(manifest_lib.read(case.bundle, "expert"))
    found = signatures.sign_bytes(content, "certificate", case.house.home / "a.key")
    (case.bundle / "signature.json").write_bytes(tree.canonical_json(found) + b"\n")


def broken_signature(make):
    def attack(case):
        path = case.bundle / "signature.json"
        make(path)

    return Kind(attack, Integrity, ("'alpha'", "signature.json"))


WEAK = "01" + "0" * 62  # the neutral element: its signatures fit everything
SIGNATURES = {
    "unsigned": signed(lambda case: (case.bundle / "signature.json").unlink(), "'alpha'", "unsigned"),
    "key that nobody knows": signed(lambda case: None, "'alpha'", "does not know this key", owner="b"),
    "name of another owner": signed(
        lambda case: case.trust["keys"][case.house.key("a")].update(names=["hospital-*"]), "'alpha'", "may not sign"
    ),
    "owner that the key does not stand for": signed(
        lambda case: case.trust["keys"][case.house.key("a")].update(owner="Clinic B"), "'alpha'", "owner"
    ),
    "revoked key": signed(lambda case: case.trust.update(revoked=[case.house.key("a")]), "'alpha'", "revoked"),
    "revoked digest": signed(trust_digest, "'alpha'", "revoked"),
    "older version, replayed": signed(lambda case: None, "'alpha'", "version 1", least_version={"alpha": 2}),
    "signature of another bundle": signature_of("gamma"),
    "signature of another version": signature_of("newer"),
    "signature of the anchor": signature_of("anchor"),
    "signature for another purpose": Kind(other_purpose, Integrity, ("'alpha'", "signature.json")),
    "weak key": signature(encoded(key=WEAK, signature=WEAK + "0" * 64), owner_knows=True),
    "signature of zeros": signature(encoded(signature="0" * 128)),
    "signature in capitals": signature(lambda found: encoded(signature=found["signature"].upper())(found)),
    "other algorithm": signature(encoded(algorithm="none")),
    "signature with a field of its own": signature(encoded(owner="Clinic A")),
    "pretty-printed signature": signature(lambda found: json.dumps(found, indent=1).encode()),
    "empty signature": broken_signature(lambda path: path.write_bytes(b"")),
    "deep signature": broken_signature(lambda path: path.write_bytes(b"[" * 4000)),
    "signature of a terabyte": broken_signature(sparse),
    "binary signature": broken_signature(lambda path: path.write_bytes(bytes(range(256)))),
    "linked signature": broken_signature(link),
    "fifo as a signature": broken_signature(os.mkfifo),
    "directory as a signature": broken_signature(os.mkdir),
}


def older(case):
    case.model = "newer_model"


REPLACED = {
    "older version than the model's": Kind(older, Policy, ("'alpha'", "version"), verbs=("replace",)),
    "bundle of an expert that the model has not": Kind(lambda case: None, Policy, ("'alpha'",), verbs=("replace",)),
}


def implanted(change, path=UP, says=(), base="alpha", honest_size=True, **options):
    """Numbers that are not to be let in, with digests that fit."""
    when = "router" if path.startswith("expert/router") else "content"

    def attack(case):
        forging.implant(case.bundle, path, change, honest_size)

    return Kind(attack, Integrity, (f"'{base}'", *(says or (path,))), when, base=base, **options)


def poke(value, place=-1):
    def change(values):
        values.reshape(-1)[place] = value

    return change


def signalling(values):
    """A NaN that traps where it is converted."""
    values.view(np.uint32).reshape(-1)[-1] = 0x7FA00000


def lie(**changed):
    return lambda case: forging.forge(case.bundle, lambda m: m["tensors"][UP].update(changed))


def bit(path, index=0, place=0):
    def attack(case):
        file = case.file(path, index)
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    return attack


def exchanged(one, other):
    def attack(case):
        a, b = case.file(*one), case.file(*other)
        first, second = a.read_bytes(), b.read_bytes()
        assert first != second
        a.write_bytes(second)
        b.write_bytes(first)

    return attack


def along_the_mean(case):
    forging.implant(case.bundle, ROW, lambda rows: np.stack([MEAN.astype(np.float32)] * len(rows)))


def twin(case):
    """The row of another owner's expert, a little louder."""
    gamma = store.open_bundle(case.house.gamma, None).tensor(ROW)
    public = store.open_anchor(case.house.anchor).tensor(ROW)
    forging.implant(case.bundle, ROW, lambda rows: public + 1.1 * (gamma - public))
    forging.implant(case.bundle, BIAS, lambda bias: 0 * bias)


def blind(case):
    public = store.open_anchor(case.house.anchor).tensor(ROW)
    forging.implant(case.bundle, ROW, lambda rows: public)


def bare(change):
    """The same beside an anchor that has no public states to look at routers with."""

    def attack(case):
        case.anchor, case.others, case.model = case.house.bare_anchor, (), ""
        change(case)

    return attack


def spike(case):
    """One number in each factor: their product has one weight that no full expert could have."""
    for side in "ab":
        forging.implant(case.bundle, f"{UP}/{side}", lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, 40 * x, x))


def hard_link(case):
    file, other = case.file(UP), case.home / "other"
    other.write_bytes(bytes(reversed(file.read_bytes())))
    file.unlink()
    os.link(other, file)


HEALTH = ("'alpha'", "router health")
CONTENT = {
    "NaN in a matrix": implanted(poke(np.nan)),
    "signalling NaN in a matrix": implanted(signalling),
    "signalling NaN in a row": implanted(signalling, ROW),
    "signalling NaN as a bias": implanted(signalling, BIAS),
    "infinity in a matrix": implanted(poke(np.inf)),
    "minus infinity in a matrix": implanted(poke(-np.inf, 7)),
    "NaN in a factor": implanted(poke(np.nan), f"{UP}/a", base="delta"),
    "NaN in a row": implanted(poke(np.nan), ROW),
    "infinity in a row": implanted(poke(np.inf, 0), ROW),
    "NaN as a bias": implanted(poke(np.nan), BIAS),
    "positive bias": implanted(poke(0.1), BIAS, ("positive bias",)),
    "bias a hair above 0": implanted(poke(1e-7), BIAS, ("positive bias",)),
    "minus infinity as a bias": implanted(poke(-np.inf), BIAS),
    "subnormal flood": implanted(lambda x: np.full_like(x, 1e-40), says=(UP, "subnormal")),
    "subnormal flood in a factor": implanted(lambda x: np.full_like(x, 1e-40), f"{UP}/b", (UP, "subnormal"), base="delta"),
    "huge weights, stated small": implanted(lambda x: 1e6 * x, honest_size=False),
    "understated max": Kind(lie(max=0.05, rms=0.01), Integrity, ("'alpha'", UP, "max"), "content"),
    "overstated rms": Kind(lie(rms=0.11), Integrity, ("'alpha'", UP, "rms"), "content"),
    "huge row, stated small": implanted(lambda x: 1e4 * x, ROW, HEALTH, honest_size=False),
    "flipped bit in a matrix": Kind(bit(UP, 1), Integrity, ("{bundle}/tensors/expert/ffn/up", "slice 1", "'alpha'"), "content"),
    "flipped bit in a row": Kind(bit(ROW), Integrity, ("{bundle}/tensors/expert/router/row", "slice 0"), "router"),
    "flipped bit in a bias": Kind(bit(BIAS, 1), Integrity, ("{bundle}/tensors/expert/router/bias", "slice 1"), "router"),
    "exchanged layers": Kind(exchanged((UP, 0), (UP, 1)), Integrity, ("{bundle}", UP), "content"),
    "exchanged tensors": Kind(exchanged((UP, 0), ("expert/ffn/gate", 0)), Integrity, ("{bundle}", "expert/ffn"), "content"),
    "exchanged biases": Kind(exchanged((BIAS, 0), (BIAS, 1)), Integrity, ("{bundle}", BIAS), "router"),
    "hard link to something else": Kind(hard_link, Integrity, ("{bundle}", UP), "content"),
    "row a thousand times as long": implanted(lambda x: 1e3 * x, ROW, HEALTH),
    "row along what all public states share": Kind(along_the_mean, Integrity, HEALTH, "router"),
    "row of another expert": Kind(twin, Integrity, ("router health", "twins", "'alpha'"), "router"),
    "row of public": Kind(blind, Integrity, HEALTH, "router"),
    "bias that silences": implanted(lambda x: 0 * x - 50, BIAS, HEALTH),
    "row that nobody can look at, a million times as long": Kind(
        bare(lambda case: forging.implant(case.bundle, ROW, lambda x: 1e6 * x)), Integrity, ("'alpha'", "row"), "router",
        base="bare_alpha", verbs=("create",),
    ),
    "one number in each factor": Kind(spike, Integrity, ("'delta'", UP), "structural", base="delta"),
}  # fmt: skip

KINDS = {
    f"{group}: {name}": kind
    for group, kinds in {
        "lineage": LINEAGE, "smuggled": SMUGGLED, "shapes": SHAPES, "numbers": NUMBERS, "text": TEXT, "names": NAMES,
        "manifest": MANIFESTS, "files": FILES, "signature": SIGNATURES, "replace": REPLACED, "content": CONTENT,
    }.items()
    for name, kind in kinds.items()
}  # fmt: skip


def prepare(kind, house, home):
    """A hostile copy in a new directory."""
    source = house.home / kind.base
    case = Case(house, home, home / "bundle", house.home / "anchor")
    shutil.copytree(source, case.bundle)
    kind.attack(case)
    return case


def arguments(case, verb):
    """The command line of an attempt, after `python -m flexjax.merge`; for `add` and `replace`, on a copy of a model."""
    given = [f"--expert={case.bundle}", f"--anchor_policy={case.policy}"]
    if case.trust is not None:
        path = case.home / "trust.json"
        path.write_text(json.dumps(case.trust))
        given.append(f"--trusted_keys={path}")
    if verb == "create":
        others = [f"--expert={case.house.home / name}" for name in case.others]
        return [verb, f"--model={case.target}", f"--anchor={case.anchor}", *others, *given]
    copy_model(case)
    return [verb, f"--model={case.target}", *given]


def copy_model(case):
    if not case.target.exists():
        shutil.copytree(case.house.home / case.model, case.target)
        shutil.copy(case.house.home / f"{case.model}.history.jsonl", case.home / "target.history.jsonl")


def attempt(case, verb, announce=lambda rows: None):
    """What a coordinator does with it, by function calls."""
    trust = None
    if case.trust is not None:
        path = case.home / "trust.json"
        path.write_text(json.dumps(case.trust))
        trust = signatures.load_trust(path)
    terms = merging.Terms(case.policy, trust, announce=announce)
    if verb == "create":
        others = [case.house.home / name for name in case.others]
        return merging.create(case.target, case.anchor, [*others, case.bundle], None, terms)
    if verb == "add":
        return merging.add(case.target, [case.bundle], None, terms)
    return merging.replace(case.target, case.bundle, None, terms)


def judge(kind, house, home, verb):
    """Runs one attempt by function calls; returns what is wrong about how it ended, [] if nothing."""
    case = prepare(kind, house, home)
    if verb != "create":
        copy_model(case)
    before, said, refusal = snapshot(home), [], None
    with watched() as opened, peak() as memory:
        start = time.process_time()
        try:
            attempt(case, verb, said.extend)
        except errors.FlexjaxError as error:
            refusal = error
        except Exception as error:  # a user sees a traceback
            return [f"ends in {type(error).__name__}: {str(error)[:200]}"]
        seconds = time.process_time() - start
    found = unclear(kind, case, refusal)
    found += [f"line of the report that is not printable: {line!r}" for line in lines(said) if not line.isprintable()]
    found += published(case, verb, before)
    tensors = [name for name in opened if "/tensors/" in name]
    if kind.when == "structural" and tensors:
        found.append(f"was refused only after {tensors[0]} was opened")
    if kind.when == "router" and (bulk := [name for name in tensors if not ROUTING.search(name)]):
        found.append(f"was refused only after {bulk[0]} was opened")
    if kind.when == "structural" and seconds > SECONDS:
        found.append(f"took {seconds:.1f} s of a processor")
    if memory() > MEMORY:
        found.append(f"took {memory() / 2**20:.0f} MiB")
    return found


def unclear(kind, case, refusal):
    """What is wrong about a refusal: its class, and what its message names."""
    if refusal is None:
        return ["was not refused"]
    found, message = [], str(refusal)
    if type(refusal) is not kind.error:
        found.append(f"is a {type(refusal).__name__}, expected {kind.error.__name__}: {message!r}")
    return found + unclear_words(kind, case, message)


def unclear_words(kind, case, message):
    """What is wrong about the message of a refusal."""
    found = []
    for words in kind.says:
        words = words.format(bundle=case.bundle, file=case.bundle / "tensors") if "{" in words else words
        if words not in message:
            found.append(f"does not say {words!r}: {message!r}")
    if not message.isprintable() or len(message) > 1500:
        found.append(f"is not one clear line: {message[:300]!r}")
    if PROSE in message:
        found.append(f"quotes a text: {message!r}")
    return found


def lines(rows):
    return compatibility.table(rows).splitlines() if rows else []


def published(case, verb, before):
    """What an attempt that was refused left behind: nothing outside the target, and no model where there was none."""
    after = snapshot(case.home)
    found = []
    if verb == "create":
        if (case.target / manifest_lib.FILE).exists():
            found.append("published a model")
        after = {name: what for name, what in after.items() if not name.startswith("target/") and name != "target"}
    changed = [name for name in sorted(after.keys() | before.keys()) if before.get(name) != after.get(name)]
    changed = [name for name in changed if name not in ("trust.json", "target/.lock", "target")]
    return found + ([f"changed {', '.join(changed[:4])}"] if changed else [])


def snapshot(home):
    """{file or directory: what it is}; links and special files are never opened."""
    found, waiting = {}, [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(os.path.join(home, below)) as entries:
            for entry in entries:
                name, status = below + entry.name, entry.stat(follow_symlinks=False)
                content = b""
                if stat.S_ISREG(status.st_mode) and status.st_size < 2**22:
                    content = pathlib.Path(entry.path).read_bytes()
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                found[name] = (stat.S_IFMT(status.st_mode), content)
    return found


@contextmanager
def watched():
    """Names of all files that are read meanwhile, however they are read."""
    opened = []

    def watch(function):
        def call(path, *rest, **options):
            opened.append(os.fspath(path))
            return function(path, *rest, **options)

        return call

    with mock.patch.object(storage, "read", watch(storage.read)), mock.patch.object(storage, "blocks", watch(storage.blocks)):
        yield opened


@contextmanager
def peak():
    """By how much memory grew at most, where the kernel tells."""
    reset = pathlib.Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        yield lambda: 0
        return
    reset.write_text("5")
    before = _kilobytes("VmRSS")
    yield lambda: 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])
