"""The three sizes in which every config of `configs/` comes, and what each phase trains with.

- `quickstart`  a toy on text that every machine holds, minutes on two CPU cores
- `mini`        a small model on flexmix-mini, below `--config.data.root`; an hour or so on two CPU cores
- `7b`          the shapes and recipe of the paper (FlexOlmo, sections 4.1 and A): OLMo-2 7B, token files below the root.
                Where our evidence is better we differ: logistic rows instead of mean states, a quarter of public windows in
                an expert's stream, and one cosine over 1 T tokens instead of a part of a longer schedule and an anneal.
"""

from flexjax import config as config_lib
from flexjax import errors

VARIANTS = ("quickstart", "mini", "7b")


def base(variant: str) -> config_lib.Config:
    """Model, data and evaluation of a variant, and the training of its anchor.

    Raises:
      ConfigError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise errors.ConfigError(f"unknown variant '{variant}'; choose {', '.join(VARIANTS)}")
    config = config_lib.Config()
    if variant == "mini":
        config.model = config_lib.ModelConfig(
            vocab_size=4096, d_model=192, num_layers=4, num_heads=6, num_kv_heads=6, head_dim=32, d_ff=512
        )
        config.data.train_files = "{root}/flexmix-mini/{domain}/train.jsonl.gz"
        config.data.validation_files = "{root}/flexmix-mini/{domain}/validation.jsonl.gz"
        config.data.seq_len = 256
    if variant == "7b":
        config.model = config_lib.ModelConfig(
            vocab_size=100_352, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=11_008
        )
        config.data.train_files = "{root}/{domain}/train/*.npy"
        config.data.validation_files = "{root}/{domain}/validation/*.npy"
        config.data.token_dtype = "uint32"
        config.data.seq_len = 4096
        config.data.attend_across_documents = True
        config.anchor.statistics_tokens = 8192
        config.evaluation.batch_size = 8
        config.mesh = config_lib.MeshConfig(data=1, fsdp=0)  # as many parts as there are devices, 8 at least
    config.anchor.train = public_training(variant)
    return config


def public_training(variant: str) -> config_lib.TrainConfig:
    """The anchor: everything is trained."""
    if variant == "7b":
        return _large(steps=250_000, weight_decay=0.1)  # 1 T tokens at 4.19 M a step
    steps = {"quickstart": 1100, "mini": 1600}[variant]
    batch_size = {"quickstart": 16, "mini": 8}[variant]
    return config_lib.TrainConfig(steps=steps, batch_size=batch_size, learning_rate=4e-3, warmup_steps=50)


def expert_training(variant: str) -> config_lib.TrainConfig:
    """One expert: its FFN, router row and bias; everything else is frozen (FlexOlmo, section 3.2)."""
    trainable = "experts/{expert}/.*"
    if variant == "7b":
        return _large(steps=12_000, weight_decay=0.0, trainable=trainable, router_z_loss=1e-3, frozen_dtype="bfloat16")
    steps = {"quickstart": 450, "mini": 400}[variant]
    batch_size = {"quickstart": 16, "mini": 8}[variant]
    return config_lib.TrainConfig(
        trainable=trainable,
        steps=steps,
        batch_size=batch_size,
        learning_rate=4e-3,
        weight_decay=0.0,
        router_z_loss=1e-3,
    )


def joint_training(variant: str) -> config_lib.TrainConfig:
    """The unrestricted MoE: everything is trained, with a load-balancing loss and no router bias."""
    train = public_training(variant)
    train.trainable = r"(?!.*bias$).*"
    train.load_balance_loss = 1e-2
    train.router_z_loss = 1e-3
    if variant != "7b":
        train.steps = 400
    return train


def router_training(variant: str) -> config_lib.TrainConfig:
    """Router tuning: rows and biases of all experts but the public one, which is the gauge (FlexOlmo, section 3.4)."""
    trainable = r"experts/(?!public/).*/router/.*"
    if variant == "7b":
        return _large(steps=1_200, learning_rate=2e-3, weight_decay=0.0, trainable=trainable)
    return config_lib.TrainConfig(
        trainable=trainable, steps=100, batch_size=8, learning_rate=2e-3, weight_decay=0.0, router_z_loss=1e-3
    )


def _large(
    steps: int,
    weight_decay: float,
    trainable: str = ".*",
    learning_rate: float = 9e-4,
    router_z_loss: float = 0.0,
    frozen_dtype: str = "float32",
) -> config_lib.TrainConfig:
    return config_lib.TrainConfig(
        trainable=trainable,
        steps=steps,
        batch_size=1024,
        accumulation=4,  # one sequence at a time on each of 256 devices
        learning_rate=learning_rate,
        warmup_steps=min(2000, steps // 6),
        weight_decay=weight_decay,
        router_z_loss=router_z_loss,
        compute_dtype="bfloat16",
        frozen_dtype=frozen_dtype,
        remat="full",
        scan_layers=True,
        save_every=500,
    )
