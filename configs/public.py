"""The public model alone: trained on public text, then frozen as the anchor of all experts.

python -m flexjax.main --config=configs/public.py

Quickstart: about 2 minutes on 2 CPU cores; 1.80 bits per byte on public text.
Variants: quickstart, mini (--config.data.root=DIR), 7b.
"""

from flexjax import config as config_lib
from flexjax import presets


def get_config(variant: str = "quickstart") -> config_lib.Config:
    config = presets.base(variant)
    config.phase = "public"
    config.train = presets.public_training(variant)
    config.evaluation.domains = ("public",)
    return config
