"""The jointly trained MoE that experts are compared with: upcycled from the anchor, trained on everybody's text at once.

python -m flexjax.main --config=configs/joint_moe.py [--config.anchor.path=DIR]

Quickstart: about 3 minutes on 2 CPU cores beside a given anchor; math 2.08 -> 1.81 bits per byte,
code 2.27 -> 1.63, public 1.80 -> 1.83.
Variants: quickstart, mini (--config.data.root=DIR), 7b.
"""

from flexjax import config as config_lib
from flexjax import presets


def get_config(variant: str = "quickstart") -> config_lib.Config:
    config = presets.base(variant)
    config.phase = "joint"
    config.mixture.experts = ("code", "math")
    config.train = presets.joint_training(variant)
    config.evaluation.domains = ("public", "code", "math")
    return config
