"""`flexjax.merge` with bad input: one clear line, the right exit code, nothing lost."""

import json
import random
import shutil

import pytest

from flexjax import workdir
from tests.commands.conftest import snapshot

CONFIG, DATA, INTEGRITY, POLICY, STORAGE = 2, 3, 4, 5, 6


@pytest.fixture
def parts(house, anchor, code_expert):
    return [f"--anchor={anchor}", f"--expert={house / 'expert'}", f"--expert={code_expert}"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["create, add, replace, remove, verify, show"]),
        (["mix"], ["create, add, replace, remove, verify, show"]),
        (["create", "remove"], ["create, add, replace, remove, verify, show"]),
        (["show"], ["--model=DIR"]),
        (["show", "--model="], ["--model=DIR"]),
        (["create", "--model=m"], ["--anchor=DIR", "--expert=DIR"]),
        (["remove", "--model=m"], ["--name=NAME"]),
        (["create", "--model=m", "--top_k=all"], ["--top_k=all", "--help"]),
        (["keygen", "--key=k", "--dry_run"], ["keygen does not take --dry_run"]),
        (["certify", "--model=m", "--removed=n", "--dry_run"], ["certify does not take --dry_run"]),
        (["sign", "--model=m", "--key=k", "--nodry_run"], ["sign does not take --dry_run"]),
        (["card", "--model=m", "--dry_run"], ["card does not take --dry_run"]),
        (["compress", "--anchor=a", "--expert=e", "--out=o", "--dry_run"], ["compress does not take --dry_run"]),
        (["compress", "--anchor=a", "--expert=e", "--expert=f", "--out=o"], ["one expert at a time"]),
        (["show", "--model=m", "--expert=e"], ["show does not take --expert"]),
        (["verify"], ["--model=DIR", "--certificate=FILE"]),
        (["show", "--modell=m"], ["unknown flag --modell", "did you mean --model?"]),
    ],
)
def test_flags(refuse, commands, arguments, says):
    refuse(commands.merge, arguments, CONFIG, *says)


def test_missing_directories(refuse, commands, parts, house, tmp_path):
    new = f"--model={tmp_path / 'new'}"
    for verb in ("show", "verify"):
        refuse(commands.merge, [verb, "--model=missing"], STORAGE, "missing", "does not exist")
        refuse(commands.merge, [verb, f"--model={house}"], STORAGE, "no manifest.json", f"{house / 'model'}?")
    refuse(commands.merge, ["create", new, "--anchor=missing", parts[1]], STORAGE, "missing", "does not exist")
    refuse(commands.merge, ["create", new, parts[0], "--expert=missing"], STORAGE, "missing", "does not exist")
    refuse(commands.merge, ["create", new, f"--anchor={house / 'expert'}", parts[1]], INTEGRITY, "expected 'anchor'")
    refuse(commands.merge, ["create", new, parts[0], f"--expert={house / 'model'}"], INTEGRITY, "expected 'expert'")
    refuse(commands.merge, ["remove", f"--model={house / 'expert'}", "--name=math"], INTEGRITY, "expected 'model'")
    assert not (tmp_path / "new").exists()


def test_number_of_active_experts(refuse, commands, parts, tmp_path):
    for k in (0, 4, -1):
        line = refuse(commands.merge, ["create", f"--model={tmp_path / 'new'}", *parts, f"--top_k={k}"], CONFIG, f"found {k}")
        assert "1 to 3" in line
    assert not (tmp_path / "new").exists()


def test_same_expert_twice(refuse, commands, parts, house, tmp_path):
    create = ["create", f"--model={tmp_path / 'new'}", *parts]
    refuse(commands.merge, [*create, f"--expert={house / 'expert'}/"], CONFIG, "'math'", "once")
    shutil.copytree(house / "expert", tmp_path / "copy")
    refuse(commands.merge, [*create, f"--expert={tmp_path / 'copy'}"], CONFIG, "'math'", "once")
    assert not (tmp_path / "new").exists()


def test_expert_of_another_anchor(refuse, commands, tiny, parts, house, tmp_path):
    anchor = tmp_path / "public" / "anchor"
    made = commands.main("--config=configs/public.py", *tiny, "--config.seed=1", f"--workdir={tmp_path / 'public'}")
    assert made.code == 0, made.err
    create = ["create", f"--model={tmp_path / 'new'}", f"--anchor={anchor}", parts[1]]
    refuse(commands.merge, create, INTEGRITY, "'math'", "anchor expected", "train 'math' on this anchor")
    assert not (tmp_path / "new").exists()


def test_create_overwrites_nothing(refuse, commands, parts, merged, house, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "experts").mkdir(parents=True)
    (foreign / "experts" / "thesis.tex").write_text("precious")
    file = tmp_path / "file"
    file.write_text("precious")
    for place in (merged, house, foreign, file, file / "below", "/proc/below"):
        before = snapshot(merged), snapshot(tmp_path)
        refuse(commands.merge, ["create", f"--model={place}", *parts], STORAGE, place)
        refuse(commands.merge, ["remove", f"--model={merged}", "--name=math", f"--out={place}"], STORAGE, place)
        assert (snapshot(merged), snapshot(tmp_path)) == before


def test_create_on_a_full_disk_can_be_repeated(refuse, commands, parts, merged, tmp_path):
    create = ["create", f"--model={tmp_path / 'new'}", *parts]
    refuse(commands.merge, create, STORAGE, tmp_path / "new", "File too large", max_bytes=5_000)
    refuse(commands.merge, ["verify", create[1]], STORAGE, "no manifest.json")
    assert commands.merge(*create).code == 0
    assert snapshot(tmp_path / "new") == snapshot(merged)


def test_remove_refuses(refuse, commands, merged):
    before = snapshot(merged)
    remove = ["remove", f"--model={merged}"]
    refuse(commands.merge, [*remove, "--name=public"], CONFIG, "'public'", "cannot be removed")
    for name in ("nobody", "../anchor", "Math", "math "):
        refuse(commands.merge, [*remove, f"--name={name}"], POLICY, f"no expert '{name}'"[:-1], "it has code, math")
    with workdir.lock(workdir.create(merged)):
        refuse(commands.merge, [*remove, "--name=math"], STORAGE, merged, "in use by process")
    assert commands.merge(*remove, "--name=math", "--dry_run").code == 0
    assert snapshot(merged) == before


def test_remove_up_to_the_last(refuse, commands, merged, house, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(merged, model)
    smaller = commands.merge("remove", f"--model={model}", "--name=code", "--json")
    alone = json.loads(commands.merge("show", f"--model={house / 'model'}", "--json").out.splitlines()[-1])
    assert json.loads(smaller.out.splitlines()[-1])["tree_digest"] == alone["model"]["digest"]
    assert commands.merge("remove", f"--model={model}", "--name=math").code == 0
    assert commands.merge("remove", f"--model={model}", "--name=math").code == 0  # finished already
    refuse(commands.merge, ["remove", f"--model={model}", "--name=code"], POLICY, "'code'", "none but public")
    assert commands.merge("verify", f"--model={model}").code == 0
    assert list((model / "experts").iterdir()) == []


@pytest.mark.parametrize("kind", ["model", "anchor", "expert"])
def test_verify_finds_every_damage(refuse, commands, merged, anchor, house, kind, tmp_path):
    """One bit, one byte less, one file less, one file more, one word of the manifest: all named."""
    source = {"model": merged, "anchor": anchor, "expert": house / "expert"}[kind]
    home, rng = tmp_path / "copy", random.Random(kind)
    shutil.copytree(source, home)
    verify = ["verify", f"--model={home}"]
    assert commands.merge(*verify).code == 0
    files = sorted(path for path in home.rglob("*") if path.is_file() and path.name != ".lock")
    for file in rng.sample(files, 6):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), content[:-1], content + b"\0"):
            file.write_bytes(damaged)
            refuse(commands.merge, verify, INTEGRITY, file)
        file.unlink()
        code = STORAGE if file == home / "manifest.json" or file.name == "manifest.json" else INTEGRITY
        refuse(commands.merge, verify, code, file.parent if code == STORAGE else file)
        file.write_bytes(content)
    for place in ("extra", "tensors/extra", "anchor/extra", "experts/extra"):
        stray = home / place
        if stray.parent.exists():
            stray.write_text("x")
            refuse(commands.merge, verify, INTEGRITY, stray, "remove it")
            stray.unlink()
    assert commands.merge(*verify).code == 0


def test_damage_is_never_merged(refuse, commands, anchor, house, tmp_path):
    shutil.copytree(house / "expert", tmp_path / "expert")
    file = next((tmp_path / "expert").rglob("c/1/0/0"))
    content = bytearray(file.read_bytes())
    content[9] ^= 2
    file.write_bytes(content)
    create = ["create", f"--model={tmp_path / 'new'}", f"--anchor={anchor}", f"--expert={tmp_path / 'expert'}"]
    refuse(commands.merge, create, INTEGRITY, file)
    refuse(commands.merge, ["show", create[1]], STORAGE, "no manifest.json")
