# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "ale-py==0.12.1",
#     "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0", "pygame==2.6.1",
# ]
# ///
"""Actor-critic with experience replay (ACER) for discrete actions, in one file.

Papers
    ACER      Wang et al. 2017, arXiv:1611.01224v2
    Retrace   Munos et al. 2016, arXiv:1606.02647v2
    DQN       Mnih et al. 2015, doi:10.1038/nature14236
    Machado   Machado et al. 2018, arXiv:1709.06009v2
    Engstrom  Engstrom et al. 2020, arXiv:2005.12729v1
    Pardo     Pardo et al. 2018, arXiv:1712.00378v4

Install   pip install torch==2.13.0 gymnasium==1.4.0 ale-py pygame tyro tensorboard tqdm
          (or `uv run acer_discrete.py`, which reads the exact versions from the top of this file)
Run       python acer_discrete.py --env-id CartPole-v1 --seed 1
          python acer_discrete.py --env-id ALE/Pong-v5 --seed 1
Faster    torchrun --nproc-per-node 4 acer_discrete.py --env-id ALE/Breakout-v5
Resume    python acer_discrete.py --resume runs/<run>/checkpoint.pt
Evaluate  python acer_discrete.py --evaluate runs/<run>/checkpoint.pt --video-dir videos
From Python: train(Args(env_id="Acrobot-v1")), load_policy("runs/<run>/checkpoint.pt").act(obs)

Equation map
    equation                       function                  symbol
    ACER eq. 9, first term         truncated_gradient        min(c, ρ) (Q^ret - V) ∇ log π
    ACER eq. 9, second term        correction_gradient       E_π([1 - c/ρ]₊ (Q - V) ∇ log π)
    ACER section 4                 entropy_gradient          the gradient of S[π]
    ACER eqs. 9-10                 acer_gradient             g, the gradient with respect to π
    ACER section 3.3               kl_gradient               k, the gradient of KL(π_a ‖ π)
    ACER eqs. 11-12                trust_region_step         z*
    ACER eq. 5, Retrace eq. 3      retrace                   Q^ret
    ACER section 3.3               update_average            θ_a
    ACER eq. 6                     acer_loss                 (Q^ret - Q) ∇Q
    ACER Algorithm 2               acer_loss                 (∂π/∂θ)ᵀ z*
    ACER Algorithm 1               acer, update              on-policy call, n ~ Poisson(r) replays
    DQN Methods                    nature_cnn                convolutional network
    Engstrom section 3, item 9     clip_global_norm          gradient clipping

Departures from the ACER paper that no flag reverts (PAPER below lists the others)
    Environments are stepped together. The paper has 16 asynchronous threads.
    All environments share one draw of n ~ Poisson(r). In the paper each thread draws its own.
    An update from replay takes a stored segment of T steps of each environment. In the paper a
    thread updates from one trajectory at a time.
    Gradients are means over the batch. In the paper they are sums over a trajectory.
    RMSProp is that of TensorFlow 1, as in OpenAI baselines.
    The entropy bonus is inside the trust region. The paper does not say where it is.
    Policy and critic have a network each for vectors. The paper's discrete tasks are all images.
    1e-6 is added to probabilities before a division or a logarithm, as in OpenAI baselines.
    When a time limit ends an episode, its last target keeps γ V(final observation) (Pardo eq. 6).
    The id of an ALE game names the game only. Frame skip and sticky actions are those of this file.
    In games with FIRE, ALE presses it at a reset. After a lost life FIRE replaces the policy's
    action, and the policy's action is stored.
Ablations: --replay-ratio 0 (on-policy only), --no-trust-region, --no-bias-correction, --trunc-c inf
(neither truncation nor correction in eq. 9).

A resumed run restarts unfinished episodes. Its replay memory is empty unless --save-replay stored
it, and replay begins again after --replay-start steps of each environment. If no episode is
unfinished at the checkpoint, and the memory is stored or not used, the resumed run equals the
uninterrupted run bit for bit (on the CPU). The random states of ALE can't be saved, so a resumed
run plays its games with new seeds.
"""

import copy
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, TextIO, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

# ---- Args ----------------------------------------------------------------------------------------


@dataclass
class RunArgs:
    # Gymnasium id such as ALE/Pong-v5 or CartPole-v1, with images or vectors as observations, or
    # module:Env-v0 for an environment of your own
    env_id: str = "CartPole-v1"
    seed: int = 1  # seed of weights, actions, replay and environments
    # environment steps, such as 1_000_000 or 1e6, rounded down to whole iterations. A step of ALE
    # is 4 frames. With --resume, a larger value continues the run and stretches anneal_lr. None:
    # 10,000,000 for images, 150,000 for vectors
    total_timesteps: int | float | None = None
    # use the settings of the ACER paper, for ALE. Flags you give override them. Replay begins after
    # 160,000 steps
    paper: bool = False
    # a new folder for this run. None: runs/<environment>__<script>__s<seed>__<date>
    run_dir: str | None = None
    # continue from this checkpoint.pt with its flags. Flags you give override them, except those
    # that a run can't change
    resume: str | None = None
    evaluate: str | None = None  # evaluate this checkpoint.pt instead of training, with its flags
    # evaluation episodes with the most probable actions, and as many with sampled ones. 0: no
    # evaluation. An episode of ALE is a whole game
    eval_episodes: int = 10
    video_dir: str | None = None  # folder for a GIF of one episode with the most probable actions
    # store the replay memory in each checkpoint. The file is then as large as the memory, and it
    # takes as much RAM again to save it
    save_replay: bool = False
    # auto, cpu, cuda, cuda:1 or mps. auto is cuda for images where there is a GPU, else cpu
    device: str = "auto"
    # compile the minibatch step with torch.compile. auto compiles runs of 250,000 steps or more
    compile: Literal["auto", "on", "off"] = "auto"


@dataclass
class EnvironmentArgs:
    # N, number of environments. ALE steps them in parallel. None: 16 for images, 8 for vectors
    num_envs: int | None = None
    # ALE: learn as if a lost life ended the episode (DQN Methods). The game and its score go on
    life_loss_terminal: bool = True
    # ALE: probability that the last action is repeated, whatever the id says. Machado et al. 2018
    # recommend 0.25
    repeat_action_probability: float = 0.0
    # images: learn from the sign of the reward (DQN Methods). Scores are of raw rewards
    clip_rewards: bool = True
    images: tyro.conf.Suppress[bool | None] = None  # not a flag: set by fill_defaults


@dataclass
class AlgorithmArgs:
    num_steps: int = 20  # T (k in the paper), steps per environment and iteration
    gamma: float = 0.99  # γ, the discount factor
    # r, mean number of updates from replay for each on-policy one. 0: on-policy only
    replay_ratio: float = 4.0
    # steps per environment in the replay memory. 50,000 of 16 ALE games take 6.3 GiB
    replay_capacity: int = 50_000
    # replay begins when each environment has stored this many steps. None: 10,000 for images, 250
    # for vectors
    replay_start: int | None = None
    # c of ACER eq. 9: the policy gradient truncates ratios π/μ at c. Q^ret truncates them at 1
    trunc_c: float = 10.0
    # the second term of ACER eq. 9, for what the truncation leaves out
    bias_correction: bool = True
    trust_region: bool = True  # ACER eq. 11, around the average policy
    trust_region_delta: float = 1.0  # δ of ACER eq. 11
    avg_decay: float = 0.99  # α of the average policy, θ_a ← α θ_a + (1-α) θ after each update
    q_coef: float = 0.5  # weight of the critic's loss ½ (Q^ret - Q)². 1 in ACER eq. 6
    ent_coef: float = 0.01  # weight of the entropy bonus
    # η, step size of RMSProp. None: 7e-4 for images, 5e-3 for vectors
    learning_rate: float | None = None
    anneal_lr: bool = False  # anneal the learning rate linearly to zero
    max_grad_norm: float = 10.0  # largest norm of the gradient. inf: no clipping
    # sizes of the hidden layers, such as 64 64. For images, of those after the convolutions. None:
    # 512 for images, 64 64 for vectors
    hidden_sizes: tuple[int, ...] | None = None
    # orthogonal weights with gain √2 (policy output 0.01, Q output 1), or PyTorch's default
    orthogonal_init: bool = True


@dataclass
class Args(AlgorithmArgs, EnvironmentArgs, RunArgs):  # fields come from the last base to the first
    """All flags of the three groups above."""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return int(self.total_timesteps // self.batch_size)

    @property
    def planned_steps(self) -> int:
        """total_timesteps, rounded down to whole iterations."""
        return self.num_iterations * self.batch_size

    @property
    def torch_device(self) -> torch.device:
        auto = "cuda" if self.images and torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)

    @property
    def torch_threads(self) -> int:
        return THREADS if self.images else 1  # more do not help small networks


DEFAULTS = {  # of fields that are None: for images (OpenAI baselines), for vectors
    "total_timesteps": (10_000_000, 150_000),
    "num_envs": (16, 8),
    "replay_start": (10_000, 250),
    "learning_rate": (7e-4, 5e-3),
    "hidden_sizes": ((512,), (64, 64)),
}

PAPER = {  # --paper: ACER sections 3 and 4, and OpenAI baselines where the paper is silent
    "num_envs": 16,  # asynchronous threads
    "replay_start": 10_000,  # OpenAI baselines
    "q_coef": 1.0,
    "ent_coef": 0.001,
    "learning_rate": 7e-4,  # OpenAI baselines. The paper takes one from A3C and does not print it
}

EPS = 1e-6  # keeps ratios and logarithms of probabilities finite
THREADS = torch.get_num_threads()  # of PyTorch, for images
ALL = slice(None)  # the part of a single process: all environments
HUGE = 1e10  # larger observations are refused
ALE = "ale_py.env:AtariEnv"  # entry point of its games in Gymnasium
FRAME_STACK = 4  # ALE: frames in an observation (DQN Methods)
FRAME_SKIP = 4  # ALE: frames that an action is repeated for (DQN Methods)
MAX_FRAMES = 108_000  # ALE: a game is truncated after 30 minutes


class InputError(ValueError):
    """Bad input. The message is one line that says what to change."""


class NonFiniteError(FloatingPointError):
    """NaN, infinity or a number too large to train on. The message says where it appeared."""


def fill_defaults(args: Args, images: bool) -> Args:
    """Return a copy with the values of DEFAULTS, for images or for vectors, in place of None.

    Sets `images`, and turns clip_rewards off for vectors.
    """
    args = replace(args, images=images, clip_rewards=args.clip_rewards and images)
    for name, (for_images, for_vectors) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, for_images if images else for_vectors)
    return args


# ---- Equations -----------------------------------------------------------------------------------
# T steps, N environments, A actions, O observation dims or (C, H, W) of an image, P weights


def truncated_gradient(
    probs: Tensor, q: Tensor, q_ret: Tensor, actions: Tensor, mu: Tensor, trunc_c: float
) -> Tensor:
    """First term of ACER eq. 9, as the gradient with respect to π: the action taken, ρ at most c.

    1{a = a_t} min(c, ρ_a) (Q^ret - V) / π_a  with  ρ = π/μ,  V = Σ_a π_a Q_a

    1/π_a is the derivative of log π_a. q_ret and actions are (…,), the others (…, A). Returns
    (…, A).
    """
    rho = probs / (mu + EPS)
    values = (probs * q).sum(-1)
    taken = torch.nn.functional.one_hot(actions, probs.shape[-1])
    return taken * rho.clamp(max=trunc_c) * (q_ret - values)[..., None] / (probs + EPS)


def correction_gradient(probs: Tensor, q: Tensor, mu: Tensor, trunc_c: float) -> Tensor:
    """Second term of ACER eq. 9, as the gradient with respect to π: what the truncation leaves out.

    π_a [1 - c/ρ_a]₊ (Q_a - V) / π_a

    π_a is the weight of the expectation, 1/π_a the derivative of log π_a. Takes and returns (…, A).
    """
    rho = probs / (mu + EPS)
    values = (probs * q).sum(-1, keepdim=True)
    weight = (1 - trunc_c / (rho + EPS)).clamp(min=0)
    return probs * weight * (q - values) / (probs + EPS)


def entropy_gradient(probs: Tensor) -> Tensor:
    """The gradient of the entropy with respect to π, -log π_a - 1. ACER section 4 has its weight.

    S[π] = -Σ_a π_a log π_a. Takes and returns (…, A).
    """
    return -(probs + EPS).log() - probs / (probs + EPS)


def acer_gradient(
    probs: Tensor,
    q: Tensor,
    q_ret: Tensor,
    actions: Tensor,
    mu: Tensor,
    trunc_c: float,
    ent_coef: float,
    bias_correction: bool = True,
) -> Tensor:
    """ACER eqs. 9-10: g, the gradient with respect to the probabilities π, with an entropy bonus.

    Without `bias_correction` the second term of eq. 9 is left out. q_ret and actions are (…,), the
    others (…, A). Returns (…, A).
    """
    g = truncated_gradient(probs, q, q_ret, actions, mu, trunc_c)
    if bias_correction:
        g = g + correction_gradient(probs, q, mu, trunc_c)
    return g + ent_coef * entropy_gradient(probs)


def kl_gradient(avg_probs: Tensor, probs: Tensor) -> Tensor:
    """ACER section 3.3: k, the gradient of KL(π_a ‖ π) with respect to π: -π_a / π. (…, A) each."""
    return -avg_probs / (probs + EPS)


def trust_region_step(g: Tensor, k: Tensor, delta: float) -> Tensor:
    """ACER eqs. 11-12: z*, in each state the nearest to g of all z with kᵀz ≤ δ. (…, A) each.

    z* = g - max(0, (kᵀg - δ) / ‖k‖²) k
    """
    assert g.shape == k.shape
    excess = (k * g).sum(-1, keepdim=True) - delta
    return g - (excess / k.square().sum(-1, keepdim=True)).clamp(min=0) * k


def retrace(
    rewards: Tensor,
    q_taken: Tensor,
    next_values: Tensor,
    rho: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
) -> Tensor:
    """ACER eq. 5, Retrace eq. 3 with c_s = min(1, ρ_s): the target Q^ret of Q(s_t, a_t).

    Q^ret_t = r_t + γ ρ̄_{t+1} (Q^ret_{t+1} - Q(s_{t+1}, a_{t+1})) + γ V(s_{t+1}),  ρ̄ = min(1, ρ)

    `rho` are the ratios π/μ of the actions taken. They are truncated at 1, as in Algorithm 2. Below
    eq. 5 the paper prints min(c, ρ), with the letter c of eq. 9. `next_values[t]` is V of the state
    that action t led to. A termination removes this V. A time limit keeps it, as V(final
    observation) (Pardo eq. 6). Both (`done`), and the end of the segment, remove the term with ρ̄.
    Takes and returns (T, N).
    """
    assert rewards.shape == q_taken.shape == next_values.shape == rho.shape
    assert rewards.shape == terminated.shape == done.shape
    rho = rho.clamp(max=1)
    q_ret = []
    beyond = torch.zeros_like(rewards[0])  # ρ̄_{t+1} (Q^ret_{t+1} - Q_{t+1})
    for t in reversed(range(len(rewards))):
        future = beyond * ~done[t] + next_values[t] * ~terminated[t]
        q_ret.insert(0, rewards[t] + gamma * future)
        beyond = rho[t] * (q_ret[0] - q_taken[t])
    return torch.stack(q_ret)


@torch.no_grad()
def update_average(avg: nn.Module, net: nn.Module, decay: float) -> None:
    """ACER section 3.3: θ_a ← α θ_a + (1 - α) θ, in place."""
    for average, param in zip(avg.parameters(), net.parameters(), strict=True):
        average.lerp_(param, 1 - decay)


# ---- Networks ------------------------------------------------------------------------------------


def mlp(sizes: tuple[int, ...], last_gain: float, orthogonal: bool) -> nn.Sequential:
    """Fully connected tanh network with a linear output (Engstrom section 3, items 3 and 8)."""
    linears = [nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
    layers = []
    for linear in linears:
        if orthogonal:
            gain = last_gain if linear is linears[-1] else math.sqrt(2)
            nn.init.orthogonal_(linear.weight, gain)
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def nature_cnn(
    obs_shape: tuple[int, ...], hidden_sizes: tuple[int, ...], orthogonal: bool
) -> nn.Sequential:
    """Network of DQN (Methods) without its output layer. Takes (B, C, H, W)."""
    channels, height, width = obs_shape
    layers = []
    for filters, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
        layers += [nn.Conv2d(channels, filters, kernel, stride), nn.ReLU()]
        channels = filters
        height = (height - kernel) // stride + 1
        width = (width - kernel) // stride + 1
    layers.append(nn.Flatten())
    size = channels * height * width
    for hidden_size in hidden_sizes:
        layers += [nn.Linear(size, hidden_size), nn.ReLU()]
        size = hidden_size
    for layer in layers:
        if orthogonal and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # faster on CPU and GPU


class ActorCritic(nn.Module):
    """π_θ(a|s), the softmax of its head, and Q_θ(s, a), both of raw observations.

    For images they are two heads of one network, for vectors they have a network each.
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.obs_shape = obs_shape
        self.obs_dims = len(obs_shape)
        self.images = len(obs_shape) == 3
        self.num_actions = num_actions
        hidden_sizes = args.hidden_sizes
        orthogonal = args.orthogonal_init
        if self.images:
            self.trunk = nature_cnn(obs_shape, hidden_sizes, orthogonal)
        else:
            sizes = (*obs_shape, *hidden_sizes)
            self.trunk = nn.Sequential(mlp(sizes, math.sqrt(2), orthogonal), nn.Tanh())
            self.q_trunk = nn.Sequential(mlp(sizes, math.sqrt(2), orthogonal), nn.Tanh())
        self.policy_head = mlp((hidden_sizes[-1], num_actions), 0.01, orthogonal)
        self.q_head = mlp((hidden_sizes[-1], num_actions), 1.0, orthogonal)

    def to_inputs(self, obs: Tensor | np.ndarray) -> Tensor:
        """Return raw observations (…, O) in the dtype and on the device of the networks."""
        if not isinstance(obs, Tensor):
            obs = torch.from_numpy(np.array(obs, None if self.images else np.float64))
        shape = self.obs_shape
        assert obs.shape[-len(shape) :] == shape, f"an observation has the shape {shape}"
        weight = self.q_head[0].weight
        if not self.images:
            obs = obs.to(weight.dtype)  # before the device: MPS has no float64
        return obs.to(weight.device).to(weight.dtype)

    def features(self, inputs: Tensor) -> Tensor:
        """Return what the head of the policy reads, (…, hidden_sizes[-1])."""
        if not self.images:
            return self.trunk(inputs)
        x = inputs.reshape(-1, *self.obs_shape) / 255  # (B, C, H, W)
        x = self.trunk(x.to(memory_format=torch.channels_last))
        return x.reshape(*inputs.shape[:-3], -1)

    def probs(self, obs: Tensor | np.ndarray) -> Tensor:
        """Return π (…, A) for raw observations (…, O)."""
        return self.policy_head(self.features(self.to_inputs(obs))).softmax(-1)

    def forward(self, obs: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return π and Q, each (…, A), for raw observations (…, O)."""
        inputs = self.to_inputs(obs)
        features = self.features(inputs)
        q_features = features if self.images else self.q_trunk(inputs)
        return self.policy_head(features).softmax(-1), self.q_head(q_features)

    @torch.inference_mode()
    def sample(self, obs: np.ndarray, noise: Tensor) -> Tensor:
        """Return argmax_a π(a|s) / E_a (…,) for raw observations (…, O), and noise E (…, A).

        With independent E_a ~ Exp(1) it is a draw from π(·|s): E_a / π_a of a is the smallest one
        with probability π_a. With E_a = 1 it is the most probable action.
        """
        probs = self.probs(obs).cpu()
        return (probs / noise).argmax(-1)

    def act(
        self, obs: np.ndarray, deterministic: bool = True, rng: torch.Generator | None = None
    ) -> np.ndarray:
        """Return the most probable action or a sample for raw observations, one or a batch.

        Without `rng` the noise comes from PyTorch's global generator.
        """
        noise = torch.ones(*np.shape(obs)[: -self.obs_dims], self.num_actions)
        if not deterministic:
            noise = noise.exponential_(generator=rng)
        return self.sample(obs, noise).numpy()


# ---- Loss and update -----------------------------------------------------------------------------


def acer_loss(
    policy: ActorCritic,
    average: ActorCritic | None,
    batch: "Segment",
    final_values: Tensor,
    args: Args,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of ACER Algorithm 2, to be minimized, and metrics. Means over (T, N).

    The gradient of the policy's part is -(∂π/∂θ)ᵀ z*. The critic's part is q_coef ½ (Q^ret - Q)².
    Its gradient is -q_coef times eq. 6. Algorithm 2 prints the gradient of (Q^ret - Q)². This is -2
    times eq. 6. `final_values` (T, N) is V(final observation) of the truncated steps.
    """
    probs, q = policy(batch.obs)  # (T+1, N, A) each
    values = (probs * q).sum(-1).detach()  # V, (T+1, N)
    probs = probs[:-1]
    q = q[:-1]
    taken = batch.actions[..., None]
    q_taken = q.gather(-1, taken).squeeze(-1)  # (T, N)

    with torch.no_grad():
        rho = (probs / (batch.mu + EPS)).gather(-1, taken).squeeze(-1)  # (T, N)
        next_values = torch.where(batch.truncated, final_values, values[1:])
        done = batch.terminated | batch.truncated
        q_ret = retrace(
            batch.rewards, q_taken, next_values, rho, batch.terminated, done, args.gamma
        )
        inputs = (probs, q, q_ret, batch.actions, batch.mu)
        g = acer_gradient(*inputs, args.trunc_c, args.ent_coef, args.bias_correction)
        z = g
        if args.trust_region:
            avg_probs = average.probs(batch.obs[:-1])
            z = trust_region_step(g, kl_gradient(avg_probs, probs), args.trust_region_delta)

    policy_loss = -(z * probs).sum(-1).mean()  # z is constant, so the gradient is -(∂π/∂θ)ᵀ z
    q_loss = 0.5 * (q_ret - q_taken).square().mean()
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": q_loss,
        "entropy": -(probs * (probs + EPS).log()).sum(-1).mean(),
        "explained_variance": 1 - (q_ret - q_taken).var() / q_ret.var(),
        "mean_ratio": rho.mean(),
        "truncated_ratios": (rho > args.trunc_c).float().mean(),
        "cut_traces": (rho < 1 - 1e-4).float().mean(),  # ρ̄ < 1 shortens Q^ret. 1e-4: EPS in ρ
    }
    if args.trust_region:
        log_ratio = (avg_probs + EPS).log() - (probs + EPS).log()
        metrics["approx_kl"] = (avg_probs * log_ratio).sum(-1).mean()  # KL(π_a ‖ π)
        metrics["adjusted_states"] = (z != g).any(-1).float().mean()
    return policy_loss + args.q_coef * q_loss, metrics


def clip_global_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 9: g ← g min(1, c / ‖g‖₂).

    g is the gradient of all weights as one vector. Returns the clipped g (P,) and the norm before
    clipping.
    """
    flat = torch.cat([g.flatten() for g in grads])
    norm = flat.norm()
    return flat * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


class RMSProp(nn.Module):
    """RMSProp of TensorFlow 1 for P weights: v starts at 1, and ε is inside the root.

    OpenAI baselines uses it. In torch.optim.RMSprop v starts at 0 and ε is outside. For g = 0.01
    the first step of torch.optim.RMSprop is a thousand times as long as here.
    """

    def __init__(self, num_weights: int, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.decay = decay
        self.eps = eps
        self.register_buffer("lr", torch.tensor(0.0))  # η
        self.register_buffer("v", torch.ones(num_weights))

    @torch.no_grad()
    def step(self, params: list[Tensor], grad: Tensor) -> None:
        """Take one step against `grad` (P,), the gradient of a loss. `params` hold P weights.

        v ← d v + (1 - d) g²
        θ ← θ - η g / √(v + ε)
        """
        self.v.lerp_(grad.square(), 1 - self.decay)
        change = self.lr * grad / (self.v + self.eps).sqrt()
        sizes = [param.numel() for param in params]
        for param, part in zip(params, change.split(sizes), strict=True):
            param -= part.view_as(param)


def minibatch_step(
    policy: ActorCritic,
    average: ActorCritic | None,
    rmsprop: RMSProp,
    batch: "Segment",
    final_values: Tensor,
    args: Args,
) -> dict[str, Tensor]:
    """Take one step of RMSProp on the loss of one batch, then one of θ_a, and return metrics."""
    loss, metrics = acer_loss(policy, average, batch, final_values, args)
    params = list(policy.parameters())
    grads = torch.autograd.grad(loss, params)
    grad, grad_norm = clip_global_norm([mean_of_processes(grads)], args.max_grad_norm)
    rmsprop.step(params, grad)
    if args.trust_region:
        update_average(average, policy, args.avg_decay)
    metrics["grad_norm"] = grad_norm
    return {name: value.detach() for name, value in metrics.items()}


def update(
    policy: ActorCritic,
    average: ActorCritic | None,
    rmsprop: RMSProp,
    train_step: Callable,
    replay: "Replay",
    rng: torch.Generator,
    args: Args,
) -> dict[str, float]:
    """ACER Algorithm 1: a call on the newest segments, then n ~ Poisson(r) on segments from replay.

    `train_step` is minibatch_step, compiled or not. Returns the metrics of the on-policy call and,
    with the prefix replay_, the means over the n from replay, NaN if n = 0. Both are then averaged
    over the processes of torchrun. replay_updates is n.
    """
    calls = []
    num_replays = 0
    if replay.count * args.num_steps >= args.replay_start:
        num_replays = int(torch.poisson(torch.tensor(float(args.replay_ratio)), generator=rng))
    for i in range(1 + num_replays):
        batch = replay.newest() if i == 0 else replay.sample(rng)
        final_values = torch.zeros(batch.rewards.shape)
        for t, n, obs in batch.finals:
            with torch.no_grad():
                probs, q = policy(obs)
            final_values[t, n] = (probs * q).sum()
        device = rmsprop.v.device
        *tensors, _ = batch
        batch = Segment(*[x.to(device) for x in tensors], finals=[])
        inputs = (batch, final_values.to(device), args)
        calls.append(train_step(policy, average, rmsprop, *inputs))

    metrics = {}
    for name, value in calls[0].items():
        metrics[name] = value.item()
        replayed = [call[name] for call in calls[1:]]
        metrics[f"replay_{name}"] = torch.stack(replayed).mean().item() if replayed else math.nan
    parts = gather(metrics)
    metrics = {name: float(np.mean([part[name] for part in parts])) for name in metrics}
    metrics["replay_updates"] = float(num_replays)
    metrics["learning_rate"] = rmsprop.lr.item()
    return metrics


# ---- Environments and rollout --------------------------------------------------------------------


class Envs:
    """N Gymnasium environments, stepped one after another.

    `obs` (N, O) is what to act on next. `rng_states[i]` is the random state of environment i before
    its last reset. A resumed run starts from these states, so it repeats these resets. Resets and
    steps raise InputError if an environment returns what Gymnasium does not allow.
    """

    def __init__(self, envs: list[gym.Env], seeds: np.ndarray, rng_states: list | None = None):
        self.envs = envs
        self.action_space = envs[0].action_space
        space = envs[0].observation_space
        self.obs = np.zeros((len(envs), *space.shape), space.dtype)
        self.spaces = describe_spaces(space, self.action_space)
        self.fps = envs[0].metadata.get("render_fps") or 30
        self.lengths = np.zeros(len(envs), int)  # steps of the unfinished episodes
        self.rng_states = rng_states or [None] * len(envs)
        for i, env in enumerate(envs):
            env.reset(seed=int(seeds[i]))  # only to seed env.np_random
            if self.rng_states[i] is not None:
                env.np_random.bit_generator.state = self.rng_states[i]
            self.reset(i)

    def reset(self, i: int) -> None:
        """Start an episode of environment i."""
        env = self.envs[i]
        if isinstance(env.np_random, np.random.Generator):  # the state of others can't be saved
            self.rng_states[i] = to_python(env.np_random.bit_generator.state)
        self.lengths[i] = 0
        result = env.reset()
        try:
            obs, _ = result
            self.obs[i] = self.checked(obs)
        except (TypeError, ValueError) as error:
            raise self.wrong_result(i, result) from error

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take actions (N,), and start an episode where one ends.

        Returns next_obs (N, O), rewards, terminated and truncated, each (N,). next_obs[i] is the
        true successor. At the end of an episode it is the final observation.
        """
        next_obs = np.empty_like(self.obs)
        rewards = np.empty(len(self.envs))
        terminated = np.empty(len(self.envs), bool)
        truncated = np.empty(len(self.envs), bool)
        self.lengths += 1
        for i, env in enumerate(self.envs):
            result = env.step(actions[i])
            try:
                obs, reward, terminated[i], truncated[i], _ = result
                rewards[i] = float(reward)
                next_obs[i] = self.checked(obs)
            except (TypeError, ValueError, OverflowError) as error:
                raise self.wrong_result(i, result) from error
        self.obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            self.reset(i)
        return next_obs, rewards, terminated, truncated

    def checked(self, obs: np.ndarray) -> np.ndarray:
        """Return one observation. Raises ValueError if it would be broadcast or truncated."""
        obs = np.asarray(obs)
        truncates = obs.dtype.kind == "f" and self.obs.dtype.kind != "f"
        if obs.shape != self.obs.shape[1:] or truncates:
            raise ValueError
        return obs

    def wrong_result(self, i: int, result: object) -> InputError:
        """Return the error for environment i, which returned `result`."""
        parts = result if isinstance(result, tuple) else [result]
        types = [f"{getattr(x, 'dtype', type(x).__name__)}{getattr(x, 'shape', '')}" for x in parts]
        expected = f"an observation of type {self.obs.dtype} and shape {self.obs.shape[1:]}"
        expected += ", a number, two booleans and a dict" if self.lengths[i] else " and a dict"
        place = f"environment {i}, step {self.lengths[i]} of its episode"
        return InputError(f"{place}: it returned {', '.join(types)}, but must return {expected}")

    def render(self) -> np.ndarray:
        """Return a picture of the first environment (H, W, 3)."""
        return self.envs[0].render()

    def close(self) -> None:
        close_all(self.envs)


def describe_spaces(obs: gym.spaces.Box, actions: gym.spaces.Discrete) -> dict:
    """Return what a checkpoint keeps of the spaces."""
    return {"obs_shape": obs.shape, "num_actions": int(actions.n)}


class AtariEnvs:
    """N games in ALE's vector environment, with the attributes and methods of Envs.

    An observation has a gray picture of 84 x 84 pixels from each of the last four steps. A step
    repeats its action for four frames of the game, and a pixel is the maximum over the last two
    (DQN Methods). A game begins with up to 30 no-ops. With `life_loss`, `terminated` is also True
    for a lost life, after which the game goes on. `rng_states` counts the steps so far, which give
    a resumed run other seeds: ALE's random states can't be saved.
    """

    def __init__(
        self,
        game: str,
        seeds: np.ndarray,
        steps: int,
        life_loss: bool,
        repeat_action_probability: float,
        color: bool,
    ):
        import ale_py

        make = partial(
            ale_py.AtariVectorEnv,
            game,
            autoreset_mode="SameStep",
            frameskip=FRAME_SKIP,
            max_num_frames_per_episode=MAX_FRAMES,
            reward_clipping=False,
            life_loss_info=life_loss,
            repeat_action_probability=repeat_action_probability,
        )
        self.ale = make(len(seeds), stack_num=FRAME_STACK)
        self.action_space = self.ale.single_action_space
        self.spaces = describe_spaces(self.ale.single_observation_space, self.action_space)
        self.fps = 60 / FRAME_SKIP
        self.lengths = np.zeros(len(seeds), int)  # steps of the unfinished games
        self.rng_states = [steps] * len(seeds)
        seeds = (seeds >> 1).astype(np.int32)
        self.obs, info = self.ale.reset(seed=seeds)
        self.frames = info["episode_frame_number"]
        self.lives = info["lives"]
        self.lost_life = np.zeros(len(seeds), bool)
        self.has_fire = self.ale.ale.get_action_set()[1] == ale_py.Action.FIRE
        self.twin = None  # the first game once more, in color: same seed, same actions
        if color:
            self.twin = make(1, stack_num=1, grayscale=False, img_height=210, img_width=160)
            self.picture, _ = self.twin.reset(seed=seeds[:1])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take actions (N,), and start a game where one ends. See Envs.step."""
        actions = np.where(self.has_fire & self.lost_life, 1, actions)
        obs, rewards, terminated, truncated, info = self.ale.step(actions)
        if self.twin is not None:
            self.picture, *_ = self.twin.step(actions[:1])
        frames = info["episode_frame_number"]
        # `terminated` may be a lost life. The frame number falls only when a new game starts
        over = truncated | (frames < self.frames)
        self.frames = frames
        self.lost_life = info["lives"] < self.lives
        self.lives = info["lives"]
        self.obs = obs
        self.lengths = np.where(over, 0, self.lengths + 1)
        self.rng_states = [steps + 1 for steps in self.rng_states]
        next_obs = obs
        if over.any():
            next_obs = np.where(over[:, None, None, None], info["final_obs"], obs)
        return next_obs, rewards.astype(float), terminated, truncated

    def render(self) -> np.ndarray:
        """Return a color picture of the first game (210, 160, 3)."""
        return self.picture[0, -1]

    def close(self) -> None:
        close_all([self.ale] if self.twin is None else [self.ale, self.twin])


class Segment(NamedTuple):
    """T steps in each of N environments, under the policy μ of their time."""

    obs: Tensor  # (T+1, N, O)  s_0 to s_T. An ended episode is followed by the next one
    actions: Tensor  # (T, N)
    mu: Tensor  # (T, N, A)  μ(·|s_t)
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    truncated: Tensor  # (T, N)  and not terminated
    resets: Tensor  # (T, N)  a new episode began after this step
    finals: list  # (t, n, final observation) of the truncated steps


def collect(envs: Envs, policy: ActorCritic, noise: Tensor) -> Segment:
    """Run the policy for T steps with noise (T, N, A)."""
    observations = [torch.from_numpy(envs.obs)]
    steps = []
    finals = []
    for t, noise_t in enumerate(noise):
        actions = policy.sample(envs.obs, noise_t).numpy()
        next_obs, rewards, terminated, truncated = envs.step(actions)
        truncated = truncated & ~terminated
        steps.append((actions, rewards, terminated, truncated, envs.lengths == 0))
        for n in np.flatnonzero(truncated):
            finals.append((t, int(n), torch.from_numpy(next_obs[n].copy())))
        observations.append(torch.from_numpy(envs.obs))
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*steps, strict=True)]
    actions, rewards, *flags = columns
    obs = torch.stack(observations)
    if obs.dtype != torch.uint8:
        obs = obs.float()
    with torch.no_grad():
        mu = policy.probs(obs[:-1])
    return Segment(obs, actions, mu.cpu(), rewards, *flags, finals)


class Episodes:
    """Return (of raw rewards) and length of each episode. `last` holds those of the last 100."""

    def __init__(self, num_envs: int, last: Iterable[tuple[float, int]] = ()):
        self.last = deque(last, maxlen=100)  # (return, length)
        self.returns = np.zeros(num_envs)  # of the unfinished episodes
        self.lengths = np.zeros(num_envs, int)

    def add(self, rewards: Tensor, ended: Tensor) -> None:
        """Count T steps: their rewards and whether they ended an episode, (T, N) each."""
        for reward, end in zip(rewards.numpy(), ended.numpy(), strict=True):
            self.returns += reward
            self.lengths += 1
            for i in np.flatnonzero(end):
                self.last.append((float(self.returns[i]), int(self.lengths[i])))
                self.returns[i] = 0
                self.lengths[i] = 0

    def means(self) -> dict[str, float]:
        """Return the means over the last 100 episodes, NaN if none ended."""
        returns = [ret for ret, _ in self.last]
        lengths = [length for _, length in self.last]
        return {"episodic_return": mean_or_nan(returns), "episodic_length": mean_or_nan(lengths)}


def stack_frames(frames: Tensor, resets: Tensor) -> Tensor:
    """Return observations of S frames each (T+1, N, S, H, W), from frames stored once.

    frames (S+T, N, H, W): the S frames of the first observation, then the newest of each later one.
    resets (T, N): a new episode began after step t. An observation shows only frames of its own
    episode. ALE sets older ones to 0. Example: S = 3, T = 3, frames a b c d e f and
    resets = [False, True, False] give

    s_0 = a b c
    s_1 = b c d
    s_2 = 0 0 e    resets[1]: e begins a new episode
    s_3 = 0 e f
    """
    num_steps = len(resets)
    size = len(frames) - num_steps
    before = torch.zeros(size, *resets.shape[1:], dtype=int)
    episode = torch.cat([before, resets.cumsum(0)])  # number of the episode of each frame
    observations = []
    for t in range(num_steps + 1):
        window = slice(t, t + size)
        same = episode[window] == episode[t + size - 1]  # (S, N)
        stack = frames[window] * same[..., None, None]
        observations.append(stack.transpose(0, 1))
    return torch.stack(observations)


class Replay:
    """The last segments of each environment (ACER section 4: a replay memory for each thread).

    If `stacked`, observations are stacks of frames, and each frame is stored once.
    """

    def __init__(self, slots: int, stacked: bool):
        self.slots = slots
        self.stacked = stacked
        self.count = 0  # segments of each environment so far
        # field of Segment: its values in all slots (slots, T, N, …). obs has T+1 observations in
        # place of T, or S+T frames
        self.memory = {}
        self.finals = {}  # slot: finals of its segment

    def add(self, segment: Segment) -> None:
        """Store a segment of each environment, in place of the oldest once the memory is full."""
        slot = self.count % self.slots
        values = segment._asdict()
        self.finals[slot] = values.pop("finals")
        if self.stacked:
            values["obs"] = torch.cat([segment.obs[0].transpose(0, 1), segment.obs[1:, :, -1]])
        for name, value in values.items():
            if name not in self.memory:
                self.memory[name] = self.allocate(value)
            self.memory[name][slot] = value
        self.count += 1

    def allocate(self, value: Tensor) -> Tensor:
        """Return zeros for a value of each slot. Raises InputError if they do not fit."""
        try:
            return torch.zeros(self.slots, *value.shape, dtype=value.dtype)
        except RuntimeError as error:
            why = "the replay memory does not fit: lower --replay-capacity or --num-envs"
            raise InputError(why) from error

    def newest(self) -> Segment:
        """Return the newest segment of each environment."""
        num_envs = self.memory["rewards"].shape[2]
        return self.take(torch.full((num_envs,), (self.count - 1) % self.slots))

    def sample(self, rng: torch.Generator) -> Segment:
        """Return a random segment of each environment. Environments draw apart from each other."""
        _, processes = rank_and_size()
        num_envs = self.memory["rewards"].shape[2] * processes
        stored = min(self.count, self.slots)
        slots = torch.randint(stored, (num_envs,), generator=rng)
        return self.take(slots[own_part(num_envs)])

    def take(self, slots: Tensor) -> Segment:
        """Return the segment slots[n] of each environment n."""
        columns = torch.arange(len(slots))
        values = {}
        for name, x in self.memory.items():
            values[name] = x[slots, :, columns].transpose(0, 1)  # from (N, T, …) to (T, N, …)
        if self.stacked:
            values["obs"] = stack_frames(values["obs"], values["resets"])
        finals = []
        for n, slot in enumerate(slots.tolist()):
            finals += [final for final in self.finals[slot] if final[1] == n]
        return Segment(**values, finals=finals)


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process, and how many torchrun has started: 0 and 1 without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_part(num_envs: int) -> slice:
    """Return which of the N environments this process steps."""
    rank, size = rank_and_size()
    share = num_envs // size
    return slice(rank * share, (rank + 1) * share)


def gather(value: object) -> list:
    """Return the values of all processes, in their order. Each process has to call it."""
    _, size = rank_and_size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def mean_of_processes(grads: Sequence[Tensor]) -> Tensor:
    """Return a gradient as one vector (P,), averaged over the processes of torchrun."""
    flat = torch.cat([grad.flatten() for grad in grads])
    _, size = rank_and_size()
    if size > 1:
        dist.all_reduce(flat)
        flat = flat / size
    return flat


def env_options(args: Args) -> dict[str, bool | float]:
    """Return the arguments of make_envs for training. Evaluation has no life_loss."""
    return {
        "life_loss": args.life_loss_terminal,
        "repeat_action_probability": args.repeat_action_probability,
    }


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    rng_states: list | None = None,
    part: slice = ALL,
    life_loss: bool = False,
    repeat_action_probability: float = 0.0,
    **kwargs,
) -> Envs | AtariEnvs:
    """Make those of N environments that `part` selects. `kwargs` go to gym.make. Raises InputError.

    `life_loss` and `repeat_action_probability` are for games of ALE only.
    """
    with suppress(ImportError):
        import ale_py  # noqa: F401  registers its games
    with suppress(Exception):
        import mujoco

        mujoco.set_mju_user_warning(mujoco_warning)
    if env_id.count(":") > 1 or env_id.startswith(":"):
        raise InputError(f"--env-id {env_id}: write Env-v0 or module:Env-v0")
    if env_id.startswith("envpool:"):
        raise InputError(f"--env-id {env_id}: EnvPool is for the scripts of continuous actions")
    rng_states = rng_states and rng_states[part]
    envs = []
    try:
        game = ale_game(env_id)
        if game is not None:
            steps = rng_states[0] if rng_states else 0
            seeds = np.random.SeedSequence((seed, steps)).generate_state(num_envs)[part]
            return AtariEnvs(
                game,
                seeds,
                steps,
                life_loss,
                repeat_action_probability,
                color="render_mode" in kwargs,
            )
        seeds = np.random.SeedSequence(seed).generate_state(num_envs)[part]
        for _ in seeds:
            envs.append(gym.make(env_id, **kwargs))
            check_spaces(envs[-1], env_id)
        return Envs(envs, seeds, rng_states)
    except BaseException as error:
        close_all(envs)
        if isinstance(error, gym.error.Error | ImportError):
            raise InputError(f"--env-id {env_id}: {first_line(error)}") from error
        raise


def ale_game(env_id: str) -> str | None:
    """Return the name of an ALE game, None if the id is not one of ALE's."""
    spec = gym.registry.get(env_id.split(":")[-1])
    return spec.kwargs["game"] if spec is not None and spec.entry_point == ALE else None


def observes_images(env_id: str) -> bool:
    """Whether observations are images, not vectors. Makes one environment. Raises InputError."""
    with closing(make_envs(env_id, 1, seed=0)) as envs:
        return envs.obs.ndim == 4


def mujoco_warning(text: str) -> None:
    """Print a warning that MuJoCo would log to ./MUJOCO_LOG.TXT. Drops those on settotalmass."""
    if "settotalmass" not in text:
        print(text, file=sys.stderr)


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Raise InputError unless observations are vectors or images and actions are discrete."""
    obs = env.observation_space
    actions = env.action_space
    box = isinstance(obs, gym.spaces.Box)
    vectors = box and len(obs.shape) == 1 and obs.shape[0] > 0
    # the convolutions need 36 x 36 pixels
    images = box and len(obs.shape) == 3 and obs.dtype == np.uint8 and min(obs.shape[1:]) >= 36
    flat_actions = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1
    float_actions = flat_actions and np.issubdtype(actions.dtype, np.floating)
    discrete = isinstance(actions, gym.spaces.Discrete)
    if discrete and actions.start == 0 and (vectors or images):
        return
    space = obs if discrete and actions.start == 0 else actions
    hint = "No script here takes it"
    if discrete and actions.start != 0:
        hint = "Shift the actions with the wrapper TransformAction"
    elif discrete and env.spec is not None and env.spec.entry_point == ALE:
        hint = f"Write the version: --env-id {env.spec.id}"
    elif discrete and box and len(obs.shape) == 3:
        hint = "Turn its images into such, uint8 (C, H, W), with the wrapper TransformObservation"
    elif discrete and obs.shape != (0,):
        hint = "Wrap it in FlattenObservation"
    elif float_actions and vectors and actions.shape[0] > 0:
        hint = "ppo_continuous.py takes continuous actions"
    needs = "this script needs discrete actions from 0 and a flat Box of observations or uint8"
    needs += " images (C, H, W) of 36 x 36 pixels or more"
    raise InputError(f"--env-id {env_id} has {space}, {needs}. {hint}")


def close_all(envs: list[gym.Env]) -> None:
    """Close every environment. A failure is only a warning, so that nothing else is lost."""
    for env in envs:
        try:
            env.close()
        except Exception as error:
            warnings.warn(f"an environment failed to close: {error!r}", stacklevel=2)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def to_python(value: object) -> object:
    """Convert NumPy and PyTorch values to Python's, and paths to strings, also in containers."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for kind in (bool, int, float, str):  # and their subclasses
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {key: to_python(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_python(x) for x in value)
    return value


def check_finite(iteration: int, **quantities: Tensor) -> None:
    """Raise NonFiniteError that names the first quantity with a NaN or an infinity."""
    for name, values in quantities.items():
        if not all(gather(bool(values.isfinite().all()))):  # in any process
            raise NonFiniteError(f"NaN or infinity in {name}, iteration {iteration}")


def check_segment(segment: Segment, iteration: int) -> None:
    """Raise NonFiniteError for observations or rewards that can't be trained on."""
    finals = [obs.flatten() for _, _, obs in segment.finals]
    obs = torch.cat([segment.obs.flatten(), *finals])
    check_finite(iteration, observations=obs, rewards=segment.rewards.float())
    if max(gather(max(obs.max().item(), -obs.min().item()))) > HUGE:
        raise NonFiniteError(f"observations beyond {HUGE:g}, iteration {iteration}")


def check_update(metrics: dict[str, float], params: list[Tensor], iteration: int) -> None:
    """Raise NonFiniteError for losses or weights that training can't go on with."""
    losses = torch.tensor([metrics["policy_loss"], metrics["value_loss"]])
    weights = torch.cat([param.detach().flatten() for param in params])
    check_finite(iteration, losses=losses, parameters=weights)


# ---- Algorithm -----------------------------------------------------------------------------------


def mean_or_nan(values: Sequence[float]) -> float:
    """Return the mean, or NaN if there are no values."""
    return float(np.mean(values)) if values else math.nan


STREAMS = ("weights", "exploration", "minibatches", "environments", "evaluation")


def stream_seed(seed: int, stream: str) -> int:
    """Return the seed of one of the random streams of a run. The streams differ."""
    sequence = np.random.SeedSequence((seed, STREAMS.index(stream)))
    return int(sequence.generate_state(1)[0])


def line(first: float, last: float, fraction: float) -> float:
    """Return the value on a straight line from `first` (fraction 0) to `last` (fraction 1)."""
    return (1 - fraction) * first + fraction * last


def acer(
    args: Args,
    state: dict | None = None,
    compile_step: Callable[[Callable], Callable] = lambda step: step,
) -> Iterator[dict[str, float]]:
    """ACER Algorithm 1. Yields the metrics of each iteration.

    If the dict `state` holds a checkpoint, the run continues from it. At each yield, `state` is a
    checkpoint with the keys policy, rmsprop, exploration, minibatches, step, episodes,
    env_rng_states and spaces. With `args.trust_region` it also has average, with `args.save_replay`
    replay. `compile_step` gets minibatch_step and returns what to use in its place. Seeds PyTorch's
    global generator. Raises InputError for an environment that does not fit, NonFiniteError for NaN
    or infinity.
    """
    args = fill_defaults(args, observes_images(args.env_id))
    state = {} if state is None else state
    torch.manual_seed(stream_seed(args.seed, "weights"))
    rngs = {}
    for name in ("exploration", "minibatches"):
        rngs[name] = torch.Generator().manual_seed(stream_seed(args.seed, name))
    env_seed = stream_seed(args.seed, "environments")
    saved_states = state.get("env_rng_states")
    part = own_part(args.num_envs)
    options = env_options(args)
    envs = make_envs(args.env_id, args.num_envs, env_seed, saved_states, part, **options)
    with closing(envs):
        num_actions = int(envs.action_space.n)
        policy = ActorCritic(envs.obs.shape[1:], num_actions, args).to(args.torch_device)
        params = list(policy.parameters())
        rmsprop = RMSProp(sum(param.numel() for param in params)).to(args.torch_device)
        modules = {"policy": policy, "rmsprop": rmsprop}
        average = None
        if args.trust_region:
            average = copy.deepcopy(policy).requires_grad_(False)
            modules["average"] = average
        slots = args.replay_capacity // args.num_steps if args.replay_ratio > 0 else 1
        replay = Replay(slots, stacked=isinstance(envs, AtariEnvs))
        if state:
            for name, module in modules.items():
                module.load_state_dict(state[name])
            for name, rng in rngs.items():
                rng.set_state(state[name])
            saved_replay = state.pop("replay", None)
            _, processes = rank_and_size()
            # The saved memory has the segments of all environments, so it fits one process only.
            if saved_replay is not None and processes == 1:
                vars(replay).update(saved_replay)
        step = state.get("step", 0)
        episodes = Episodes(args.num_envs, state.get("episodes", ()))
        train_step = compile_step(minibatch_step)

        while step + args.batch_size <= args.total_timesteps:
            iteration = step // args.batch_size + 1
            fraction = step / args.planned_steps
            final_lr = 0.0 if args.anneal_lr else args.learning_rate
            rmsprop.lr.fill_(line(args.learning_rate, final_lr, fraction))

            shape = (args.num_steps, args.num_envs, num_actions)
            noise = torch.empty(shape).exponential_(generator=rngs["exploration"])
            segment = collect(envs, policy, noise[:, part])
            # Each process of torchrun has some of the environments. Episodes are counted for all
            columns = gather((segment.rewards, segment.resets, envs.rng_states))
            rewards, resets, rng_states = zip(*columns, strict=True)
            episodes.add(torch.cat(rewards, 1), torch.cat(resets, 1))
            check_segment(segment, iteration)
            rewards = segment.rewards.sign() if args.clip_rewards else segment.rewards
            segment = segment._replace(rewards=rewards.float())
            replay.add(segment)

            rng = rngs["minibatches"]  # draws n ~ Poisson(r) and the segments from replay
            metrics = update(policy, average, rmsprop, train_step, replay, rng, args)
            check_update(metrics, params, iteration)

            step += args.batch_size
            state.update({name: module.state_dict() for name, module in modules.items()})
            state.update({name: generator.get_state() for name, generator in rngs.items()})
            state.update(step=step, episodes=list(episodes.last))
            state.update(env_rng_states=sum(rng_states, []), spaces=envs.spaces)
            if args.save_replay:
                state["replay"] = dict(vars(replay))
            metrics |= episodes.means()
            yield metrics


# ==================================================================================================
# The algorithm ends here. Below is what runs it: files, progress, evaluation, command line.
# ==================================================================================================

ALGORITHM = "acer_discrete"  # what a checkpoint is checked for
GENERATOR = acer
WHY_AUTO = "cuda for images where there is a GPU"  # for the device that --device auto takes
SHOWN = "entropy"  # the metric that the progress shows
FIXED_ON_EVALUATION = ("hidden_sizes",)
FIXED_ON_RESUME = (
    "hidden_sizes",
    "env_id",
    "seed",
    "num_envs",
    "orthogonal_init",
    "trust_region",
    "num_steps",
    "replay_capacity",
)
RANGES = (
    (
        "total_timesteps num_envs num_steps replay_capacity trunc_c trust_region_delta "
        "hidden_sizes learning_rate max_grad_norm",
        lambda x: x > 0,
        "must be positive",
    ),
    (
        "seed eval_episodes replay_ratio replay_start q_coef ent_coef",
        lambda x: x >= 0,
        "must not be negative",
    ),
    (
        "learning_rate replay_ratio q_coef ent_coef",
        math.isfinite,
        "must be finite",
    ),
    (
        "gamma avg_decay repeat_action_probability",
        lambda x: 0 <= x <= 1,
        "must lie in [0, 1]",
    ),
)

SOURCE = Path(globals().get("__file__", ""))  # a notebook cell has none
SCRIPT = SOURCE.stem if SOURCE.is_file() else ALGORITHM
CHARTS = ("episodic_return", "episodic_length", "SPS", "learning_rate")  # other tags are losses/
SAVE_SECONDS = 60  # between two checkpoints
LINE_SECONDS = 60  # between two lines of progress where stdout is no terminal
COMPILE_FROM = 250_000  # steps, for --compile auto
LONGEST_EVALUATION = 100_000  # steps, for tasks without a time limit
LONGEST_FILM = 3_000  # frames


def train(args: Args, _signals: Sequence[int] = ()) -> dict:
    """Train from the start or from args.resume, then evaluate.

    Returns steps, episodic_return (mean of the last 100 training episodes, NaN if none ended),
    eval_return (mean of the deterministic evaluation, None without it), checkpoint and run_dir.
    Sets PyTorch's seed and number of threads. Raises InputError for bad input, NonFiniteError for
    NaN or infinity, SaveError if the last checkpoint can't be written. A KeyboardInterrupt goes to
    the caller. The last checkpoint stays.

    With `args.resume`, weights and progress come from the checkpoint, everything else from `args`:
    start from `Args(**load_checkpoint(path)["args"])`. Under torchrun only the first process
    returns results, and the process group is ended after training.
    """
    rank, _ = rank_and_size()
    if rank > 0:
        follow(_signals)
        return {}
    folder = Path.cwd()  # an environment may change it
    args = check_args(args)
    require(not args.evaluate, "--evaluate: in Python use evaluate_policy(load_policy(path), args)")
    state = {}
    if args.resume:
        state = load_checkpoint(args.resume)
        check_fixed(args, state["args"], FIXED_ON_RESUME)
        load_policy(args.resume)  # raises InputError if the networks differ
    start = state.get("step", 0)
    check_environment(args, state.get("spaces"))
    if args.video_dir:
        check_film(args)
    torch.set_num_threads(args.torch_threads)
    with Log(args, start, folder) as log:
        gather((args, state))  # to the processes that follow
        saved_at = -math.inf
        stopped = False
        with closing(GENERATOR(args, state, partial(compile_or_eager, args=args))) as iterations:
            for metrics in iterations:
                log(state["step"], metrics)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    saved_at = time.monotonic()
                    try:
                        save_checkpoint(log.run_dir, args, state)
                    except SaveError as error:
                        say(f"{error}. The next try is in a minute")
                stopped = any(gather(bool(_signals)))
                if stopped:
                    break
        checkpoint = str(log.run_dir / "checkpoint.pt")
        if state["step"] > start:
            save_checkpoint(log.run_dir, args, state)
        leave_processes()
        log.end_training(state)
        stopped = stopped or bool(_signals)
        evaluation = {}
        if args.eval_episodes and not stopped:
            evaluation = evaluate_policy(load_policy(checkpoint), args, _signals)
            log.end_evaluation(state["step"], evaluation)
        say(f"{state['step']:,} steps in {log.seconds:.0f} s  {log.shown / 'checkpoint.pt'}")
        if args.video_dir and not stopped:
            film(load_policy(checkpoint), args, _signals)
    if stopped and not _signals:  # the signal went to another process
        raise KeyboardInterrupt
    deterministic = evaluation.get("deterministic")
    return {
        "steps": state["step"],
        "episodic_return": mean_or_nan([ret for ret, _ in state["episodes"]]),
        "eval_return": float(np.mean(deterministic)) if deterministic else None,
        "checkpoint": checkpoint,
        "run_dir": str(log.run_dir),
    }


def follow(signals: Sequence[int]) -> None:
    """Train along with the first process of torchrun, which logs, saves and evaluates."""
    args, state = gather(None)[0]  # what the first process has checked
    torch.set_num_threads(args.torch_threads)
    iterations = GENERATOR(args, state, partial(compile_or_eager, args=args))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), closing(iterations):
        stopped = False
        for _ in iterations:
            stopped = any(gather(bool(signals)))
            if stopped:
                break
    leave_processes()
    if stopped:
        raise KeyboardInterrupt  # after an exit code of 0, torchrun waits for other machines


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], env_id: str, episodes: int, seed: int, **kwargs
) -> list[float]:
    """Return the raw returns of one whole episode in each of `episodes` environments.

    `act` maps raw observations (episodes, …) to actions of the environment (episodes, …). Only the
    first episode of each environment counts, so that short episodes do not count more often. One
    that does not end within LONGEST_EVALUATION steps is left out, and a line says so. `kwargs` are
    those of make_envs.
    """
    totals = np.zeros(episodes)
    running = np.ones(episodes, bool)
    with closing(make_envs(env_id, episodes, seed, **kwargs)) as envs:
        for _ in progress_bar(range(LONGEST_EVALUATION), "evaluation"):
            _, rewards, terminated, truncated = envs.step(act(envs.obs))
            totals[running] += rewards[running]
            running &= ~(terminated | truncated)
            if not running.any():
                break
    if running.any():
        limit = f"within {LONGEST_EVALUATION:,} steps"
        say(f"{running.sum()} of {episodes} episodes did not end {limit}. They are left out")
    return totals[~running].tolist()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal. It may be None, closed, or an object without isatty."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def progress_bar(steps: Iterable[int], name: str) -> Iterable[int]:
    """Show a bar on a terminal. It has no total, because an episode may end at any step."""
    hidden = not is_terminal(sys.stderr)
    return steps if hidden else tqdm(iter(steps), name, unit="step", leave=False)


def task_name(env_id: str) -> str:
    """Return the last part of an id, for names of files."""
    return env_id.replace(":", "/").split("/")[-1]


def interruptible(act: Callable, signals: Sequence[int]) -> Callable:
    """Return `act`, but raising KeyboardInterrupt after a signal."""

    def checked(*inputs):
        if signals:
            raise KeyboardInterrupt
        return act(*inputs)

    return checked


def evaluate_policy(
    policy: nn.Module, args: Args, signals: Sequence[int] = ()
) -> dict[str, list[float]]:
    """Evaluate the most probable actions and sampled ones. Prints and returns their returns."""
    policy.to(args.torch_device)
    seed = stream_seed(args.seed, "evaluation")
    rng = torch.Generator().manual_seed(seed)
    acts = {
        "deterministic": policy.act,
        "sampled": lambda obs: policy.act(obs, False, rng),
    }
    evaluation = {}
    for mode, act in acts.items():
        act = interruptible(act, signals)
        sticky = {"repeat_action_probability": args.repeat_action_probability}
        returns = evaluate(act, args.env_id, args.eval_episodes, seed, **sticky)
        evaluation[mode] = returns
        result = "no episode ended"
        if returns:
            result = f"{np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes"
        say(f"evaluation, {mode}: {result}")
    return evaluation


def make_film_env(args: Args) -> Envs | AtariEnvs:
    """Make one environment that renders."""
    seed = stream_seed(args.seed, "evaluation")
    sticky = {"repeat_action_probability": args.repeat_action_probability}
    return make_envs(args.env_id, 1, seed, render_mode="rgb_array", **sticky)


def film(policy: nn.Module, args: Args, signals: Sequence[int] = ()) -> None:
    """Write a GIF of one episode of the most probable actions. If that fails, a line says why."""
    path = Path(args.video_dir, f"{task_name(args.env_id)}__{SCRIPT}__s{args.seed}.gif")
    new = path.with_suffix(".tmp")
    act = interruptible(policy.act, signals)
    try:
        from PIL import Image
        from PIL.GifImagePlugin import getdata, getheader  # to write frame by frame

        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(make_film_env(args)) as envs, new.open("wb") as file:
            stride = max(1, round(envs.fps / 25))  # steps a frame
            milliseconds = round(1000 * stride / envs.fps)
            for step in progress_bar(range(LONGEST_FILM * stride), "film"):
                if step % stride == 0:
                    image = Image.fromarray(envs.render()).quantize()
                    if step == 0:
                        file.writelines(getheader(image, info={"loop": 0})[0])
                    frame = getdata(image, duration=milliseconds, include_color_table=True)
                    file.writelines(frame)
                _, _, terminated, truncated = envs.step(act(envs.obs))
                if terminated[0] or truncated[0]:
                    break
            file.write(b";")  # the end of a GIF
        os.replace(new, path)
        say(f"film {path}")
    except Exception as error:  # every renderer raises types of its own
        say(f"no film {path}: {type(error).__name__}: {first_line(error)}")
    finally:
        with suppress(OSError):
            new.unlink()


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line. A closed terminal or a character that it does not know raises nothing."""
    file = file or sys.stdout
    with suppress(OSError, ValueError, AttributeError), tqdm.external_write_mode(file):
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "replace").decode(), file=file, flush=True)


@cache
def say_once(text: str) -> None:
    """Print a line that this process has not printed before."""
    say(text)


def write_json(path: Path, content: dict) -> None:
    """Write standard JSON. It has no infinity and no NaN, so they become strings."""
    content = json.loads(json.dumps(content), parse_constant=str)
    path.write_text(json.dumps(content, indent=1) + "\n")


class SaveError(OSError):
    """A checkpoint can't be written. The message is one line."""


def save_checkpoint(run_dir: Path, args: Args, state: dict) -> None:
    """Write checkpoint.pt. A crash leaves the old file or the new one. Raises SaveError."""
    new = Path(run_dir, "checkpoint.tmp")
    try:
        torch.save({**state, "algorithm": ALGORITHM, "args": asdict(args)}, new)
        load_checkpoint(str(new))  # never replace a good file by one that can't be read
        os.replace(new, Path(run_dir, "checkpoint.pt"))
    except (OSError, RuntimeError, InputError) as error:
        with suppress(OSError):
            new.unlink()
        raise SaveError(f"can't save a checkpoint in {run_dir}: {first_line(error)}") from error


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint to the CPU. Raises InputError if it is damaged or of another script.

    "args" are the fields of this version of Args. Fields that are new have their default.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many unrelated types
        name = type(error).__name__
        raise InputError(f"{path} is not a readable checkpoint ({name})") from error
    known = isinstance(saved, dict) and {"algorithm", "args"} <= saved.keys()
    require(known, f"{path} is not a checkpoint of this version of {ALGORITHM}.py")
    writer = saved["algorithm"]
    require(writer == ALGORITHM, f"{path} was written by {writer}.py: use that script")
    names = {field.name for field in fields(Args)}
    unknown = sorted(saved["args"].keys() - names)
    if unknown:
        listed = ", ".join(unknown)
        say_once(f"{Path(path).absolute()} has flags that are not known here: ignored {listed}")
    kept = {name: value for name, value in saved["args"].items() if name in names}
    saved["args"] = asdict(Args(**kept))
    return saved


def load_policy(path: str) -> ActorCritic:
    """Return the policy of a checkpoint, on the CPU. Its environment need not be installed.

    `policy.act(obs, deterministic=True)` maps raw observations, one (O) or a batch (B, O), to
    actions.
    """
    saved = load_checkpoint(path)
    spaces = saved["spaces"]
    args = Args(**saved["args"])
    policy = ActorCritic(tuple(spaces["obs_shape"]), spaces["num_actions"], args)
    try:
        policy.load_state_dict(saved["policy"])
    except RuntimeError as error:
        raise InputError(f"{path} has other networks than this {SCRIPT}.py") from error
    return policy.eval()


def whole_rows(path: Path, last_step: int) -> list[dict[str, str]]:
    """Return the rows of a progress.csv up to `last_step`. Leaves out what is damaged."""
    rows = []
    with suppress(OSError, csv.Error):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()  # without a cut-off last line
        for row in csv.DictReader(lines):
            with suppress(KeyError, TypeError, ValueError):
                whole = None not in row and None not in row.values()
                if whole and int(row["step"]) <= last_step and math.isfinite(float(row["seconds"])):
                    rows.append(row)
    return rows


class Log:
    """Keeps config.json, progress.csv and TensorBoard events of a run, and shows its progress."""

    def __init__(self, args: Args, step: int, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = Path(args.resume).parent if args.resume else Path(args.run_dir)
        inside = self.run_dir.is_relative_to(folder)
        self.shown = self.run_dir.relative_to(folder) if inside else self.run_dir
        try:
            self.run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
            self.open_files(args, step)
        except OSError as error:
            name = "--resume" if args.resume else "--run-dir"
            needed = "a folder" if args.resume else "a new folder"
            why = f"{first_line(error)}. Name {needed} that can be written"
            raise InputError(f"{name} {self.shown}: {why}") from error
        self.events = SummaryWriter(str(self.run_dir), purge_step=step + 1)
        self.bar = None
        self.step = step
        self.last = time.monotonic()
        self.last_line = self.last
        self.total = args.planned_steps

        say(f"{SCRIPT}  {args.env_id}  seed {args.seed}  {self.shown}")
        size = f"{args.num_envs} environments x {args.num_steps} steps = batch of"
        size += f" {args.batch_size:,}, {args.num_iterations} iterations = {self.total:,} steps"
        size += f", from {step:,}" if step else ""
        _, processes = rank_and_size()
        size += f", {processes} processes" if processes > 1 else ""
        say(size)
        why = f"auto: {WHY_AUTO}" if args.device == "auto" else "as asked"
        say(f"device {args.torch_device} ({why})")
        if step + args.batch_size > args.total_timesteps:
            say("nothing is left to train: a larger --total-timesteps continues")

    def open_files(self, args: Args, step: int) -> None:
        """Write the configuration. Open progress.csv to append, without its rows after `step`."""
        config = {"args": asdict(args), "device": str(args.torch_device)}
        config["python"] = sys.version.split()[0]
        config |= {package.__name__: package.__version__ for package in (torch, gym, np)}
        if SOURCE.is_file():
            config["script_sha256"] = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
        name = f"config-{step}.json" if args.resume else "config.json"
        write_json(self.run_dir / name, config)

        if step + args.batch_size <= args.total_timesteps:
            (self.run_dir / "eval.json").unlink(missing_ok=True)  # of weights that will change
        path = self.run_dir / "progress.csv"
        rows = whole_rows(path, step) if step else []
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.columns = list(rows[0]) if rows else None
        new = path.with_suffix(".tmp")
        with new.open("w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        os.replace(new, path)
        self.file = path.open("a", buffering=1, newline="")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of one iteration that ended at `step`."""
        elapsed = time.monotonic() - self.last
        sps = (step - self.step) / elapsed
        metrics = {"SPS": sps} | metrics
        if self.bar is None:  # the first iteration may print lines
            options = {"unit": "step", "unit_scale": True, "dynamic_ncols": True}
            hidden = not is_terminal(sys.stderr)
            self.bar = tqdm(initial=self.step, total=self.total, disable=hidden, **options)
        self.step = step
        self.last += elapsed
        self.seconds += elapsed
        try:
            self.write(step, metrics)
        except OSError as error:  # a full disk must not end the run
            say_once(f"progress.csv and TensorBoard are not complete: {error}")
        mean_return = f"{metrics['episodic_return']:.1f}"
        shown = f"{metrics[SHOWN]:.4f}"
        self.bar.set_postfix({"return": mean_return, SHOWN: shown}, refresh=False)
        self.bar.update(step - self.bar.n)
        seen = is_terminal(sys.stdout) and is_terminal(sys.stderr)
        if not seen and self.last - self.last_line >= LINE_SECONDS:
            self.last_line = self.last
            done = f"step {step:,} of {self.total:,}"
            say(f"{done}  return {mean_return}  {SHOWN} {shown}  {sps:.0f} steps/s")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one row of progress.csv and the TensorBoard scalars."""
        row = {"step": str(step), "seconds": f"{self.seconds:.2f}"}
        for name, value in metrics.items():
            row[name] = "" if math.isnan(value) else f"{value:.6g}"
        if self.columns is None:
            self.columns = list(row)
            self.file.write(",".join(self.columns) + "\n")
        options = {"restval": "", "extrasaction": "ignore", "lineterminator": "\n"}
        csv.DictWriter(self.file, self.columns, **options).writerow(row)
        for name, value in metrics.items():
            if not math.isnan(value):
                group = "charts" if name in CHARTS else "losses"
                self.events.add_scalar(f"{group}/{name}", value, step)

    def end_training(self, state: dict) -> None:
        """Print the training score."""
        if self.bar is not None:
            self.bar.close()
        returns = [ret for ret, _ in state["episodes"]]
        count = f"the last {len(returns)} training episodes"
        text = f"mean return of {count} {mean_or_nan(returns):.1f}"
        say(text if returns else "no training episode ended")

    def end_evaluation(self, step: int, evaluation: dict[str, list[float]]) -> None:
        """Write eval.json, and the deterministic score for TensorBoard."""
        try:
            write_json(self.run_dir / "eval.json", evaluation)
            if evaluation["deterministic"]:
                mean = np.mean(evaluation["deterministic"])
                self.events.add_scalar("eval/return", mean, step)
        except OSError as error:
            say_once(f"eval.json and TensorBoard are not complete: {error}")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        for file in (self.events, self.file):
            with suppress(OSError):
                file.close()


def compile_or_eager(function: Callable, args: Args) -> Callable:
    """Return `function` compiled to one graph, or as it is with --compile off or no compiler."""
    torch.compiler.reset()  # PyTorch limits how many versions of a function a process compiles
    if args.compile == "off" or (args.compile == "auto" and args.total_timesteps < COMPILE_FROM):
        return function
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        say("not compiled: this PyTorch can't compile torch.autograd.grad")
        return function
    torch._dynamo.config.trace_autograd_ops = True
    cuda = args.torch_device.type == "cuda"
    how = {"mode": "reduce-overhead"} if cuda else {"options": {"cpp_wrapper": True}}
    chosen = torch.compile(function, fullgraph=True, **how)
    first = True

    def compiled(*inputs):
        nonlocal chosen, first
        if first:
            say("compiling: the first iteration takes up to half a minute")
            first = False
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()  # the next call overwrites the outputs
        try:
            outputs = chosen(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, for one
            say(f"not compiled: {first_line(error)}")
            chosen = function
            outputs = function(*inputs)
        return {name: x.clone() for name, x in outputs.items()} if cuda else outputs

    return compiled


def require(condition: bool, message: str) -> None:
    """Raise InputError unless the condition holds."""
    if not condition:
        raise InputError(message)


def flag(name: str) -> str:
    """Return the flag of a field of Args."""
    return "--" + name.replace("_", "-")


def check_type(name: str, value: object, kind: object) -> None:
    """Raise InputError unless the value of a flag is of the type that Args declares."""
    kinds = get_args(kind) or (kind,)
    origins = [get_origin(x) for x in (kind, *kinds)]
    if value is None and type(None) in kinds:
        return
    if Literal in origins:
        require(value in kinds, f"{name} {value!r}: choose from {', '.join(kinds)}")
    elif tuple in origins:
        whole = isinstance(value, tuple) and all(type(x) is int for x in value)
        require(whole, f"{name} {value!r} must be a tuple of whole numbers")
    elif set(kinds) <= {bool, int, float, str, type(None)}:
        names = " or ".join(x.__name__ for x in kinds).replace("NoneType", "None")
        fits = type(value) in kinds
        require(fits, f"{name} {value!r} must be of type {names}")
        require(value != "", f"{name} is empty")


def check_args(args: Args) -> Args:
    """Return a copy with plain values and whole paths. Raises InputError for what can't be used."""
    args = replace(args, **to_python(asdict(args)))
    for field, kind in get_type_hints(Args).items():
        name = flag(field)
        value = getattr(args, field)
        if isinstance(value, list):
            value = tuple(value)
        kinds = get_args(kind) or (kind,)
        if int in kinds and isinstance(value, float):
            require(value % 1 == 0, f"{name} {value} must be a whole number")
            value = int(value)
        if float in kinds and int not in kinds and type(value) is int:
            require(abs(value) < 1e300, f"{name} is too large")
            value = float(value)
        check_type(name, value, kind)
        setattr(args, field, value)
    for names, holds, what in RANGES:
        for name in names.split():
            value = getattr(args, name)
            values = value if isinstance(value, tuple) else [value]
            good = value is None or all(holds(x) for x in values)
            require(good, f"{flag(name)} {value} {what}")
    unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    default = f"runs/{task_name(args.env_id)}__{SCRIPT}__s{args.seed}__{unique}"
    args.run_dir = args.run_dir or default
    for name in ("run_dir", "resume", "evaluate", "video_dir"):
        path = getattr(args, name)
        if path is not None:  # an environment may change the working directory
            setattr(args, name, str(Path(path).absolute()))

    given = args
    args = fill_defaults(args, observes_images(args.env_id))
    size = f"--num-envs x --num-steps = {args.batch_size}"
    require(args.batch_size >= 2, f"{size} must be 2 or more")
    require(args.num_iterations >= 1, f"--total-timesteps is less than one batch, {size}")
    _, processes = rank_and_size()
    why = f"--num-envs {args.num_envs} is not a multiple of the {processes} processes of torchrun"
    require(args.num_envs % processes == 0, why)
    if processes > 1:
        require(not args.evaluate, "--evaluate: run it without torchrun")
        why = f"--device {args.device}: torchrun gives each process a GPU"
        require(":" not in args.device, why)
        gpus = torch.cuda.device_count()
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        crowded = args.torch_device.type == "cuda" and 0 < gpus < local_processes
        why = f"{local_processes} processes but {gpus} GPUs"
        hint = f"lower --nproc-per-node to {gpus}, or add --device cpu"
        require(not crowded, f"{why}: {hint}")
    if args.resume:
        name = Path(args.resume).name
        why = f"--resume continues in the run folder: name its checkpoint.pt, not {name}"
        require(name == "checkpoint.pt", why)
    evaluates = args.eval_episodes > 0 or not args.evaluate
    require(evaluates, "--evaluate needs --eval-episodes of 1 or more")
    taken = any(getattr(args, name) == value for name, value in PAPER.items())
    require(taken or not args.paper, "paper=True changes nothing in Python: write Args(**PAPER)")
    check_algorithm_args(args)
    try:
        torch.zeros(1, device=args.torch_device).item()
    except Exception as error:  # every backend raises types of its own
        raise InputError(f"--device {args.device}: {first_line(error)}. Try cpu") from error
    say_defaults(given, args)
    return args


def check_environment(args: Args, spaces: dict | None) -> None:
    """Raise InputError unless the environment works with this script and with a checkpoint."""
    options = {} if args.evaluate else env_options(args)
    envs = make_envs(args.env_id, 1, args.seed, **options)
    envs.close()
    fits = spaces is None or spaces == envs.spaces
    require(fits, f"--env-id {args.env_id} has other spaces than the environment of the checkpoint")
    content = {"args": asdict(args), "spaces": envs.spaces, "env_rng_states": envs.rng_states}
    file = io.BytesIO()
    try:
        torch.save(content, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle raises many unrelated types
        why = f"a checkpoint can't hold its flags or its environment: {first_line(error)}"
        raise InputError(why) from error


def check_film(args: Args) -> None:
    """Raise InputError unless the environment can be rendered."""
    try:
        with closing(make_film_env(args)) as envs:
            envs.render()
    except Exception as error:  # every renderer raises types of its own
        why = f"{type(error).__name__}: {first_line(error)}"
        hint = "MuJoCo needs MUJOCO_GL=egl with libegl1, or osmesa with libosmesa6"
        raise InputError(f"--video-dir: can't render {args.env_id} ({why}). {hint}") from error


def say_defaults(given: Args, filled: Args) -> None:
    """Print the values of the fields that fill_defaults filled."""
    chosen = [name for name in DEFAULTS if getattr(given, name) is None]
    if chosen:
        values = ", ".join(f"{name} {getattr(filled, name)}" for name in chosen)
        say(f"defaults for {'images' if filled.images else 'vectors'}: {values}")


def check_algorithm_args(args: Args) -> None:
    """Raise InputError for flags that contradict each other."""
    require(len(args.hidden_sizes) > 0, "--hidden-sizes needs one layer or more")
    used = args.repeat_action_probability == 0 or ale_game(args.env_id) is not None
    require(used, "--repeat-action-probability is for games of ALE")
    if args.replay_ratio > 0:
        holds = args.replay_capacity // args.num_steps * args.num_steps  # whole segments
        why = f"the replay memory holds {holds:,} steps of each environment"
        hint = "lower --replay-start or raise --replay-capacity"
        require(max(args.replay_start, 1) <= holds, f"{why}, replay would never begin: {hint}")
        first = args.replay_start * args.num_envs
        if first > args.total_timesteps:
            say(f"no replay: it begins after {first:,} steps, lower --replay-start")
    for name in ("trust_region_delta", "avg_decay"):
        default = getattr(Args, name)
        why = f"{flag(name)} has no effect with --no-trust-region: leave it at {default}"
        require(args.trust_region or getattr(args, name) == default, why)
    if args.replay_ratio == 0:
        why = "--save-replay has no effect with --replay-ratio 0: use --no-save-replay"
        require(not args.save_replay, why)
    _, processes = rank_and_size()
    why = "--save-replay: torchrun's processes have a replay memory each, which is not saved"
    require(processes == 1 or not args.save_replay, why)


def check_fixed(args: Args, saved: dict, names: Sequence[str]) -> None:
    """Raise InputError if args differ from a checkpoint's where they can't change."""
    for name in names:
        value = getattr(args, name)
        same = value == saved[name]
        require(same, f"{flag(name)} {value}: the checkpoint has {saved[name]}, which can't change")


def cli(default: Args) -> Args:
    """Read the command line. Flags that are not given have the values of `default`."""
    groups = {"run": RunArgs, "environment": EnvironmentArgs, "algorithm": AlgorithmArgs}
    defaults = {}
    for name, group in groups.items():
        defaults[name] = group(**{f.name: getattr(default, f.name) for f in fields(group)})
    flags = make_dataclass("Flags", groups.items())
    config = (tyro.conf.OmitArgPrefixes,)
    description = (__doc__ or ALGORITHM).splitlines()[0]
    given = tyro.cli(flags, default=flags(**defaults), description=description, config=config)
    values = {}
    for name in groups:
        values |= vars(getattr(given, name))
    return Args(**values)


def parse_args() -> Args:
    """Return the Args of the command line. --resume and --evaluate start from a checkpoint's."""
    args = cli(Args())
    path = args.resume or args.evaluate
    if not path:
        return cli(Args(**PAPER, paper=True)) if args.paper else args
    require(not args.paper, "--paper: a checkpoint has its own settings, leave it out")
    if args.resume:
        why = "--resume continues in the checkpoint's folder: leave out --evaluate and --run-dir"
        require(not args.evaluate and not args.run_dir, why)
    saved = Args(**load_checkpoint(path)["args"])
    episodes = saved.eval_episodes or (Args.eval_episodes if args.evaluate else 0)
    own = {"resume": None, "run_dir": None, "video_dir": None, "eval_episodes": episodes}
    return cli(replace(saved, **own))


def evaluate_checkpoint(args: Args, signals: Sequence[int]) -> None:
    """Run --evaluate: print the scores of a checkpoint, and film it if --video-dir is given."""
    args = check_args(args)
    saved = load_checkpoint(args.evaluate)
    check_fixed(args, saved["args"], FIXED_ON_EVALUATION)
    policy = load_policy(args.evaluate)
    check_environment(args, saved["spaces"])
    evaluate_policy(policy, args, signals)
    if args.video_dir:
        film(policy, args, signals)


def drop_unread_output() -> None:
    """Send output that a closed pipe did not take to os.devnull. Else Python prints an error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def join_processes() -> None:
    """Connect to the other processes of torchrun, and use GPU LOCAL_RANK if there are GPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")


def leave_processes() -> None:
    """Undo join_processes. NCCL wants all processes to do it at the same time."""
    if "TORCHELASTIC_RUN_ID" in os.environ and dist.is_initialized():
        dist.destroy_process_group()


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that the connection to another process broke."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "c10d" in text


def main() -> int:
    """Run the command line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # the terminal may not know Greek
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets it
    signals = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    caught = [
        n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN
    ]  # nohup ignores SIGHUP

    def stop(number: int, _) -> None:
        signals.append(number)
        if launched:  # torchrun repeats signals
            return
        for n in caught:
            signal.signal(n, signal.SIG_DFL)
        with suppress(OSError):
            if sys.stderr is not None:  # else descriptor 2 may be another file
                os.write(2, b"\nstopping: a second signal kills\n")

    for n in caught:
        signal.signal(n, stop)
    rank = int(os.environ["RANK"]) if launched else 0
    name = f"{SCRIPT}.py, process {rank}" if rank > 0 else f"{SCRIPT}.py"
    try:
        if launched:
            join_processes()
        args = parse_args() if rank == 0 else Args()  # train gives the others the args of the first
        if args.evaluate:
            evaluate_checkpoint(args, signals)
        else:
            train(args, signals)
    except InputError as error:
        say(f"{name}: {error}", sys.stderr)
        return 2
    except NonFiniteError as error:
        if rank == 0:  # all processes have found it
            say(f"{name}: {error}. The last checkpoint, if there is one, stays", sys.stderr)
        return 1
    except SaveError as error:
        say(f"{name}: {error}", sys.stderr)
        return 1
    except RuntimeError as error:
        if not launched or not lost_process(error):
            raise
        if rank == 0:
            why = "another process ended. The last checkpoint, if there is one, stays"
            say(f"{name}: {why} ({first_line(error)})", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + (signals[0] if signals else signal.SIGINT)
    except BrokenPipeError:  # of --help
        return 0
    finally:
        with suppress(AttributeError, ValueError):
            drop_unread_output()
    return (128 + signals[0]) if signals else 0


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
