"""Aggregators of the caller's own code and of installed packages."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crcjax.config import get_config
from crcjax.config_check import check_config
from crcjax.errors import InputError
from crcjax.models.aggregators import registry
from crcjax.models.aggregators.pooling import Instances, MeanPool
from crcjax.models.aggregators.registry import add_aggregator, build_aggregator

PLUGIN = """
from crcjax.models.aggregators import registry
from crcjax.models.aggregators.pooling import MaxPool

class Plugin(MaxPool):
    pass
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test adds is gone after it."""
    monkeypatch.setattr("crcjax.config_check._ADDED", {})
    monkeypatch.setattr(registry, "AGGREGATORS", dict(registry.AGGREGATORS))


def _build(name: str):
    config = get_config()
    config.data.store, config.data.cohort, config.model.mil = "store", "cohort.csv", name
    config.model.features = 16
    check_config(config)
    return build_aggregator(config.model, 3, (1,), dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_an_aggregator_of_the_callers_code_is_built_by_its_name_and_can_be_replaced() -> None:
    with pytest.raises(InputError, match=r"config\.model\.mil must be one of .*, got 'own'; try gated_abmil"):
        _build("own")

    class Doubled(MeanPool):
        def __call__(self, bag, label=None):
            return super().__call__(Instances(2 * bag.features, bag.mask, bag.position), label)

    bag = Instances(jnp.ones((1, 4, 16)), jnp.array([[True, True, True, False]]), jnp.zeros((1, 4, 2)))
    for aggregator, expected in ((MeanPool, 1.0), (Doubled, 2.0)):
        add_aggregator("own", aggregator)
        np.testing.assert_allclose(_build("own")(bag).embedding, expected, rtol=1e-6)


def test_an_aggregator_of_crcjax_cannot_be_replaced() -> None:
    with pytest.raises(InputError, match="'hierarchical' is an aggregator of crcjax; choose another name"):
        add_aggregator("hierarchical", MeanPool)


def test_an_installed_package_adds_an_aggregator_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mil_plugin.py").write_text(PLUGIN)
    metadata = tmp_path / "mil_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mil-plugin\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[crcjax.aggregators]\nplugin = mil_plugin:Plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(_build("plugin")).__name__ == "Plugin"
    assert "mil_plugin" in sys.modules


def test_a_run_whose_aggregator_is_not_here_says_what_to_install() -> None:
    config = get_config()
    config.model.mil = "gone"
    with pytest.raises(InputError, match=r"'gone': no such aggregator here; install the package that has it or call"):
        build_aggregator(config.model, 3, (1,), dtype=jnp.float32, rngs=nnx.Rngs(0))
