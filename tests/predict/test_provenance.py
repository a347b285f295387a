"""The key of a result changes with everything that the result depends on, and with nothing else."""

import dataclasses
from pathlib import Path

import pytest

from crcjax.predict import provenance
from crcjax.predict.member import settings_of
from crcjax.predict.provenance import PredictedBy, pipeline_id, result_key
from crcjax.runs import code_id as code
from crcjax.runs.trained_model import TrainedModel, model_of_run


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return model_of_run(run)


def _key(trained: TrainedModel, content: object = ("a", "hash"), **changes: str) -> str:
    by = PredictedBy("model", "bundle", pipeline_id(settings_of([trained], 0), None), lambda name: "", "subtype")
    return result_key(dataclasses.replace(by, **changes), "attention", content)


def test_content_bundle_tiling_and_code_each_change_the_key(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [_key(model), _key(model, ("a", "other")), _key(model, bundle_id="other"), _key(model, model="other")]
    keys.append(_key(dataclasses.replace(model, tiling=dataclasses.replace(model.tiling, tile_px=128))))
    keys.append(result_key(PredictedBy("model", "bundle", "", lambda name: "", ""), "gradient", ("a", "hash")))
    monkeypatch.setattr(provenance, "code_id", lambda: "other code")
    keys.append(_key(model))
    assert len(set(keys)) == len(keys)


def test_the_key_of_equal_inputs_is_equal(run: Path, model: TrainedModel) -> None:
    assert _key(model) == _key(model_of_run(run)) == _key(model, ["a", "hash"])


def test_the_id_of_the_code_is_that_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = code.code_id()
    assert first == code.code_id.__wrapped__()
    (tmp_path / "module.py").write_text("one = 1\n")
    monkeypatch.setattr(code.crcjax, "__file__", str(tmp_path / "__init__.py"))
    ids = [code.code_id.__wrapped__()]
    (tmp_path / "module.py").write_text("one = 2\n")
    ids.append(code.code_id.__wrapped__())
    (tmp_path / "module.py").rename(tmp_path / "renamed.py")
    ids.append(code.code_id.__wrapped__())
    assert len({first, *ids}) == 4
