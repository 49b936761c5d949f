"""The methods of a suite by name: what `--methods` selects and what every table lists."""

import dataclasses

from benchmarks.reporting.rows import GROUPS
from benchmarks.suite import extraction, methods, second, suites
from flexjax import errors


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method: how tables call it, the group that runs it, and what it does."""

    title: str
    group: str
    method: methods.Method


def entries(suite: suites.Suite, size: suites.Size) -> dict[str, Entry]:
    """Every method by name, in the order in which they run: cheap ones and those that others need first."""
    names = suite.owners
    core: dict[str, tuple[str, methods.Method]] = {
        "anchor": ("Public anchor", methods.anchor),
        "flex": ("FlexOlmo, our recipe, no tuning", methods.flex),
        "flex-sequence": ("FlexOlmo, routed by sequence (mixture)", methods.flex_by_sequence("mixture")),
        "flex-sequence-hard": ("FlexOlmo, routed by sequence (hard)", methods.flex_by_sequence("hard")),
        "flex-memory": ("FlexOlmo, routers with a memory, no tuning", methods.flex_memory),
        "flex-memory-sequence": (
            "FlexOlmo, routers with a memory, routed by sequence (mixture)",
            methods.flex_memory_by_sequence,
        ),
        "joint-1x": ("Joint MoE, 1x FLOPs", methods.joint(1.0)),
        "joint-2x": ("Joint MoE, 2x FLOPs", methods.joint(2.0)),
        "joint-frozen-1x": ("Joint MoE, shared weights frozen, 1x FLOPs", methods.joint_frozen(1.0)),
        "joint-frozen-2x": ("Joint MoE, shared weights frozen, 2x FLOPs", methods.joint_frozen(2.0)),
        "joint-data": ("Joint MoE on as much text as the experts", methods.joint_on_as_much_text),
        **{f"dense-{name}": (f"Dense model of {name}", methods.dense(name)) for name in names},
        "control": ("Anchor trained further on public text", methods.control),
        "soup": ("Soup of dense models", methods.soup),
        "soup-weighted": ("Soup, weighted by likelihood for each input", methods.soup_weighted),
        "btm": ("BTM, all dense models", methods.btm(None)),
        "btm-2": ("BTM, the two most likely dense models", methods.btm(2)),
        "btm-1": ("BTM, the most likely dense model alone", methods.btm(1)),
        "btm-opening-2": ("BTM, two dense models chosen by the opening", methods.btm_by_opening(2)),
        "btm-opening-1": ("BTM, one dense model chosen by the opening", methods.btm_by_opening(1)),
        "btm-shared": ("BTM with the weights of sequence routing", methods.btm_shared),
        "no-coordination": ("No coordination: FFNs of dense models merged", methods.no_coordination),
        "flex-paper": ("FlexOlmo as the paper: mean rows, own text only", methods.flex_as_paper),
        "flex-calibrated": ("FlexOlmo, biases calibrated on public text", methods.flex_calibrated),
        "flex-tuned-sampled": ("FlexOlmo, router tuned on text that experts wrote", methods.flex_tuned("sampled")),
        "flex-tuned-proxy": ("FlexOlmo, router tuned on public look-alikes", methods.flex_tuned("proxy")),
        "flex-tuned-donated": ("FlexOlmo, router tuned on 1 % donated text", methods.flex_tuned("donated")),
        "flex-memory-tuned-sampled": (
            "FlexOlmo, routers with a memory, tuned on text that experts wrote",
            methods.flex_memory_tuned("sampled"),
        ),
        "flex-memory-tuned-donated": (
            "FlexOlmo, routers with a memory, tuned on 1 % donated text",
            methods.flex_memory_tuned("donated"),
        ),
        "flex-tuned-sampled-sequence": (
            "FlexOlmo, tuned on text that experts wrote, routed by sequence",
            methods.flex_by_sequence("mixture", "sampled"),
        ),
        **{f"flex-without-{name}": (f"FlexOlmo without {name}", methods.flex_without(name)) for name in names},
        **{
            f"flex-sequence-without-{name}": (
                f"FlexOlmo routed by sequence, without {name}",
                methods.flex_by_sequence("mixture", without=name),
            )
            for name in names
        },
    }
    found = {name: Entry(title, "core", method) for name, (title, method) in core.items()}
    found["extraction"] = Entry("FlexOlmo with an owner whose text holds canaries", "second", extraction.method)
    for group, more in (("second", second.table(size)), ("ablation", second.ablations(names))):
        found |= {name: Entry(title, group, method) for name, (title, method) in more.items()}
    return found


def select(suite: suites.Suite, size: suites.Size, wanted: list[str]) -> dict[str, Entry]:
    """The methods that names and groups ask for.

    Raises:
      ConfigError: there is no such method or group.
    """
    every = entries(suite, size)
    for name in wanted:
        if name not in every and name not in (*GROUPS, "all"):
            raise errors.ConfigError(
                f"method '{name}' is unknown; choose groups ({', '.join(GROUPS)}, all) or {', '.join(every)}"
            )
    return {name: entry for name, entry in every.items() if {name, entry.group, "all"} & set(wanted)}
