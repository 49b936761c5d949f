"""Runs a suite: every method on every seed, one JSON row each the moment it is finished, then a report and figures.

python -m benchmarks.run --suite=table1 [--size=cpu] [--data_root=DIR] [--methods=NAME,...] [--seeds=3]
    [--tasks=all] [--sweep=PATH=VALUE,...]

Starting it again goes on where it was: finished stages and rows are kept. `--suite=installed` needs no data.
"""

import datetime
import json
import math
import os
import pathlib
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from benchmarks import measuring, report
from benchmarks.reporting import rows
from benchmarks.suite import catalogue, methods, models, owned_text, scoring, suites, sweep, tasks, training, tuning
from flexjax import command, errors, memory, presets, tree, workdir
from flexjax import config as config_lib
from flexjax.train import flops

SUITE = flags.DEFINE_string("suite", "table1", f"One of {', '.join(suites.SUITES)}.")
SIZE = flags.DEFINE_string("size", "cpu", f"One of {', '.join(suites.SIZES)}.")
DATA_ROOT = flags.DEFINE_string("data_root", "", "Holds flexmix-mini/ and tasks/; not needed for --suite=installed.")
METHODS = flags.DEFINE_list("methods", ["core"], f"Names of methods, or groups: {', '.join(catalogue.GROUPS)}, all.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many.", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "The first of them.", lower_bound=0)
TASKS = flags.DEFINE_list("tasks", [], "Benchmark items to ask as well: names of files in DATA_ROOT/tasks, or all.")
SWEEP = flags.DEFINE_multi_string("sweep", [], "PATH=VALUE,... of the expert recipe: trains and ranks the grid, nothing else.")
WORKDIR = flags.DEFINE_string("workdir", None, "For stages; default runs/benchmarks/<suite>-<size>.")
OUT = flags.DEFINE_string("out", None, "For rows, report and figures; default benchmarks/results/<suite>-<size>.")
COMMIT = measuring.commit()  # of the code that runs, whatever is committed meanwhile
RECIPE = "recipe.json"


def main(argv: list[str]) -> None:
    """Runs what is missing, then reports."""
    memory.keep_freed()
    if argv:
        raise errors.ConfigError(f"unexpected argument '{argv[0]}'; everything is a flag: --suite=table1 --data_root=DIR")
    suite, size = suites.find(SUITE.value, SIZE.value)
    chosen = catalogue.select(suite, size, METHODS.value)
    points = sweep.grid(SWEEP.value) if SWEEP.value else []
    asked = tasks.names(DATA_ROOT.value, TASKS.value, suite.domains) if TASKS.value else []
    name = f"{suite.name}-{SIZE.value}"
    out = pathlib.Path(OUT.value or f"benchmarks/results/{name}")
    home = workdir.create(WORKDIR.value or os.path.join("runs", "benchmarks", name))
    command.compilation_cache(home / "compiled")
    failed: list[str] = []
    with workdir.lock(home):
        for seed in range(FIRST_SEED.value, FIRST_SEED.value + SEEDS.value):
            bench = training.Bench(suite, SIZE.value, home, DATA_ROOT.value, seed, say)
            if points:
                run_sweep(bench, points, out)
            else:
                failed += run_seed(bench, chosen, out, asked)
    if points:
        return
    report.write(rows.read(out / rows.FILE), out)
    say(f"report: {out / 'report.md'}")
    if failed:
        raise errors.FlexjaxError(f"{len(failed)} methods failed: {', '.join(failed)}; the report and {home}/failed-* say why")


def say(text: str) -> None:
    """One line for whoever watches, with the time."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def run_sweep(bench: training.Bench, points: Sequence[Mapping[str, Any]], out: pathlib.Path) -> None:
    """Ranks a grid of settings on one seed; `sweep.jsonl` keeps every point."""
    out.mkdir(parents=True, exist_ok=True)
    ranked = sweep.run(models.Models(bench, _rates(bench, out), groups=("tune",)), points)
    path = out / "sweep.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    same = {json.dumps([row["seed"], row["settings"]]) for row in ranked}
    kept = [row for row in kept if json.dumps([row["seed"], row["settings"]]) not in same]
    workdir.write(epath.Path(path), "".join(json.dumps(row) + "\n" for row in [*kept, *ranked]).encode())
    for place, row in enumerate(ranked, 1):
        bench.say(f"{place}. by token {row['token']:.4f}, by sequence {row['sequence']:.4f}: {json.dumps(row['settings'])}")


def run_seed(
    bench: training.Bench, chosen: Mapping[str, catalogue.Entry], out: pathlib.Path, asked: Sequence[str] = ()
) -> list[str]:
    """Writes those rows of one seed that are not in `out` yet, with the tasks that are asked for; returns what failed.

    Raises:
      NumericError: the anchor does not pass the suite's gate.
    """
    out.mkdir(parents=True, exist_ok=True)
    rates = _rates(bench, out)
    found = {row["method"]: row for row in _rows(out) if row["seed"] == bench.seed and row["status"] == "ok"}
    lab = models.Models(bench, rates)
    made_of = {"corpus": bench.corpus, "inputs": rates.inputs}
    if not all(_answers(found.get(name), made_of, asked) for name in chosen):
        lab.check_anchor()  # one that does not pass stops the suite, not a method
        made_of["anchor"] = lab.anchor.manifest["digest"]
    failed = []
    for name, entry in chosen.items():
        before = found.get(name)
        if _answers(before, made_of, asked):
            bench.say(f"seed {bench.seed}: {name}: finished, skipped")
            continue
        if not _made_of(before, made_of):
            before = None
            if name in found:
                bench.say(f"seed {bench.seed}: {name}: what it is made of changed, run anew")
        answered = {} if before is None else before["extra"].get("tasks", {})
        head = _head(bench, name, entry) | made_of
        try:
            outcome = entry.method(lab)
            if asked:
                outcome.extra["tasks"] = tasks.scores(lab, name, outcome, sorted({*asked, *answered}))
            row = head | {"status": "ok", "error": ""} | _result(lab, outcome)
            kinds = {lab.kinds[run] for run in outcome.runs if run in lab.kinds}
            row |= {"learning_rates": {kind: rates.trials[kind] for kind in sorted(kinds & set(rates.trials))}}
        except (errors.Preempted, errors.StorageError):
            raise
        except Exception as error:  # whatever it is, the table must show it
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            for secret, instead in ((os.fspath(bench.home), "WORKDIR"), (bench.data_root or "\0", "DATA_ROOT")):
                said = said.replace(secret, instead)
            (bench.home / f"failed-{bench.seed}-{name}.txt").write_text(traceback.format_exc())
            bench.say(f"seed {bench.seed}: {name}: FAILED, {said}")
            failed.append(name)
            row = head | {"status": "failed", "error": said} if before is None else before
        _put(out, row)
        if row["status"] == "ok":
            scores = row["scores"]["report"].items()
            reached = {domain: sum(each["nats"]) / math.log(2) / sum(each["bytes"]) for domain, each in scores}
            told = "  ".join(f"{domain} {value:.3f}" for domain, value in reached.items())
            bench.say(f"seed {bench.seed}: {name}: {told}")
    return failed


def _made_of(row: dict[str, Any] | None, made_of: Mapping[str, str]) -> bool:
    """Whether a row was made of this corpus, by these settings and, where it is known, beside this anchor.

    Another machine may round differently, and have another anchor of the same seed: a gap between two anchors means nothing.
    """
    return row is not None and all(row.get(field) == digest for field, digest in made_of.items())


def _answers(row: dict[str, Any] | None, made_of: Mapping[str, str], asked: Sequence[str]) -> bool:
    """Whether a row is up to date, with the tasks that are asked for, unless it is of a method that answers none."""
    if row is None or not _made_of(row, made_of):
        return False
    answered = row["extra"].get("tasks", None if asked else {})
    return answered == {} or set(asked) <= set(answered or ())


def _head(bench: training.Bench, name: str, entry: catalogue.Entry) -> dict[str, Any]:
    return {
        "suite": bench.suite.name,
        "size": bench.size_name,
        "seed": bench.seed,
        "method": name,
        "title": entry.title,
        "group": entry.group,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **measuring.machine(),
        "commit": COMMIT,
    }


def _rates(bench: training.Bench, out: pathlib.Path) -> tuning.Rates:
    """The learning rates of the suite, with what they and all rows depend on."""
    kinds = (presets.public_training, presets.expert_training, presets.joint_training, presets.router_training)
    settings = [config_lib.to_dict(kind("mini")) for kind in kinds]
    tuned = [models.RATES, tuning.FACTORS, tuning.FRACTION, methods.SEQUENCE]
    constants = [*tuned, models.MEMORY, owned_text.KEPT, owned_text.SHORT, config_lib.to_dict(config_lib.ExpertConfig())]
    made_of = [bench.corpus, repr(bench.suite), repr(bench.size), settings, constants]
    return tuning.Rates(bench, epath.Path(out / RECIPE), tree.sha256(tree.canonical_json(made_of)))


def _rows(out: pathlib.Path) -> list[dict[str, Any]]:
    return rows.read(out / rows.FILE) if (out / rows.FILE).exists() else []


def _put(out: pathlib.Path, row: dict[str, Any]) -> None:
    """Adds a row in place of the one that the same method and seed had."""
    path = out / rows.FILE
    kept = [other for other in _rows(out) if (other["method"], other["seed"]) != (row["method"], row["seed"])]
    workdir.write(epath.Path(path), "".join(json.dumps(each) + "\n" for each in [*kept, row]).encode())


def _result(lab: models.Models, outcome: methods.Outcome) -> dict[str, Any]:
    """The part of a row that the method decides."""
    bench = lab.bench
    runs = {run: bench.ledger[run] for run in outcome.runs}
    dense = flops.forward_per_token(lab.public.architecture, bench.size.seq_len)
    texts: dict[str, dict[str, Any]] = {}
    shares = {}
    for text, scores in outcome.scores.items():
        group, _, name = text.partition("/")
        texts.setdefault(group, {})[name] = scoring.by_document(scores, None if outcome.nats is None else outcome.nats[text])
        if group == "report" and outcome.experts:
            shares[name] = [[round(float(share), 4) for share in layer] for layer in scores.shares]
    return {
        "ledger": {
            "runs": runs,
            "anchor_flops": bench.ledger["anchor"]["flops"],
            "training_flops": sum(run["flops"] for run in runs.values()),
            "inference_flops_per_token": outcome.inference_flops,
            "forwards": round(outcome.inference_flops / dense, 3),
        },
        "scores": texts,
        "experts": list(outcome.experts),
        "shares": shares,
        **({} if outcome.confusion is None else {"confusion": outcome.confusion}),
        "trials": outcome.trials,
        "chosen": outcome.chosen,
        "extra": outcome.extra,
    }


if __name__ == "__main__":
    command.run(main)
