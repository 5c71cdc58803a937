"""What is compared: each suite is a tuple of entries, one run for each entry and seed."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One row of a suite: `script` trains `task` with `flags`; `name` tells variants of a script apart in tables."""

    script: str  # of the repository, or a peer of peers.py
    task: str
    flags: str = ""
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.script


NINE = (
    *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5"),
    *("Reacher-v5", "Swimmer-v5", "Walker2d-v5"),
)
FOUR = ("HalfCheetah-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "Walker2d-v5")
CLASSIC = ("CartPole-v1", "Acrobot-v1")
FLAGS = {"Swimmer-v5": "--gamma 0.9999"}  # its returns lie beyond the horizon of 0.99
ATARI = "--eval-episodes 10"
CHOOSING = ("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")  # four of the nine
REVERTED = {  # PPO's departures from the paper that are flags, each reverted alone, and all at once
    "num_envs": "--num-envs 1 --num-steps 2048",
    "norm_obs": "--no-norm-obs",
    "norm_reward": "--no-norm-reward",
    "anneal_lr": "--no-anneal-lr",
    "recompute_advantages": "--no-recompute-advantages",
    "max_grad_norm": "--max-grad-norm inf",
    "orthogonal_init": "--no-orthogonal-init",
    "log_std_init": "--log-std-init 0",
    "log_std_final": "--log-std-final None",
    "all": "--paper",
}
TRPO_CANDIDATES = {
    "return_floor": "--return-floor 0",
    "log_std_final": "--log-std-final None",
    "cg_damping": "--cg-damping 0.1",
}
FAST_PONG = "--learning-rate 5e-4 --clip-coef 0.2 --bf16"


def tuning(script: str, name: str, flags: str, tasks: tuple[str, ...] = CHOOSING) -> list[Entry]:
    """A candidate for the default of a script: EnvPool with one thread, so that two cores train two runs."""
    flags = f"{flags} --env-threads 1 --eval-episodes 20"
    return [Entry(script, f"envpool:{task}", flags, name) for task in tasks]


SUITES: dict[str, tuple[Entry, ...]] = {
    "smoke": (
        Entry("ppo_continuous", "InvertedPendulum-v5", "--total-timesteps 20_480 --eval-episodes 10"),
        Entry("trpo_continuous", "InvertedPendulum-v5", "--total-timesteps 20_480 --eval-episodes 10"),
        Entry("acer_discrete", "CartPole-v1", "--total-timesteps 10_000 --eval-episodes 10"),
        Entry("ppo_atari", "ALE/Pong-v5", "--total-timesteps 256 --num-steps 16 --eval-episodes 0"),
    ),
    "mujoco": (
        *(
            Entry(script, task, f"{FLAGS.get(task, '')} --eval-episodes 100")
            for script in ("ppo_continuous", "trpo_continuous")
            for task in NINE
        ),
    ),
    "mujoco-peers": tuple(Entry(peer, task) for peer in ("sb3_ppo", "sb3_trpo") for task in FOUR),
    "tuning": (  # see results/tuning/README.md
        *tuning("ppo_continuous", "ppo", ""),
        *(e for name, flags in REVERTED.items() for e in tuning("ppo_continuous", f"ppo-without-{name}", flags)),
        *tuning("trpo_continuous", "trpo", ""),
        *(e for name, flags in TRPO_CANDIDATES.items() for e in tuning("trpo_continuous", f"trpo-{name}", flags)),
    ),
    "classic": (
        *(
            Entry(
                "acer_discrete",
                task,
                f"--total-timesteps 300_000 --replay-ratio {ratio} --eval-episodes 100",
                f"acer_discrete-replay{ratio}",
            )
            for ratio in (0, 1, 4, 8)
            for task in CLASSIC
        ),
        *(Entry("ppo_atari", task, "--total-timesteps 300_000 --eval-episodes 100") for task in CLASSIC),
    ),
    "atari": (
        Entry("ppo_atari", "ALE/Breakout-v5", f"--total-timesteps 10_000_000 {ATARI}"),
        Entry("ppo_atari", "ALE/Pong-v5", f"--total-timesteps 1_500_000 {FAST_PONG} {ATARI}"),
        Entry("acer_discrete", "ALE/Pong-v5", f"--total-timesteps 2_000_000 {ATARI}"),
    ),
}
