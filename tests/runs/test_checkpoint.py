from pathlib import Path

import jax.numpy as jnp

from crcjax.models.mil import build_model, params_of
from crcjax.runs.checkpoint import Checkpointer, best_metrics, restore_params
from crcjax.runs.train_state import TrainState


def test_the_best_checkpoint_is_kept_and_identified_after_a_restart(small_config, tmp_path: Path, capfd) -> None:
    model = build_model(small_config.model, 3, 0)
    best, worse = {"balanced_accuracy": 0.9, "loss": 1.0}, {"balanced_accuracy": 0.5, "loss": 0.1}
    for steps in ({1: None, 2: best, 3: None, 4: worse}, {5: worse, 6: None}):
        checkpoints = Checkpointer(tmp_path, 1)
        for step, metrics in steps.items():
            checkpoints.save(TrainState(jnp.int32(step), params_of(model), ()), metrics)
        checkpoints.close()
    assert best_metrics(tmp_path) == (2, best)
    assert restore_params(tmp_path, model)[1] == 2
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 6]
    assert "WARNING" not in capfd.readouterr().err
