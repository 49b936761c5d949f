"""The plan before you pay: memory, FLOPs, collectives, time and cost of a job on a machine that need not be there.

python -m flexjax.plan --config=configs/math_expert.py:7b --topology=v5e:16x16 --config.mesh.fsdp=256 [--search] [--json]
python -m flexjax.plan --config=configs/public.py --topology=cpu:8 --config.mesh.fsdp=8
python -m flexjax.plan --config=configs/joint_moe.py:7b --topology=gpu:64 --gpu=h100 --config.mesh.fsdp=64

It compiles the very step that trains, for the machine, where there is a compiler: for TPUs the wheel `libtpu`, which works
on any host (the extra `plan`). Elsewhere, and with --analytic, it uses formulas. Exit code 2: it
does not fit. With --report=FILE.md, the plan is kept there and beside it as JSON, and not made again.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags

from flexjax import command, errors, hardware, jobs, tree, workdir
from flexjax import config as config_lib
from flexjax.planning import planner, report, search, topology

CONFIG = config_flags.DEFINE_config_file("config", None, "The job: configs/NAME.py[:variant].")
TOPOLOGY = flags.DEFINE_string("topology", "", "The machine: v5e:16x16, v5p:4x4x8, v6e:8x8, cpu:8, gpu:8.")
GPU = flags.DEFINE_string("gpu", "", "Which GPU: a100, h100 or h200.")
FLOPS = flags.DEFINE_float("flops", 0.0, "Of a device, FLOP/s in bfloat16, where no table has it.", lower_bound=0)
MEMORY_GB = flags.DEFINE_float("memory_gb", 0.0, "Of a device, in 1e9 bytes.", lower_bound=0)
BANDWIDTH = flags.DEFINE_float("bandwidth", 0.0, "Of its memory, bytes/s.", lower_bound=0)
LINK = flags.DEFINE_float("link", 0.0, "Bytes/s that a device sends to the others.", lower_bound=0)
ANALYTIC = flags.DEFINE_bool("analytic", False, "Formulas only, no compiler.")
SEARCH = flags.DEFINE_bool("search", False, "Rank all sensible meshes by formulas, then compile the best two.")
PRICE = flags.DEFINE_float("price", 0.0, "Of a device for an hour, in your currency.", lower_bound=0)
STORAGE = flags.DEFINE_float("storage", 1e9, "Bytes/s that one host writes to storage.", lower_bound=1)
REPORT = flags.DEFINE_string("report", "", "A Markdown file to write, with JSON beside it.")
JSON = flags.DEFINE_bool("json", False, "Print the plan as one JSON object, last on stdout.")

SHOWN = 10  # meshes of a search
COMPILED = 2
CODE = ("hardware.py", "train/flops.py", "planning/*.py")  # what decides a plan, beside the program itself

LOOKS = ("report.py", "search.py")  # but for these,
FORMULAS = ("analytic.py", "advice.py")  # and where a compiler answers, these


def main(argv: list[str]) -> None:
    """Plans a job, or the best meshes for it."""
    command.use_cpu()
    if argv:
        raise errors.ConfigError(f"unexpected argument '{argv[0]}'; everything is a flag: --topology=v5e:16x16")
    if not TOPOLOGY.value or not flags.FLAGS["config"].present:
        raise errors.ConfigError("--config and --topology are needed; for instance --config=configs/public.py --topology=cpu:8")
    if REPORT.value and not REPORT.value.endswith(".md"):
        raise errors.ConfigError(f"--report={REPORT.value} must end in .md; the JSON is written beside it")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    config = jobs.check(CONFIG.value, file)
    topology.fake_devices(TOPOLOGY.value)
    machine = topology.parse(TOPOLOGY.value, chip(), ANALYTIC.value)
    made = None
    if SEARCH.value:
        config, made = best(config, machine)
    plan = kept(config, machine, f"{file} on {machine.name}", made)
    if JSON.value:
        print(json.dumps(plan))
    if not plan["fits"]:
        raise errors.ConfigError(f"{file} on {machine.name} {report.verdict(plan)}")


def chip() -> hardware.Chip | None:
    """The device that the flags describe, None if they do not.

    Raises:
      ConfigError: only some of its figures are given.
    """
    given = {"flops": FLOPS.value, "memory_gb": MEMORY_GB.value, "bandwidth": BANDWIDTH.value, "link": LINK.value}
    if GPU.value:
        found = hardware.chip(GPU.value)
        if found.dimensions:
            raise errors.ConfigError(f"--gpu={GPU.value} is a TPU; name its slice: --topology={GPU.value}:16x16")
        return dataclasses.replace(
            found,
            flops={"bfloat16": given["flops"], "float32": given["flops"]} if given["flops"] else found.flops,
            memory=given["memory_gb"] * 1e9 or found.memory,
            bandwidth=given["bandwidth"] or found.bandwidth,
            link=given["link"] or found.link,
        )
    if not any(given.values()):
        return None
    for name, value in given.items():
        if not value:
            raise errors.ConfigError(
                f"--{name} is missing: a device by numbers needs --flops, --memory_gb, --bandwidth and --link"
            )
    flops = {"bfloat16": given["flops"], "float32": given["flops"]}
    return hardware.Chip("given", "", flops, given["memory_gb"] * 1e9, given["bandwidth"], given["link"])


def options() -> planner.Options:
    """Money and storage as the flags say."""
    return planner.Options(PRICE.value, STORAGE.value)


def best(config: config_lib.Config, machine: topology.Topology) -> tuple[config_lib.Config, dict[str, Any]]:
    """Ranks meshes, shows them, and returns the job on the best with its plan: of the first two, the better compiled one."""
    architecture = jobs.architecture(config)
    found = search.rank(config, architecture, machine)
    print(f"{len(found)} meshes of {len(machine.devices)} devices, by formulas; the best {min(SHOWN, len(found))}:")
    print("\n".join(report.candidates(found[:SHOWN])), flush=True)
    tried = []
    for one in found[: COMPILED if machine.compiles else 1]:
        changed = one.applied(config)
        plan = planner.make(changed, architecture, machine, options(), planner.lower(changed, architecture, machine))
        print(f"{report.mesh(plan)}: {report.verdict(plan)}", file=sys.stderr)
        tried.append((not plan["fits"], plan["roofline"]["step"] if plan["roofline"] else 0.0, changed, plan))
    return min(tried, key=lambda row: row[:2])[2:]


def kept(config: config_lib.Config, machine: topology.Topology, title: str, made: dict[str, Any] | None) -> dict[str, Any]:
    """The plan, printed; made if it is neither given nor in `--report` already, and written there."""
    architecture = jobs.architecture(config)
    lowered = planner.lower(config, architecture, machine)
    key = planner.key(config, machine, options(), lowered, code(LOOKS + FORMULAS * machine.compiles))
    page = epath.Path(REPORT.value) if REPORT.value else None
    saved = workdir.read_json(page.with_suffix(".json")) if page else None
    if saved is not None and saved["key"] == key:
        print(f"{page}: this plan is there already, nothing is compiled", file=sys.stderr)
        made = saved["plan"]
    plan = made or planner.make(config, architecture, machine, options(), lowered)
    if page:
        workdir.write_json(page.with_suffix(".json"), {"key": key, "title": title, "plan": plan})
        workdir.write(page, report.markdown(title, plan).encode())
    print(report.text(title, plan), flush=True)
    return plan


def code(without: tuple[str, ...]) -> str:
    """Digest of the code that makes plans, without some files."""
    home = pathlib.Path(__file__).parent
    files = [path for pattern in CODE for path in sorted(home.glob(pattern)) if path.name not in without]
    return tree.sha256(b"".join(path.read_bytes() for path in files))


if __name__ == "__main__":
    command.run(main)
