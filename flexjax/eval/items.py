"""Files of benchmark items, read strictly: every line is an item, or the file is refused.

    NAME.jsonl.gz   multiple choice {"id", "query", "choices", "gold"}   gold is an index
                    generative      {"id", "prompt", "answer"}           "subject" and "solution" where there are some

A choice or answer continues its text after one blank, or as it stands where the text ends in white space. Other fields are
left alone.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections import Counter, defaultdict
from typing import Any

from etils import epath

from flexjax import errors, tree

SUFFIX = ".jsonl.gz"
MAX_BYTES = 2**28  # of a file's text
CHOICE, GENERATIVE = "multiple choice", "generative"
DOMAINS = {
    "public": (
        "agieval_logiqa_en", "agieval_lsat_ar", "agieval_lsat_lr", "agieval_lsat_rc", "bbh_mini",
        "bigbench_general_knowledge", "bigbench_strategyqa", "mmlu_public",
    ),
    "academic": ("bigbench_gre_reading_comprehension", "mmlu_academic", "pubmedqa"),
    "code": ("bigbench_code_line_description", "humaneval", "mbpp", "mmlu_code"),
    "creative": ("bigbench_authorship_verification", "bigbench_understanding_fables", "lambada"),
    "educational": (
        "agieval_gaokao_english", "agieval_sat_en", "arc_challenge", "arc_easy", "bigbench_physics", "mmlu_educational",
    ),
    "math": ("agieval_aqua_rat", "agieval_sat_math", "bigbench_elementary_math_qa", "gsm8k_test", "mmlu_math"),
    "news": ("mmlu_news",),
    "reddit": ("bigbench_irony_identification", "bigbench_social_iqa", "goemotions"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """A text, how it may go on, and what goes for knowing nothing.

    Attributes:
      id: unique in its task.
      text: the query or prompt.
      continuations: the choices, or the one right answer, with what separates them from the text.
      gold: which of them is right.
      answer: the right one as the file has it.
      chance: of one who guesses a choice, or who always gives the answer that is most frequent in the file (in the subject).
    """

    id: str
    text: str
    continuations: tuple[str, ...]
    gold: int
    answer: str
    chance: float


@dataclasses.dataclass(frozen=True)
class Task:
    """Items of one kind, in the order in which every model gets them; the domain is empty if nobody gave it one."""

    name: str
    kind: str
    domain: str
    items: tuple[Item, ...]


def names(directory: epath.PathLike) -> list[str]:
    """The tasks that a directory holds, sorted."""
    directory = epath.Path(directory)
    found = directory.iterdir() if directory.exists() else ()
    return sorted(path.name.removesuffix(SUFFIX) for path in found if path.name.endswith(SUFFIX))


def read(directory: epath.PathLike, name: str, limit: int = 0) -> Task:
    """Reads a task, and keeps the first `limit` items (0: all) in the order of their ids' hashes.

    Raises:
      DataError: the file is missing or damaged, or a line is no item; by `file:line`.
      ConfigError: the limit is negative.
    """
    if limit < 0:
        raise errors.ConfigError(f"limit={limit} must be 0 (all items) or a positive number")
    path = epath.Path(directory) / f"{name}{SUFFIX}"
    rows: dict[str, dict[str, Any]] = {}
    kind = ""
    for number, line in enumerate(_lines(path), 1):
        try:
            row = _parse(line)
            found = CHOICE if "query" in row else GENERATIVE
            if row["id"] in rows:
                raise ValueError("its id has occurred before")
            if kind and found != kind:
                raise ValueError(f"a {found} item in a {kind} task")
        except ValueError as error:
            raise errors.DataError(f"{path}:{number}: {error}; mend the line or fetch the file again") from None
        kind, rows[row["id"]] = found, row
    if not rows:
        raise errors.DataError(f"{path}: the file is empty; fetch it again")
    chosen = sorted(rows.values(), key=lambda row: hashlib.sha256(row["id"].encode()).digest())[: limit or None]
    if kind == CHOICE:
        items = tuple(_choice_item(row) for row in chosen)
    else:
        chance = _most_frequent(list(rows.values()))
        items = tuple(_generative_item(row, chance[row.get("subject")]) for row in chosen)
    return Task(name, kind, next((domain for domain, tasks in DOMAINS.items() if name in tasks), ""), items)


def _lines(path: epath.Path) -> list[bytes]:
    if not path.exists():
        held = ", ".join(names(path.parent)) or "no task"
        raise errors.DataError(f"{path}: no such task file; the directory holds {held}")
    try:
        with path.open("rb") as file, gzip.GzipFile(fileobj=file) as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise errors.DataError(f"{path}: the file cannot be read, or is no whole gzip stream; fetch it again") from None
    if len(content) > MAX_BYTES:
        raise errors.DataError(f"{path}: more than {MAX_BYTES} bytes of text; split the task")
    return content.splitlines()


def _parse(line: bytes) -> dict[str, Any]:
    """An item's fields; raises ValueError with what is wrong, never with what is written there."""
    try:
        row = tree.strict_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested beyond all measure") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    needed = ("id", "query") if "query" in row else ("id", "prompt", "answer")
    for name in needed + tuple(name for name in ("subject", "solution") if name in row):
        _check_text(row.get(name), f"field '{name}'")
    if "query" in row:
        choices, gold = row.get("choices"), row.get("gold")
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError("field 'choices' must be a list of at least 2")
        for choice in choices:
            _check_text(choice, "each of 'choices'")
        if len({choice.strip() for choice in choices}) < len(choices):
            raise ValueError("two of 'choices' are the same")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise ValueError(f"field 'gold' must be an index from 0 to {len(choices) - 1}")
    return row


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate at character {error.start}") from None


def _most_frequent(rows: list[dict[str, Any]]) -> dict[str | None, float]:
    """The share of its most frequent answer, by subject."""
    answers: dict[str | None, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row.get("subject")][row["answer"].strip()] += 1
    return {subject: max(counts.values()) / counts.total() for subject, counts in answers.items()}


def _after(text: str, answer: str) -> str:
    return answer if text[-1].isspace() else f" {answer.strip()}"


def _choice_item(row: dict[str, Any]) -> Item:
    choices, gold = row["choices"], row["gold"]
    after = tuple(_after(row["query"], choice) for choice in choices)
    return Item(row["id"], row["query"], after, gold, choices[gold], 1 / len(choices))


def _generative_item(row: dict[str, Any], chance: float) -> Item:
    answer = row["answer"]
    if "solution" in row:  # the prompt asks for it; the answer stands behind it, as in the training text of such problems
        answer = f"{row['solution'].strip()}\nAnswer: {answer.strip()}"
    return Item(row["id"], row["prompt"], (_after(row["prompt"], answer),), 0, row["answer"], chance)
