"""Tunes the router rows and biases of a merged model on public text and text like its experts'; experts stay as they are.

python -m flexjax.main --config=configs/router_tuning.py --config.mixture.model_path=DIR

Quickstart: 74 s on 2 CPU cores; merged math and code experts: math 1.87 -> 1.86 bits per byte,
code 1.70 -> 1.71, public 1.84 -> 1.83.
Variants: quickstart, mini (--config.data.root=DIR), 7b.
"""

from flexjax import config as config_lib
from flexjax import presets


def get_config(variant: str = "quickstart") -> config_lib.Config:
    config = presets.base(variant)
    config.phase = "router"
    config.train = presets.router_training(variant)
    config.evaluation.domains = ("public", "code", "math")
    return config
