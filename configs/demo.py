"""The demo: a small synthetic cohort on two CPU cores, as `crcjax demo` trains it.

    crcjax demo --out DEMO
    python -m crcjax.main --config configs/demo.py --workdir RUN --config.data.store=DEMO/store --config.data.cohort=DEMO/cohort.csv

Gives RUN for `crcjax predict --run RUN`, trained in a few minutes.
"""

from crcjax.demo import demo_config as get_config

__all__ = ["get_config"]
