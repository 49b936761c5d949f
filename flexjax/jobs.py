"""What a job trains and on which text, from its config alone: before there is an anchor, a model or a corpus."""

from typing import Any

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import surgery
from flexjax.model import transformer

EXPERT_KINDS = ("full", "low_rank")


def check(config: Any, file: str) -> config_lib.Config:
    """Returns what a config file gave, resolved.

    Raises:
      ConfigError: it is no config, or a value or the phase is none that can be.
    """
    if not isinstance(config, config_lib.Config):
        raise errors.ConfigError(
            f"--config={file}: no such file, or its get_config() returns no flexjax.config.Config; see configs/public.py"
        )
    config_lib.check(config)
    config_lib.resolve(config)
    if config.phase not in config_lib.UNREAD:
        raise errors.ConfigError(f"config.phase is '{config.phase}', expected one of {', '.join(config_lib.UNREAD)}")
    return config


def public_config(config: config_lib.Config) -> config_lib.Config:
    """The job that trains the anchor of another job; what concerns experts only is at its default."""
    return config_lib.Config(
        phase="public",
        seed=config.seed,
        model=config.model,
        data=config.data,
        anchor=config_lib.AnchorConfig(rows=config.anchor.rows, statistics_tokens=config.anchor.statistics_tokens),
        train=config.anchor.train,
    )


def mixture_weights(mixture: config_lib.MixtureConfig) -> dict[str, float]:
    """Public text at its fraction, the experts' domains sharing the rest.

    Raises:
      ConfigError: the fraction is no share, or there is no expert.
    """
    if not 0 <= mixture.public_fraction <= 1 or not mixture.experts:
        raise errors.ConfigError(
            f"mixture.public_fraction={mixture.public_fraction} must lie in [0, 1], beside one expert at least"
        )
    rest = (1 - mixture.public_fraction) / len(mixture.experts)
    return {config_lib.PUBLIC: mixture.public_fraction, **{name: rest for name in mixture.experts}}


def architecture(config: config_lib.Config) -> transformer.Architecture:
    """What a job would train, before there is an anchor or a model on disk.

    Raises:
      ConfigError: shapes, names or the number of active experts make no model.
    """
    bank, shapes = config_lib.Bank, config.model
    public = transformer.dense_banks(shapes)
    names = config.mixture.experts
    if config.phase == "public":
        return surgery.architecture(shapes, public, top_k=1)
    if config.phase == "expert":
        return surgery.architecture(shapes, (*public, expert_bank(config)), top_k=2)
    if config.phase == "joint":
        ((name, members),) = joint_groups(config).items()
        return surgery.architecture(shapes, (bank(name, members, shapes.d_ff, biased=False),), config.mixture.top_k)
    return surgery.architecture(shapes, (*public, bank(f"w{shapes.d_ff}", names, shapes.d_ff)), top_k=len(names) + 1)


def expert_bank(config: config_lib.Config) -> config_lib.Bank:
    """The bank of the one expert that an owner trains.

    Raises:
      ConfigError: its kind, width and rank do not go together.
    """
    expert, shapes = config.expert, config.model
    most = min(shapes.d_model, shapes.d_ff)
    if expert.kind not in EXPERT_KINDS:
        raise errors.ConfigError(f"expert.kind is '{expert.kind}', expected one of {', '.join(EXPERT_KINDS)}")
    if expert.kind == "full" and expert.rank:
        raise errors.ConfigError(f"expert.rank={expert.rank} is for low-rank experts; set expert.kind=low_rank, or no rank")
    if expert.kind == "low_rank" and expert.d_ff:
        raise errors.ConfigError(
            f"expert.d_ff={expert.d_ff} with expert.kind=low_rank, which has the public width; set no d_ff"
        )
    if expert.kind == "low_rank" and not 1 <= expert.rank <= most:
        raise errors.ConfigError(f"expert.rank={expert.rank} of a low-rank expert must lie between 1 and {most}")
    return config_lib.Bank(expert.name, (expert.name,), expert.d_ff or shapes.d_ff, rank=expert.rank)


def joint_groups(config: config_lib.Config) -> dict[str, tuple[str, ...]]:
    """The bank of a joint model: all experts in one, `public` among them, so that they can live apart."""
    return {"joint": (config_lib.PUBLIC, *config.mixture.experts)}
