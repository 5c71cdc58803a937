"""Each script learns a small task with its default flags."""

import pytest
from conftest import each_continuous


@each_continuous
@pytest.mark.parametrize("seed", [1, 2])
def test_learns_inverted_pendulum(script, tmp_path, seed):
    changes = {"env_id": "InvertedPendulum-v5", "total_timesteps": 100_000, "seed": seed}
    args = script.Args(**changes, compile="off", run_dir=str(tmp_path / "run"))
    assert script.train(args)["eval_return"] >= 900
