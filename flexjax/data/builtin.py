"""The corpus that any machine already holds, so that the quickstart downloads nothing.

Three domains, made from the sources of installed packages, which are parsed and never imported:

- `math`    docstrings of scipy and numpy: mathematical prose and formulas (BSD-3-Clause);
- `code`    the standard library without its docstrings and comments (PSF-2.0);
- `public`  the language reference in `pydoc_data.topics` and the docstrings of the standard library (PSF-2.0) and of jax,
            flax, optax and orbax (Apache-2.0).

A module belongs wholly to training or wholly to validation, and no document occurs twice in all of the corpus.
"""

import ast
import gzip
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterator

from etils import epath

from flexjax import errors, workdir

DOMAINS = ("public", "math", "code")
SPLITS = ("train", "validation")

_RECIPE = 1  # raise it when the documents change
_MARKER = "builtin.json"
_PSF, _BSD, _APACHE = "PSF-2.0", "BSD-3-Clause", "Apache-2.0"
_LEFT_OUT = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "encodings", "ensurepip", "pydoc_data"}
_LEFT_OUT |= {"site-packages", "dist-packages"}
_MIN_CHARACTERS = 120  # of a docstring: shorter ones are names in other words
_CODE_CHARACTERS = (500, 3000)  # definitions are put together up to the second; what stays below the first is dropped
_VALIDATION_SHARE = 0.05

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Row = tuple[str, str, str]  # text, source (module), licence


def build(root: epath.PathLike) -> bool:
    """Writes `{root}/{public,math,code}/{train,validation}.jsonl.gz`; returns False if they were there already.

    Each line is `{"text", "source", "license"}`. The bytes depend only on the installed sources. The marker file is written
    last and holds the digest of every file, so an interrupted or damaged corpus is built again.

    Raises:
      StorageError: the directory cannot be written.
      DataError: a package whose sources are needed is not installed.
    """
    root = epath.Path(root)
    if _is_complete(root):
        return False
    digests = {}
    for name, rows in _splits(_documents()).items():
        content = gzip.compress("".join(_line(*row) for row in rows).encode(), compresslevel=6, mtime=0)
        digests[name] = hashlib.sha256(content).hexdigest()
        workdir.write(root / name, content)
    marker = {"recipe": _RECIPE, "files": digests}
    workdir.write_json(root / _MARKER, marker)
    return True


def _is_complete(root: epath.Path) -> bool:
    try:
        marker = json.loads((root / _MARKER).read_text())
        if marker["recipe"] != _RECIPE:
            return False
        files = marker["files"]
        return len(files) == len(DOMAINS) * len(SPLITS) and all(
            hashlib.sha256((root / name).read_bytes()).hexdigest() == digest for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _line(text: str, source: str, license_: str) -> str:
    return json.dumps({"text": text, "source": source, "license": license_}, ensure_ascii=False) + "\n"


def _splits(documents: Iterator[tuple[str, _Row]]) -> dict[str, list[_Row]]:
    """File name -> rows; of equal texts the first stays."""
    rows: dict[str, list[_Row]] = {f"{domain}/{split}.jsonl.gz": [] for domain in DOMAINS for split in SPLITS}
    seen = set()
    for domain, row in documents:
        key = hashlib.sha256(" ".join(row[0].split()).encode()).digest()
        if key in seen:
            continue
        seen.add(key)
        split = SPLITS[_hash01(row[1]) < _VALIDATION_SHARE]
        rows[f"{domain}/{split}.jsonl.gz"].append(row)
    return rows


def _hash01(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _documents() -> Iterator[tuple[str, _Row]]:
    """(domain, row), in an order that is the same on every machine with the same sources."""
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for package in ("numpy", "scipy"):
        for module, tree in _modules(*_package(package)):
            yield from (("math", (text, module, _BSD)) for text in _docstrings(tree, module))
    for topic, text in _topics(stdlib / "pydoc_data" / "topics.py"):
        yield "public", (text, f"pydoc_data.topics/{topic}", _PSF)
    for module, tree in _modules(stdlib, ""):
        yield from (("public", (text, module, _PSF)) for text in _docstrings(tree, module))
        yield from (("code", (text, module, _PSF)) for text in _code(tree))
    for package in ("jax", "flax", "optax", "orbax"):
        for module, tree in _modules(*_package(package)):
            yield from (("public", (text, module, _APACHE)) for text in _docstrings(tree, module))


def _package(name: str) -> tuple[pathlib.Path, str]:
    """Directory and name of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise errors.DataError(f"built-in corpus: the package {name!r} is not installed; install it or set data.root")
    return pathlib.Path(next(iter(spec.submodule_search_locations))), name


def _modules(directory: pathlib.Path, package: str) -> Iterator[tuple[str, ast.Module]]:
    """(dotted name, syntax tree) of every module below a directory that is not left out."""
    files = sorted(path.relative_to(directory) for path in directory.rglob("*.py"))
    for relative in files:
        if not _LEFT_OUT.isdisjoint(relative.parts) or relative.name.startswith("test_"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
                tree = ast.parse((directory / relative).read_bytes())
        except (SyntaxError, ValueError):  # a template, or for another Python
            continue
        parts = [package, *relative.with_suffix("").parts]
        yield ".".join(part for part in parts if part and part != "__init__"), tree


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """The long docstrings of a module; numpy and scipy keep those of compiled functions as calls of `add_newdoc`."""
    if module.endswith("_add_newdocs"):
        strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        texts = (inspect.cleandoc(string) for string in strings if isinstance(string, str))
    else:
        nodes = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
        texts = (ast.get_docstring(node) or "" for node in nodes)
    for text in texts:
        if len(text) >= _MIN_CHARACTERS and _is_text(text):
            yield text


def _topics(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference that `help()` prints."""
    tree = ast.parse(path.read_bytes())
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    for table in tables:
        for topic, text in sorted(ast.literal_eval(table).items()):
            yield topic, inspect.cleandoc(text)


def _code(tree: ast.Module) -> Iterator[str]:
    """The module's statements without docstrings (the parser has dropped the comments), a few definitions each."""
    shortest, longest = _CODE_CHARACTERS
    groups, size = [""], 0
    for statement in _without_docstrings(tree).body:
        text = ast.unparse(statement) + "\n"
        size += len(text)
        if size > longest:
            groups.append("")
            size = len(text)
        groups[-1] += text
    return (text for text in groups if len(text) >= shortest and _is_text(text))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def _is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8 and holds no control characters."""
    return re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", text) is None
