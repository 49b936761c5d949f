"""Task files are read whole or refused by line; which items are taken depends on their ids alone."""

import gzip
import hashlib
import json

import pytest

from flexjax import errors
from flexjax.eval import items

CHOICE = {"id": "t/0", "query": "Which?\nAnswer:", "choices": ["red", " dark blue ", "a"], "gold": 1, "license": "MIT"}
GENERATIVE = {"id": "t/0", "prompt": "Q: 1 + 1\nA:", "answer": "2"}


def write(directory, name, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines), mtime=0))


def many(count, **changes):
    return [{**CHOICE, "id": f"t/{i}", **changes} for i in range(count)]


def test_choices_follow_after_one_blank_and_code_as_it_stands(tmp_path):
    write(tmp_path, "arc_easy", [CHOICE])
    task = items.read(tmp_path, "arc_easy")
    assert (task.kind, task.domain) == (items.CHOICE, "educational")
    assert task.items[0].continuations == (" red", " dark blue", " a")
    assert (task.items[0].text, task.items[0].gold, task.items[0].chance) == (CHOICE["query"], 1, 1 / 3)
    write(tmp_path, "humaneval", [{"id": "0", "prompt": "def f():\n", "answer": "    return 1\n"}])
    assert items.read(tmp_path, "humaneval").items[0].continuations == ("    return 1\n",)
    write(tmp_path, "gsm8k_test", [{**GENERATIVE, "solution": "1 + 1 = 2\n"}])
    item = items.read(tmp_path, "gsm8k_test").items[0]
    assert (item.continuations, item.answer) == ((" 1 + 1 = 2\nAnswer: 2",), "2")
    write(tmp_path, "mine", [GENERATIVE])
    assert items.read(tmp_path, "mine").domain == ""
    assert items.names(tmp_path) == ["arc_easy", "gsm8k_test", "humaneval", "mine"]
    assert items.names(tmp_path / "nowhere") == []


def test_the_first_items_by_hash_are_the_same_in_any_file_order(tmp_path):
    rows = many(40)
    write(tmp_path, "a", rows)
    write(tmp_path, "b", rows[::-1])
    chosen = [item.id for item in items.read(tmp_path, "a", limit=10).items]
    assert chosen == [item.id for item in items.read(tmp_path, "b", limit=10).items]
    assert chosen == sorted((row["id"] for row in rows), key=lambda i: hashlib.sha256(i.encode()).digest())[:10]
    assert chosen != [row["id"] for row in rows[:10]]
    assert [item.id for item in items.read(tmp_path, "a").items][:10] == chosen
    assert len(items.read(tmp_path, "a").items) == len(items.read(tmp_path, "a", limit=99).items) == 40
    with pytest.raises(errors.ConfigError, match="limit=-1"):
        items.read(tmp_path, "a", limit=-1)


def test_chance_of_a_generative_item_is_that_of_its_subjects_most_frequent_answer(tmp_path):
    answers = {"logic": ["yes", "yes ", "yes", "no"], "sums": ["1", "2", "3", "4", "4"]}
    rows = [
        {"id": f"{subject}/{i}", "prompt": "?", "answer": answer, "subject": subject}
        for subject, given in answers.items()
        for i, answer in enumerate(given)
    ]
    write(tmp_path, "t", rows)
    for limit in (0, 3):  # of the file, not of the few that were taken
        for item in items.read(tmp_path, "t", limit).items:
            assert item.chance == (3 / 4 if item.id.startswith("logic") else 2 / 5)


BAD = {
    "blank": (b"", "broken JSON at column 1"),
    "cut": (b'{"id": "secret', "broken JSON at column 8"),
    "utf-8": (b'{"id": "\xff"}', "invalid UTF-8 at byte 8"),
    "twice a key": (b'{"id": "x", "id": "y"}', "a key occurs twice"),
    "deep": (b"[" * 100_000, "nested beyond"),
    "list": ([1], "expected a JSON object, got list"),
    "no id": ({"query": "q", "choices": ["a", "b"], "gold": 0}, "field 'id'"),
    "same id": (CHOICE, "id has occurred before"),
    "id no text": ({**CHOICE, "id": 7}, "field 'id' must be a text"),
    "other kind": ({**GENERATIVE, "id": "t/1"}, "a generative item in a multiple choice task"),
    "no answer": ({"id": "t/1", "prompt": "secret"}, "field 'answer'"),
    "blank query": ({**CHOICE, "id": "t/1", "query": " \n"}, "field 'query' must be a text that is not blank"),
    "surrogate": (b'{"id": "t/1", "query": "secret\\ud800", "choices": ["a", "b"], "gold": 0}', "surrogate at character 6"),
    "one choice": ({**CHOICE, "id": "t/1", "choices": ["a"], "gold": 0}, "a list of at least 2"),
    "choices no list": ({**CHOICE, "id": "t/1", "choices": "ab"}, "a list of at least 2"),
    "blank choice": ({**CHOICE, "id": "t/1", "choices": ["a", ""]}, "each of 'choices'"),
    "same choices": ({**CHOICE, "id": "t/1", "choices": ["a", " a"]}, "two of 'choices'"),
    "gold outside": ({**CHOICE, "id": "t/1", "gold": 3}, "index from 0 to 2"),
    "gold negative": ({**CHOICE, "id": "t/1", "gold": -1}, "index from 0 to 2"),
    "gold a bool": ({**CHOICE, "id": "t/1", "gold": True}, "index from 0 to 2"),
    "gold a letter": ({**CHOICE, "id": "t/1", "gold": "B"}, "index from 0 to 2"),
    "subject no text": ({**CHOICE, "id": "t/1", "subject": 3}, "field 'subject'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_file_and_line_and_not_quoted(tmp_path, name):
    line, message = BAD[name]
    write(tmp_path, "t", [CHOICE, line])
    with pytest.raises(errors.DataError, match=message) as raised:
        items.read(tmp_path, "t")
    assert "t.jsonl.gz:2: " in str(raised.value) and "secret" not in str(raised.value)


def test_missing_damaged_and_empty_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(errors.DataError, match=r"piqa\.jsonl\.gz: no such task file; the directory holds no task"):
        items.read(tmp_path, "piqa")
    write(tmp_path, "arc_easy", [CHOICE])
    write(tmp_path, "mbpp", [GENERATIVE])
    with pytest.raises(errors.DataError, match=r"piqa\.jsonl\.gz: no such task file; the directory holds arc_easy, mbpp"):
        items.read(tmp_path, "piqa")
    whole = (tmp_path / "mbpp.jsonl.gz").read_bytes()
    for content in (whole[:-9], b"no gzip", whole[:20] + b"\x00" * 10 + whole[30:]):
        (tmp_path / "mbpp.jsonl.gz").write_bytes(content)
        with pytest.raises(errors.DataError, match=r"mbpp\.jsonl\.gz: .*no whole gzip stream"):
            items.read(tmp_path, "mbpp")
    write(tmp_path, "mbpp", [])
    with pytest.raises(errors.DataError, match="the file is empty"):
        items.read(tmp_path, "mbpp")
    monkeypatch.setattr(items, "MAX_BYTES", 100)
    with pytest.raises(errors.DataError, match="more than 100 bytes"):
        items.read(tmp_path, "arc_easy")
