"""Train a peer on the tasks of the scripts, into the same run folder, with the same evaluation.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/peers.py --peer sb3_ppo --env-id Hopper-v5 --seed 1 --run-dir runs/hopper

The peers run with their own default flags and VecNormalize in one environment, for 1,000,000 steps.
`evaluate` of this repository then measures the policies, on raw rewards with constant statistics.
They are not resumed.
"""

import csv
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    run_dir: str  # folder of this run, not existing yet
    # PPO of Stable-Baselines3 or TRPO of sb3-contrib
    peer: Literal["sb3_ppo", "sb3_trpo"] = "sb3_ppo"
    env_id: str = "Hopper-v5"  # Gymnasium id
    seed: int = 1  # seed of everything random
    total_timesteps: int = 1_000_000  # environment steps, rounded up to whole rollouts by the peer
    eval_episodes: int = 100  # evaluation episodes with mean actions, and as many with sampled ones


def train(args: Args) -> None:
    """Train and evaluate. Writes progress.csv and eval.json into the run folder."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from ppo_continuous import evaluate

    if args.peer == "sb3_ppo":
        from stable_baselines3 import PPO as Peer
    else:
        from sb3_contrib import TRPO as Peer
    run_dir = Path(args.run_dir)
    run_dir.mkdir(parents=True)
    torch.set_num_threads(1)
    envs = VecNormalize(make_vec_env(args.env_id, seed=args.seed))
    peer, start = Peer("MlpPolicy", envs, device="cpu", seed=args.seed), time.time()

    class Progress(BaseCallback):
        returns: deque = deque(maxlen=100)

        def _on_step(self) -> bool:
            self.returns.extend(
                info["episode"]["r"] for info in self.locals["infos"] if "episode" in info
            )
            return True

        def _on_rollout_end(self) -> None:
            mean = f"{np.mean(self.returns):.6g}" if self.returns else ""
            writer.writerow([self.num_timesteps, f"{time.time() - start:.2f}", mean])
            file.flush()

    with (run_dir / "progress.csv").open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "seconds", "episodic_return"])
        peer.learn(args.total_timesteps, callback=Progress())
    low, high = envs.action_space.low, envs.action_space.high
    evaluation = {}
    for mode in ("deterministic", "sampled"):

        def act(obs: np.ndarray, deterministic: bool = mode == "deterministic") -> np.ndarray:
            actions, _ = peer.predict(envs.normalize_obs(obs), deterministic=deterministic)
            return np.clip(actions, low, high)

        evaluation[mode] = evaluate(act, args.env_id, args.eval_episodes, args.seed + 10**6)
    (run_dir / "eval.json").write_text(json.dumps(evaluation, indent=1) + "\n")


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    try:
        train(arguments)
    except ModuleNotFoundError as error:
        sys.exit(f"peers.py: {error.name} is missing: pip install -r benchmarks/requirements.txt")
    except FileExistsError:
        sys.exit(f"peers.py: --run-dir {arguments.run_dir} exists: name a new one")
