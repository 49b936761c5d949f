"""Hostile bundles are refused in time and by name, by calls and by commands, and honest ones are let in (G7, G4)."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from flexjax import errors, storage, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, publishing, schema, store
from flexjax.governance import card, merging, signatures
from tests.commands import conftest as session
from tests.commands import zygote
from tests.experts import forging
from tests.experts import test_store as damage
from tests.governance import hostile

anchor, code_expert, commands, corpus = session.anchor, session.code_expert, session.commands, session.corpus
tiny, house = session.tiny, session.house
QUICK = (  # what the default run also tries by the command line
    "lineage: other anchor", "smuggled: path out of the directory", "shapes: plausible width with files that hold nothing",
    "numbers: huge weights, honestly stated", "text: owner of 10 kB", "names: path as a name", "manifest: deep manifest",
    "files: slice of a terabyte", "signature: revoked key", "replace: older version than the model's",
    "content: positive bias", "content: flipped bit in a matrix",
)  # fmt: skip
ATTEMPTS = [(name, verb) for name, kind in hostile.KINDS.items() for verb in kind.verbs]
DEFAULT = [  # structural kinds are refused before anything asks for what: one verb each, in turn
    (name, verb)
    for number, (name, kind) in enumerate(hostile.KINDS.items())
    for verb in (kind.verbs if kind.when != "structural" else (kind.verbs[number % len(kind.verbs)],))
]


@pytest.fixture(scope="module", autouse=True)
def shapes():
    """Shapes of a config are worked out once: every attempt opens a dozen artefacts."""
    known, work_out = {}, schema.shared_shapes

    def shared_shapes(config):
        key = dataclasses.astuple(config)
        known[key] = known.get(key) or work_out(config)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "shared_shapes", shared_shapes)
        yield


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """What is honest; nothing that is tried may change it."""
    honest = hostile.build(tmp_path_factory.mktemp("hostile"))
    before = hostile.snapshot(honest.home)
    yield honest
    assert hostile.snapshot(honest.home) == before, "an attempt changed what it was given"


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    """The command as a user types it."""
    process = zygote.Zygote("flexjax.merge", tmp_path_factory.mktemp("merge"))
    yield process
    process.close()


def needs_root(name):
    if "device as" in name and os.geteuid() != 0:
        pytest.skip("only root makes devices")


def test_the_corpus_has_every_row_of_the_threats():
    assert len(hostile.KINDS) >= 45
    assert {kind.when for kind in hostile.KINDS.values()} == {"structural", "router", "content"}
    assert {verb for _, verb in DEFAULT} == {"create", "add", "replace"} and {name for name, _ in DEFAULT} == set(hostile.KINDS)


@pytest.mark.parametrize(("name", "verb"), DEFAULT)
def test_every_kind_is_refused_by_calls(honest, tmp_path, name, verb):
    needs_root(name)
    assert hostile.judge(hostile.KINDS[name], honest, tmp_path, verb) == []


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "verb"), [attempt for attempt in ATTEMPTS if attempt not in DEFAULT])
def test_every_kind_is_refused_by_every_call(honest, tmp_path, name, verb):
    needs_root(name)
    assert hostile.judge(hostile.KINDS[name], honest, tmp_path, verb) == []


def by_command(merge, honest, home, name, verb):
    """What is wrong about how a command refuses a kind; [] if nothing."""
    kind = hostile.KINDS[name]
    case = hostile.prepare(kind, honest, home)
    arguments = hostile.arguments(case, verb)
    before = hostile.snapshot(home)
    done = merge(*arguments)
    said = done.err.splitlines() or [""]
    found = [] if done.code == kind.error.exit_code else [f"exit code {done.code}, expected {kind.error.exit_code}"]
    found += [] if len(said) == 1 and said[0].startswith("error: ") else [f"says {done.err!r}"]
    found += [f"prints {line!r}" for line in done.out.splitlines() if not line.isprintable()]
    return found + hostile.unclear_words(kind, case, said[-1]) + hostile.published(case, verb, before)


@pytest.mark.parametrize("name", QUICK)
def test_kinds_are_refused_by_commands(merge, honest, tmp_path, name):
    assert by_command(merge, honest, tmp_path, name, hostile.KINDS[name].verbs[0]) == []


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "verb"), ATTEMPTS)
def test_every_kind_is_refused_by_every_command(merge, honest, tmp_path, name, verb):
    needs_root(name)
    assert by_command(merge, honest, tmp_path, name, verb) == []


MEMORY = """
import pathlib, sys
from flexjax import errors
from flexjax.governance import merging

def kilobytes(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])

target, anchor, good, *bundles = sys.argv[1:]
merging.create(target + "-first", anchor, [good], None)  # what is compiled and imported on the way is no bomb
before = kilobytes("VmHWM")
for bundle in bundles:
    try:
        merging.create(target, anchor, [bundle], None)
    except errors.FlexjaxError as error:
        print(type(error).__name__, kilobytes("VmHWM") - before, error)
"""
BOMBS = (
    "shapes: giant shape", "shapes: giant width", "shapes: giant rank", "shapes: plausible width with files that hold nothing",
    "manifest: number of a million digits", "manifest: deep manifest", "manifest: deep manifest that closes before it opens",
    "manifest: large manifest", "manifest: manifest of a terabyte", "files: slice of a terabyte", "files: link to a device",
    "signature: signature of a terabyte",
)  # fmt: skip


def test_bombs_are_refused_in_little_memory(honest, tmp_path):
    """In a process of their own, whose largest size the kernel tells."""
    homes = []
    for number, name in enumerate(BOMBS):
        home = tmp_path / str(number)
        home.mkdir()
        homes.append(hostile.prepare(hostile.KINDS[name], honest, home).bundle)
    command = [sys.executable, "-c", MEMORY, tmp_path / "target", honest.anchor, honest.beta, *homes]
    environment = {**os.environ, "PYTHONPATH": str(zygote.ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    said = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(said) == len(BOMBS) and {kind for kind, _, _ in said} == {"IntegrityError"}, done.stdout
    assert max(1024 * int(grown) for _, grown, _ in said) < hostile.MEMORY


# What changes while it is looked at.


def exchange(file, contents, stop):
    """Replaces a file again and again, each time at once."""
    for number, content in enumerate(itertools.cycle(contents)):
        other = file.with_name(f"{file.name}.{number % 2}")
        other.write_bytes(content)
        os.replace(other, file)
        if stop.is_set():
            return


@pytest.mark.parametrize("path", [hostile.UP, hostile.BIAS, hostile.ROW])
def test_a_slice_that_is_exchanged_meanwhile(honest, tmp_path, path):
    """What is published is what was verified, or nothing is."""
    bundle = shutil.copytree(honest.alpha, tmp_path / "alpha")
    file = hostile.Case(honest, tmp_path, bundle, honest.anchor).file(path)
    sound = file.read_bytes()
    stop = threading.Event()
    thread = threading.Thread(target=exchange, args=(file, [sound, bytes(reversed(sound))], stop))
    thread.start()
    try:
        for number in range(4):
            target = tmp_path / f"target{number}"
            with contextlib.suppress(errors.IntegrityError):
                models.verify(merging.create(target, honest.anchor, [honest.beta, bundle], None))
            assert not (target / manifest_lib.FILE).exists() or models.open_model(target).bundles.keys() == {"alpha", "beta"}
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("reads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["another width", "a leaf of nobody"])
def test_a_manifest_that_is_exchanged_meanwhile(honest, tmp_path, monkeypatch, kind, reads):
    """After so many reads of it an honest one lies in its place: what is checked must be what is used."""
    bundle, policy = tmp_path / "alpha", "strict"
    if kind == "another width":  # sound in itself and not of this anchor: sixty hidden units
        anchor, expert = store.open_anchor(honest.anchor), {"expert": wide_expert()}
        with contextlib.suppress(errors.IntegrityError):
            publishing.stream_bundle(bundle, "alpha", anchor, 60, lambda writer: writer.put_tree(expert), {})
        assert manifest_lib.read(bundle, "expert")["d_ff"] == 60
    else:
        policy = "report"
        shutil.copytree(honest.alpha, bundle)
        forging.forge(bundle, lambda m: m["tensors"].update({"shared/../../../escaped": m["tensors"][hostile.UP]}))
    sound = (honest.alpha / "manifest.json").read_bytes()
    read, count = storage.read_small, itertools.count(1)

    def read_small(path, *rest):
        data = read(path, *rest)
        if os.fspath(path) == os.fspath(bundle / "manifest.json") and next(count) == reads:
            (bundle / "manifest.json").write_bytes(sound)
        return data

    monkeypatch.setattr(storage, "read_small", read_small)
    before = {path for path in tmp_path.rglob("*") if "target" not in path.parts}
    with pytest.raises(errors.FlexjaxError):
        merging.create(tmp_path / "target", honest.anchor, [bundle], None, merging.Terms(policy))
    assert not (tmp_path / "target" / manifest_lib.FILE).exists(), "a model was published and then refused"
    assert {path for path in tmp_path.rglob("*") if "target" not in path.parts} == before


def wide_expert():
    """Ten times as wide as the public one."""
    times = {"gate": (1, 1, 10), "up": (1, 1, 10), "down": (1, 10, 1)}
    ffn = {name: np.tile(hostile.EXPERTS["alpha"]["ffn"][name], reps) for name, reps in times.items()}
    return {**hostile.EXPERTS["alpha"], "ffn": ffn}


# Models that somebody changed after they were merged.


def in_model(change):
    return lambda home: forging.forge(home, change)


def expert_of(home, name="gamma"):
    return home / "experts" / manifest_lib.read(home, "model")["experts"][name]


def calibrated(**changed):
    entry = {"bias": [-1.0, -1.0], "share": 0.1, "text": hostile.ZEROS, "with": []} | changed
    return in_model(lambda m: m.update(calibration={"gamma": entry}))


def renewed(change):
    """Spoils a bundle inside a model, and makes every digest above it fit."""

    def attack(home):
        former = expert_of(home)
        change(former)
        digest = manifest_lib.read(former, "expert")["digest"]
        former.rename(former.with_name(digest))
        forging.forge(home, lambda m: m["experts"].update(gamma=digest))

    return attack


def linked_expert(home):
    directory = expert_of(home)
    directory.rename(home.parent / "elsewhere")
    directory.symlink_to(home.parent / "elsewhere")


def flipped(home):
    file = next(iter(sorted(expert_of(home).rglob("up/c/1/0/0"))))
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def averaged_over_somebody_else(home):
    """Shared leaves that an expert shaped which the model does not name."""
    made = home.parent / "made"
    anchor, carrying = store.open_anchor(home / "anchor"), made / "carrying"
    hostile.write(carrying, "alpha", anchor, shared=hostile.moved())
    merging.create(made / "model", home / "anchor", [carrying], None, merging.Terms("average"))
    entry = manifest_lib.read(made / "model", "model")["shared"]
    shutil.copytree(made / "model" / "shared", home / "shared")
    forging.forge(home, lambda m: m.update(shared=entry))


OPENED = {  # refused when the model is opened, before any tensor is
    "path out as an expert's digest": (in_model(lambda m: m["experts"].update(gamma="../../x")), "gamma"),
    "expert exchanged for another": (in_model(lambda m: m["experts"].update(gamma=m["experts"]["beta"])), "gamma"),
    "expert that is not there": (in_model(lambda m: m["experts"].update(gamma="e" * 64)), "eeee"),
    "path out as an expert's name": (in_model(lambda m: m["experts"].update({"../x": m["experts"]["beta"]})), "../x"),
    "other anchor": (in_model(lambda m: m.update(anchor="e" * 64)), "anchor"),
    "no expert per token": (in_model(lambda m: m.update(top_k=0)), "top_k"),
    "more experts per token than there are": (in_model(lambda m: m.update(top_k=10**400)), "top_k"),
    "unknown field": (in_model(lambda m: m.update(hook="import os")), "hook"),
    "forged digest": (
        lambda home: (home / "manifest.json").write_bytes(
            tree.canonical_json(manifest_lib.read(home, "model") | {"top_k": 1}) + b"\n"
        ),
        "digest",
    ),
    "positive calibrated bias": (calibrated(bias=[0.1, -1.0]), "gamma"),
    "calibrated bias that becomes infinite": (calibrated(bias=[-1e300, -1.0]), "gamma"),
    "calibrated bias beyond every float": (calibrated(bias=[-(10**400), -1.0]), "gamma"),
    "calibrated bias for another number of layers": (calibrated(bias=[-1.0] * 3), "gamma"),
    "calibration of nobody": (in_model(lambda m: m.update(calibration={"nobody": {}})), "nobody"),
    "calibration with a text": (calibrated(text=hostile.PROSE), "gamma"),
    "shared leaves that are not there": (
        in_model(lambda m: m.update(shared={"digest": "../../x", "experts": {}})), "shared"
    ),
    "shared leaves of an expert that is not in it": (averaged_over_somebody_else, "shared"),
    "positive bias, stated large": (
        renewed(lambda home: forging.forge(home, lambda m: m["tensors"][hostile.BIAS].update(shape=[2**20]))), hostile.BIAS
    ),
}  # fmt: skip
READ = {  # refused when its tensors are read: by verify, and by whoever runs it
    "flipped bit": (flipped, "expert/ffn/up"),
    "positive bias": (renewed(lambda home: forging.implant(home, hostile.BIAS, hostile.poke(0.1))), "positive bias"),
    "NaN in a matrix": (renewed(lambda home: forging.implant(home, hostile.UP, hostile.poke(np.nan))), "ffn/up"),
}
VERIFIED = {  # refused by verify; whoever runs the model never sees them
    "extra file": (lambda home: (home / "pickle.pkl").write_bytes(b"\x80"), "pickle.pkl"),
    "what an expert left behind": (lambda home: shutil.copytree(expert_of(home), home / "experts" / ("e" * 64)), "eeee"),
    "linked expert": (linked_expert, "experts"),
    "card that lies": (lambda home: (home / "README.md").write_text("# benign\n"), "README.md"),
    "card of an expert that lies": (lambda home: (expert_of(home) / "README.md").write_text("# benign\n"), "README.md"),
    "broken signature": (lambda home: (home / "signature.json").write_text("{}"), "signature.json"),
    "broken signature of an expert": (lambda home: (expert_of(home) / "signature.json").write_text("{}"), "signature.json"),
}


def verify(directory, trust=None):
    """What `merge verify` does."""
    kind = manifest_lib.kind(directory)
    model = models.open_model(directory) if kind == "model" else None
    for artefact in [store.open_bundle(directory, None)] if model is None else model.artefacts:
        artefact.verify()
        asked = trust if artefact.manifest["kind"] == "expert" else None
        if artefact.manifest["kind"] != "shared":
            card.check(artefact.directory)
            signatures.check(artefact.directory, artefact.manifest, asked)
    if model is not None:
        models.check_listing(model)
        card.check(directory)
        signatures.check(directory, model.manifest, None)


@pytest.mark.parametrize("name", [*OPENED, *READ, *VERIFIED])
def test_changed_models_are_refused(honest, tmp_path, name):
    home = shutil.copytree(honest.model, tmp_path / "model")
    attack, says = (OPENED | READ | VERIFIED)[name]
    attack(home)
    refuse = [verify] + ([models.open_model] if name in OPENED else [])
    refuse += [lambda home: models.load(models.open_model(home))] if name not in VERIFIED else []
    refuse += [lambda home: merging.add(home, [honest.alpha])] if name in OPENED else []
    before = hostile.snapshot(home)
    for call in refuse:
        with hostile.watched() as opened, pytest.raises((errors.IntegrityError, errors.StorageError)) as refusal:
            call(home)
        assert says in str(refusal.value) and str(refusal.value).isprintable()
        assert name not in OPENED or not [file for file in opened if "/tensors/" in file]
    after = hostile.snapshot(home)
    after.pop(".lock", None), before.pop(".lock", None)
    assert after == before


@pytest.mark.parametrize("name", ["positive calibrated bias", "positive bias", "card that lies"])
def test_changed_models_are_refused_by_commands(merge, honest, tmp_path, name):
    home = shutil.copytree(honest.model, tmp_path / "model")
    attack, says = (OPENED | READ | VERIFIED)[name]
    attack(home)
    done = merge("verify", f"--model={home}")
    assert done.code == errors.IntegrityError.exit_code and says in done.err and len(done.err.splitlines()) == 1, done.err


@pytest.fixture(scope="module")
def runnable(house, code_expert, tmp_path_factory):
    """A model of real runs, whose experts have the names that are attacked."""
    home = tmp_path_factory.mktemp("runnable")
    for name, source in {"beta": code_expert, "gamma": house / "expert"}.items():
        shutil.copytree(source, home / name)
        forging.forge(home / name, lambda m, name=name: m.update(name=name))
    merging.create(home / "model", house / "public" / "anchor", [home / "beta", home / "gamma"], None)
    return home / "model"


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["", *OPENED, *READ])
def test_changed_models_are_never_run(commands, runnable, corpus, tmp_path, name):
    """By `evaluate`, which reads every tensor; as it was, the same model runs."""
    if name in ("shared leaves of an expert that is not in it", "positive bias, stated large"):
        pytest.skip("made for the shapes of the other honest")
    home = shutil.copytree(runnable, tmp_path / "model")
    if name:
        (OPENED | READ)[name][0](home)
    done = commands.evaluate(f"--model={home}", f"--data=math={corpus}/math/validation.jsonl", "--max_kilobytes=1")
    if not name:
        assert done.code == 0, done.err
        return
    assert done.code in (errors.IntegrityError.exit_code, errors.StorageError.exit_code), done.err
    assert len(done.err.splitlines()) == 1 and "math" not in done.out, done.err


# Honest ones.


def cast(dtype, name="alpha"):
    return tree.map_with_path(lambda _, leaf: leaf.astype(dtype), hostile.EXPERTS[name])


def with_a_small_number(expert):
    """Of weights as small as usual, N(0, 0.02), one in 400 is below 6e-5, the least normal number of half precision."""
    expert["ffn"]["up"][0, 0, 0] = 3e-5
    return expert


def longer(name="alpha"):
    """Weights as they are after more training."""
    scale = lambda path, leaf: leaf if path.endswith("bias") else (np.float32(1.5) * leaf).astype(np.float32)  # noqa: E731
    return tree.map_with_path(scale, hostile.EXPERTS[name])


def read_only(home):
    for path in [*home.rglob("*"), home]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def behind_a_link(home):
    """The link lies above the bundle, and the coordinator named it."""
    (home.parent / "link").symlink_to(home.parent, target_is_directory=True)
    return home.parent / "link" / home.name


def beside(home):
    card.write(home)
    signatures.generate_key(home.parent / "key")
    signatures.sign(home, home.parent / "key")


MARGINS = {"quantiles": [0.1, 0.5, 0.9], "values": [[-2.5, 0.25, 3.0], [-1.0, 0.0, 9.5]]}
HONEST = {  # name of the expert, how it is written, what is done to the directory
    "as trained": ("alpha", {}, None),
    "bfloat16": ("alpha", {"expert": cast(ml_dtypes.bfloat16)}, None),
    "float16": ("alpha", {"expert": with_a_small_number(cast(np.float16))}, None),
    "narrow": ("beta", {}, None),
    "low rank": ("delta", {}, None),
    "low rank in bfloat16": ("delta", {"expert": cast(ml_dtypes.bfloat16, "delta")}, None),
    "no licence stated": ("alpha", {"data": {"documents": 1010}}, None),
    "nothing stated": ("alpha", {"data": {}, "owner": "", "training": {}}, None),
    "two licences": ("alpha", {"data": {"licence": "MIT OR Apache-2.0 (code)", "documents": 2**40}}, None),
    "differential privacy": ("alpha", {"privacy": {"dp": "DP-SGD", "epsilon": 2.1, "delta": 1e-5}}, None),
    "margins": ("alpha", {"margins": MARGINS}, None),
    "evaluated": ("alpha", {"evaluation": {"math": {"bits_per_byte": 1.25, "anchor": 1.5}, "public": {}}}, None),
    "router tuned with others": ("alpha", {"training": {"router_tuned_with": ["alpha", "beta", "code.v2-x_y"]}}, None),
    "derived from another": ("alpha", {"parent": {"digest": hostile.ZEROS, "by": "compress to rank 64"}}, None),
    "higher version": ("alpha", {"version": 17}, None),
    "other seed": ("alpha", {"training": {"seed": 2**31}}, None),
    "imported": ("alpha", {"training": {"huggingface": {"rope_theta": 5e5, "eos": 2, "name": "olmo2", "scale": [1.0]}}}, None),
    "trained longer": ("alpha", {"expert": longer()}, None),
    "owner with umlauts": ("alpha", {"owner": "Universit\u00e4tsklinikum M\u00dcNCHEN"}, None),
    "owner in Chinese": ("alpha", {"owner": "\u5317\u4eac\u534f\u548c\u533b\u9662 (PUMCH)"}, None),
    "card and signature": ("alpha", {}, beside),
    "read-only": ("alpha", {}, read_only),
    "blanks in its path": ("alpha", {}, lambda home: home.rename(home.parent / "my own expert, v1 (final)")),
    "behind a link": ("alpha", {}, behind_a_link),
    "carried leaves under another policy": ("alpha", {"shared": hostile.moved()}, None),
}


@pytest.mark.parametrize("case", HONEST)
def test_honest_bundles_are_let_in(honest, tmp_path, case):
    name, stated, change = HONEST[case]
    bundle = tmp_path / "bundle"
    hostile.write(bundle, name, store.open_anchor(honest.anchor), **stated)
    bundle = (change(bundle) if change else None) or bundle
    terms = merging.Terms("average" if "shared" in stated else "strict")
    others = [honest.home / other for other in ("beta", "gamma") if other != name]
    model = merging.create(tmp_path / "target", honest.anchor, [*others, bundle], None, terms)
    verify(tmp_path / "target")
    given = store.open_bundle(bundle, None)
    assert model.bundles[name].manifest == given.manifest
    for path in given.manifest["tensors"]:
        assert model.bundles[name].tensor(path).tobytes() == given.tensor(path).tobytes()
    assert set(models.load(model)[0].experts) == {"public", "beta", "gamma", name}


@pytest.mark.parametrize("names", [["*"], ["alpha"], ["al*", "hospital-*"]])
def test_honest_bundles_are_let_in_by_trust(honest, tmp_path, names):
    bundle = shutil.copytree(honest.newer, tmp_path / "alpha")
    case = hostile.Case(honest, tmp_path, bundle, honest.anchor)
    case.sign(least_version={"alpha": 3}, revoked=[honest.key("b"), manifest_lib.read(honest.alpha, "expert")["digest"]])
    case.trust["keys"][honest.key("a")]["names"] = names
    model = hostile.attempt(case, "create")
    assert signatures.check(model.bundles["alpha"].directory, model.bundles["alpha"].manifest, None).state == "signed"


@pytest.mark.parametrize("case", ["bfloat16", "low rank", "owner in Chinese", "blanks in its path", "read-only"])
def test_honest_bundles_are_let_in_by_commands(merge, honest, tmp_path, case):
    name, stated, change = HONEST[case]
    bundle = tmp_path / "bundle"
    hostile.write(bundle, name, store.open_anchor(honest.anchor), **stated)
    bundle = (change(bundle) if change else None) or bundle
    model = shutil.copytree(honest.model, tmp_path / "target")
    shutil.copy(honest.home / "model.history.jsonl", tmp_path / "target.history.jsonl")
    done = merge("add", f"--model={model}", f"--expert={bundle}", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["tree_digest"] == models.open_model(model).tree_digest
    assert merge("verify", f"--model={model}", "--router").code == 0


# Damage to bundles with everything that they may hold (G4).


@pytest.fixture(scope="module")
def full(honest, tmp_path_factory):
    """A signed low-rank bundle that carries a leaf, states margins and has a card; and a model of it, calibrated, averaged."""
    home = tmp_path_factory.mktemp("full")
    anchor = store.open_anchor(honest.anchor)
    stated = {"margins": MARGINS, "privacy": {"dp": "DP-SGD", "epsilon": 2.0, "delta": 1e-5}, "version": 4}
    hostile.write(home / "delta", "delta", anchor, shared=hostile.moved(), **stated)
    signatures.sign(home / "delta", honest.home / "a.key")
    card.write(home / "delta")
    merging.create(home / "model", honest.anchor, [home / "delta"], None, merging.Terms("average"))
    entry = {"bias": [-1.5, -0.25], "share": 0.1, "text": hostile.ZEROS, "with": []}
    merging.calibrate(home / "model", {"delta": entry})
    (home / "model" / ".lock").unlink()
    signatures.sign(home / "model", honest.home / "a.key")
    card.write(home / "model")
    trust = {honest.key("a"): signatures.Holder("Clinic A", ("*",))}
    return home, signatures.Trust(trust, frozenset(), {})


def rounds(home, trust, count, seed):
    """Damages, expects a refusal that names the damage, and restores; returns what went unseen."""
    unseen = []
    for number in range(count):
        dice, fault = random.Random(f"{seed}-{number}"), damage.FAULTS[number % len(damage.FAULTS)]
        directory = home / dice.choice(["delta", "model"])
        before = {path: path.read_bytes() for path in damage.files_of(directory)}
        names = fault(directory, dice)
        gone = [path for path in before if not path.exists() and path.name in manifest_lib.BESIDE]
        try:
            verify(directory, trust)
            if not gone:  # a card or a model's signature need not be there
                unseen.append((number, fault.__name__, names))
        except (errors.IntegrityError, errors.StorageError, errors.PolicyError) as refusal:
            expected = [names] if isinstance(names, str) else list(names)
            if not gone and not any(name in str(refusal) for name in expected):
                unseen.append((number, fault.__name__, names, str(refusal)))
        restore(directory, before)
    verify(home / "delta", trust)
    verify(home / "model", trust)
    return unseen


def restore(directory, before):
    for path in list(directory.rglob("*")):
        if path.is_dir() and not path.is_symlink() and path in before:
            path.rmdir()
        elif path.is_symlink() or (path.is_file() and path not in before):
            path.unlink()
    for path, data in before.items():
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def test_damage_to_full_bundles_is_seen_and_named(full):
    assert rounds(*full, 64, "default") == []


@pytest.mark.reliability
def test_a_thousand_damages_to_full_bundles_are_seen_and_named(full):
    assert rounds(*full, 1000, "g4") == []


def test_what_is_outside_a_digest_cannot_be_taken_away_unseen(full, tmp_path):
    """Whoever trusts keys sees that a signature is gone."""
    home, trust = full
    bundle = shutil.copytree(home / "delta", tmp_path / "delta")
    (bundle / "signature.json").unlink()
    with pytest.raises(errors.PolicyError, match=r"expert 'delta'.*unsigned"):
        verify(bundle, trust)
