"""Every setting of flexjax, once, with its default.

A file in `configs/` builds a `Config`; `--config.a.b=value` overrides any field. Each field says how it behaves when a run
is resumed from a checkpoint:

- `identity`    the run would be another run: a changed value is refused;
- `schedule`    the run continues, but along another path: refused without `--allow_schedule_change`, and logged;
- `operations`  where and how fast, never what: free.

No number is negative, and a whole number is at least 1 unless its field says otherwise.

`Bank` is not a setting but the static description of a group of experts; it stands here because every room speaks of it.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

from flexjax import errors


def _field(default: Any, resume: str, least: int | None) -> Any:
    return dataclasses.field(default=default, metadata={"resume": resume, "least": least})


def identity(default: Any, least: int | None = None) -> Any:
    """A field whose change makes another run."""
    return _field(default, "identity", least)


def option(default: float) -> Any:
    """An identity field that is written down only where it is not at its default: what is older than it stays what it is."""
    return dataclasses.field(default=default, metadata={"resume": "identity", "least": None, "unwritten": True})


def schedule(default: Any, least: int | None = None) -> Any:
    """A field whose change alters the rest of the run, not its past."""
    return _field(default, "schedule", least)


def operations(default: Any, least: int | None = None) -> Any:
    """A field that changes where and how fast a run goes, never its result."""
    return _field(default, "operations", least)


def nested(factory: Any) -> Any:
    """A sub-config."""
    return dataclasses.field(default_factory=factory)


PUBLIC = "public"


@dataclasses.dataclass(frozen=True)
class Bank:
    """A group of experts of one size that are trained or frozen together.

    Attributes:
      name: the key under `params["experts"]`.
      experts: names, in the order of the leaves' expert axis.
      d_ff: hidden width of each expert's SwiGLU.
      biased: whether its routers carry a bias (the public bank is the gauge and has none).
      rank: of what each expert adds to every matrix of `public`, whose width `d_ff` then is; 0: it has matrices of its own.
    """

    name: str
    experts: tuple[str, ...]
    d_ff: int
    biased: bool = True
    rank: int = 0


@dataclasses.dataclass
class ModelConfig:
    """Shapes of the OLMo-2 decoder; `d_ff` is the width of the public expert."""

    vocab_size: int = identity(2048)
    d_model: int = identity(128)
    num_layers: int = identity(4)
    num_heads: int = identity(4)
    num_kv_heads: int = identity(4)
    head_dim: int = identity(32)
    d_ff: int = identity(512)
    tied_head: bool = identity(False)
    rope_theta: float = identity(500_000.0)
    norm_eps: float = identity(1e-6)
    init_std: float = identity(0.02)
    router_memory: float = option(0.0)  # routers read a running mean of a document's states, which forgets at this rate


@dataclasses.dataclass
class DataConfig:
    """Where text comes from and how it becomes windows of tokens.

    `{root}` and `{domain}` in the file patterns are filled in; patterns may hold globs and may be `gs://`. With an empty
    root the built-in corpus is used. Files: .jsonl, .jsonl.gz (a `text_field` per line), .npy, .bin (token arrays).
    """

    root: str = operations("")
    train_files: str = operations("{root}/{domain}/train.jsonl.gz")
    validation_files: str = operations("{root}/{domain}/validation.jsonl.gz")
    text_field: str = identity("text")
    tokenizer: str = operations("")  # a .model or tokenizer.json; empty: train one on the public text
    token_dtype: str = identity("uint16")  # of headerless .npy and .bin files
    seq_len: int = identity(128)
    attend_across_documents: bool = identity(False)
    bad_documents: str = identity("strict")  # or "quarantine": counted, listed by id, at most 0.1 %
    max_document_mb: int = operations(64)
    cache_dir: str = operations("")  # tokenised corpora; empty: `data/` in the workdir
    prefetch: int = operations(4, least=0)  # batches prepared ahead


@dataclasses.dataclass
class TrainConfig:
    """One training run: what is trainable, for how long, and how."""

    trainable: str = identity(".*")  # full match on the parameter path; {expert} is the expert's name
    steps: int = schedule(400)
    batch_size: int = identity(16)  # sequences per step, all devices together
    accumulation: int = schedule(1)  # micro-batches per step; a run that goes on with fewer devices may need more
    learning_rate: float = schedule(3e-3)
    decay: str = schedule("cosine")  # or "constant"
    warmup_steps: int = schedule(20, least=0)
    final_fraction: float = schedule(0.1)  # learning rate at the end / peak
    weight_decay: float = schedule(0.1)
    decayed: str = identity(r".*/(q|k|v|o|gate|up|down|kernel)|embed/embedding")  # paths that decay
    b1: float = schedule(0.9)
    b2: float = schedule(0.95)
    adam_eps: float = schedule(1e-8)
    clip_norm: float = schedule(1.0)
    z_loss: float = schedule(1e-5)
    router_z_loss: float = schedule(0.0)
    load_balance_loss: float = schedule(0.0)
    spike_factor: float = schedule(100.0)  # skip a step whose gradient norm exceeds this times its running mean
    max_bad_steps: int = schedule(10)  # skipped in a row before the run stops
    compute_dtype: str = identity("float32")  # or "bfloat16"; trainable masters stay float32
    frozen_dtype: str = identity("float32")  # frozen leaves are cast to this when loaded
    remat: str = operations("none")  # "none", "dots" or "full"
    scan_layers: bool = operations(False)
    save_every: int = operations(100)
    keep: int = operations(2)
    log_every: int = operations(10)
    profile_at: int = operations(0, least=0)  # the step from which on profile/ is traced; 0: never
    profile_steps: int = operations(3)


@dataclasses.dataclass
class AnchorConfig:
    """The frozen public model. With an empty path, it is trained first, by `train`."""

    path: str = operations("")
    rows: str = identity("logistic")  # "logistic", "mean", "text" or "random": how owners make their router rows
    statistics_tokens: int = identity(2048)  # public token states kept per layer
    train: TrainConfig = nested(TrainConfig)


@dataclasses.dataclass
class ExpertConfig:
    """The owner's expert; its name is also the domain whose files it reads."""

    name: str = identity("math")
    kind: str = identity("full")  # matrices of its own; or "low_rank": what it adds to those of the public expert
    d_ff: int = identity(0, least=0)  # 0: as wide as the public expert; narrower keeps its strongest units
    rank: int = identity(0, least=0)  # of each matrix of a low-rank expert
    public_fraction: float = identity(0.25)  # share of windows that are public negatives
    row_documents: int = identity(1000)  # documents behind the domain row, at least 1000


@dataclasses.dataclass
class StatementConfig:
    """What the owner states in the bundle's manifest, and nobody can check."""

    owner: str = operations("")
    licence: str = operations("")  # of the text, such as CC-BY-4.0
    version: int = operations(1)  # the owner's release of this expert
    margins: bool = operations(False)  # quantiles of the router's margin on the owner's text: a few numbers that describe it


@dataclasses.dataclass
class MixtureConfig:
    """Joint training and router tuning: which experts, on which mixture of their domains and public text."""

    experts: tuple[str, ...] = identity(("math", "code"))
    public_fraction: float = identity(0.34)
    top_k: int = identity(2)
    model_path: str = operations("")  # router tuning: the merged model to start from


@dataclasses.dataclass
class EvaluationConfig:
    """What the final table scores."""

    domains: tuple[str, ...] = operations((PUBLIC, "{expert}"))
    max_kilobytes: int = operations(256, least=0)  # of validation text per domain; 0: all
    batch_size: int = operations(16)


@dataclasses.dataclass
class MeshConfig:
    """How the devices are arranged. The sizes multiply to their number; one may be 0: what the others leave."""

    data: int = operations(0, least=0)  # groups that each hold the whole model
    fsdp: int = operations(1, least=0)  # parts of every weight, gathered layer by layer
    tensor: int = operations(1, least=0)  # parts of the heads and of the hidden units
    expert: int = operations(1, least=0)  # parts of a bank of experts: tokens travel to the experts they chose
    frozen: str = operations("sharded")  # or "replicated": frozen weights are split like the others, or whole in each group
    transport: str = operations("auto")  # of tokens to experts: "padded", "ragged" (TPU), or what the devices are best at


@dataclasses.dataclass
class Config:
    """A whole job. `phase` is "public", "expert", "joint" or "router"."""

    phase: str = identity("expert")
    seed: int = identity(0, least=0)
    model: ModelConfig = nested(ModelConfig)
    data: DataConfig = nested(DataConfig)
    anchor: AnchorConfig = nested(AnchorConfig)
    expert: ExpertConfig = nested(ExpertConfig)
    statement: StatementConfig = nested(StatementConfig)
    mixture: MixtureConfig = nested(MixtureConfig)
    train: TrainConfig = nested(TrainConfig)
    evaluation: EvaluationConfig = nested(EvaluationConfig)
    mesh: MeshConfig = nested(MeshConfig)


def resolve(config: Config) -> None:
    """Fills the expert's name in where a config says `{expert}`."""
    name = config.expert.name
    config.train.trainable = config.train.trainable.replace("{expert}", re.escape(name))
    config.evaluation.domains = tuple(domain.replace("{expert}", name) for domain in config.evaluation.domains)


def check_field(path: str) -> Any:
    """Returns the type of a field ("train.steps").

    Raises:
      ConfigError: `path` is no field of `Config`; the message has the nearest name, or all there are.
    """
    kind: Any = Config
    known = "config"
    for part in path.split("."):
        if not dataclasses.is_dataclass(kind):
            raise errors.ConfigError(f"config.{path} does not exist; {known} is a value")
        names = {field.name: field.type for field in dataclasses.fields(kind)}
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {known}.{near[0]}?" if near else f"{known} has {', '.join(names)}"
            raise errors.ConfigError(f"config.{path} does not exist; {hint}")
        kind, known = names[part], f"{known}.{part}"
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0].name
        raise errors.ConfigError(f"{known} is a group of settings; set one of them, for instance {known}.{first}")
    return kind


def check(config: Any, where: str = "config") -> None:
    """Raises ConfigError for the first value that is not of its field's type or too small; a config file may set anything."""
    for field in dataclasses.fields(config):
        kind: Any = field.type
        value, path = getattr(config, field.name), f"{where}.{field.name}"
        least = field.metadata.get("least")
        if kind == tuple[str, ...]:
            expected, fits = "tuple of strings", isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        elif kind is int:
            least = 1 if least is None else least
            expected, fits = f"int of at least {least}", type(value) is int and value >= least
        elif kind is float:
            expected, fits = "finite float of at least 0", type(value) in (int, float) and 0 <= value < math.inf
        else:  # a string, a bool or a sub-config
            expected, fits = kind.__name__, type(value) is kind
        if not fits:
            raise errors.ConfigError(f"{path} is {value!r:.80}, expected: {expected}; correct the flag or the config file")
        if dataclasses.is_dataclass(kind):
            check(value, path)


def classes(kind: Any = Config, prefix: str = "") -> dict[str, str]:
    """Every field's path with its class: identity, schedule or operations."""
    found = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found.update(classes(field.type, f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = field.metadata["resume"]
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as a flat {path: value}; tuples become lists, as in JSON, and options that are off are left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found.update({f"{field.name}.{path}": leaf for path, leaf in to_dict(value).items()})
        elif not field.metadata.get("unwritten") or value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


UNREAD = {  # what a phase never reads, and so may change
    "public": ("expert.", "statement.", "mixture.", "anchor.train."),
    "expert": ("mixture.", "anchor."),  # the anchor's own settings are compared where it is trained, by its digest elsewhere
    "joint": ("expert.", "statement.", "anchor."),
    "router": ("expert.", "statement.", "anchor."),
}


def changes(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, list[str]]:
    """Fields that differ between two `to_dict` results, by class; each as "path: saved -> current".

    A field that this version does not know counts as identity: another version of the code wrote it. What the phase does not
    read is left out.
    """
    kinds = classes()
    found: dict[str, list[str]] = {"identity": [], "schedule": [], "operations": []}
    for path in sorted(set(saved) | set(current)):
        before, after = saved.get(path, "(absent)"), current.get(path, "(absent)")
        if before != after and not path.startswith(UNREAD.get(str(current.get("phase")), ())):
            found[kinds.get(path, "identity")].append(f"{path}: {before} -> {after}")
    return found


def check_same_run(saved: dict[str, Any], current: dict[str, Any], allow_schedule_change: bool) -> list[str]:
    """Refuses to continue a run with a config that would make another one; both as `to_dict` gives them.

    Returns the changes of the schedule that were allowed.

    Raises:
      ConfigError: an identity field changed, or a schedule field without leave.
    """
    changed = changes(saved, current)
    if changed["identity"]:
        raise errors.ConfigError(
            f"the workdir holds another run: {'; '.join(changed['identity'])}; restore the value or choose another --workdir"
        )
    if changed["schedule"] and not allow_schedule_change:
        raise errors.ConfigError(
            f"the schedule changed: {'; '.join(changed['schedule'])}; restore it or pass --allow_schedule_change"
        )
    return changed["schedule"]
