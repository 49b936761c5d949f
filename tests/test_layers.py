"""The house stands as `README.md` draws it: who may import whom, and what is written nowhere."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "flexjax"
ENTRY_POINTS = {"main", "merge", "convert", "evaluate", "generate", "plan"}
ROWS = [  # a module imports from earlier rows and from its own folder only
    {"errors", "config", "tree", "workdir", "memory", "hardware", "peers", "distributed", "sharding"},
    {"bucket"},
    {"storage"},
    {"checkpoint"},
    {"data"},
    {"model"},
    {"experts"},
    {"inference"},
    {"eval"},
    {"governance"},
    {"train"},
    {"planning"},
    {"jobs", "presets", "statement"},
    {"stages"},
    {"baselines"},
    {"comparison"},
    {"report"},
    {"command"},
    {"hosts"},
    ENTRY_POINTS,
]
FREE = {"jax", "numpy", "etils", "jaxtyping", "ml_dtypes", "flexjax"}  # anybody may import these and the standard library
OWNERS = {
    "absl": {"command", "hosts", *ENTRY_POINTS},
    "cryptography": {"governance/signatures"},
    "flax": {"model"},
    "google": {"bucket"},
    "google_crc32c": {"bucket"},
    "requests": {"bucket"},
    "urllib3": {"bucket"},
    "grain": {"data"},
    "matplotlib": {"report"},
    "ml_collections": {"main", "plan"},
    "optax": {"train"},
    "orbax": {"checkpoint"},
    "scipy": {"data/proxies"},
    "sentencepiece": {"data"},
    "sklearn": {"data/proxies"},
    "tensorboardX": {"train/metrics"},
    "tokenizers": {"data"},
    "tqdm": {"train/metrics"},
}
EXCEPTIONS = {("data/tokens", "absl")}  # its logging, never flags
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = {"train/loop.train": 150}
DEFAULT_FUNCTION_LINES = 80

MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
CODE = [name for name in MODULES if not name.endswith("__init__")]


def imports(name):
    """Dotted names of the modules and things that a module imports."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """`jax.config.update` of an attribute or name, empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def row(name):
    room = name.split("/")[0]
    found = [index for index, rooms in enumerate(ROWS) if room in rooms]
    assert found, f"flexjax/{name}.py has no place; give it one in ROWS and in the README's picture"
    return found[0]


@pytest.mark.parametrize("name", CODE)
def test_imports_come_from_earlier_rows(name):
    room = name.split("/")[0]
    for imported in imports(name):
        if not imported.startswith("flexjax."):
            continue
        other = imported.split(".")[1]
        allowed = row(other) < row(name) or (other == room and "/" in name) or (row(other) == row(name) and row(name) == 0)
        assert allowed, f"flexjax/{name}.py imports {imported}, which stands in a later or the same row"


def test_rooms_of_one_row_do_not_import_in_circles():
    """The first row holds several modules: among themselves they are in order too."""
    done, left = set(), {name for name in CODE if row(name) == 0}
    while left:
        ready = {name for name in left if not {i.split(".")[1] for i in imports(name) if "flexjax." in i} - done}
        assert ready, f"{sorted(left)} import each other"
        done |= ready
        left -= ready


@pytest.mark.parametrize("name", CODE)
def test_packages_have_owners(name):
    for imported in imports(name):
        package = imported.split(".")[0]
        if package in FREE or package in sys.stdlib_module_names or (name, package) in EXCEPTIONS:
            continue
        owners = OWNERS.get(package, set())
        allowed = any(name == owner or name.startswith(f"{owner}/") for owner in owners)
        assert allowed, f"flexjax/{name}.py imports {package}, which belongs to {sorted(owners) or 'nobody'}"


def test_every_owner_exists():
    """A rule about a package or room that is gone is removed."""
    used = {imported.split(".")[0] for name in CODE for imported in imports(name)}
    assert set(OWNERS) <= used
    rooms = {name.split("/")[0] for name in CODE}
    assert set.union(*ROWS) - rooms <= {"memory", "generate"}


@pytest.mark.parametrize("name", CODE)
def test_nothing_dangerous(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in ("eval", "exec", "compile", "__import__"), f"{name}:{node.lineno} calls {called}"
            switches = called == "jax.config.update" and name not in ("command", "distributed")
            assert not switches, f"{name}:{node.lineno} switches jax for everybody"
            for keyword in node.keywords:
                pickles = keyword.arg == "allow_pickle" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                )
                assert not pickles, f"{name}:{node.lineno} unpickles"
    packages = {imported.split(".")[0] for imported in imports(name)}
    assert not packages & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, f"{name} can run code that is in data"


def test_no_code_in_init():
    for name, path in MODULES.items():
        assert name in CODE or not path.read_text().strip(), f"flexjax/{name}.py is not empty; there are no re-exports here"


def test_names_say_something():
    for name in CODE:
        stem = name.split("/")[-1]
        assert not set(stem.split("_")) & {"utils", "util", "common", "helpers", "helper", "misc"}, f"flexjax/{name}.py"


@pytest.mark.parametrize("name", CODE)
def test_size(name):
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"flexjax/{name}.py has {lines} lines; which room is missing?"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            limit = MAX_FUNCTION_LINES.get(f"{name}.{node.name}", DEFAULT_FUNCTION_LINES)
            assert length <= limit, f"{name}.{node.name} has {length} lines, at most {limit}"
