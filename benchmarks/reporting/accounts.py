"""What a suite was made of, what it took, and what did not work: trials, failures, the ledger of FLOPs, the log of attempts."""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from benchmarks.reporting.measures import Measures
from benchmarks.reporting.rows import Row
from benchmarks.reporting.tables import NONE, code, number, table

ATTEMPTS = "attempts.md"
CHANGED = "+changes"  # behind a commit that the code differed from
FEW = 3  # methods that are named, rather than counted


def comparable(measures: Measures) -> list[str]:
    """A line each: of what finished rows were not made alike by `inputs`, and by which code if not by one clean commit."""
    rows = [row for row in measures.rows.values() if row["status"] == "ok"]
    found = []
    inputs = _named(rows, "inputs")
    if len(inputs) > 1:
        found.append(f"**Not comparable: rows were made of different `inputs`.** {_most(inputs)}")
    for seed in measures.seeds:
        anchors = _named([row for row in rows if row["seed"] == seed], "anchor")
        if len(anchors) > 1:
            found.append(f"**Not comparable: seed {seed} has several anchors.** {_most(anchors)}")
    commits = _named(rows, "commit")
    if len(commits) > 1:
        (commit, _), *others = commits.items()
        odd = "; ".join(f"`{other:.40}`: {who}" for other, who in others)
        found.append(f"Rows are of several commits: most of `{commit:.40}`; {odd}.")
    changed = [commit for commit in commits if commit.endswith(CHANGED)]
    if changed:
        said = ", ".join(f"`{commit:.40}`" for commit in changed)
        found.append(f"Code that is in no commit, `{CHANGED}`: {said}.")
    return found


def _most(groups: dict[str, str]) -> str:
    """Which digest most rows have, and who has another one; `groups` as from `_named`."""
    (digest, _), *others = groups.items()
    odd = "; ".join(f"`{other:.12}`: {who}" for other, who in others)
    return f"Most of `{digest:.12}`, but {odd}."


def _named(rows: Iterable[Row], field: str) -> dict[str, str]:
    """By value of a field, the most frequent first: the methods, with their seeds, that have it."""
    groups: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(field) or "unknown"), {}).setdefault(row["method"], []).append(row["seed"])
    order = sorted(groups.items(), key=lambda item: -sum(map(len, item[1].values())))
    return {
        value: ", ".join(f"{code(method)} (seed {', '.join(map(str, sorted(seeds)))})" for method, seeds in methods.items())
        for value, methods in order
    }


def tuning(measures: Measures) -> list[str]:
    """What each kind of training run and each method tried, in macro bits per byte on the tuning half, and what was chosen.

    A method's trials are those of its own settings and those of the learning rates of its kinds of run.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in measures.rows.values():
        for kind, trials in (row.get("learning_rates") or {}).items():
            kinds.setdefault(kind, trials)
    body, totals = [], []
    for method in filter(measures.seeds_of, measures.methods):
        rows = measures.of(method)
        own: list[dict[str, Any]] = next((row["trials"] for row in rows if row.get("trials")), [])
        rates = {kind: len(trials) for row in rows for kind, trials in (row.get("learning_rates") or {}).items()}
        chosen = [", ".join(_setting({name: value}) for name, value in (row.get("chosen") or {}).items()) for row in rows]
        totals.append(len(own) + sum(rates.values()))
        said = ", ".join(f"{kind} {count}" for kind, count in rates.items()) or "0"
        body.append(
            [code(method), str(totals[-1]), str(len(own)), said, _tried(own), "; ".join(dict.fromkeys(filter(None, chosen)))]
        )
    if not any(totals):
        return []
    counts = sorted({*totals, *map(len, kinds.values())})
    if len(counts) == 1:
        lines = [f"All that is listed had {counts[0]} trials, judged on the tuning half."]
    else:
        lines = [f"Numbers of trials DIFFER: {', '.join(map(str, counts))}. All were judged on the tuning half."]
    if kinds:
        rates_tried = [[kind, str(len(trials)), _tried(trials), _best(trials)] for kind, trials in kinds.items()]
        lines += ["", *table(["kind of run", "trials", "tried: bits per byte", "chosen (all seeds)"], rates_tried, text=4)]
    head = ["method", "trials", "own", "of learning rates", "tried: bits per byte (first seed)", "chosen"]
    return [*lines, "", *table(head, body, text=6)]


def _best(trials: list[dict[str, Any]]) -> str:
    """The learning rate that did best, and whether a better one may lie beyond those tried."""
    best = min(trials, key=lambda trial: math.inf if trial.get("tune") is None else trial["tune"])
    rates = [trial["learning_rate"] for trial in trials]
    edge = best["learning_rate"] in (min(rates), max(rates))
    return _setting(best) + (", best at the edge of the grid" if edge else "")


def _tried(trials: list[dict[str, Any]]) -> str:
    return "; ".join(f"{_setting(trial)}: {number(_float(trial.get('tune')), 3)}" for trial in trials)


def _setting(trial: dict[str, Any]) -> str:
    """What a trial set: `{"learning_rate": 0.004}` or `{"setting": "temperature 3"}`, with or without a value."""
    said = []
    for name, value in trial.items():
        if name != "tune":
            short = f"{value:g}" if isinstance(value, float) else str(value)
            said.append(short if name in ("setting", "value") else f"{name.replace('_', ' ')} {short}")
    return " ".join(said)


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def failures(measures: Measures) -> list[str]:
    """Methods that failed, and those that some seeds lack."""
    body = []
    for method in measures.methods:
        for seed in measures.seeds:
            row = measures.rows.get((method, seed))
            if row is None:
                body.append([code(method), str(seed), "not run"])
            elif row["status"] != "ok":
                body.append([code(method), str(seed), f"failed: {row.get('error') or 'no reason given'}"])
    return table(["method", "seed", "what happened"], body, text=3) if body else []


def ledger(measures: Measures) -> list[str]:
    """Every training run once, with who uses it."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    users: dict[str, set[str]] = {}
    anchors = []
    for (method, seed), row in measures.rows.items():
        found = row.get("ledger") or {}
        anchors += [found["anchor_flops"]] if found.get("anchor_flops") else []
        for name, entry in found.get("runs", {}).items():
            runs.setdefault(name, {})[seed] = entry
            users.setdefault(name, set()).add(method)
    body = []
    if anchors and "anchor" not in runs:
        body.append(["anchor", "all", NONE, NONE, number(float(np.mean(anchors)) / 1e12), NONE, NONE, NONE])
    for name, seeds in runs.items():
        used = sorted(users[name])
        who = ", ".join(map(code, used)) if len(used) <= FEW else f"{len(used)} methods"
        body.append([name, who, *_run(list(seeds.values()))])
    if not body:
        return []
    head = ["run", "used by", "tokens, M", "steps", "TFLOP", "seconds", "GFLOP/s", "device"]
    note = "Means over seeds. Seconds: the whole stage, data and saving included; *: interrupted, only what came after."
    return [*table(head, body, text=2), "", note]


def _run(entries: list[dict[str, Any]]) -> list[str]:
    """A run's cells, mean over seeds."""
    tokens, steps, flops, seconds = (
        float(np.mean([entry.get(key, math.nan) for entry in entries])) for key in ("tokens", "steps", "flops", "seconds")
    )
    resumed = any(entry.get("resumed") for entry in entries)
    speed = NONE if resumed or not seconds > 0 else number(flops / seconds / 1e9, 0)
    devices = ", ".join(sorted({entry.get("device", NONE) for entry in entries}))
    spent = number(seconds, 0) + ("*" if resumed else "")
    return [number(tokens / 1e6), number(steps, 0), number(flops / 1e12), spent, speed, devices]


def attempts(directory: epath.Path) -> list[str]:
    """The log of what was tried, without its title, its headings below this report's."""
    path = directory / ATTEMPTS
    if not path.exists():
        return []
    text = re.sub(r"\A# .*\n+", "", path.read_text().strip())
    return re.sub(r"^#{1,2} ", "### ", text, flags=re.MULTILINE).splitlines()
