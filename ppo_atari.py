# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "ale-py==0.12.1",
#     "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0", "pygame==2.6.1",
# ]
# ///
"""Proximal policy optimization (PPO) for discrete actions: Atari, images and vectors, in one file.

Papers
    PPO       Schulman et al. 2017, arXiv:1707.06347v2
    GAE       Schulman et al. 2016, arXiv:1506.02438v6
    TRPO      Schulman et al. 2015, arXiv:1502.05477v5
    DQN       Mnih et al. 2015, doi:10.1038/nature14236
    Machado   Machado et al. 2018, arXiv:1709.06009v2
    Engstrom  Engstrom et al. 2020, arXiv:2005.12729v1
    Pardo     Pardo et al. 2018, arXiv:1712.00378v4
    Kingma    Kingma & Ba 2015, arXiv:1412.6980v9

Install   pip install torch==2.13.0 gymnasium==1.4.0 ale-py pygame tyro tensorboard tqdm
          (or `uv run ppo_atari.py`, which reads the exact versions from the top of this file)
Run       python ppo_atari.py --env-id ALE/Breakout-v5 --seed 1
          python ppo_atari.py --env-id CartPole-v1 --seed 1
Faster    torchrun --nproc-per-node 4 ppo_atari.py --env-id ALE/Breakout-v5
Resume    python ppo_atari.py --resume runs/<run>/checkpoint.pt
Evaluate  python ppo_atari.py --evaluate runs/<run>/checkpoint.pt --video-dir videos
From Python: train(Args(env_id="Acrobot-v1")), load_policy("runs/<run>/checkpoint.pt").act(obs)

Equation map
    equation                       function                  symbol
    PPO section 3                  ppo_loss                  r_t(θ)
    PPO eq. 7                      clipped_surrogate         L^CLIP
    PPO eq. 9                      ppo_loss                  L^CLIP - c1 L^VF + c2 S
    PPO eq. 9                      value_loss                L^VF
    PPO eq. 9                      categorical_entropy       S[π]
    PPO eqs. 11-12, GAE eq. 16     gae                       Â_t, δ_t
    PPO Algorithm 1                ppo, update               N actors, T steps, K epochs
    GAE footnote 2                 advantages                V^targ
    TRPO appendix D                categorical_logp          log π(a|s)
    TRPO eq. 12                    categorical_kl            KL(π_old ‖ π)
    DQN Methods                    nature_cnn                convolutional network
    Engstrom section 3, item 1     clipped_value_loss        L^VF with V clipped around V_old
    Engstrom section 3, item 2     rolling_discounted_sums   R_t, whose std divides the rewards
    Engstrom section 3, item 9     clip_global_norm          gradient clipping
    Kingma Algorithm 1             Adam                      m, v, θ

Departures from the PPO paper (section 6.4) that no flag reverts (PAPER below lists the others)
    The network for images is that of DQN. The paper has the smaller one of A3C
    (Mnih et al. 2016, arXiv:1602.01783).
    When a time limit ends an episode, its last δ_t keeps γ V(final observation) (Pardo eq. 6).
    The id of an ALE game names the game only. Frame skip and sticky actions are those of this file.
    In games with FIRE, ALE presses it at a reset. After a lost life FIRE replaces the policy's
    action, and the policy's action is stored.
    Adam's ε is 1e-5. The PPO paper names none. Kingma's is 1e-8.

With norm_obs, the first rollout is sampled before there are statistics. They are then computed from
it and used in its update, so this π_old is not the policy that took the actions.

A resumed run restarts unfinished episodes. If none is unfinished at the checkpoint, the resumed
run equals the uninterrupted run bit for bit (on the CPU). The random states of ALE can't be saved,
so a resumed run plays its games with new seeds.
"""

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
    env_id: str = "ALE/Breakout-v5"
    seed: int = 1  # seed of weights, actions, minibatches and environments
    # environment steps, such as 1_000_000 or 1e6, rounded down to whole iterations. A step of ALE
    # is 4 frames. With --resume, a larger value stretches the schedules. None: 10,000,000 for
    # images, 500,000 for vectors
    total_timesteps: int | float | None = None
    # use the settings of the PPO paper, for images. Flags you give override them
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
    # auto, cpu, cuda, cuda:1 or mps. auto is cuda for images where there is a GPU, else cpu
    device: str = "auto"
    # compile the minibatch step with torch.compile. auto compiles runs of 250,000 steps or more
    compile: Literal["auto", "on", "off"] = "auto"
    # compute the layers below the two heads in bfloat16. Weights and losses stay in float32. Much
    # slower on processors without instructions for it
    bf16: bool = False


@dataclass
class EnvironmentArgs:
    num_envs: int = 8  # N, number of environments. ALE steps them in parallel
    # ALE: learn as if a lost life ended the episode (DQN Methods). The game and its score go on
    life_loss_terminal: bool = True
    # ALE: probability that the last action is repeated, whatever the id says. Machado et al. 2018
    # recommend 0.25
    repeat_action_probability: float = 0.0
    # normalize observations, each component or pixel by its running mean and std. Without it,
    # pixels are divided by 255
    norm_obs: bool = True
    # vectors: divide rewards by the running std of their rolling discounted sum, and clip them to
    # ±10
    norm_reward: bool = True
    # images: learn from the sign of the reward (DQN Methods). Scores are of raw rewards
    clip_rewards: bool = True
    images: tyro.conf.Suppress[bool | None] = None  # not a flag: set by fill_defaults


@dataclass
class AlgorithmArgs:
    num_steps: int = 128  # T, steps per environment and iteration
    # K, passes over the batch of N x T samples. None: 4 for images, 10 for vectors
    update_epochs: int | None = None
    num_minibatches: int = 4  # minibatches per epoch, each of M = N x T / num_minibatches samples
    # step size of Adam (the α of PPO Table 5 anneals it). None: 2.5e-4 for images, 1e-3 for vectors
    learning_rate: float | None = None
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    gamma: float = 0.99  # γ, the discount factor
    gamma_final: float | None = None  # anneal γ linearly to this. None: γ is constant
    gae_lambda: float = 0.95  # λ of GAE eq. 16. 0: one-step TD, 1: Monte Carlo
    norm_adv: bool = True  # standardize the advantages over the whole batch
    # ε of PPO eq. 7 and of clip_vloss. None: 0.1 for images, 0.2 for vectors
    clip_coef: float | None = None
    anneal_clip: bool = False  # anneal ε linearly to zero
    clip_vloss: bool = False  # clip V to ±ε around its old value. Not in the paper
    # c1 of PPO eq. 9, weight of the squared error. OpenAI baselines has 0.5 of half of it
    vf_coef: float = 0.25
    ent_coef: float = 0.01  # c2 of PPO eq. 9, weight of the entropy bonus
    max_grad_norm: float = 0.5  # largest norm of the gradient. inf: no clipping
    # sizes of the hidden layers, such as 64 64. For images, of those after the convolutions. None:
    # 512 for images, 64 64 for vectors
    hidden_sizes: tuple[int, ...] | None = None
    # orthogonal weights with gain √2 (policy output 0.01, value output 1), or PyTorch's default
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


DEFAULTS = {  # of fields that are None: for images, for vectors
    "total_timesteps": (10_000_000, 500_000),
    "update_epochs": (4, 10),
    "learning_rate": (2.5e-4, 1e-3),
    "clip_coef": (0.1, 0.2),
    "hidden_sizes": ((512,), (64, 64)),
}

PAPER = {  # --paper: PPO section 6.4 and Table 5
    # clip_rewards stays on, as in OpenAI baselines. The paper does not mention it
    "life_loss_terminal": False,  # the paper does not mention it. OpenAI baselines has it
    "norm_obs": False,  # pixels are divided by 255
    "update_epochs": 3,  # 4 in OpenAI baselines
    "norm_adv": False,  # the paper does not mention it
    "anneal_clip": True,
    "vf_coef": 1.0,
    "max_grad_norm": math.inf,  # the paper does not mention gradient clipping
    "orthogonal_init": False,  # the paper names no initialization
}

THREADS = torch.get_num_threads()  # of PyTorch, for images
NORM_LIMIT = 10.0  # normalized observations and rewards are clipped to ± this
PIXEL_LIMIT = 5.0  # normalized pixels are clipped to ± this
ALL = slice(None)  # the part of a single process: all environments
HUGE = 1e10  # larger observations need norm_obs
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

    Sets `images`, and turns norm_reward off for images and clip_rewards for vectors.
    """
    norm_reward = args.norm_reward and not images
    clip_rewards = args.clip_rewards and images
    args = replace(args, images=images, norm_reward=norm_reward, clip_rewards=clip_rewards)
    for name, (for_images, for_vectors) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, for_images if images else for_vectors)
    return args


# ---- Equations -----------------------------------------------------------------------------------
# T steps, N environments, B = T N transitions, M transitions of a minibatch, K epochs,
# O observation dims or (C, H, W) of an image, A actions, P weights


def categorical_logp(logits: Tensor, actions: Tensor) -> Tensor:
    """TRPO appendix D: log π(a|s) = z_a - log Σ_b exp z_b.

    z are the logits (…, A). actions and the result are (…,).
    """
    assert logits.shape[:-1] == actions.shape
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """S[π] of PPO eq. 9 in nats: -Σ_a π(a|s) log π(a|s). logits (…, A), returns (…,)."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def categorical_kl(logits_old: Tensor, logits: Tensor) -> Tensor:
    """KL(π_old ‖ π) of TRPO eq. 12 in nats: Σ_a π_old log(π_old / π). (…, A) each, returns (…,)."""
    assert logits_old.shape == logits.shape
    logp_old = logits_old.log_softmax(-1)
    return (logp_old.exp() * (logp_old - logits.log_softmax(-1))).sum(-1)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """PPO eq. 9: L^VF = Ê[(V_θ(s_t) - V_t^targ)²], without ½. (B,) each, returns a scalar."""
    assert values.shape == returns.shape
    return (values - returns).square().mean()


def clipped_value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, eps_clip: Tensor | float
) -> Tensor:
    """Engstrom section 3, item 1. Not in the PPO paper.

    L^VF = Ê[max((V_θ - V^targ)², (clip(V_θ, V_old - ε, V_old + ε) - V^targ)²)]

    Engstrom prints min. Its authors' code takes max. (B,) each, returns a scalar.
    """
    assert values.shape == values_old.shape == returns.shape
    clipped = values_old + (values - values_old).clamp(-eps_clip, eps_clip)
    return torch.max((values - returns).square(), (clipped - returns).square()).mean()


def clipped_surrogate(ratio: Tensor, adv: Tensor, eps_clip: Tensor | float) -> Tensor:
    """PPO eq. 7: L^CLIP(θ) = Ê[min(r_t Â_t, clip(r_t, 1-ε, 1+ε) Â_t)], to be maximized.

    (B,) each, returns a scalar.
    """
    assert ratio.shape == adv.shape
    return torch.min(ratio * adv, ratio.clamp(1 - eps_clip, 1 + eps_clip) * adv).mean()


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
    """π_θ(a|s) = softmax z_θ(s) and V_θ(s) of raw observations: one network with two heads.

    V is in units of scaled reward.
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.norm_obs = args.norm_obs
        self.bf16 = args.bf16
        self.obs_dims = len(obs_shape)
        self.images = len(obs_shape) == 3
        self.num_actions = num_actions
        self.obs_stats = RunningMeanStd(*obs_shape)
        self.reward_stats = RunningMeanStd()
        hidden_sizes = args.hidden_sizes
        orthogonal = args.orthogonal_init
        if self.images:
            self.trunk = nature_cnn(obs_shape, hidden_sizes, orthogonal)
            # obs_stats in float32, std at least 1. Without statistics pixels are divided by 255
            self.register_buffer("pixel_mean", torch.zeros(obs_shape))
            self.register_buffer("pixel_std", torch.full(obs_shape, 255.0))
        else:
            sizes = (*obs_shape, *hidden_sizes)
            self.trunk = nn.Sequential(mlp(sizes, math.sqrt(2), orthogonal), nn.Tanh())
        self.policy_head = mlp((hidden_sizes[-1], num_actions), 0.01, orthogonal)
        self.value_head = mlp((hidden_sizes[-1], 1), 1.0, orthogonal)

    def update_stats(self, obs: Tensor) -> None:
        """Merge raw observations (B, …) into the statistics that `norm_obs` uses.

        The std of a pixel is at least one gray level.
        """
        if not self.norm_obs:
            return
        self.obs_stats.update(obs)
        if self.images:
            self.pixel_mean.copy_(self.obs_stats.mean)
            self.pixel_std.copy_(self.obs_stats.std.clamp(min=1))

    def normalize(self, obs: Tensor | np.ndarray) -> Tensor:
        """Normalize raw observations (…, O) (Engstrom section 3, items 6 and 7).

        Takes a tensor or an array. Computes in float64 on the CPU. Returns the dtype and device of
        the network. Images (…, C, H, W) stay uint8: `logits_and_values` normalizes them.
        """
        if not isinstance(obs, Tensor):
            obs = torch.from_numpy(np.array(obs, None if self.images else np.float64))
        shape = self.obs_stats.mean.shape
        assert obs.shape[-len(shape) :] == shape, f"an observation has the shape {tuple(shape)}"
        if self.images:
            return obs.to(self.pixel_mean.device)
        obs = obs.to("cpu", torch.float64)
        if self.norm_obs:
            obs = (obs - self.obs_stats.mean) / self.obs_stats.std
            obs = obs.clamp(-NORM_LIMIT, NORM_LIMIT)
        return obs.to(self.value_head[0].weight)

    def logits_and_values(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits z (…, A) and V (…,) for the results of `normalize` (…, O)."""
        x = inputs
        if self.images:
            x = inputs.reshape(-1, *self.pixel_mean.shape).to(self.pixel_mean)  # (B, C, H, W)
            x = ((x - self.pixel_mean) / self.pixel_std).clamp(-PIXEL_LIMIT, PIXEL_LIMIT)
            x = x.to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.trunk(x)
        leading = inputs.shape[: -self.obs_dims]
        x = x.float().reshape(*leading, x.shape[-1])
        return self.policy_head(x), self.value_head(x).squeeze(-1)

    def forward(self, obs: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the logits z (…, A) and V (…,) for raw observations (…, O)."""
        return self.logits_and_values(self.normalize(obs))

    @torch.inference_mode()
    def sample(self, obs: np.ndarray, noise: Tensor) -> Tensor:
        """Return argmax_a π(a|s) / E_a (…,) for raw observations (…, O), and noise E (…, A).

        With independent E_a ~ Exp(1) it is a draw from π(·|s): E_a / π_a of a is the smallest one
        with probability π_a. With E_a = 1 it is the most probable action.
        """
        logits, _ = self(obs)
        probs = logits.softmax(-1).cpu()
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


class Batch(NamedTuple):
    """B transitions of a rollout or M of a minibatch. "old" means: under π_old and V_old."""

    inputs: Tensor  # (B, O)  normalized observations, or images
    actions: Tensor  # (B,)
    logits_old: Tensor  # (B, A)
    logp_old: Tensor  # (B,)
    values_old: Tensor  # (B,)
    adv: Tensor  # (B,)
    returns: Tensor  # (B,)


def ppo_loss(
    policy: ActorCritic, batch: Batch, eps_clip: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -(L^CLIP - c1 L^VF + c2 S), PPO eq. 9, and metrics."""
    logits, values = policy.logits_and_values(batch.inputs)  # (M, A), (M,)
    logp = categorical_logp(logits, batch.actions)
    ratio = (logp - batch.logp_old).exp()  # r_t(θ), (M,)
    kl = categorical_kl(batch.logits_old, logits)  # (M,)
    surrogate = clipped_surrogate(ratio, batch.adv, eps_clip)

    if args.clip_vloss:
        vf_loss = clipped_value_loss(values, batch.values_old, batch.returns, eps_clip)
    else:
        vf_loss = value_loss(values, batch.returns)
    entropy = categorical_entropy(logits).mean()

    metrics = {
        "policy_loss": -surrogate,
        "value_loss": vf_loss,
        "entropy": entropy,
        "approx_kl": kl.mean(),  # the exact KL before this step. approx_kl is its usual name
        "clipfrac": ((ratio - 1).abs() > eps_clip).float().mean(),
    }
    return -(surrogate - args.vf_coef * vf_loss + args.ent_coef * entropy), metrics


def clip_global_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 9: g ← g min(1, c / ‖g‖₂).

    g is the gradient of one network as one vector. Returns the clipped g (P,) and the norm before
    clipping.
    """
    flat = torch.cat([g.flatten() for g in grads])
    norm = flat.norm()
    return flat * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


class Adam(nn.Module):
    """Kingma Algorithm 1 for P weights.

    Takes the steps of torch.optim.Adam, whose class can't be compiled into one graph with the loss.
    """

    def __init__(self, num_weights: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("lr", torch.tensor(0.0))  # α
        self.register_buffer("t", torch.tensor(0.0))
        self.register_buffer("m", torch.zeros(num_weights))
        self.register_buffer("v", torch.zeros(num_weights))

    @torch.no_grad()
    def step(self, params: list[Tensor], grad: Tensor) -> None:
        """Take one step against `grad` (P,), the gradient of a loss. `params` hold P weights.

        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        θ ← θ - α m̂ / (√v̂ + ε)  with  m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
        """
        beta1 = 0.9
        beta2 = 0.999
        self.t += 1
        self.m.lerp_(grad, 1 - beta1)
        self.v.lerp_(grad.square(), 1 - beta2)
        # -expm1(t log β) is 1 - βᵗ without the rounding error of the difference
        m_hat = self.m / -torch.expm1(self.t * math.log(beta1))
        v_hat = self.v / -torch.expm1(self.t * math.log(beta2))
        change = self.lr * m_hat / (v_hat.sqrt() + self.eps)
        sizes = [param.numel() for param in params]
        for param, part in zip(params, change.split(sizes), strict=True):
            param -= part.view_as(param)


def minibatch_step(
    policy: ActorCritic, adam: Adam, batch: Batch, eps_clip: Tensor, args: Args
) -> dict[str, Tensor]:
    """Take one step of Adam on the loss of one minibatch, and return metrics."""
    loss, metrics = ppo_loss(policy, batch, eps_clip, args)
    params = list(policy.parameters())
    grads = torch.autograd.grad(loss, params)
    grad, grad_norm = clip_global_norm([mean_of_processes(grads)], args.max_grad_norm)
    adam.step(params, grad)
    metrics["grad_norm"] = grad_norm
    return {name: value.detach() for name, value in metrics.items()}


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalized advantage estimation, GAE eq. 16, cut at the end of the rollout.

    δ_t = r_t + γ (1 - terminated_t) V(s_{t+1}) - V(s_t)     PPO eq. 12
    Â_t = δ_t + γλ δ_{t+1} + … + (γλ)^{T-1-t} δ_{T-1}        PPO eq. 11
        = δ_t + γλ (1 - done_t) Â_{t+1}

    PPO eq. 11 misprints the last exponent as T-t+1. `next_values[t]` is V of the state that action
    t led to. At the end of an episode this is its final observation. A termination removes this V.
    A time limit keeps it (Pardo eq. 6). Both (`done`) end the sum. Takes and returns (T, N).
    """
    assert rewards.shape == values.shape == next_values.shape == terminated.shape == done.shape
    delta = (rewards + gamma * next_values * ~terminated - values).cpu().numpy()
    decay = gamma * lam * ~done.cpu().numpy()
    adv = np.zeros_like(delta)
    adv[-1] = delta[-1]
    for t in reversed(range(len(delta) - 1)):
        adv[t] = delta[t] + decay[t] * adv[t + 1]
    return torch.from_numpy(adv).to(rewards.device)


@torch.no_grad()
def advantages(
    policy: ActorCritic, rollout: "Rollout", gamma: float, args: Args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Â, V^targ, V and the logits of π_old, each (T, N, …).

    V^targ = Â + V (GAE footnote 2), before norm_adv standardizes Â.
    """
    logits, values = policy.logits_and_values(rollout.obs)
    # s_{t+1} is the next row, except at the end of the rollout and of an episode
    _, last_values = policy.logits_and_values(rollout.next_obs[-1:])
    next_values = torch.cat([values[1:], last_values])
    _, next_values[rollout.done] = policy.logits_and_values(rollout.next_obs[rollout.done])
    lam = args.gae_lambda
    adv = gae(rollout.rewards, values, next_values, rollout.terminated, rollout.done, gamma, lam)
    returns = adv + values
    if args.norm_adv:
        all_adv = of_all_processes(adv)
        adv = (adv - all_adv.mean()) / (all_adv.std() + 1e-8)
    return adv, returns, values, logits


def update(
    policy: ActorCritic,
    adam: Adam,
    train_step: Callable,
    rollout: "Rollout",
    gamma: float,
    eps_clip: float,
    rng: torch.Generator,
    args: Args,
) -> dict[str, float]:
    """K epochs of minibatches over one prepared rollout (PPO Algorithm 1). Returns metrics.

    `train_step` is minibatch_step, compiled or not. explained_variance is that before the update,
    over all processes of torchrun. The others are means over minibatches and processes.
    """
    adv, returns, values_old, logits_old = advantages(policy, rollout, gamma, args)
    logp_old = categorical_logp(logits_old, rollout.actions)
    unexplained = of_all_processes(returns - values_old).var()
    explained_variance = 1 - unexplained / of_all_processes(returns).var()

    history = []
    # a float would compile a graph for each value
    eps_tensor = torch.tensor(eps_clip, device=adv.device)
    for _ in range(args.update_epochs):
        batch = Batch(  # (T, N, …), flattened below
            inputs=rollout.obs,
            actions=rollout.actions,
            logits_old=logits_old,
            logp_old=logp_old,
            values_old=values_old,
            adv=adv,
            returns=returns,
        )
        order = torch.randperm(adv.numel(), generator=rng).to(adv.device)
        shuffled = [x.flatten(0, 1).index_select(0, order) for x in batch]  # (B, …)
        chunks = [x.chunk(args.num_minibatches) for x in shuffled]
        for minibatch in zip(*chunks, strict=True):
            metrics = train_step(policy, adam, Batch(*minibatch), eps_tensor, args)
            history.append(metrics)

    means = {}
    for name in history[0]:
        means[name] = torch.stack([metrics[name] for metrics in history]).mean().item()
    means["explained_variance"] = explained_variance.item()
    means["learning_rate"] = adam.lr.item()
    parts = gather(means)
    return {name: float(np.mean([part[name] for part in parts])) for name in means}


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


class Rollout(NamedTuple):
    """T x N transitions: raw from collect. From prepare: scaled rewards, normalized vectors."""

    obs: Tensor  # (T, N, O)
    next_obs: Tensor  # (T, N, O)  true successors, final observations included
    actions: Tensor  # (T, N)
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    done: Tensor  # (T, N)  terminated | truncated
    resets: Tensor  # (T, N)  a new episode began. After a lost life (done) a game may go on


def collect(envs: Envs, policy: nn.Module, noise: Tensor) -> Rollout:
    """Run the policy for T steps (PPO Algorithm 1) with noise (T, N, A). Returns raw values."""
    steps = []
    for noise_t in noise:
        obs = envs.obs
        actions = policy.sample(obs, noise_t).numpy()
        next_obs, rewards, terminated, truncated = envs.step(actions)
        done = terminated | truncated
        resets = envs.lengths == 0
        steps.append((obs, next_obs, actions, rewards, terminated, done, resets))
    columns = [np.stack(column) for column in zip(*steps, strict=True)]
    return Rollout(*map(torch.from_numpy, columns))


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


def rolling_discounted_sums(
    rewards: Tensor, done: Tensor, running_sum: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 2: R_t = γ R_{t-1} + r_t, from 0 in each episode.

    rewards and done are (T, N). running_sum (N,) is R_{-1}, from the previous rollout. Returns
    R (T, N) and the running sum of the next rollout.
    """
    rewards = rewards.numpy()
    done = done.numpy()
    total = running_sum.numpy()
    sums = np.zeros_like(rewards)
    for t in range(len(rewards)):
        total = gamma * total + rewards[t]
        sums[t] = total
        total = total * ~done[t]
    return torch.from_numpy(sums), torch.from_numpy(total)


def prepare(
    raw: Rollout, policy: ActorCritic, running_sum: Tensor, gamma: float, args: Args
) -> tuple[Rollout, Tensor]:
    """Update reward_stats, normalize observations, scale rewards, and move all to the device.

    With `clip_rewards` rewards become their signs (DQN Methods). With `norm_reward` they are
    divided by the std of their rolling discounted sum (Engstrom section 3, items 2 and 5). Returns
    the rollout and the running sum of the next one.
    """
    rewards = raw.rewards
    if args.clip_rewards:
        rewards = rewards.sign()
    if args.norm_reward:
        sums, running_sum = rolling_discounted_sums(rewards, raw.done, running_sum, gamma)
        policy.reward_stats.update(sums.flatten())
        rewards = (rewards / policy.reward_stats.std).clamp(-NORM_LIMIT, NORM_LIMIT)
    obs = policy.normalize(raw.obs)
    next_obs = policy.normalize(raw.next_obs)
    rollout = raw._replace(obs=obs, next_obs=next_obs, rewards=rewards.float())
    return Rollout(*(x.to(obs.device) for x in rollout)), running_sum


class RunningMeanStd(nn.Module):
    """Mean and std of all rows seen so far (Chan et al. 1979). A constant component has std 1.

    They are float64 and not buffers, so they stay on the CPU when the module moves to a device.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.count = 0
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.var = torch.ones(shape, dtype=torch.float64)
        self.std = torch.ones(shape, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Merge rows (B, *shape) of each process."""
        rows = rows.to("cpu", torch.float64)
        for count, mean, var in gather((len(rows), rows.mean(0), rows.var(0, correction=0))):
            self.count += count
            weight = count / self.count
            var = var + (1 - weight) * (mean - self.mean).square()
            self.mean = (1 - weight) * self.mean + weight * mean
            self.var = (1 - weight) * self.var + weight * var
        constant = self.var <= (1e-12 * self.mean).square()  # zero to rounding
        self.std = torch.where(constant, 1.0, self.var.sqrt())

    def get_extra_state(self) -> dict:
        names = ("count", "mean", "var", "std")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


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


def of_all_processes(x: Tensor) -> Tensor:
    """Return x (T, N) of all processes side by side."""
    return torch.cat(gather(x.cpu()), 1).to(x.device)


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


def check_rollout(rollout: Rollout, iteration: int, norm_obs: bool) -> None:
    """Raise NonFiniteError for observations or rewards that can't be trained on."""
    rewards = rollout.rewards.float()  # shows what is too large for float32
    if rollout.obs.dtype != torch.uint8:
        obs = torch.cat([rollout.obs, rollout.next_obs]).double()
        check_finite(iteration, observations=obs)
        limit = 1e100 if norm_obs else HUGE  # statistics need their squares
        if max(gather(obs.abs().max().item())) > limit:
            hint = "" if norm_obs else ": add --norm-obs"
            raise NonFiniteError(f"observations beyond {limit:g}, iteration {iteration}{hint}")
    check_finite(iteration, rewards=rewards)


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


def ppo(
    args: Args,
    state: dict | None = None,
    compile_step: Callable[[Callable], Callable] = lambda step: step,
) -> Iterator[dict[str, float]]:
    """PPO Algorithm 1, actor-critic style. Yields the metrics of each iteration.

    If the dict `state` holds a checkpoint, the run continues from it. At each yield, `state` is a
    complete checkpoint with the keys policy, adam, exploration, minibatches, step, episodes,
    env_rng_states and spaces. `compile_step` gets minibatch_step and returns what to use in its
    place. Seeds PyTorch's global generator. Raises InputError for an environment that does not
    fit, NonFiniteError for NaN or infinity.
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
        adam = Adam(sum(param.numel() for param in params)).to(args.torch_device)
        modules = {"policy": policy, "adam": adam}
        if state:
            for name, module in modules.items():
                module.load_state_dict(state[name])
            for name, rng in rngs.items():
                rng.set_state(state[name])
        step = state.get("step", 0)
        episodes = Episodes(args.num_envs, state.get("episodes", ()))
        running_sum = torch.zeros(len(envs.obs), dtype=torch.float64)
        train_step = compile_step(minibatch_step)
        # An image of ALE holds the last 4 steps. Every fourth image shows each step once.
        stride = FRAME_STACK if args.images else 1

        while step + args.batch_size <= args.total_timesteps:
            iteration = step // args.batch_size + 1
            fraction = step / args.planned_steps
            final_lr = 0.0 if args.anneal_lr else args.learning_rate
            adam.lr.fill_(line(args.learning_rate, final_lr, fraction))
            final_gamma = args.gamma if args.gamma_final is None else args.gamma_final
            gamma = line(args.gamma, final_gamma, fraction)
            final_clip = 0.0 if args.anneal_clip else args.clip_coef
            eps_clip = line(args.clip_coef, final_clip, fraction)

            shape = (args.num_steps, args.num_envs, num_actions)
            noise = torch.empty(shape).exponential_(generator=rngs["exploration"])
            raw = collect(envs, policy, noise[:, part])
            # Each process of torchrun has some of the environments. Episodes are counted for all
            columns = gather((raw.rewards, raw.resets, envs.rng_states))
            rewards, resets, rng_states = zip(*columns, strict=True)
            episodes.add(torch.cat(rewards, 1), torch.cat(resets, 1))
            check_rollout(raw, iteration, args.norm_obs)
            first = policy.obs_stats.count == 0
            # The first rollout is sampled before there are statistics. They are then computed from
            # it and used in its update, so this π_old is not the policy that took the actions.
            if first:
                policy.update_stats(raw.obs[::stride].flatten(0, 1))
            rollout, running_sum = prepare(raw, policy, running_sum, gamma, args)

            rng = rngs["minibatches"]
            metrics = update(policy, adam, train_step, rollout, gamma, eps_clip, rng, args)
            check_update(metrics, params, iteration)
            metrics |= {"clip_coef": eps_clip, "gamma": gamma}
            if not first:
                policy.update_stats(raw.obs[::stride].flatten(0, 1))

            step += args.batch_size
            state.update({name: module.state_dict() for name, module in modules.items()})
            state.update({name: generator.get_state() for name, generator in rngs.items()})
            state.update(step=step, episodes=list(episodes.last))
            state.update(env_rng_states=sum(rng_states, []), spaces=envs.spaces)
            metrics |= episodes.means()
            yield metrics


# ==================================================================================================
# The algorithm ends here. Below is what runs it: files, progress, evaluation, command line.
# ==================================================================================================

ALGORITHM = "ppo_atari"  # what a checkpoint is checked for
GENERATOR = ppo
WHY_AUTO = "cuda for images where there is a GPU"  # for the device that --device auto takes
SHOWN = "approx_kl"  # the metric that the progress shows
FIXED_ON_EVALUATION = ("norm_obs", "hidden_sizes")
FIXED_ON_RESUME = (
    "norm_obs",
    "hidden_sizes",
    "env_id",
    "seed",
    "num_envs",
    "norm_reward",
    "orthogonal_init",
)
RANGES = (
    (
        "total_timesteps num_envs num_steps update_epochs num_minibatches hidden_sizes "
        "learning_rate clip_coef max_grad_norm",
        lambda x: x > 0,
        "must be positive",
    ),
    (
        "seed eval_episodes vf_coef ent_coef",
        lambda x: x >= 0,
        "must not be negative",
    ),
    (
        "learning_rate clip_coef vf_coef ent_coef",
        math.isfinite,
        "must be finite",
    ),
    (
        "gamma gamma_final gae_lambda repeat_action_probability",
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
    size = f"--num-envs x --num-steps = {args.batch_size}"
    _, processes = rank_and_size()
    divides = args.batch_size // processes % args.num_minibatches == 0
    size += f" / {processes} processes" if processes > 1 else ""
    require(divides, f"--num-minibatches must divide {size}")
    require(len(args.hidden_sizes) > 0, "--hidden-sizes needs one layer or more")
    require(args.images or not args.paper, "--paper is for images: the paper has no vectors")
    used = args.repeat_action_probability == 0 or ale_game(args.env_id) is not None
    require(used, "--repeat-action-probability is for games of ALE")


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
