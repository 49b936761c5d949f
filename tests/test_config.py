"""Configs: every field lives, every value is checked, every file of `configs/` is a job."""

import ast
import dataclasses
import importlib.util
import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from flexjax import config as config_lib
from flexjax import errors, presets

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
JOBS = [(file, variant) for file in FILES for variant in presets.VARIANTS]
CLASSES = {"identity", "schedule", "operations"}


def job(file, *variant):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


def test_every_field_is_read():
    """A field that only configs and presets mention is dead: make it live or remove it."""
    read = set()
    for path in sorted((ROOT / "flexjax").rglob("*.py")):
        if path.name in ("config.py", "presets.py") and path.parent.name == "flexjax":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    dead = [path for path in config_lib.classes() if path.split(".")[-1] not in read]
    assert not dead, f"fields that nothing reads: {dead}"


def test_every_field_has_a_class():
    found = config_lib.classes()
    assert set(found.values()) == CLASSES
    assert set(found) == set(config_lib.to_dict(config_lib.Config(model=config_lib.ModelConfig(router_memory=0.9))))
    for path in found:
        config_lib.check_field(path)


def test_an_option_that_is_off_is_as_if_it_did_not_exist():
    """So what was made before there was one stays what it is; switched on, it makes another run."""
    old, new = config_lib.Config(), config_lib.Config(model=config_lib.ModelConfig(router_memory=0.98))
    assert "model.router_memory" not in config_lib.to_dict(old)
    with pytest.raises(errors.ConfigError, match=r"model.router_memory: \(absent\) -> 0.98"):
        config_lib.check_same_run(config_lib.to_dict(old), config_lib.to_dict(new), allow_schedule_change=True)


def test_groups_have_no_defaults_of_their_own():
    """Two configs share nothing: a nested default is made anew."""
    one, two = config_lib.Config(), config_lib.Config()
    one.train.steps = 7
    assert two.train.steps != 7
    assert one.anchor.train.steps != 7


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("train.step", "did you mean config.train.steps?"),
        ("trian.steps", "did you mean config.train?"),
        ("anchor.train.batchsize", "did you mean config.anchor.train.batch_size?"),
        ("expert.colour", "config.expert has name, kind, d_ff, rank, public_fraction, row_documents"),
        ("train.steps.x", "config.train.steps is a value"),
        ("train", "config.train is a group of settings"),
        ("anchor.train", "for instance config.anchor.train.trainable"),
        ("", "config has phase"),
    ],
)
def test_check_field_suggests(path, hint):
    with pytest.raises(errors.ConfigError) as caught:
        config_lib.check_field(path)
    assert hint in str(caught.value)


def test_check_field_returns_the_type():
    assert config_lib.check_field("train.steps") is int
    assert config_lib.check_field("anchor.train.learning_rate") is float
    assert config_lib.check_field("mixture.experts") == tuple[str, ...]


def leaves():
    """(path, type, default) of every field."""
    defaults = config_lib.Config()
    for path in config_lib.classes():
        value = defaults
        for part in path.split("."):
            value = getattr(value, part)
        yield path, config_lib.check_field(path), value


@pytest.mark.parametrize(("path", "kind", "default"), list(leaves()), ids=[path for path, *_ in leaves()])
def test_check_refuses_wrong_values_of_every_field(path, kind, default):
    wrong = {
        int: ["1", 1.0, True, None, -1],
        float: ["1", True, None, -0.5, float("nan"), float("inf")],
        str: [1, None, ("a",), b"a"],
        bool: [1, "true", None],
        tuple[str, ...]: ["public", (1,), None, ("a", None)],
    }
    assert config_lib.check(config_lib.Config()) is None
    for value in wrong[kind]:
        config = config_lib.Config()
        *groups, name = path.split(".")
        group = config
        for part in groups:
            group = getattr(group, part)
        setattr(group, name, value)
        with pytest.raises(errors.ConfigError) as caught:
            config_lib.check(config)
        assert f"config.{path} is {value!r}" in str(caught.value)
    del default


def test_whole_numbers_are_floats():
    config = config_lib.Config()
    config.train.learning_rate = 1
    config_lib.check(config)


def test_changes_by_class():
    before = config_lib.to_dict(config_lib.Config())
    after = before | {"train.steps": 5, "seed": 3, "data.root": "x", "train.learning_rate": before["train.learning_rate"]}
    assert config_lib.changes(before, after) == {
        "identity": ["seed: 0 -> 3"],
        "schedule": [f"train.steps: {before['train.steps']} -> 5"],
        "operations": ["data.root:  -> x"],
    }
    assert config_lib.changes(before, before) == {kind: [] for kind in CLASSES}


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_changes_of_every_field(kind):
    before = config_lib.to_dict(config_lib.Config())
    for path, found in config_lib.classes().items():
        if found == kind:
            changed = config_lib.changes(before, before | {path: "another"})
            unread = path.startswith(config_lib.UNREAD["expert"])
            assert [line.split(":")[0] for line in changed[kind]] == ([] if unread else [path])


def test_a_field_of_another_version_is_identity():
    before = config_lib.to_dict(config_lib.Config())
    changed = config_lib.changes(before | {"train.gone": 1}, before)
    assert changed["identity"] == ["train.gone: 1 -> (absent)"]


def test_resolve_fills_the_name_in():
    config = config_lib.Config()
    config.expert.name = "math.v2"
    config.train.trainable = "experts/{expert}/.*"
    config_lib.resolve(config)
    assert config.train.trainable == r"experts/math\.v2/.*"
    assert config.evaluation.domains == ("public", "math.v2")


@pytest.mark.parametrize(("file", "variant"), JOBS, ids=[f"{file.stem}:{variant}" for file, variant in JOBS])
def test_every_job_loads(file, variant):
    config = job(file, variant)
    config_lib.check(config)
    config_lib.resolve(config)
    model, train = config.model, config.train
    assert model.num_heads * model.head_dim == model.d_model
    assert model.num_heads % model.num_kv_heads == 0
    for run in (train, config.anchor.train):
        assert run.warmup_steps < run.steps and run.batch_size % run.accumulation == 0
        assert run.save_every <= run.steps and run.log_every <= run.steps
    assert config.expert.row_documents >= 1000
    assert 0 <= config.expert.public_fraction < 1 and 0 <= config.mixture.public_fraction <= 1
    assert config.evaluation.domains[0] == config_lib.PUBLIC
    assert not any("{expert}" in domain for domain in config.evaluation.domains)
    assert train.weight_decay == 0 or config.phase in ("public", "joint"), "an expert's few tensors are not decayed"
    assert config.phase != "expert" or train.trainable == f"experts/{config.expert.name}/.*"
    assert model.vocab_size <= 2**16 or config.data.token_dtype == "uint32"
    assert file.stem.startswith(config.phase) or config.expert.name in file.stem
    assert not config.data.root and not config.anchor.path and not config.mixture.model_path, "a path of somebody's machine"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_quickstart_is_the_default(file):
    assert job(file) == job(file, "quickstart")
    with pytest.raises(errors.ConfigError, match="unknown variant 'huge'; choose quickstart, mini, 7b"):
        job(file, "huge")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_gives_the_command(file):
    assert f"python -m flexjax.main --config=configs/{file.name}" in ast.get_docstring(ast.parse(file.read_text()))


def test_jobs_of_one_variant_share_their_anchor():
    """Experts trained apart must fit one model: shapes, data and the anchor's training are the variant's."""
    for variant in presets.VARIANTS:
        jobs = [job(file, variant) for file in FILES]
        for part in ("model", "data", "anchor", "seed"):
            assert len({str(getattr(config, part)) for config in jobs}) == 1, f"{part} of {variant}"


def test_public_job_is_the_anchors():
    public = job(ROOT / "configs" / "public.py")
    assert public.train == public.anchor.train


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments):
        argv = ["job", f"--config={ROOT / 'configs' / 'math_expert.py'}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where the names of overridden fields are looked up
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values)
        values(argv)
        return holder.value

    return parse


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_overrides(parse):
    config = parse(
        "--config.train.learning_rate=1",
        "--config.train.steps=7",
        "--config.model.tied_head",
        "--noconfig.train.scan_layers",
        "--config.data.attend_across_documents=true",
        "--config.evaluation.domains=('public','code')",
        "--config.mixture.experts=law",
        "--config.anchor.train.batch_size=3",
        "--config.data.root=/some where/[x]=y",
    )
    config_lib.check(config)
    assert type(config.train.learning_rate) is float and config.train.learning_rate == 1
    assert (config.train.steps, config.anchor.train.batch_size) == (7, 3)
    assert config.model.tied_head is True and config.train.scan_layers is False
    assert config.data.attend_across_documents is True
    assert config.evaluation.domains == ("public", "code")
    assert config.mixture.experts == ("law",)
    assert config.data.root == "/some where/[x]=y"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_overrides_touch_one_field(parse):
    untouched = config_lib.to_dict(parse())
    changed = config_lib.to_dict(parse("--config.train.steps=7"))
    assert {path for path in untouched if untouched[path] != changed[path]} == {"train.steps"}


def test_configs_are_plain_dataclasses():
    for kind in (config_lib.ModelConfig, config_lib.DataConfig, config_lib.TrainConfig, config_lib.Config):
        assert dataclasses.is_dataclass(kind)
        assert all(not isinstance(field.type, str) for field in dataclasses.fields(kind)), "types must be evaluated"
