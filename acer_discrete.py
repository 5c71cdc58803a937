# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "ale-py==0.12.1", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "pygame==2.6.1"]
# ///
"""Actor-critic with experience replay (ACER) for discrete actions, in one file.

Papers   ACER      Wang et al. 2017, arXiv:1611.01224v2           DQN    Mnih et al. 2015, doi:10.1038/nature14236
         Retrace   Munos et al. 2016, arXiv:1606.02647v2          Pardo  Pardo et al. 2018, arXiv:1712.00378v4
         Machado   Machado et al. 2018, arXiv:1709.06009v2        GAE    Schulman et al. 2016, arXiv:1506.02438v6
         Engstrom  Engstrom et al. 2020, arXiv:2005.12729v1
Install  pip install --requirements-from-script acer_discrete.py        (pip 26 or later; or `uv run` the file)
Run      python acer_discrete.py --env-id CartPole-v1 --seed 1
         python acer_discrete.py --env-id ALE/Pong-v5 --num-envs 16 --learning-rate 7e-4 --replay-start 10_000
Resume   python acer_discrete.py --resume runs/<run>/checkpoint.pt
Evaluate python acer_discrete.py --evaluate runs/<run>/checkpoint.pt --eval-episodes 20 --video-dir videos

Equation map: equation -> function -> symbol
    GAE eq. 16                     linear_recursion          Σ_k d_t⋯d_{k-1} x_k, here of Retrace
    ACER eq. 5, Retrace eq. 3      retrace                   Q^ret
    ACER eq. 9                     acer_gradient             g, the gradient of the actor's objective by π
    Engstrom section 3, item 9     clip_global_norm          gradient clipping
    ACER section 3.3               kl_gradient               k, the gradient of KL(π_a ‖ π) by π
    ACER eqs. 11-12                trust_region_step         z*
    ACER section 3.3               update_average            θ_a
    ACER section 3                 minibatch_gradient        (∂π/∂θ)ᵀ z* and the critic's gradient
    ACER section 3                 update                    one on-policy call, n ~ Poisson(r) from replay
    ACER section 3                 train                     collect, store, update
Departures from the ACER paper, where OpenAI's baselines differ from it or it is silent, and the flags for the other
    --learning-rate 7e-4 --num-envs 16  baselines' for Atari; the defaults are those that small tasks are learned with
    --ent-coef 0.001                    the paper's weight of the entropy bonus; baselines' 0.01 is the default
    --replay-start 10_000               baselines' for Atari, of a replay memory that is worth drawing from
    --q-coef 1                          the paper's weight of the critic's gradient; baselines' 0.5 is the default
    --no-orthogonal-init                PyTorch's initialization instead of scaled orthogonal layers
    --max-grad-norm inf                 gradients unclipped
    (always on)                         V(final observation) completes returns cut by a time limit (Pardo eq. 6)
    (always on)                         gradients are means over the batch, not sums
    (always on)                         environments stepped together, where the paper has 16 asynchronous threads
    (always on)                         RMSProp of TensorFlow 1; the entropy bonus inside the trust region
Ablations of the paper: --replay-ratio 0 (on-policy only), --no-trust-region, --no-bias-correction, --trunc-c,
--trust-region-delta, --avg-decay.

Resuming restores weights, optimizer, average policy and random generators. Episodes in flight start anew; the replay
memory too, unless --save-replay stored it, and nothing is replayed until it holds --replay-start steps again.
"""

import copy
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

# ---- Args ------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    # run
    seed: int = 1  # seed of everything random: initialization, actions, replay, environments
    total_timesteps: int = 150_000  # environment steps, rounded down to whole iterations; four frames each in ALE
    run_dir: str | None = None  # folder of this run, not existing yet; default runs/<env>__<script>__s<seed>__<unique>
    resume: str | None = None  # checkpoint.pt to go on from, with its configuration; flags given win, or are refused
    evaluate: str | None = None  # checkpoint.pt to evaluate instead of training
    eval_episodes: int = 10  # full games of the evaluation at the end, deterministic and sampled each; 0 = none
    video_dir: str | None = None  # folder for a GIF of the first evaluation episode
    save_every: int = 100  # iterations between checkpoints; one is always written at the end
    save_replay: bool = False  # keep the replay memory in replay.pt beside each checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is CUDA for images where there is a GPU, else the CPU
    replay_device: Literal["cpu", "cuda"] = "cpu"  # where the replay memory is
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the gradient step; auto = from 250,000 steps on
    # environment
    env_id: str = "CartPole-v1"  # Gymnasium id, of vectors, images or an ALE game; module:Env-v0 for one of your own
    num_envs: int = 8  # N, environments; ALE's are stepped in parallel, others in turn
    frame_skip: int = 4  # ALE: frames that an action is repeated for, the last two max-pooled (DQN methods)
    frame_stack: int = 4  # ALE: 84 x 84 gray frames in an observation (DQN methods)
    noop_max: int = 30  # ALE: a game starts after up to this many no-ops (DQN methods)
    fire_on_reset: bool = True  # ALE: press fire to begin a game, and as the first action of each life (baselines)
    life_loss_terminal: bool = True  # ALE: a lost life ends the return to learn from, not the game (DQN methods)
    repeat_action_probability: float = 0.0  # ALE: sticky actions; Machado recommends 0.25, baselines have none
    max_episode_frames: int = 108_000  # ALE: frames until a game is truncated, 30 minutes
    clip_rewards: bool = True  # ALE: learn from the sign of the reward (DQN methods); scores logged are raw
    # algorithm
    num_steps: int = 20  # T, steps per environment and iteration (ACER's k), and of a segment in replay
    gamma: float = 0.99  # γ, discount factor
    replay_ratio: float = 4.0  # r, mean number of updates from replay for each on-policy one; 0 = on-policy only
    replay_capacity: int = 50_000  # steps per environment that the replay memory holds
    replay_start: int = 250  # steps per environment in it before replay begins; 10_000 for Atari
    trunc_c: float = 10.0  # c of ACER eq. 9, where importance weights are truncated
    bias_correction: bool = True  # the second term of ACER eq. 9, for what truncation takes away
    trust_region: bool = True  # ACER eq. 11, against the average policy
    trust_region_delta: float = 1.0  # δ of ACER eq. 11
    avg_decay: float = 0.99  # α of the average policy, θ_a ← α θ_a + (1-α) θ after each update
    q_coef: float = 0.5  # weight of the critic's halved squared error
    ent_coef: float = 0.01  # weight of the entropy bonus, inside the trust region
    learning_rate: float = 5e-3  # RMSProp's step size; 7e-4 for Atari
    anneal_lr: bool = False  # anneal the learning rate linearly to zero
    rms_decay: float = 0.99  # decay of RMSProp's mean square
    rms_eps: float = 1e-5  # ε of RMSProp, inside the root
    max_grad_norm: float = 10.0  # largest norm of the gradient; inf = off
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers, of vectors
    shared_trunk: bool = False  # one trunk for policy and critic of vectors; images always share theirs
    cnn_hidden: int = 512  # units of the layer after the convolutions, of images
    activation: Literal["tanh", "relu"] = "tanh"  # activation, of vectors
    orthogonal_init: bool = True  # orthogonal weights: gain √2, policy output 0.01, Q output 1; else PyTorch's own

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @property
    def num_minibatches(self) -> int:
        return 1

    @property
    def ale(self) -> dict[str, int | float | bool]:
        """Arguments of ALE's vector environment, all but life_loss_info of which holds for full games too."""
        return {
            "frameskip": self.frame_skip,
            "stack_num": self.frame_stack,
            "noop_max": self.noop_max,
            "use_fire_reset": self.fire_on_reset,
            "repeat_action_probability": self.repeat_action_probability,
            "max_num_frames_per_episode": self.max_episode_frames,
        }


# ---- Equations -------------------------------------------------------------------------------------------------------
# T steps per rollout · N environments · B = T·N samples · A actions · O observation dims

EPS = 1e-6  # keeps ratios and logarithms of probabilities finite, as in baselines


def linear_recursion(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + d_t y_{t+1} with y_T = 0, the recursive form of GAE eq. 16. All (T, N).

    Round k merges sums of 2^k terms in pairs, y_t ← y_t + d_t⋯d_{t+2^k-1} y_{t+2^k}: log₂ T operations instead of T.
    """
    assert x.shape == decay.shape
    y, reach = x, 1
    while reach < len(x):
        y = torch.cat([y[:-reach] + decay[:-reach] * y[reach:], y[-reach:]])
        decay = torch.cat([decay[:-reach] * decay[reach:], decay[-reach:]])
        reach *= 2
    return y


def retrace(
    rewards: Tensor, q_taken: Tensor, next_values: Tensor, rho: Tensor, terminated: Tensor, done: Tensor, gamma: float
) -> Tensor:
    """ACER eq. 5, Retrace eq. 3 with λ = 1: the target Q^ret of Q(s_t, a_t). All (T, N).

        Q^ret_t = r_t + γ ρ̄_{t+1} (Q^ret_{t+1} - Q(s_{t+1}, a_{t+1})) + γ V(s_{t+1}),  ρ̄ = min(1, ρ)

    Written with δ_t = r_t + γ V(s_{t+1}) - Q(s_t, a_t): Q^ret_t - Q_t = δ_t + γ ρ̄_{t+1} (Q^ret_{t+1} - Q_{t+1}).
    `rho` are the weights π/μ of the actions taken; 1 is their limit here, though eq. 5 prints the letter c of eq. 9.
    `next_values[t]` is V of the state that action t led to: at an episode end, of the final observation. A termination
    removes that V, a truncation keeps it (Pardo eq. 6); both (`done`) end the sum.
    """
    assert rewards.shape == q_taken.shape == next_values.shape == rho.shape == terminated.shape == done.shape
    delta = rewards + gamma * next_values * ~terminated - q_taken  # (T, N)
    traces = gamma * rho.clamp(max=1).roll(-1, 0) * ~done  # γ ρ̄_{t+1}; the last one multiplies nothing
    return q_taken + linear_recursion(delta, traces)


def acer_gradient(
    probs: Tensor, q: Tensor, q_ret: Tensor, actions: Tensor, mu: Tensor, trunc_c: float, ent_coef: float
) -> Tensor:
    """ACER eq. 9 and an entropy bonus, differentiated by the probabilities: g. q_ret, actions (B,), else (B, A).

        g_a = 1{a = a_t} min(c, ρ_a) (Q^ret - V) / π_a + [1 - c/ρ_a]₊ (Q_a - V) - β (log π_a + 1)

    with ρ = π/μ and V = Σ_a π_a Q_a: truncated weights for the action taken, and what truncation leaves out as an
    expectation under π. The factor π_a of that expectation cancels the 1/π_a of ∇ log π_a.
    """
    values = (probs * q).sum(-1, keepdim=True)  # (B, 1)
    rho, grad_log = probs / (mu + EPS), 1 / (probs + EPS)
    taken = torch.nn.functional.one_hot(actions, probs.shape[-1])
    truncated = taken * rho.clamp(max=trunc_c) * (q_ret[:, None] - values) * grad_log
    correction = (1 - trunc_c / (rho + EPS)).clamp(min=0) * probs * (q - values) * grad_log
    return truncated + correction - ent_coef * ((probs + EPS).log() + probs * grad_log)


def kl_gradient(avg_probs: Tensor, probs: Tensor) -> Tensor:
    """ACER section 3.3: k, the gradient of KL(π_a ‖ π) by the probabilities π: -π_a / π. (B, A) each -> (B, A)."""
    return -avg_probs / (probs + EPS)


def trust_region_step(g: Tensor, k: Tensor, delta: float) -> Tensor:
    """ACER eqs. 11-12: z*, the nearest to g of all z with kᵀz ≤ δ, state by state. (B, A) each -> (B, A).

    z* = g - max(0, (kᵀg - δ) / ‖k‖²) k
    """
    assert g.shape == k.shape
    return g - ((k * g).sum(-1, keepdim=True) - delta).clamp(min=0) / k.square().sum(-1, keepdim=True) * k


def clip_global_norm(grads: tuple[Tensor, ...], max_norm: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 9: g ← g · min(1, c / ‖g‖₂) for g, all the tensors as one flat vector; and ‖g‖₂."""
    flat = torch.cat([g.flatten() for g in grads])
    norm = flat.norm()
    return flat * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


# ---- Networks --------------------------------------------------------------------------------------------------------


def fast_tanh(x: Tensor) -> Tensor:
    """tanh x, for large tensors as 2 σ(2x) - 1: on a CPU that takes PyTorch a quarter of its tanh's time.

    Where its derivative follows and nothing fuses the parts, PyTorch's tanh is as fast or faster.
    """
    eager_gradient = x.requires_grad and not torch.compiler.is_compiling()
    return torch.tanh(x) if x.numel() < 4096 or eager_gradient else 2 * torch.sigmoid(2 * x) - 1


class MLP(nn.Module):
    """Fully connected network with these layer sizes and a linear output (Engstrom section 3, items 3 and 8)."""

    def __init__(self, sizes: tuple[int, ...], args: Args, last_gain: float):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.activation = fast_tanh if args.activation == "tanh" else torch.relu
        for layer in self.layers if args.orthogonal_init else ():
            nn.init.orthogonal_(layer.weight, last_gain if layer is self.layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:  # not layer(x), whose own cost shows when acting on few observations
            x = self.activation(nn.functional.linear(x, layer.weight, layer.bias))
        return nn.functional.linear(x, last.weight, last.bias)


class NatureCNN(nn.Module):
    """The network of DQN (Methods) up to the hidden layer, without its activation: (B, C, H, W) uint8 -> (B, H)."""

    def __init__(self, obs_shape: tuple[int, ...], args: Args):
        super().__init__()
        (channels, *size), layers = obs_shape, []
        for filters, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            layers.append(nn.Conv2d(channels, filters, kernel, stride))
            channels, size = filters, [(x - kernel) // stride + 1 for x in size]
        self.layers = nn.ModuleList([*layers, nn.Conv2d(channels, args.cnn_hidden, size)])  # fully connected
        for layer in self.layers if args.orthogonal_init else ():
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU

    def forward(self, obs: Tensor) -> Tensor:
        *convolutions, last = self.layers
        x = obs.to(torch.float32, memory_format=torch.channels_last) / 255
        for layer in convolutions:
            x = torch.relu(layer(x))
        return last(x).flatten(1)


class Policy(nn.Module):
    """π_θ(a|s) = softmax z_θ(s) and Q_θ(s, a): two trunks or one, each with a linear head."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.spaces.Discrete, args: Args):
        super().__init__()
        images, sizes = len(obs_shape) == 3, (*obs_shape, *args.hidden_sizes)
        self.activation = torch.relu if images or args.activation == "relu" else fast_tanh
        self.trunk = NatureCNN(obs_shape, args) if images else MLP(sizes, args, math.sqrt(2))
        self.q_trunk = None if images or args.shared_trunk else MLP(sizes, args, math.sqrt(2))
        width = args.cnn_hidden if images else args.hidden_sizes[-1]
        self.policy_head, self.q_head = (MLP((width, int(action_space.n)), args, gain) for gain in (0.01, 1.0))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Raw observations (B, …) -> π (B, A), Q (B, A)."""
        x = self.activation(self.trunk(obs))
        y = x if self.q_trunk is None else self.activation(self.q_trunk(obs))
        return self.policy_head(x).softmax(-1), self.q_head(y)

    @torch.inference_mode()
    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Raw observations (N, …), standard Gumbel noise (N, A) -> samples argmax log π + noise (N,), π (N, A)."""
        probs, _ = self(obs)
        return (probs.log() + noise).argmax(-1), probs


@torch.no_grad()
def update_average(avg: nn.Module, net: nn.Module, decay: float) -> None:
    """ACER section 3.3: θ_a ← α θ_a + (1 - α) θ, in place."""
    for average, param in zip(avg.parameters(), net.parameters(), strict=True):
        average.lerp_(param, 1 - decay)


class RMSProp(nn.Module):
    """RMSProp as TensorFlow 1 has it: v from 1, ε inside the root; θ ← θ - α g / √(v + ε). State in buffers.

    The results that ACER is compared with were made so. torch.optim.RMSprop starts v at 0, with ε outside: for g = 0.01
    its first step is a thousand times as long, where this one warms up over some hundred updates.
    """

    def __init__(self, num_weights: int, args: Args):
        super().__init__()
        self.decay, self.eps = args.rms_decay, args.rms_eps
        self.register_buffer("lr", torch.tensor(args.learning_rate))  # α
        self.register_buffer("v", torch.ones(num_weights))

    @torch.no_grad()
    def step(self, params: list[Tensor], grad: Tensor) -> None:
        """v ← d v + (1 - d) g², then the step. `grad` (P,) is that of all `params`."""
        self.v.lerp_(grad.square(), 1 - self.decay)
        change = self.lr * grad * (self.v + self.eps).rsqrt()
        for param, part in zip(params, change.split([param.numel() for param in params]), strict=True):
            param -= part.view_as(param)


# ---- Environments ----------------------------------------------------------------------------------------------------


class Envs:
    """N Gymnasium environments stepped in turn; `obs` (N, O) is what to act on next.

    `ended` collects (return, length) of the episodes that end, from raw rewards. `rng_states[i]` is environment i's
    random state before the reset that began its current episode: resuming from it replays that reset.
    """

    def __init__(self, envs: list[gym.Env], seed: int, rng_states: list[dict] | None = None):
        self.envs, self.ended, self.sums = envs, [], np.zeros((2, len(envs)))  # return and length so far
        for env, env_seed in zip(envs, np.random.SeedSequence(seed).generate_state(len(envs)).tolist(), strict=True):
            env.reset(seed=env_seed)
        self.rng_states = rng_states or [env.np_random.bit_generator.state for env in envs]
        for env, state in zip(envs, self.rng_states, strict=True):
            env.np_random.bit_generator.state = state
        self.obs = np.stack([env.reset()[0] for env in envs]).astype(np.float32)  # (N, O)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Actions (N, A) -> next_obs (N, O), rewards, terminated, truncated (N,), obs (N, O).

        `next_obs` are the true successors, final observations included; `obs` is what to act on next.
        """
        next_obs, rewards = np.empty_like(self.obs), np.empty(len(self.envs))
        terminated, truncated = np.empty((2, len(self.envs)), bool)
        for i, env in enumerate(self.envs):
            next_obs[i], rewards[i], terminated[i], truncated[i], _ = env.step(actions[i])
        self.obs = next_obs.copy()
        self.sums[0] += rewards
        self.sums[1] += 1
        for i in np.flatnonzero(terminated | truncated):
            self.ended.append(tuple(self.sums[:, i].tolist()))
            self.sums[:, i] = 0
            self.rng_states[i] = self.envs[i].np_random.bit_generator.state
            self.obs[i], _ = self.envs[i].reset()
        return next_obs, rewards, terminated, truncated, self.obs


class AtariEnvs:
    """N games in ALE's own vector environment, with `step` and `ended` of Envs.

    `terminated` may be a lost life (life_loss_info), after which the game goes on; `ended` counts whole games.
    """

    def __init__(self, game: str, num_envs: int, seed: int | tuple[int, ...], color: bool, **kwargs):
        import ale_py

        make = partial(
            ale_py.AtariVectorEnv, game, autoreset_mode="SameStep", maxpool=True, reward_clipping=False,
            episodic_life=False, **kwargs,
        )  # fmt: skip  # episodic_life would start a new game after each lost life
        self.ale = make(num_envs=num_envs, img_height=84, img_width=84, grayscale=True)
        self.twin = make(num_envs=1, stack_num=1, img_height=210, img_width=160, grayscale=False) if color else None
        self.action_space, self.metadata = self.ale.single_action_space, {"render_fps": 60 / kwargs.get("frameskip", 4)}
        self.observation_space, self.rng_states = self.ale.single_observation_space, None
        self.envs, self.ended, self.sums = [self] * num_envs, [], np.zeros((2, num_envs))  # return and length so far
        seeds = (np.random.SeedSequence(seed).generate_state(num_envs) >> 1).astype(np.int32)
        self.obs, info = self.ale.reset(seed=seeds)  # (N, 4, 84, 84)
        self.frames, self.picture = info["episode_frame_number"], self.twin and self.twin.reset(seed=seeds[:1])[0]
        self.lives, self.lost = info["lives"], np.zeros(num_envs, bool)  # lost: a life, in the last step
        self.fire = kwargs.get("use_fire_reset", True) and self.ale.ale.get_action_set()[1] == ale_py.Action.FIRE

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Actions (N,) -> next_obs (N, C, H, W), rewards, terminated, truncated (N,), obs (N, C, H, W)."""
        actions = np.where(self.fire & self.lost, 1, actions)  # a life begins with fire, whatever the policy chose
        self.obs, rewards, terminated, truncated, info = self.ale.step(actions)
        self.picture = self.twin and self.twin.step(actions[:1])[0]  # same seed, same actions: the same game
        over = truncated | (info["episode_frame_number"] < self.frames)  # frame numbers fall where a game starts anew
        self.frames, self.lives, self.lost = info["episode_frame_number"], info["lives"], info["lives"] < self.lives
        self.sums += rewards, np.ones_like(rewards)
        self.ended.extend(map(tuple, self.sums[:, over].T.tolist()))
        self.sums[:, over] = 0
        next_obs = np.where(over[:, None, None, None], info["final_obs"], self.obs) if over.any() else self.obs
        return next_obs, rewards, terminated, truncated, self.obs

    def render(self) -> np.ndarray:
        """Color picture (210, 160, 3) of the first game."""
        return self.picture[0, -1]


def make_envs(
    env_id: str, num_envs: int, seed: int, rng_states: list[dict] | None = None, ale: dict | None = None, **kwargs
) -> Envs | AtariEnvs:
    """`num_envs` ALE games, with the arguments `ale`, or environments of vectors or images, and discrete actions.

    Raises InputError for any other.
    """
    with suppress(ImportError):
        import ale_py  # noqa: F401  its games register themselves
    spec = gym.registry.get(env_id)
    if spec and "game" in spec.kwargs:
        return AtariEnvs(spec.kwargs["game"], num_envs, seed, "render_mode" in kwargs, **(ale or {}))
    try:
        envs = [gym.make(env_id, **kwargs) for _ in range(num_envs)]
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"--env-id {env_id}: {str(error).splitlines()[0]}") from error
    check_spaces(envs[0], env_id)
    envs = Envs(envs, seed, rng_states)
    envs.obs = envs.obs.astype(np.uint8 if envs.obs.ndim > 2 else np.float32)  # and so all that `step` returns
    return envs


# ---- Rollout ---------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """T steps in each of N environments under the policy μ of their time."""

    obs: Tensor  # (T+1, N, …)  s_0 to s_T; after an episode's end, of the next one
    actions: Tensor  # (T, N)
    mu: Tensor  # (T, N, A)  μ(·|s_t)
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    truncated: Tensor  # (T, N)
    resets: Tensor  # (T, N)  a new episode began after this step
    finals: list  # [(t, n, final observation)] of the truncated steps


class Replay:
    """The last segments of each environment in a ring, every frame of an image stack stored once (ACER section 3)."""

    def __init__(self, obs: np.ndarray, num_actions: int, stack: int, args: Args):
        self.stack, (num_envs, *shape), steps = stack, obs.shape, args.num_steps
        slots = max(1, args.replay_capacity // steps) if args.replay_ratio else 1
        shape = shape[1:] if stack > 1 else shape
        frames = ((stack + steps, *shape), torch.uint8 if obs.dtype == np.uint8 else torch.float32)
        sizes = {"frames": frames, "actions": ((steps,), torch.int64), "mu": ((steps, num_actions), torch.float32)}
        sizes |= dict.fromkeys(("terminated", "truncated", "resets"), ((steps,), torch.bool))
        sizes["rewards"] = ((steps,), torch.float32)
        self.memory = allocate({name: ((slots, num_envs, *s), dtype) for name, (s, dtype) in sizes.items()}, args)
        self.finals, self.slots, self.count = {}, slots, 0  # finals of each slot; segments stored so far

    def add(self, segment: Segment) -> None:
        """Store a segment, over the oldest once the ring is full."""
        slot, obs = self.count % self.slots, segment.obs.transpose(0, 1)  # (N, T+1, …)
        self.memory["frames"][slot] = torch.cat([obs[:, 0], obs[:, 1:, -1]], 1) if self.stack > 1 else obs
        for name in self.memory.keys() - {"frames"}:
            self.memory[name][slot] = getattr(segment, name).transpose(0, 1)
        self.finals[slot] = segment.finals
        self.count += 1

    def batch(self, slots: Tensor) -> Segment:
        """Segment slots[n] of environment n, for each n (N,), in the form in which it was added."""
        rest = {name: x[slots, torch.arange(len(slots))].transpose(0, 1) for name, x in self.memory.items()}
        frames = rest.pop("frames").transpose(0, 1)  # (N, stack+T, …)
        if self.stack > 1:  # stacks of frames, but those of another episode than the newest, which are zero in ALE
            episode = nn.functional.pad(rest["resets"].cumsum(0), (0, 0, self.stack, 0)).T  # (N, stack+T) of each frame
            episode, frames = episode.unfold(1, self.stack, 1), frames.unfold(1, self.stack, 1).movedim(-1, 2)
            frames = frames * (episode == episode[..., -1:])[..., None, None]  # (N, T+1, stack, H, W)
        finals = [f for n, slot in enumerate(slots.tolist()) for f in self.finals[slot] if f[1] == n]
        return Segment(frames.transpose(0, 1), **rest, finals=finals)


def gumbel_noise(rng: torch.Generator, *shape: int) -> Tensor:
    """-log E, E ~ Exp(1): argmax z + noise is a sample of softmax z, from random numbers drawn ahead and on the CPU."""
    return -torch.empty(shape).exponential_(generator=rng).log()


def collect(
    envs: Envs | AtariEnvs, policy: Policy, rng: torch.Generator, num_steps: int, device: torch.device
) -> Segment:
    """Run the policy for T steps in each of N environments."""
    noise = gumbel_noise(rng, num_steps, len(envs.envs), envs.envs[0].action_space.n).to(device)  # (T, N, A)
    observations, samples, steps, finals = [envs.obs], [], [], []
    for t, noise_t in enumerate(noise):
        samples.append(policy.act(torch.from_numpy(envs.obs).to(device), noise_t))
        next_obs, rewards, terminated, truncated, obs = envs.step(samples[-1][0].cpu().numpy())
        finals += [(t, n, torch.from_numpy(next_obs[n])) for n in np.flatnonzero(truncated & ~terminated).tolist()]
        steps.append((rewards.astype(np.float32), terminated, truncated & ~terminated, envs.sums[1] == 0))
        observations.append(obs)
    actions, mu = (torch.stack(x).cpu() for x in zip(*samples, strict=True))
    rest = (torch.from_numpy(np.stack(x)) for x in zip(*steps, strict=True))
    return Segment(torch.from_numpy(np.stack(observations)), actions, mu, *rest, finals)


# ---- Update ----------------------------------------------------------------------------------------------------------


LOSSES = (
    *("policy_loss", "correction_loss", "value_loss", "entropy", "approx_kl", "explained_variance", "grad_norm"),
    *("adjusted_states", "adjustment", "mean_ratio", "largest_ratio", "truncated_ratios", "cut_traces"),
)


def minibatch_gradient(
    policy: Policy, average: Policy, batch: Segment, final_values: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """Clipped gradient of one call of ACER, to descend, as one vector; the figures of LOSSES. final_values (T, N)."""
    probs, q = (x.unflatten(0, batch.obs.shape[:2]) for x in policy(batch.obs.flatten(0, 1)))  # (T+1, N, A)
    values = (probs * q).sum(-1).detach()  # (T+1, N)
    pi, taken = probs[:-1], batch.actions[..., None]  # (T, N, A), (T, N, 1)
    q_taken = q[:-1].gather(-1, taken)[..., 0]  # (T, N)
    with torch.no_grad():
        rho = (pi / (batch.mu + EPS)).gather(-1, taken)[..., 0]  # (T, N)
        next_values, done = torch.where(batch.truncated, final_values, values[1:]), batch.terminated | batch.truncated
        q_ret = retrace(batch.rewards, q_taken, next_values, rho, batch.terminated, done, args.gamma)  # (T, N)
        q_actor = q[:-1] if args.bias_correction else values[:-1, :, None].expand_as(pi)  # Q = V: nothing to correct
        tensors = [x.flatten(0, 1) for x in (pi, q_actor, q_ret, batch.actions, batch.mu)]
        g = acer_gradient(*tensors, args.trunc_c, args.ent_coef)  # (B, A)
        avg, _ = average(batch.obs[:-1].flatten(0, 1))  # (B, A)
        z = trust_region_step(g, kl_gradient(avg, tensors[0]), args.trust_region_delta) if args.trust_region else g
    surrogate = (z * pi.flatten(0, 1)).sum(-1).mean()  # its gradient is (∂π/∂θ)ᵀ z
    loss = -surrogate + args.q_coef * 0.5 * (q_ret - q_taken).square().mean()
    grad, norm = clip_global_norm(torch.autograd.grad(loss, list(policy.parameters())), args.max_grad_norm)

    return grad, diagnostics(batch, probs, q_actor, values, q_ret, q_taken, avg, g, z, norm, args)


def minibatch_step(
    policy: Policy, average: Policy, rmsprop: RMSProp, batch: Segment, final_values: Tensor, args: Args
) -> Tensor:
    """One call of ACER: a step of RMSProp, then of the average policy; the figures of LOSSES."""
    grad, figures = minibatch_gradient(policy, average, batch, final_values, args)
    rmsprop.step(list(policy.parameters()), grad)
    update_average(average, policy, args.avg_decay)
    return figures


def update(
    policy: Policy, average: Policy, rmsprop: RMSProp, step: Callable, replay: Replay, rng: torch.Generator, args: Args
) -> dict[str, float]:
    """ACER section 3: a call on the newest segments, then n ~ Poisson(r) on segments from replay, one of each column.

    `step` is minibatch_step, compiled or not. -> figures of the on-policy call, and means of those from replay.
    """
    device, stored, calls = rmsprop.v.device, min(replay.count, replay.slots), []
    slots = torch.full((args.num_envs,), (replay.count - 1) % replay.slots)
    rate = torch.tensor(args.replay_ratio if stored * args.num_steps >= args.replay_start else 0.0)
    replays = int(torch.poisson(rate, generator=rng))
    for _ in range(1 + replays):
        batch = replay.batch(slots)
        finals, final_values = batch.finals, torch.zeros(batch.rewards.shape)  # (T, N)
        if finals:  # V of them under the policy as it is
            t, n, obs = zip(*finals, strict=True)
            with torch.no_grad():
                probs, q = policy(torch.stack(obs).to(device))
            final_values[t, n] = (probs * q).sum(-1).cpu()
        batch = Segment(*(x.to(device, non_blocking=True) for x in batch[:-1]), finals=[])
        calls.append(step(policy, average, rmsprop, batch, final_values.to(device), args).clone())
        slots = torch.randint(stored, (args.num_envs,), generator=rng)
    means = torch.stack(calls[1:]).mean(0) if replays else torch.full((len(LOSSES),), math.nan)
    stats = dict(zip(LOSSES, calls[0].tolist(), strict=True)) | {"replay_updates": float(replays)}
    return stats | {f"replay_{name}": value for name, value in zip(LOSSES, means.tolist(), strict=True)}


# ---- Train -----------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """ACER section 3 from the first iteration, or a checkpoint's, to the last, then evaluation.

    Returns steps, episodic_return (mean raw score of the last 100 training episodes), eval_return (mean of the
    deterministic evaluation), checkpoint, run_dir, and signal (that ended it early). Sets for the process PyTorch's
    seed, for vectors its thread count, for images what glibc does with freed memory. Raises InputError for bad input,
    FloatingPointError for NaN or infinity. With `args.resume`, weights and progress come from the checkpoint, all else
    from `args`: start from `Args(**load_checkpoint(path)["args"])`.
    """
    check_args(args)
    check_replay_args(args)
    saved = load_checkpoint(args.resume, args, FIXED_ON_RESUME) if args.resume else {}
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed + 2**32)  # another stream than that of the weights
    step, episodes = saved.get("step", 0), deque(saved.get("episodes", ()), maxlen=100)  # (return, length) of the last
    ale = {**args.ale, "life_loss_info": args.life_loss_terminal}
    envs = make_envs(args.env_id, args.num_envs, (args.seed, step), saved.get("env_rng_states"), ale)
    atari, device = isinstance(envs, AtariEnvs), pick_device(args.device, images=envs.obs.ndim > 2)
    set_up_cpu(images=envs.obs.ndim > 2)
    policy = Policy(envs.obs.shape[1:], envs.envs[0].action_space, args).to(device)
    average, num_weights = copy.deepcopy(policy).requires_grad_(False), sum(x.numel() for x in policy.parameters())
    modules = {"policy": policy, "average": average, "rmsprop": (rmsprop := RMSProp(num_weights, args).to(device))}
    for name, module in modules.items() if saved else ():
        module.load_state_dict(saved[name])
    rng.set_state(saved.get("rng", rng.get_state()))
    total_steps = args.num_iterations * args.batch_size
    replay = Replay(envs.obs, int(envs.envs[0].action_space.n), args.frame_stack if atari else 1, args)
    found = load_replay(replay, args, step)
    with Log(args, device, step, len(rmsprop.v)) as log:

        def checkpoint() -> str:
            state = {"step": step, "episodes": list(episodes), "env_rng_states": envs.rng_states}
            state |= {name: module.state_dict() for name, module in modules.items()} | {"rng": rng.get_state()}
            if args.save_replay:
                save_replay(log.run_dir, replay, step)
            return save_checkpoint(log.run_dir, args, state)

        describe(policy, replay, args, found)
        compiled_step = compile_or_eager(minibatch_step, args, device)
        with stop_signals() as signals:
            while step + args.batch_size <= args.total_timesteps and not signals:
                rmsprop.lr.fill_(args.learning_rate * (1 - step / total_steps if args.anneal_lr else 1.0))

                segment = collect(envs, policy, rng, args.num_steps, device)
                check_finite(step, observations=segment.obs, rewards=segment.rewards)
                episodes.extend(envs.ended)
                envs.ended.clear()
                if atari and args.clip_rewards:
                    segment = segment._replace(rewards=segment.rewards.sign())
                replay.add(segment)

                stats = update(policy, average, rmsprop, compiled_step, replay, rng, args)
                weights = torch.cat([param.detach().flatten() for param in policy.parameters()])
                check_finite(step, losses=torch.tensor([stats[name] for name in LOSSES[:5]]), parameters=weights)

                step += args.batch_size
                log(step, rmsprop.lr.item(), episodes, stats)
                if step // args.batch_size % args.save_every == 0:
                    checkpoint()
            path = checkpoint()
        log.bar.close()
        evaluation = evaluate_policy(policy, args) if args.eval_episodes and not signals else {}
        mean_return = float(np.mean([x for x, _ in episodes])) if episodes else math.nan
        log.finish(step, mean_return, len(episodes), evaluation, path)
    eval_return = float(np.mean(evaluation["deterministic"])) if evaluation else None
    result = {"steps": step, "episodic_return": mean_return, "eval_return": eval_return, "checkpoint": path}
    return result | {"run_dir": str(log.run_dir), "signal": signals[0] if signals else None}


# ======================================================================================================================
# The algorithm ends here. Below: evaluation, checkpoints, logging, run folder, signals, input checks, main.
# ======================================================================================================================

SCRIPT = "acer_discrete"
CHECKS = (
    (
        "total_timesteps save_every num_envs num_steps frame_skip frame_stack max_episode_frames replay_capacity "
        "trunc_c trust_region_delta learning_rate rms_eps max_grad_norm hidden_sizes cnn_hidden",
        lambda x: x > 0,
        "must be positive",
    ),
    ("seed eval_episodes noop_max replay_ratio replay_start q_coef ent_coef", lambda x: x >= 0, "must not be negative"),
    ("gamma avg_decay rms_decay repeat_action_probability", lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
)
FIXED_ON_EVALUATION = "frame_stack hidden_sizes shared_trunk cnn_hidden activation"
FIXED_ON_RESUME = f"{FIXED_ON_EVALUATION} seed env_id num_envs orthogonal_init"
AUTO_DEVICE = "CUDA for images where there is a GPU, else the CPU"
LONGEST_EVALUATION = 100_000  # steps, for tasks without a time limit
LONGEST_FILM = 3_000  # frames


class InputError(ValueError):
    """Bad input; the message is one line that says what to change."""


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], env_id: str, episodes: int, seed: int, video_dir: str | None = None,
    **env_kwargs,
) -> list[float]:  # fmt: skip
    """Raw returns of one whole episode in each of `episodes` environments; `act` maps raw observations to actions.

    One each, since counting the first to end would favour short ones; cut after LONGEST_EVALUATION steps. `video_dir`
    gets a GIF of the first environment; `env_kwargs` are make_envs's.
    """
    envs = make_envs(env_id, episodes, seed, **env_kwargs, **({"render_mode": "rgb_array"} if video_dir else {}))
    returns, going, frames, obs = np.zeros(episodes), np.ones(episodes, bool), [], envs.obs
    fps = envs.envs[0].metadata.get("render_fps", 30)
    stride = max(1, round(fps / 25))  # steps a frame
    for step in tqdm(iter(range(LONGEST_EVALUATION)), "evaluation", unit="step", leave=False, disable=None):
        if video_dir and going[0] and step % stride == 0 and len(frames) < LONGEST_FILM:
            frames.append(envs.envs[0].render())
        _, rewards, terminated, truncated, obs = envs.step(act(obs))
        returns[going] += rewards[going]
        going &= ~(terminated | truncated)
        if not going.any():
            break
    if video_dir:
        import imageio.v3

        path = Path(video_dir, f"{Path(env_id.replace(':', '/')).name}__{SCRIPT}__s{seed}.gif")
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.v3.imwrite(path, frames, duration=1000 * stride / fps, loop=0)
        print(f"video {path}")
    return returns.tolist()


@torch.no_grad()
def diagnostics(
    batch: Segment, probs: Tensor, q: Tensor, values: Tensor, q_ret: Tensor, q_taken: Tensor, avg: Tensor, g: Tensor,
    z: Tensor, grad_norm: Tensor, args: Args,
) -> Tensor:  # fmt: skip
    """The figures of LOSSES: the two parts of ACER eq. 9 as losses, the critic's, what trust region and traces do."""
    pi, taken = probs[:-1], batch.actions[..., None]
    log_pi, ratios = (pi + EPS).log(), pi / (batch.mu + EPS)
    rho, log_taken = (x.gather(-1, taken)[..., 0] for x in (ratios, log_pi))  # (T, N)
    actor = rho.clamp(max=args.trunc_c) * (q_ret - values[:-1]) * log_taken
    correction = (1 - args.trunc_c / (ratios + EPS)).clamp(min=0) * pi * (q - values[:-1, :, None]) * log_pi
    k, error = kl_gradient(avg, pi.flatten(0, 1)), q_ret - q_taken
    shift = ((g - z) * k).sum(-1) / k.square().sum(-1)  # the multiplier of k in ACER eq. 12
    kl = (avg * ((avg + EPS).log() - log_pi.flatten(0, 1))).sum(-1)
    figures = [-actor.mean(), -correction.sum(-1).mean(), 0.5 * error.square().mean(), -(pi * log_pi).sum(-1).mean()]
    figures += [kl.mean(), 1 - error.var() / q_ret.var(), grad_norm, (shift > 0).float().mean(), shift.mean()]
    figures += [rho.mean(), rho.max(), (rho > args.trunc_c).float().mean(), (rho < 1 - 1e-4).float().mean()]
    return torch.stack(figures)


def evaluate_policy(policy: Policy, args: Args) -> dict[str, list[float]]:
    """Raw scores of full games, deterministic and sampled."""
    rng, seed = torch.Generator().manual_seed(args.seed), 1_000_000 + args.seed  # apart from the training seeds
    bias = policy.policy_head.layers[-1].bias  # (A,)

    def act(obs: np.ndarray) -> np.ndarray:
        return policy.act(torch.from_numpy(obs).to(bias.device))[0].cpu().numpy()

    def sample(obs: np.ndarray) -> np.ndarray:
        noise = gumbel_noise(rng, len(obs), len(bias)).to(bias.device)
        return policy.act(torch.from_numpy(obs).to(bias.device), noise)[0].cpu().numpy()

    deterministic = evaluate(act, args.env_id, args.eval_episodes, seed, args.video_dir, ale=args.ale)
    sampled = evaluate(sample, args.env_id, args.eval_episodes, seed, ale=args.ale)
    return {"deterministic": deterministic, "sampled": sampled}


def print_evaluation(evaluation: dict[str, list[float]]) -> None:
    """Mean and standard deviation over episodes of each mode."""
    for mode, returns in evaluation.items():
        print(f"evaluation, {mode}: {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes")


def save_checkpoint(run_dir: Path, args: Args, state: dict) -> str:
    """Write checkpoint.pt so that a crash leaves the old file or the new one, never half of one; -> its path."""
    torch.save({"script": SCRIPT, "args": asdict(args)} | state, run_dir / "checkpoint.tmp")
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")
    return str(run_dir / "checkpoint.pt")


def load_checkpoint(path: str, args: Args | None = None, fixed: str = "") -> dict:
    """Read a checkpoint to the CPU. Raises InputError if it is none of this script, or `args` differ in `fixed`."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script, saved_args = saved["script"], saved["args"]
    except Exception as error:  # torch.load raises many unrelated types
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error
    if script != SCRIPT or saved_args.keys() != asdict(Args()).keys():
        raise InputError(f"{path} was written by {script}.py, or by another version of {SCRIPT}.py: use that one")
    for name in fixed.split():
        if getattr(args, name) != saved_args[name]:
            raise InputError(f"--{name.replace('_', '-')}: {path} has {saved_args[name]}, which can't be changed")
    return saved


class Log:
    """Run folder with config.json, progress.csv and TensorBoard events; head lines and, on a terminal, progress bar."""

    def __init__(self, args: Args, device: torch.device, step: int, num_params: int):
        from torch.utils.tensorboard import SummaryWriter

        unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        name = f"{Path(args.env_id.replace(':', '/')).name}__{SCRIPT}__s{args.seed}__{unique}"
        self.run_dir = Path(args.resume).parent if args.resume else Path(args.run_dir or f"runs/{name}")
        try:
            self.run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
        except OSError as error:
            raise InputError(f"--run-dir {self.run_dir}: {error.strerror}; name a folder that can be made") from error
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "gymnasium": gym.__version__}
        script_hash = {"script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
        config = {"args": asdict(args), "device": str(device)} | versions | script_hash
        path = self.run_dir / (f"config-{step}.json" if args.resume else "config.json")
        path.write_text(json.dumps(config, indent=1) + "\n")
        path = self.run_dir / "progress.csv"
        header, *rows = path.read_text().splitlines() if step and path.exists() else [""]
        kept = [row.split(",") for row in rows if int(row.split(",")[0]) <= step]
        self.file = path.open("w", buffering=1)  # a line at a time
        self.file.writelines(",".join(row) + "\n" for row in ([header.split(","), *kept] if header else []))
        self.events = SummaryWriter(str(self.run_dir), purge_step=step + 1)
        total = args.num_iterations * args.batch_size
        why = "as asked" if args.device != "auto" else f"auto: {AUTO_DEVICE}"
        print(f"{SCRIPT}  {args.env_id}  seed {args.seed}  {self.run_dir}")
        print(f"{args.num_envs} environments x {args.num_steps} steps = batch of {args.batch_size:,}", end=", ")
        print(f"{args.num_iterations} iterations = {total:,} steps{f', from {step:,}' if step else ''}")
        print(f"device {device} ({why}), {num_params:,} parameters", flush=True)
        self.bar = tqdm(initial=step, total=total, unit="step", unit_scale=True, disable=None, dynamic_ncols=True)
        self.step, self.last, self.seconds = step, time.time(), float(kept[-1][1]) if kept else 0.0

    def __call__(self, step: int, lr: float, episodes: deque, stats: dict[str, float]) -> None:
        """One iteration: `episodes` holds the (return, length) pairs to average, `stats` goes to losses/."""
        elapsed, (returns, lengths) = time.time() - self.last, np.mean(episodes or [(math.nan,) * 2], axis=0).tolist()
        sps = (step - self.step) / elapsed
        charts = {"episodic_return": returns, "episodic_length": lengths, "SPS": sps, "learning_rate": lr}
        self.step, self.last, self.seconds = step, self.last + elapsed, self.seconds + elapsed
        if not self.file.tell():
            self.file.write(",".join(["step", "seconds", *charts, *stats]) + "\n")
        cells = {**charts, **stats}
        values = ("" if math.isnan(x) else f"{x:.6g}" for x in cells.values())
        self.file.write(",".join([str(step), f"{self.seconds:.2f}", *values]) + "\n")
        for name, value in cells.items():
            if not math.isnan(value):
                self.events.add_scalar(f"{'charts' if name in charts else 'losses'}/{name}", value, step)
        self.bar.set_postfix({"return": f"{returns:.1f}", "kl": f"{stats['approx_kl']:.4f}"}, refresh=False)
        self.bar.update(step - self.bar.n)

    def finish(self, step: int, mean_return: float, episodes: int, evaluation: dict, path: str) -> None:
        """Write the evaluation, if there was one, and print the closing lines."""
        if evaluation:
            (self.run_dir / "eval.json").write_text(json.dumps(evaluation, indent=1) + "\n")
            self.events.add_scalar("eval/return", np.mean(evaluation["deterministic"]), step)
        print(f"mean return of the last {episodes} training episodes {mean_return:.1f}")
        print_evaluation(evaluation)
        print(f"{step:,} steps in {self.seconds:.0f} s  {path}")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        for part in (self.bar, self.events, self.file):
            part.close()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first Ctrl-C or SIGTERM; the second kills."""
    caught, previous = [], {}

    def note(number: int, _) -> None:
        caught.append(number)
        with suppress(OSError):  # nobody may read it any more
            os.write(2, b"\nstopping after this iteration; once more kills\n")
        for s in previous:
            signal.signal(s, signal.SIG_DFL)

    with suppress(ValueError):  # only the main thread can catch signals
        previous.update({s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield caught
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def compile_or_eager(function: Callable, args: Args, device: torch.device) -> Callable:
    """`function` as one compiled graph if --compile asks for it and PyTorch can; else eager, saying why."""
    torch.compiler.reset()  # a process may train many configurations; PyTorch recompiles a function a few times only
    if args.compile == "off" or (args.compile == "auto" and args.total_timesteps < 250_000):
        return function
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        print("not compiled: this PyTorch can't trace torch.autograd.grad")
        return function
    torch._dynamo.config.trace_autograd_ops = True
    print("compiling: the first iteration takes up to half a minute", flush=True)
    cuda_graphs = device.type == "cuda"
    how = {"mode": "reduce-overhead"} if cuda_graphs else {"options": {"cpp_wrapper": device.type == "cpu"}}
    chosen = torch.compile(function, fullgraph=True, **how)

    def compiled(*inputs):
        nonlocal chosen
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last call may be overwritten
        try:
            return chosen(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, for one
            print(f"not compiled: {str(error).splitlines()[0]}")
            chosen = function
            return function(*inputs)

    return compiled


def pick_device(name: str, images: bool) -> torch.device:
    """The device of --device. Raises InputError if it is not there."""
    auto = "cuda" if images and torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0].splitlines()[0]
        raise InputError(f"--device {name} can't be used here ({why}): try cpu") from error


def keep_memory() -> None:
    """Tell glibc to keep freed memory; else it returns it to the system, and gets it anew, in every minibatch.

    That is a fifth of the time of a convolutional network's gradient. Without glibc it does nothing.
    """
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, size in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, its largest; M_TRIM_THRESHOLD
            mallopt(option, size)


def set_up_cpu(images: bool) -> None:
    """For convolutional networks, keep memory; for others, take one thread: more do not help networks this small."""
    keep_memory() if images else torch.set_num_threads(1)


def allocate(sizes: dict[str, tuple[tuple[int, ...], torch.dtype]], args: Args) -> dict[str, Tensor]:
    """Tensors of these shapes and types on the replay device. Raises InputError if they do not fit its memory."""
    size, free = sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes.values()), math.inf
    if args.replay_device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--replay-device cuda needs a GPU: use cpu")
        free = torch.cuda.mem_get_info()[0]
    else:
        with suppress(OSError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        with suppress(OSError, ValueError):  # a container's limit, or "max"
            free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if size > 0.95 * free:
        less = "--replay-capacity or --num-envs"
        raise InputError(f"the replay memory takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free: lower {less}")
    return {name: torch.zeros(shape, dtype=dtype, device=args.replay_device) for name, (shape, dtype) in sizes.items()}


def save_replay(run_dir: Path, replay: Replay, step: int) -> None:
    """Write replay.pt, so that a crash leaves the old file or the new one."""
    torch.save(vars(replay) | {"step": step}, run_dir / "replay.tmp")
    os.replace(run_dir / "replay.tmp", run_dir / "replay.pt")


def load_replay(replay: Replay, args: Args, step: int) -> str:
    """On resuming, fill the memory from replay.pt, if there is one of this step; -> what to tell about it.

    Raises InputError if it can't be read or has another size.
    """
    if not args.resume or not args.replay_ratio:
        return ""
    path = Path(args.resume).with_name("replay.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"step": None}
        old = saved["step"]
    except Exception as error:  # torch.load raises many unrelated types
        hint = "move it away to start with an empty memory"
        raise InputError(f"{path} is not readable ({type(error).__name__}): {hint}") from error
    if old != step:
        why = f"{path} is of step {old:,}; " if old is not None else ""
        return f"replay memory: {why}empty, filled again before replay goes on"
    if saved["slots"] != replay.slots or any(saved["memory"][k].shape != x.shape for k, x in replay.memory.items()):
        raise InputError(f"--replay-capacity or --num-steps: {path} has another size; move it away to start empty")
    for name, x in replay.memory.items():
        x.copy_(saved["memory"][name])
    replay.finals, replay.count = saved["finals"], saved["count"]
    return f"replay memory: {min(replay.count, replay.slots) * args.num_steps:,} steps from {path}"


def describe(policy: Policy, replay: Replay, args: Args, found: str) -> None:
    """Print which network and which replay memory it is, and what was found of it on resuming."""
    trunk = "convolutions" if isinstance(policy.trunk, NatureCNN) else "hidden layers"
    print(f"network: {trunk}, {'one trunk for' if policy.q_trunk is None else 'a trunk each for'} policy and critic")
    size = sum(x.numel() * x.itemsize for x in replay.memory.values()) / 2**30
    holds = f"{replay.slots * args.num_steps:,} steps of each environment, {size:.2f} GiB on {args.replay_device}"
    begins = f"replay begins with {args.replay_start:,} steps of each"
    print(f"replay memory: {f'{holds}; {begins}' if args.replay_ratio else 'none, replay ratio 0'}")
    if found:
        print(found)


def check_replay_args(args: Args) -> None:
    """Raise InputError for values of ACER's own that can't be trained with."""
    if not args.hidden_sizes:
        raise InputError("--hidden-sizes needs one layer or more")
    if math.isinf(args.replay_ratio):
        raise InputError("--replay-ratio must be finite")
    holds = args.replay_capacity // args.num_steps * args.num_steps  # whole segments
    if args.replay_ratio and max(args.replay_start, 1) > holds:
        hint = "lower --replay-start or raise --replay-capacity"
        raise InputError(f"replay would never begin: the memory holds {holds:,} steps of each environment; {hint}")


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Raise InputError unless observations are vectors or uint8 images, and actions discrete."""
    actions, obs, needs = env.action_space, env.observation_space, f"--env-id {env_id} has the space"
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        shifted = isinstance(actions, gym.spaces.Discrete)
        hint = "shift them with the wrapper TransformAction" if shifted else "for continuous ones use ppo_continuous.py"
        raise InputError(f"{needs} {actions}, but this script needs discrete actions from 0: {hint}")
    image = (
        isinstance(obs, gym.spaces.Box) and obs.dtype == np.uint8 and len(obs.shape) == 3 and min(obs.shape[1:]) >= 36
    )
    if not image and not (isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1):
        hint = "for images of shape (H, W, C) use the wrapper TransformObservation, for others FlattenObservation"
        raise InputError(f"{needs} {obs}, but this script needs a flat Box or uint8 images (C, H, W): {hint}")


def check_args(args: Args) -> None:
    """Raise InputError for values that can't be trained with."""
    for names, holds, what in CHECKS:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not all(map(holds, value if isinstance(value, tuple) else [value])):
                raise InputError(f"--{name.replace('_', '-')} {value} {what}")
    if args.batch_size < 2:
        raise InputError("num_envs x num_steps must be 2 or more")
    if args.batch_size % args.num_minibatches:
        raise InputError(f"--num-minibatches must divide num_envs x num_steps = {args.batch_size}")
    if args.total_timesteps < args.batch_size:
        raise InputError(f"--total-timesteps is less than one batch, num_envs x num_steps = {args.batch_size}")
    if args.resume and Path(args.resume).name != "checkpoint.pt":
        raise InputError(f"--resume goes on in the run folder: name its checkpoint.pt, not {Path(args.resume).name}")
    if args.evaluate and not args.eval_episodes:
        raise InputError("--evaluate needs --eval-episodes of 1 or more")
    if args.video_dir:
        try:
            make_envs(args.env_id, 1, args.seed, render_mode="rgb_array").envs[0].render()
        except InputError:
            raise
        except Exception as error:  # every renderer raises types of its own
            hint = "MuJoCo needs MUJOCO_GL=egl with libegl1, or osmesa with libosmesa6"
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
            raise InputError(f"--video-dir: can't render {args.env_id} ({why}); {hint}") from error


def check_finite(step: int, **tensors: Tensor) -> None:
    """Raise FloatingPointError if one of the tensors holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"NaN or infinity in {name}, in the iteration after step {step:,}")


def parse_args() -> Args:
    """Command line -> Args; --resume and --evaluate take the checkpoint's arguments as defaults."""
    cli = partial(tyro.cli, Args, description=__doc__.splitlines()[0])
    args = cli()
    if args.resume and (args.evaluate or args.run_dir):
        raise InputError("--resume goes on in the checkpoint's own folder: leave out --evaluate and --run-dir")
    if not (args.resume or args.evaluate):
        return args
    saved = Args(**load_checkpoint(args.resume or args.evaluate)["args"])
    episodes = saved.eval_episodes or (Args.eval_episodes if args.evaluate else 0)
    return cli(default=replace(saved, resume=None, run_dir=None, video_dir=None, eval_episodes=episodes))


def main() -> int:
    """Run the command line; -> the exit code."""
    try:
        args = parse_args()
        if args.video_dir and sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
        if not args.evaluate:
            return 128 + signum if (signum := train(args)["signal"]) else 0
        check_args(args)
        saved = load_checkpoint(args.evaluate, args, FIXED_ON_EVALUATION)
        env = make_envs(args.env_id, 1, args.seed, ale=args.ale).envs[0]
        policy = Policy(env.observation_space.shape, env.action_space, args).to(
            pick_device(args.device, len(env.observation_space.shape) == 3)
        )
        try:
            policy.load_state_dict(saved["policy"])
        except RuntimeError as error:
            raise InputError(f"--env-id {args.env_id} has other sizes than {saved['args']['env_id']}") from error
        print_evaluation(evaluate_policy(policy, args))
        return 0
    except InputError as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{SCRIPT}.py: {error}; the last checkpoint, if there is one, stays", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
