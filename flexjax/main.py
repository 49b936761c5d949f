"""Runs the job that a config describes: train the public model, an expert, a joint model, or tune routers.

python -m flexjax.main --config=configs/math_expert.py[:variant] [--workdir=DIR] [--config.x.y=v ...]
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
from typing import Any, NoReturn

from absl import flags
from etils import epath
from ml_collections import config_flags

from flexjax import command, comparison, distributed, errors, hosts, jobs, memory, report, sharding, stages, statement, workdir
from flexjax import config as config_lib
from flexjax.data import sources
from flexjax.experts import manifest, models, store
from flexjax.train import loop, program

CONFIG = config_flags.DEFINE_config_file("config", None, "The job: configs/NAME.py[:variant].")
WORKDIR = flags.DEFINE_string("workdir", "", "Where everything is written; default runs/<config>-<variant>.")
FALL_BACK = flags.DEFINE_bool("fall_back", False, "Pass over damaged checkpoints to the next older one.")
ALLOW_SCHEDULE_CHANGE = flags.DEFINE_bool("allow_schedule_change", False, "Continue a run with another schedule.")
JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object, last on stdout.")


def main(argv: list[str]) -> None:
    """Runs all stages of the job in its directory."""
    memory.keep_freed()
    signal.signal(signal.SIGTERM, _stop)  # between the training loops, which have their own handler
    if argv:
        raise errors.ConfigError(f"unexpected argument '{argv[0]}'; everything is a flag: --config=configs/math_expert.py")
    if not flags.FLAGS["config"].present:
        raise errors.ConfigError("--config is missing; for instance --config=configs/math_expert.py")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    config = check(CONFIG.value, file)
    where = WORKDIR.value or default_workdir(file)
    facts = {"workdir": where, "fall_back": FALL_BACK.value, "allow_schedule_change": ALLOW_SCHEDULE_CHANGE.value}
    facts |= {f"config.{name}": value for name, value in config_lib.to_dict(config).items()}
    hosts.join(facts)
    mesh = sharding.make_mesh(config.mesh)
    if not workdir.is_local(where):
        raise errors.ConfigError(f"--workdir={where} is no local directory; train locally, then copy expert/ or model/ there")
    directory = workdir.create(where)
    command.compilation_cache(directory / "compiled")
    options = loop.Options(mesh, FALL_BACK.value, ALLOW_SCHEDULE_CHANGE.value)
    with workdir.lock(directory) if distributed.is_main() else contextlib.nullcontext():
        run(config, directory, options, file)


def _stop(*_: Any) -> NoReturn:
    raise errors.Preempted("asked to stop; finished stages are kept, start the same command again")


def check(config: Any, file: str) -> config_lib.Config:
    """Returns a config, resolved, if a run can begin with it; what needs the data or the model is checked there.

    Raises:
      ConfigError: it is no config, a value has the wrong type, or phase and names do not go together.
    """
    config = jobs.check(config, file)
    names = {"expert": (config.expert.name,), "joint": config.mixture.experts}.get(config.phase, ())
    for name in names:
        manifest.check_name(name)
    if config.phase == "expert":
        statement.check(config.statement)
    if config.phase == "joint" and not 0 < len(set(names)) == len(names):
        raise errors.ConfigError(f"config.mixture.experts is {names}, expected at least one name, and each once")
    if config.phase == "router" and not config.mixture.model_path:
        raise errors.ConfigError("router tuning starts from a merged model; pass --config.mixture.model_path=DIR")
    return config


def default_workdir(config_file: str) -> str:
    """`runs/<config>-<variant>` for `configs/<config>.py[:variant]`."""
    path, _, variant = config_file.partition(":")
    return os.path.join("runs", f"{pathlib.Path(path).stem}-{variant or 'quickstart'}")


@dataclasses.dataclass
class Outcome:
    """What a phase made: models to compare, the text to compare them on, and the runs whose curves are drawn."""

    subjects: list[comparison.Subject]
    corpora: sources.Corpora
    runs: dict[str, epath.Path]


def run(config: config_lib.Config, directory: epath.Path, options: loop.Options, file: str) -> None:
    """Runs a job in a directory that this process holds, and reports."""
    outcome = PHASES[config.phase](config, directory, options)
    scores = comparison.evaluate(config, outcome.subjects, outcome.corpora, directory, options.mesh)
    if not distributed.is_main():
        return
    report.picture(directory / "report.png", outcome.runs, scores)
    print(report.table(scores))
    print(f"\n{directory / 'report.png'}: loss curves and bars\n\nNext:")
    for line in _next_commands(config, outcome.corpora, directory, file):
        print(f"  {line}")
    if JSON.value:
        print(json.dumps({"workdir": str(directory), "evaluation": workdir.read_json(directory / "evaluation.json")}))


def _public(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> Outcome:
    stages.claim(config, directory, options)
    if config.anchor.path:  # trained elsewhere: only what owners need is added
        given = store.open_anchor(config.anchor.path)
        shapes, memory = store.config_of(given), config.model.router_memory
        config.model = dataclasses.replace(shapes, router_memory=memory or shapes.router_memory)
        corpora = sources.Corpora(config, directory, store.tokenizer_path(given), distributed.say)
        anchor = stages.prepare_stage(config, given, corpora, directory / "anchor", options.mesh)
        return Outcome([comparison.of_anchor(anchor)], corpora, {})
    program.check(config.train, jobs.architecture(config), options.mesh)
    corpora = sources.Corpora(config, directory, None, distributed.say)
    anchor = stages.public_stage(config, corpora, directory, options)
    return Outcome([comparison.of_anchor(anchor)], corpora, {"anchor": directory})


def _expert(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> Outcome:
    anchor, corpora, runs = _beside_anchor(config, directory, options)
    bundle = stages.expert_stage(config, anchor, corpora, directory, options)
    model = stages.model_stage(anchor, bundle, directory)
    runs[f"expert {config.expert.name}"] = directory
    return Outcome([comparison.of_anchor(anchor), comparison.of_model(model)], corpora, runs)


def _joint(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> Outcome:
    anchor, corpora, runs = _beside_anchor(config, directory, options)
    model = stages.joint_stage(config, anchor, corpora, directory, options)
    return Outcome([comparison.of_anchor(anchor), comparison.of_model(model)], corpora, runs | {"joint": directory})


def _router(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> Outcome:
    start = models.open_model(config.mixture.model_path)
    config.model = store.config_of(start.anchor)
    config.mixture.experts = tuple(start.bundles)
    stages.claim(config, directory, options)
    corpora = sources.Corpora(config, directory, store.tokenizer_path(start.anchor), distributed.say)
    model = stages.router_stage(config, start, corpora, directory, options)
    subjects = [comparison.of_anchor(start.anchor), comparison.of_model(start, "untuned"), comparison.of_model(model, "tuned")]
    return Outcome(subjects, corpora, {"router tuning": directory})


PHASES = {"public": _public, "expert": _expert, "joint": _joint, "router": _router}


def _beside_anchor(
    config: config_lib.Config, directory: epath.Path, options: loop.Options
) -> tuple[store.Artefact, sources.Corpora, dict[str, epath.Path]]:
    """Opens or trains the anchor, and lets it decide the model's shapes and the tokenizer."""
    if not config.anchor.path:
        for job in (jobs.public_config(config), config):  # before any text is tokenised
            program.check(job.train, jobs.architecture(job), options.mesh)
        stages.check_claim(jobs.public_config(config), directory / "public", options)
        stages.claim(config, directory, options)
    anchor = stages.anchor(config, directory, options)
    shapes = store.config_of(anchor)
    for name, value in config_lib.to_dict(config.model).items():
        if value != getattr(shapes, name):
            distributed.say(f"note: the anchor's shapes count: model.{name} is {getattr(shapes, name)}, not {value}")
    config.model, config.anchor.rows = shapes, anchor.manifest["rows"]
    program.check(config.train, jobs.architecture(config), options.mesh)
    stages.claim(config, directory, options)
    runs = {} if config.anchor.path else {"anchor": directory / "public"}
    return anchor, sources.Corpora(config, directory, store.tokenizer_path(anchor), distributed.say), runs


def _next_commands(config: config_lib.Config, corpora: sources.Corpora, directory: epath.Path, file: str) -> list[str]:
    """Commands that go on from here, ready to be typed."""
    _, colon, variant = file.partition(":")
    root = [f"--config.data.root={config.data.root}"] if config.data.root else []
    anchor = config.anchor.path or str(directory / "public" / "anchor")
    if config.phase == "public":
        expert, anchor = "math", str(directory / "anchor")
    else:
        expert = "code" if config.expert.name == "math" else "math"
    train = ["main", f"--config=configs/{expert}_expert.py{colon}{variant}", *root, f"--config.anchor.path={anchor}"]
    if config.phase == "expert" and config.expert.name not in ("math", "code"):  # the next owner's text is their own, too
        train += ["--config.expert.name=NAME", "--workdir=runs/NAME"]
    model = f"--model={directory / 'model'}"
    texts = [f"{domain}={corpora.pattern(domain, 'validation')}" for domain in config.evaluation.domains[-1:]]
    commands = [
        ["generate", model, "--prompt=The", "--max_new_tokens=40"],
        ["evaluate", model, f"--data={','.join(texts) or 'NAME=PATH'}", "--experts=public"],
        ["merge", "show", model],
    ]
    chosen = {"public": [train], "expert": [train, *commands]}.get(config.phase, commands)
    return [shlex.join(["python", "-m", f"flexjax.{verb}", *rest]) for verb, *rest in chosen]


if __name__ == "__main__":
    command.run(main)
