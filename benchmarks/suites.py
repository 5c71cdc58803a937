"""What is compared. A suite is a list of entries, and each entry is run once for each seed."""

from typing import NamedTuple


class Entry(NamedTuple):
    """`script` trains `task` with `flags`. `name` tells variants of a script apart in tables."""

    script: str  # of the repository, or a peer of peers.py
    task: str  # Gymnasium id
    flags: str = ""
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.script


NINE = (
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)
FOUR = ("HalfCheetah-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "Walker2d-v5")
TUNING_TASKS = (*FOUR, "Swimmer-v5", "Ant-v5")
CLASSIC = ("CartPole-v1", "Acrobot-v1")
SHORT = "--total-timesteps 20_480 --eval-episodes 10"  # a run of seconds
EVALUATION = "--eval-episodes 100"
TASK_FLAGS = {"Swimmer-v5": "--gamma 0.9999"}  # its returns lie beyond the horizon of 0.99
PPO_CANDIDATES = {  # each departure from the paper that is a flag reverted alone, and all at once
    "ppo": "",
    "ppo-without-num_envs": "--num-envs 1 --num-steps 2048",
    "ppo-without-norm_obs": "--no-norm-obs",
    "ppo-without-norm_reward": "--no-norm-reward",
    "ppo-without-anneal_lr": "--no-anneal-lr",
    "ppo-without-recompute_advantages": "--no-recompute-advantages",
    "ppo-without-max_grad_norm": "--max-grad-norm inf",
    "ppo-without-orthogonal_init": "--no-orthogonal-init",
    "ppo-without-log_std_init": "--log-std-init 0",
    "ppo-without-log_std_final": "--log-std-final None",
    "ppo-without-all": "--paper",
    "ppo-simple": "--learning-rate 3e-4 --gae-lambda 0.95",  # the default
    "ppo-slow": "--learning-rate 2e-4 --gae-lambda 0.9",
}
TRPO_LONG = "--num-envs 4 --num-steps 256 --gae-lambda 0.95 --return-floor 0.1"
TRPO_CANDIDATES = {
    "trpo-annealed": "--gae-lambda 0.95 --log-std-init -1 --log-std-final -2.5 --return-floor 0.1",
    "trpo-long-annealed": f"{TRPO_LONG} --log-std-init -1 --log-std-final -2.5",
    "trpo-long-learned": f"{TRPO_LONG} --log-std-init -0.5 --log-std-final None --cg-damping 0.1",
}


def mujoco(script: str) -> list[Entry]:
    """Nine tasks with the script's default flags, a million steps each."""
    return [Entry(script, task, f"{TASK_FLAGS.get(task, '')} {EVALUATION}") for task in NINE]


def classic(script: str, flags: str = "", name: str = "") -> list[Entry]:
    """Two small tasks with discrete actions."""
    flags = f"--total-timesteps 300_000 {flags} {EVALUATION}"
    return [Entry(script, task, flags, name) for task in CLASSIC]


def atari(script: str, game: str, flags: str = "") -> Entry:
    """A game for a million steps."""
    flags = f"--total-timesteps 1_000_000 {flags} --eval-episodes 10"
    return Entry(script, f"ALE/{game}-v5", flags)


def tuning(script: str, candidates: dict[str, str]) -> list[Entry]:
    """Candidates for the default of a script: label -> flags. EnvPool has one thread a run."""
    return [
        Entry(
            script,
            f"envpool:{task}",
            f"{flags} {TASK_FLAGS.get(task, '')} --env-threads 1 --eval-episodes 20",
            label,
        )
        for label, flags in candidates.items()
        for task in TUNING_TASKS
    ]


SUITES: dict[str, list[Entry]] = {
    "smoke": [
        Entry("ppo_continuous", "InvertedPendulum-v5", SHORT),
        Entry("trpo_continuous", "InvertedPendulum-v5", SHORT),
        Entry("acer_discrete", "CartPole-v1", SHORT),
        Entry("ppo_atari", "ALE/Pong-v5", "--total-timesteps 256 --num-steps 16 --eval-episodes 0"),
    ],
    "mujoco": mujoco("ppo_continuous") + mujoco("trpo_continuous"),
    "mujoco-flags": [  # flags that help one task
        Entry("ppo_continuous", "Ant-v5", f"--gae-lambda 0.9 --learning-rate 2e-4 {EVALUATION}"),
        Entry(
            "trpo_continuous",
            "Swimmer-v5",
            "--gamma 0.9999 --gae-lambda 0.98 --num-envs 2 --num-steps 512 --return-floor 0 "
            f"--log-std-init 0 --log-std-final None {EVALUATION}",
        ),
    ],
    "mujoco-peers": [Entry(peer, task) for peer in ("sb3_ppo", "sb3_trpo") for task in FOUR],
    "classic": [
        *classic("acer_discrete", "--replay-ratio 0", "acer_discrete-replay0"),
        *classic("acer_discrete", "--replay-ratio 1", "acer_discrete-replay1"),
        *classic("acer_discrete", "--replay-ratio 4", "acer_discrete-replay4"),
        *classic("acer_discrete", "--replay-ratio 8", "acer_discrete-replay8"),
        *classic("ppo_atari"),
    ],
    "atari": [
        atari("acer_discrete", "Pong"),
        atari("ppo_atari", "Breakout"),
        atari("ppo_atari", "Pong", "--learning-rate 5e-4 --clip-coef 0.2"),
    ],
    "tuning": [  # see results/tuning/README.md
        *tuning("ppo_continuous", PPO_CANDIDATES),
        *tuning("trpo_continuous", TRPO_CANDIDATES),
    ],
}
