"""Makes every plan of `benchmarks/plans/` that is not there yet for today's program, and the table that compares them.

python -m benchmarks.plans [--only=TEXT]     (needs `libtpu`; one to five minutes for each plan)
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

from etils import epath

from flexjax import workdir
from flexjax.planning import report

HOME = pathlib.Path(__file__).parent / "plans"
SIX = "--config.mixture.experts=('academic','code','creative','math','news','reddit')"
SEVEN = "--config.mixture.experts=('academic','code','creative','educational','math','news','reddit')"
PADDED = "--config.mesh.transport=padded"  # v5e has no ragged exchange
V5E, V5P = "v5e:16x16", "v5p:4x4x8"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One plan: the name of its files, what it is, and the command line that makes it."""

    name: str
    title: str
    config: str
    topology: str
    mesh: dict[str, int]
    accumulation: int
    more: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Arguments of `python -m flexjax.plan`."""
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        config = [f"--config=configs/{self.config}.py:7b", f"--topology={self.topology}"]
        report = [f"--report={HOME.relative_to(HOME.parents[1]) / self.name}.md"]
        return [*config, *mesh, f"--config.train.accumulation={self.accumulation}", *self.more, *report]


def _plan(kind: str, config: str, topology: str, mesh: dict[str, int], accumulation: int, *more: str) -> Plan:
    name = f"{kind.replace(' ', '-')}-{topology.replace(':', '-')}"
    return Plan(name.lower(), kind, config, topology, mesh, accumulation, more)


PUBLIC, EXPERT, ROUTER, JOINT = "7B public", "2x7B expert", "7x7B router tuning", "8x7B joint MoE"
MAIN = [
    _plan(PUBLIC, "public", V5E, {"fsdp": 256}, 4),
    _plan(PUBLIC, "public", V5P, {"fsdp": 128}, 2),
    _plan(EXPERT, "math_expert", V5E, {"fsdp": 256}, 4),
    _plan(EXPERT, "math_expert", V5P, {"fsdp": 128}, 2),
    _plan(ROUTER, "router_tuning", V5E, {"fsdp": 256}, 4, SIX),
    _plan(ROUTER, "router_tuning", V5P, {"fsdp": 128}, 2, SIX),
    _plan(JOINT, "joint_moe", V5E, {"fsdp": 32, "expert": 8}, 4, SEVEN, "--config.mixture.top_k=4", PADDED),
    _plan(JOINT, "joint_moe", V5P, {"fsdp": 16, "expert": 8}, 4, SEVEN, "--config.mixture.top_k=4"),
]
SMALLEST = [
    _plan(EXPERT, "math_expert", "v5e:2x2", {"tensor": 4}, 1024),
    _plan(EXPERT, "math_expert", "v5e:2x4", {"fsdp": 8}, 128),
    _plan(EXPERT, "math_expert", "v6e:2x2", {"fsdp": 4}, 256),
    _plan(EXPERT, "math_expert", "v5p:2x2x1", {"fsdp": 4}, 128),
]
LOW_RANK = ("--config.expert.kind=low_rank",)
SMALL = [  # the fewest chips on which an owner trains a low-rank 7B expert
    _plan(f"2x7B expert of rank {rank}", "math_expert", topology, mesh, accumulation, *LOW_RANK, f"--config.expert.rank={rank}")
    for rank in (64, 256)
    for topology, mesh, accumulation in (("v6e:1x1", {"fsdp": 1}, 1024), ("v5e:2x2", {"fsdp": 4}, 256))
]
GROWTH = [  # with layers, then with devices; the 32-layer plan on 256 chips belongs to both
    dataclasses.replace(_plan(EXPERT, "math_expert", V5E, {"fsdp": 256}, 4, f"--config.model.num_layers={layers}"), name=name)
    for layers in (8, 16)
    if (name := f"growth-{layers}-layers")
] + [
    dataclasses.replace(
        _plan(EXPERT, "math_expert", f"v5e:{size}", {"fsdp": count}, 1024 // count), name=f"growth-{count}-chips"
    )
    for size, count in (("4x4", 16), ("8x8", 64))
]


def main() -> None:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plans whose name contains this")
    only = parser.parse_args().only
    for plan in MAIN + SMALLEST + SMALL + GROWTH:
        if only in plan.name:
            print(f"{plan.name}: python -m flexjax.plan {' '.join(plan.command)}", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, "-m", "flexjax.plan", *plan.command], stdout=subprocess.DEVNULL, check=False)
            if done.returncode not in (0, 2):
                sys.exit(done.returncode)
    page = [f"# Plans of the 7B jobs\n\n{INTRODUCTION}"]
    page += ["\n## The paper's jobs on 256 v5e and 128 v5p chips\n", *_table(MAIN)]
    page += ["\n## The smallest slice on which an owner can train a full 7B expert\n", *_table(SMALLEST)]
    page += ["\n## The smallest slices for low-rank 7B experts\n", *_table(SMALL)]
    page += ["\n## How memory and compile time grow with layers and chips\n", *_growth()]
    page += ["\n## The formulas of `--analytic` and `--search` beside the compiler\n", *_formulas()]
    (HOME / "README.md").write_text("\n".join(page) + "\n")


INTRODUCTION = """Made by `python -m benchmarks.plans`, without a TPU: each is the very step that trains,
compiled by the TPU's own compiler. Memory, FLOPs and collectives are the compiler's; times and MFU are a roofline
estimate that no run has confirmed, with its assumptions in each plan. Each row's file has the rest."""


def _saved(plan: Plan) -> dict[str, Any] | None:
    found = workdir.read_json(epath.Path(HOME / f"{plan.name}.json"))
    return None if found is None else found["plan"]


def _mesh(found: dict[str, Any]) -> str:
    used = [f"{axis} {found['mesh'][axis]}" for axis in ("data", "fsdp", "tensor", "expert") if found["mesh"][axis] > 1]
    return f"{' x '.join(used) or 'one chip'}, {found['job']['accumulation']} micro-batches"


def _table(plans: list[Plan]) -> list[str]:
    body = []
    for plan in plans:
        if (found := _saved(plan)) is None:
            continue
        facts, time = found["facts"], found["roofline"]
        body.append(
            (
                f"[{plan.title}]({plan.name}.md)",
                plan.topology,
                _mesh(found),
                report.verdict(found),
                f"{sum(facts['flops'].values()) / found['useful_flops']:.0%}",
                f"{time['step']:.1f} s",
                f"{time['mfu']:.0%}",
                f"{time['tokens_per_second']:,.0f}",
                f"{time['hours']:,.0f}",
                f"{time['chip_hours']:,.0f}",
                f"{found['checkpoint']['bytes'] / 1e9:.0f} GB, {found['checkpoint']['seconds']:.0f} s",
            )
        )
    head = ("job", "machine", "mesh", "memory", "executed / useful FLOPs", "step", "MFU", "tokens/s", "hours", "chip-hours")
    return report.table((*head, "checkpoint"), body)


def _growth() -> list[str]:
    body = []
    for plan in sorted((*GROWTH, MAIN[2]), key=lambda plan: plan.name):
        if (found := _saved(plan)) is not None and found["facts"]["compiling"]:
            facts = found["facts"]
            body.append(
                (
                    str(found["job"]["layers"]),
                    str(found["machine"]["devices"]),
                    str(found["job"]["accumulation"]),
                    report.size(facts["arguments"]),
                    report.size(facts["temporaries"]),
                    f"{facts['compiling']['lower_seconds']:.1f} s",
                    f"{facts['compiling']['compile_cpu_seconds']:.0f} s",
                    report.size(facts["compiling"]["host_bytes"]),
                    f"{facts['compiling']['lines']:,.0f}",
                )
            )
    body.sort(key=lambda row: (int(row[1]) != 256, int(row[1]), int(row[0])))
    head = (
        "layers",
        "chips",
        "micro-batches",
        "arguments",
        "temporaries",
        "lowered in",
        "compiled in",
        "host memory",
        "HLO lines",
    )
    return report.table(head, body)


def _formulas() -> list[str]:
    body = []
    for plan in MAIN + SMALLEST + SMALL:
        if (found := _saved(plan)) is None:
            continue
        arguments = [part for part in plan.command if not part.startswith("--report")]
        command = [sys.executable, "-m", "flexjax.plan", *arguments, "--analytic", "--json"]
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
        guess = json.loads(out.splitlines()[-1])
        body.append(
            (
                plan.title,
                plan.topology,
                report.size(guess["facts"]["peak"]),
                report.size(found["facts"]["peak"]),
                f"{sum(guess['facts']['flops'].values()) / sum(found['facts']['flops'].values()):.2f}",
                f"{guess['roofline']['step']:.1f} s",
                f"{found['roofline']['step']:.1f} s",
            )
        )
    head = ("job", "machine", "memory, formulas", "memory, compiler", "FLOPs, formulas / compiler", "step, formulas")
    return report.table((*head, "step, compiled program"), body)


if __name__ == "__main__":
    main()
