"""What a suite took, and what did not work: tuning trials, failures, the ledger of FLOPs, the log of attempts."""

import math
import re
from typing import Any

import numpy as np
from etils import epath

from benchmarks.reporting.measures import Measures
from benchmarks.reporting.tables import NONE, code, number, table

ATTEMPTS = "attempts.md"
FEW = 3  # methods that are named, rather than counted


def tuning(measures: Measures) -> list[str]:
    """What each kind of training run and each method tried, in macro bits per byte on the tuning half, and what was chosen."""
    body, counts = [], set()
    rates: dict[str, Any] = next((row["learning_rates"] for row in measures.rows.values() if row.get("learning_rates")), {})
    for kind, trials in rates.items():
        counts.add(len(trials))
        best = min(trials, key=lambda trial: trial["tune"])
        body.append([f"runs: {kind}", str(len(trials)), _tried(trials), f"{_setting(best)} (all seeds)"])
    for method in measures.methods:
        rows = [row for row in measures.of(method) if row.get("trials")]
        counts |= {len(row["trials"]) for row in rows}
        chosen = [", ".join(_setting({name: value}) for name, value in (row.get("chosen") or {}).items()) for row in rows]
        if rows:
            trials = rows[0]["trials"]
            body.append([code(method), str(len(trials)), _tried(trials), "; ".join(dict.fromkeys(chosen))])
    if not body:
        return []
    said = f"Numbers of trials DIFFER: {', '.join(map(str, sorted(counts)))}."
    if len(counts) == 1:
        said = f"All that was tuned had {counts.pop()} trials, judged on the tuning half."
    return [said, "", *table(["what", "trials", "tried: bits per byte (first seed)", "chosen"], body, text=4)]


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
