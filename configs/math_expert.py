"""The math expert, trained beside a frozen public anchor on math and public text; nobody else's text is read.

python -m flexjax.main --config=configs/math_expert.py [--config.anchor.path=DIR]
python -m flexjax.main --config=configs/math_expert.py:mini --config.data.root=DIR
"""

from flexjax import config as config_lib
from flexjax import presets


def get_config(variant: str = "quickstart") -> config_lib.Config:
    config = presets.base(variant)
    config.phase = "expert"
    config.expert.name = "math"
    config.train = presets.expert_training(variant)
    return config
