"""The code expert, trained beside a frozen public anchor on code and public text; nobody else's text is read.

python -m flexjax.main --config=configs/code_expert.py [--config.anchor.path=DIR]
python -m flexjax.main --config=configs/code_expert.py:mini --config.data.root=DIR

Quickstart: 1 min 27 s on 2 CPU cores beside a given anchor; code 2.27 -> 1.66 bits per byte,
public 1.80 -> 1.83.
Variants: quickstart, mini (--config.data.root=DIR), 7b.
"""

from flexjax import config as config_lib
from flexjax import presets


def get_config(variant: str = "quickstart") -> config_lib.Config:
    config = presets.base(variant)
    config.phase = "expert"
    config.expert.name = "code"
    config.train = presets.expert_training(variant)
    return config
