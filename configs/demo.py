"""The demo's config: a small painted cohort, two CPU cores, a few minutes."""

from crcjax.demo import demo_config as get_config

__all__ = ["get_config"]
