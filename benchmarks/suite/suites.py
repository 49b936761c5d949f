"""The suites: which domains, in which sizes, on which text.

- `table1`     public, math, educational, code: the four sets of the paper's Table 1, from flexmix-mini;
- `table2`     all eight domains of flexmix-mini, as in its Table 2;
- `installed`  public, math, code, on text that any machine holds, so that anybody can repeat it.

A size fixes shapes and budgets. The anchor sees at least ten times the tokens of one expert, and costs more FLOPs than the
experts, or the joint model at 2x, after it: beside a starved anchor everything wins.
"""

import dataclasses

from flexjax import config as config_lib
from flexjax import errors

PUBLIC = config_lib.PUBLIC


@dataclasses.dataclass(frozen=True)
class Suite:
    """Domains and where their text comes from.

    Attributes:
      name: of the suite.
      corpus: the folder below `--data_root`; empty: the built-in corpus.
      owners: the domains whose owners train experts.
      beside: other domains of which the public text holds some, megabytes each: a public mix has some of everything.
      unseen: by domain, beginnings of `source` that no training text comes from: the measure of what generalises.
      gate: bits per byte on public text (the tuning half) that the anchor must reach before experts start, by size.
      expert_share: of the size's expert steps, where many owners would otherwise cost more than the anchor.
    """

    name: str
    corpus: str
    owners: tuple[str, ...]
    beside: dict[str, float] = dataclasses.field(default_factory=dict)
    unseen: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    gate: dict[str, float] = dataclasses.field(default_factory=dict)
    expert_share: float = 1.0

    @property
    def domains(self) -> tuple[str, ...]:
        """`public`, then the owners."""
        return (PUBLIC, *self.owners)


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes and budgets of a suite on one kind of machine.

    Attributes:
      model: shapes.
      seq_len, batch_size: of every training step.
      anchor_steps, expert_steps: their ratio is at least 10.
      tuning_steps: of router tuning.
      kilobytes: of text scored by domain: `report`, `tune` (half of the validation text each), `unseen`, `mixed`.
      compute_dtype: of training.
      row_documents, statistics_tokens: behind domain rows.
      sampled_tokens, proxy_documents: behind router tuning, for each owner.
      prefixes: real documents whose continuation extraction asks for.
    """

    model: config_lib.ModelConfig
    seq_len: int
    batch_size: int
    anchor_steps: int
    expert_steps: int
    tuning_steps: int
    kilobytes: dict[str, int]
    compute_dtype: str = "float32"
    row_documents: int = 1000
    statistics_tokens: int = 4096
    sampled_tokens: int = 65_536
    proxy_documents: int = 60
    prefixes: int = 200


_UNSEEN: dict[str, tuple[str, ...]] = {
    PUBLIC: ("debian:dict-jargon", "debian:anarchism"),
    "code": ("debian:libruby3.1", "pypi:networkx"),
    "educational": ("github:philschatz/psychology",),
    "math": ("github:jirilebl/ra",),
}

SUITES = {
    "table1": Suite(
        "table1",
        "flexmix-mini",
        ("code", "educational", "math"),
        beside={"academic": 4.1, "creative": 5.0, "news": 5.0, "reddit": 3.0},
        unseen=_UNSEEN,
        gate={"cpu": 1.95, "gpu": 1.60},
    ),
    "table2": Suite(
        "table2",
        "flexmix-mini",
        ("academic", "code", "creative", "educational", "math", "news", "reddit"),
        unseen=_UNSEEN
        | {
            "creative": ("github:standardebooks/mark-twain", "github:standardebooks/jane-austen"),
            "news": ("github:fordred/wikinews",),
        },
        gate={"cpu": 1.95, "gpu": 1.60},
        expert_share=0.5,
    ),
    "installed": Suite("installed", "", ("code", "math"), gate={"cpu": 1.95, "gpu": 1.50}),
}

_SMALL = {"report": 130, "tune": 65, "unseen": 65, "mixed": 130}
SIZES = {
    "smoke": Size(
        config_lib.ModelConfig(vocab_size=512, d_model=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64),
        seq_len=64,
        batch_size=4,
        anchor_steps=20,
        expert_steps=2,
        tuning_steps=2,
        kilobytes={"report": 4, "tune": 4, "unseen": 2, "mixed": 4},
        statistics_tokens=1024,
        sampled_tokens=512,
        proxy_documents=20,
        prefixes=2,
    ),
    "cpu": Size(
        config_lib.ModelConfig(vocab_size=4096, d_model=192, num_layers=4, num_heads=6, num_kv_heads=6, head_dim=32, d_ff=512),
        seq_len=256,
        batch_size=8,
        anchor_steps=4000,
        expert_steps=400,
        tuning_steps=200,
        kilobytes=_SMALL,
    ),
    "gpu": Size(
        config_lib.ModelConfig(
            vocab_size=8192, d_model=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, d_ff=2048
        ),
        seq_len=512,
        batch_size=64,
        anchor_steps=4000,
        expert_steps=400,
        tuning_steps=200,
        kilobytes=_SMALL,
        compute_dtype="bfloat16",
    ),
}


def find(suite: str, size: str) -> tuple[Suite, Size]:
    """Raises ConfigError if there is no such suite or size."""
    for name, known in ((suite, SUITES), (size, SIZES)):
        if name not in known:
            raise errors.ConfigError(f"'{name}' is unknown; choose {', '.join(known)}")
    return SUITES[suite], SIZES[size]
