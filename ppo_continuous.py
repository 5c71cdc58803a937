# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0",
#     "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
"""Proximal policy optimization (PPO) for continuous actions, in one file.

Papers
    PPO       Schulman et al. 2017, arXiv:1707.06347v2
    GAE       Schulman et al. 2016, arXiv:1506.02438v6
    TRPO      Schulman et al. 2015, arXiv:1502.05477v5
    Engstrom  Engstrom et al. 2020, arXiv:2005.12729v1
    Pardo     Pardo et al. 2018, arXiv:1712.00378v4
    Kingma    Kingma & Ba 2015, arXiv:1412.6980v9

Install   pip install torch==2.13.0 "gymnasium[mujoco]==1.4.0" tyro tensorboard tqdm
          (or `uv run ppo_continuous.py`, which reads the exact versions from the top of this file)
Run       python ppo_continuous.py --env-id HalfCheetah-v5 --seed 1
Faster    python ppo_continuous.py --env-id envpool:HalfCheetah-v5     (pip install envpool)
          torchrun --nproc-per-node 4 ppo_continuous.py --env-id Humanoid-v5
Resume    python ppo_continuous.py --resume runs/<run>/checkpoint.pt
Evaluate  python ppo_continuous.py --evaluate runs/<run>/checkpoint.pt --video-dir videos
From Python: train(Args(env_id="Hopper-v5")), load_policy("runs/<run>/checkpoint.pt").act(obs)

Equation map
    equation                       function                  symbol
    PPO section 3                  ppo_loss                  r_t(θ)
    PPO eq. 6                      importance_surrogate      L^CPI
    PPO eq. 7                      clipped_surrogate         L^CLIP
    PPO eq. 8                      kl_penalized_surrogate    L^KLPEN
    PPO eq. 8                      gaussian_kl               KL[π_old, π]
    PPO section 4                  adapt_kl_coef             β
    PPO eq. 9                      ppo_loss                  L^CLIP - c1 L^VF + c2 S
    PPO eq. 9                      value_loss                L^VF
    PPO eq. 9                      gaussian_entropy          S[π]
    PPO eqs. 11-12, GAE eq. 16     gae                       Â_t, δ_t
    PPO Algorithm 1                ppo, update               N actors, T steps, K epochs
    GAE footnote 2                 advantages                V^targ
    TRPO appendix D                gaussian_logp             log π(a|s)
    Engstrom section 3, item 1     clipped_value_loss        L^VF with V clipped around V_old
    Engstrom section 3, item 2     rolling_discounted_sums   R_t, whose std divides the rewards
    Engstrom section 3, item 9     clip_global_norm          gradient clipping
    Kingma Algorithm 1             Adam                      m, v, θ

Departures from the PPO paper that no flag reverts (PAPER below lists the others)
    When a time limit ends an episode, its last δ_t keeps γ V(final observation) (Pardo eq. 6).
    Actions are scaled from [-1, 1] to the bounds of the environment and clipped there. Where a
    bound is infinite, they are not scaled. log π(a|s) is that of the action before clipping.
    c1 of PPO eq. 9 is left out (c1 = 1). As in section 6.1 of the paper the networks share no
    weights. Adam and gradient clipping by network then nearly cancel c1.
    The adaptive β stays in [1e-8, 1e8].
    Adam's ε is 1e-5. The PPO paper names none. Kingma's is 1e-8.

With norm_obs, the first rollout is sampled before there are statistics. They are then computed from
it and used in its update, so this π_old is not the policy that took the actions.

A resumed run restarts unfinished episodes. If none is unfinished at the checkpoint, the resumed
run equals the uninterrupted run bit for bit. This does not hold for EnvPool, whose random states
can't be saved: its episodes start from new seeds.
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
    # Gymnasium id, module:Env-v0 for an environment of your own, or envpool:HalfCheetah-v5
    env_id: str = "HalfCheetah-v5"
    seed: int = 1  # seed of weights, noise, minibatches and environments
    # environment steps, such as 1_000_000 or 1e6, rounded down to whole iterations. With --resume,
    # a larger value stretches the schedules
    total_timesteps: int | float = 1_000_000
    paper: bool = False  # use the settings of the PPO paper. Flags you give override them
    # a new folder for this run. None: runs/<environment>__<script>__s<seed>__<date>
    run_dir: str | None = None
    # continue from this checkpoint.pt with its flags. Flags you give override them, except those
    # that a run can't change
    resume: str | None = None
    evaluate: str | None = None  # evaluate this checkpoint.pt instead of training, with its flags
    # evaluation episodes with mean actions, and as many with sampled ones. 0: no evaluation
    eval_episodes: int = 10
    video_dir: str | None = None  # folder for a GIF of one episode with mean actions
    # auto, cpu, cuda, cuda:1 or mps. auto is cpu, because the networks are small
    device: str = "auto"
    # compile the minibatch step with torch.compile. auto compiles runs of 250,000 steps or more
    compile: Literal["auto", "on", "off"] = "auto"


@dataclass
class EnvironmentArgs:
    num_envs: int = 16  # N, number of environments, stepped one after another
    # threads with which each process steps EnvPool, for ids such as envpool:HalfCheetah-v5
    # (default: one for each core)
    env_threads: int | None = None
    # normalize observations by their running mean and std, and clip them to ±10
    norm_obs: bool = True
    # divide rewards by the running std of their rolling discounted sum, and clip them to ±10
    norm_reward: bool = True


@dataclass
class AlgorithmArgs:
    num_steps: int = 128  # T, steps per environment and iteration
    update_epochs: int = 10  # K, passes over the batch of N x T samples
    num_minibatches: int = 32  # minibatches per epoch, each of M = N x T / num_minibatches samples
    learning_rate: float = 3e-4  # α, step size of Adam, for both networks
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    gamma: float = 0.99  # γ, the discount factor. Swimmer-v5 needs 0.9999
    gamma_final: float | None = None  # anneal γ linearly to this. None: γ is constant
    gae_lambda: float = 0.95  # λ of GAE eq. 16. 0: one-step TD, 1: Monte Carlo
    norm_adv: bool = False  # standardize the advantages over the whole batch
    recompute_advantages: bool = True  # recompute advantages and value targets before each epoch
    # clip: PPO eq. 7. kl-adaptive, kl-fixed: PPO eq. 8. none: PPO eq. 6
    surrogate: Literal["clip", "kl-adaptive", "kl-fixed", "none"] = "clip"
    clip_coef: float = 0.2  # ε of PPO eq. 7 and of clip_vloss
    kl_coef: float = 1.0  # β of PPO eq. 8. kl-adaptive starts from it
    kl_target: float = 0.01  # d_targ of the adaptive β (PPO section 4)
    clip_vloss: bool = False  # clip V to ±ε around its old value. Not in the paper
    ent_coef: float = 0.0  # c2 of PPO eq. 9, weight of the entropy bonus. Needs a learned σ
    max_grad_norm: float = 0.5  # largest gradient norm of each network. inf: no clipping
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of each network
    # orthogonal weights with gain √2 (policy output 0.01, value output 1), or PyTorch's default
    orthogonal_init: bool = True
    log_std_init: float = -1.0  # log σ at the start
    # log σ approached at the end, on a straight line in σ. None: σ is learned, from log_std_init
    log_std_final: float | None = -3.0


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
        return torch.device("cpu" if self.device == "auto" else self.device)

    @property
    def torch_threads(self) -> int:
        return 1  # more do not help networks this small


PAPER = {  # --paper: PPO section 6.1 and Table 3
    "num_envs": 1,  # one long rollout instead of several short ones
    "num_steps": 2048,
    "norm_obs": False,  # the paper does not mention normalizing observations or rewards
    "norm_reward": False,
    "anneal_lr": False,
    "recompute_advantages": False,  # once per iteration
    "max_grad_norm": math.inf,  # the paper does not mention gradient clipping
    "orthogonal_init": False,  # the paper names no initialization
    "log_std_init": 0.0,  # the paper names no initial σ for MuJoCo
    "log_std_final": None,  # σ is learned. Only Table 4 (Roboschool) anneals it, on a line in log σ
}

NORM_LIMIT = 10.0  # normalized observations and rewards are clipped to ± this
POOL = "envpool:"  # prefix of the ids of EnvPool
ALL = slice(None)  # the part of a single process: all environments
HUGE = 1e10  # larger action bounds count as none. Larger observations need norm_obs


class InputError(ValueError):
    """Bad input. The message is one line that says what to change."""


class NonFiniteError(FloatingPointError):
    """NaN, infinity or a number too large to train on. The message says where it appeared."""


# ---- Equations -----------------------------------------------------------------------------------
# T steps, N environments, B = T N transitions, M transitions of a minibatch, K epochs,
# O observation dims, A action dims, P weights


def gaussian_logp(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """TRPO appendix D: log π(a|s) of N(μ(s), diag σ²).

    log π(a|s) = Σ_i [-½ ((a_i - μ_i) / σ_i)² - log σ_i - ½ log 2π]

    mean, actions (…, A), log_std (A,) or (…, A). Returns (…,).
    """
    assert mean.shape == actions.shape
    z = (actions - mean) / log_std.exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_old: Tensor, log_std_old: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(π_old ‖ π) of PPO eq. 8 in nats.

    KL = Σ_i [log(σ_i / σ_old,i) + (σ_old,i² + (μ_old,i - μ_i)²) / (2 σ_i²) - ½]

    means (…, A), log stds (A,) or (…, A). Returns (…,).
    """
    assert mean_old.shape == mean.shape
    squares = (2 * log_std_old).exp() + (mean_old - mean).square()
    return (log_std - log_std_old + squares / (2 * (2 * log_std).exp()) - 0.5).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """S[π] of PPO eq. 9 in nats: Σ_i (log σ_i + ½ log 2πe). log_std (…, A), returns (…,)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


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


def importance_surrogate(ratio: Tensor, adv: Tensor) -> Tensor:
    """PPO eq. 6: L^CPI(θ) = Ê[r_t Â_t], to be maximized. (B,) each, returns a scalar."""
    assert ratio.shape == adv.shape
    return (ratio * adv).mean()


def clipped_surrogate(ratio: Tensor, adv: Tensor, eps_clip: Tensor | float) -> Tensor:
    """PPO eq. 7: L^CLIP(θ) = Ê[min(r_t Â_t, clip(r_t, 1-ε, 1+ε) Â_t)], to be maximized.

    (B,) each, returns a scalar.
    """
    assert ratio.shape == adv.shape
    return torch.min(ratio * adv, ratio.clamp(1 - eps_clip, 1 + eps_clip) * adv).mean()


def kl_penalized_surrogate(ratio: Tensor, adv: Tensor, kl: Tensor, beta: Tensor | float) -> Tensor:
    """PPO eq. 8: L^KLPEN(θ) = Ê[r_t Â_t - β KL[π_old, π_θ]], to be maximized. Returns a scalar.

    ratio and adv are (B,). kl is (B,), or its mean.
    """
    return importance_surrogate(ratio, adv) - beta * kl.mean()


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


class Policy(nn.Module):
    """π_θ(a|s) = N(μ_θ(s), diag σ²) of raw observations. σ does not depend on s (TRPO appendix D).

    `to_env` maps -1 and 1 to the bounds of the action space, and clips there.
    """

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.spaces.Box, args: Args):
        super().__init__()
        (action_dim,) = action_space.shape
        self.action_dim = action_dim
        self.norm_obs = args.norm_obs
        self.obs_stats = RunningMeanStd(*obs_shape)
        sizes = (*obs_shape, *args.hidden_sizes, action_dim)
        self.mean_net = mlp(sizes, last_gain=0.01, orthogonal=args.orthogonal_init)
        self.log_std_init = args.log_std_init
        self.log_std_final = args.log_std_final
        log_std = torch.full((action_dim,), float(args.log_std_init))
        if args.log_std_final is None:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)
        self.action_map = ActionMap(action_space)

    def normalize(self, obs: Tensor | np.ndarray) -> Tensor:
        """Normalize raw observations (…, O) for both networks (Engstrom section 3, items 6 and 7).

        Takes a tensor or an array. Computes in float64 on the CPU. Returns the dtype and device of
        the networks.
        """
        if not isinstance(obs, Tensor):
            obs = torch.from_numpy(np.array(obs, np.float64))
        shape = self.obs_stats.mean.shape
        assert obs.shape[-1:] == shape, f"an observation has the shape {tuple(shape)}"
        obs = obs.to("cpu", torch.float64)
        if self.norm_obs:
            obs = (obs - self.obs_stats.mean) / self.obs_stats.std
            obs = obs.clamp(-NORM_LIMIT, NORM_LIMIT)
        return obs.to(self.mean_net[0].weight)

    def mean_and_log_std(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ_θ(s) (…, A) and log σ, (A,) or (…, A), for normalized observations (…, O)."""
        return self.mean_net(inputs), self.log_std

    def forward(self, obs: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return μ_θ(s) (…, A) and log σ, (A,) or (…, A), for raw observations (…, O)."""
        return self.mean_and_log_std(self.normalize(obs))

    def anneal(self, fraction: float) -> None:
        """Put σ on the line from its first to its last value. A learned σ stays."""
        if self.log_std_final is not None:
            std = line(math.exp(self.log_std_init), math.exp(self.log_std_final), fraction)
            self.log_std.fill_(math.log(std))

    @torch.inference_mode()
    def sample(self, obs: np.ndarray, noise: Tensor) -> Tensor:
        """Return μ_θ(s) + σ z (…, A), given raw observations (…, O) and noise z (…, A).

        With z ~ N(0, I) it is a draw from π(·|s), before `to_env`.
        """
        mean, log_std = self(obs)
        return mean + log_std.exp() * noise.to(mean)

    def to_env(self, samples: Tensor) -> np.ndarray:
        """Map actions of the Gaussian (…, A) to actions of the environment (…, A)."""
        return self.action_map(samples.cpu().numpy())

    def act(
        self, obs: np.ndarray, deterministic: bool = True, rng: torch.Generator | None = None
    ) -> np.ndarray:
        """Return the mean action or a sample for raw observations (…, O), as `to_env` gives it.

        Without `rng` the noise comes from PyTorch's global generator.
        """
        shape = (*np.shape(obs)[:-1], self.action_dim)
        noise = torch.zeros(shape) if deterministic else torch.randn(shape, generator=rng)
        return self.to_env(self.sample(obs, noise))


class Critic(nn.Module):
    """V(s) in units of scaled reward. Takes normalized observations (…, O), returns (…,)."""

    def __init__(self, obs_shape: tuple[int, ...], args: Args):
        super().__init__()
        self.reward_stats = RunningMeanStd()
        sizes = (*obs_shape, *args.hidden_sizes, 1)
        self.value_net = mlp(sizes, last_gain=1.0, orthogonal=args.orthogonal_init)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value_net(inputs).squeeze(-1)


# ---- Loss and update -----------------------------------------------------------------------------


class Batch(NamedTuple):
    """B transitions of a rollout or M of a minibatch. "old" means: under π_old and V_old."""

    inputs: Tensor  # (B, O)  normalized observations
    actions: Tensor  # (B, A)  before to_env
    mean_old: Tensor  # (B, A)
    log_std_old: Tensor  # (B, A)
    logp_old: Tensor  # (B,)
    values_old: Tensor  # (B,)
    adv: Tensor  # (B,)
    returns: Tensor  # (B,)


def ppo_loss(
    policy: Policy, critic: Critic, batch: Batch, beta: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -(L^CLIP - L^VF + c2 S), PPO eq. 9 with c1 = 1, and metrics.

    `args.surrogate` may replace L^CLIP.
    """
    mean, log_std = policy.mean_and_log_std(batch.inputs)
    logp = gaussian_logp(mean, log_std, batch.actions)
    ratio = (logp - batch.logp_old).exp()  # r_t(θ), (M,)
    kl = gaussian_kl(batch.mean_old, batch.log_std_old, mean, log_std)  # (M,)
    if args.surrogate == "clip":
        surrogate = clipped_surrogate(ratio, batch.adv, args.clip_coef)
    elif args.surrogate == "none":
        surrogate = importance_surrogate(ratio, batch.adv)
    else:
        surrogate = kl_penalized_surrogate(ratio, batch.adv, kl, beta)

    values = critic(batch.inputs)  # (M,)
    if args.clip_vloss:
        vf_loss = clipped_value_loss(values, batch.values_old, batch.returns, args.clip_coef)
    else:
        vf_loss = value_loss(values, batch.returns)
    entropy = gaussian_entropy(log_std).mean()

    metrics = {
        "policy_loss": -surrogate,
        "value_loss": vf_loss,
        "entropy": entropy,
        "approx_kl": kl.mean(),  # the exact KL before this step. approx_kl is its usual name
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return -(surrogate - vf_loss + args.ent_coef * entropy), metrics


def clip_global_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 9: g ← g min(1, c / ‖g‖₂).

    g is the gradient of one network as one vector. Engstrom takes both networks of PPO together.
    Returns the clipped g (P,) and the norm before clipping.
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
    policy: Policy, critic: Critic, adam: Adam, batch: Batch, beta: Tensor, args: Args
) -> dict[str, Tensor]:
    """Take one step of Adam on the loss of one minibatch, and return metrics.

    The gradient of each network is clipped by its own norm.
    """
    loss, metrics = ppo_loss(policy, critic, batch, beta, args)
    policy_params = list(policy.parameters())
    critic_params = list(critic.parameters())
    grads = torch.autograd.grad(loss, policy_params + critic_params)
    n = len(policy_params)
    policy_grad, policy_grad_norm = clip_global_norm(grads[:n], args.max_grad_norm)
    critic_grad, critic_grad_norm = clip_global_norm(grads[n:], args.max_grad_norm)
    adam.step(policy_params + critic_params, torch.cat([policy_grad, critic_grad]))
    metrics["policy_grad_norm"] = policy_grad_norm
    metrics["value_grad_norm"] = critic_grad_norm
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
    critic: Critic, rollout: "Rollout", gamma: float, args: Args
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Â, V^targ and V of the current critic, each (T, N).

    V^targ = Â + V (GAE footnote 2), before norm_adv standardizes Â.
    """
    values = critic(rollout.obs)
    # s_{t+1} is the next row, except at the end of the rollout and of an episode
    next_values = torch.cat([values[1:], critic(rollout.next_obs[-1:])])
    next_values[rollout.done] = critic(rollout.next_obs[rollout.done])
    lam = args.gae_lambda
    adv = gae(rollout.rewards, values, next_values, rollout.terminated, rollout.done, gamma, lam)
    returns = adv + values
    if args.norm_adv:
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    return adv, returns, values


def update(
    policy: Policy,
    critic: Critic,
    adam: Adam,
    train_step: Callable,
    rollout: "Rollout",
    gamma: float,
    beta: float,
    rng: torch.Generator,
    args: Args,
) -> dict[str, float]:
    """K epochs of minibatches over one prepared rollout (PPO Algorithm 1). Returns metrics.

    `train_step` is minibatch_step, compiled or not. metrics["kl"] is d of PPO section 4: the mean
    of KL[π_old, π] over the rollout after the last epoch. explained_variance and action_std are
    those before the update. learning_rate is the one used. The rest are means over minibatches.
    """
    with torch.no_grad():
        mean_old, log_std_old = policy.mean_and_log_std(rollout.obs)
        logp_old = gaussian_logp(mean_old, log_std_old, rollout.actions)
        log_std_old = log_std_old.clone().expand_as(mean_old)  # Adam changes a learned σ in place
    adv, returns, values_old = advantages(critic, rollout, gamma, args)
    explained_variance = 1 - (returns - values_old).var() / returns.var()

    history = []
    # a float would compile a graph for each value
    beta_tensor = torch.tensor(beta, device=adv.device)
    for epoch in range(args.update_epochs):
        if epoch > 0 and args.recompute_advantages:
            adv, returns, _ = advantages(critic, rollout, gamma, args)
        batch = Batch(  # (T, N, …), flattened below
            inputs=rollout.obs,
            actions=rollout.actions,
            mean_old=mean_old,
            log_std_old=log_std_old,
            logp_old=logp_old,
            values_old=values_old,
            adv=adv,
            returns=returns,
        )
        order = torch.randperm(args.batch_size, generator=rng).to(adv.device)
        shuffled = [x.flatten(0, 1).index_select(0, order) for x in batch]  # (B, …)
        chunks = [x.chunk(args.num_minibatches) for x in shuffled]
        for minibatch in zip(*chunks, strict=True):
            metrics = train_step(policy, critic, adam, Batch(*minibatch), beta_tensor, args)
            history.append(metrics)

    means = {}
    for name in history[0]:
        means[name] = torch.stack([metrics[name] for metrics in history]).mean().item()
    with torch.no_grad():
        mean, log_std = policy.mean_and_log_std(rollout.obs)
        kl = gaussian_kl(mean_old, log_std_old, mean, log_std).mean()
    means["kl"] = kl.item()
    means["explained_variance"] = explained_variance.item()
    means["action_std"] = log_std_old.exp().mean().item()
    means["learning_rate"] = adam.lr.item()
    return means


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
        """Take actions (N, A), and start an episode where one ends.

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


class PoolEnvs:
    """N environments of EnvPool, stepped in threads, with the interface of Envs that training uses.

    Its random states can't be saved. `rng_states` counts the steps so far, which give a resumed
    run other seeds. The spaces are those of the Gymnasium task of the same name. EnvPool reports an
    episode that terminates at its time limit as truncated, not as terminated.
    """

    def __init__(self, task: str, seeds: np.ndarray, steps: int, threads: int):
        try:
            import envpool
        except ImportError as error:
            raise InputError(f"--env-id {POOL}{task}: pip install envpool") from error
        is_mujoco = task in gym.registry and task.endswith("-v5")
        if not is_mujoco or task not in envpool.list_all_envs():
            raise InputError(
                f"--env-id {POOL}{task}: EnvPool is for MuJoCo tasks such as Hopper-v5"
            )
        with closing(gym.make(task)) as env:
            self.action_space = env.action_space
            self.spaces = describe_spaces(env.observation_space, env.action_space)
        seeds = [int(seed >> 1) for seed in seeds]  # it takes 31 bits
        options = {"num_envs": len(seeds), "num_threads": min(threads, len(seeds))}
        self.pool = envpool.make_gymnasium(task, seed=seeds, **options)
        self.obs, _ = self.pool.reset()
        self.rng_states = [steps] * len(seeds)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take actions (N, A), and start an episode where one ends. See Envs.step."""
        next_obs, rewards, terminated, truncated, _ = self.pool.step(actions)
        self.obs = next_obs.copy()
        over = np.flatnonzero(terminated | truncated)
        if len(over) > 0:  # EnvPool's own reset would replace the next step of these environments
            self.obs[over], _ = self.pool.reset(over)
        self.rng_states = [steps + 1 for steps in self.rng_states]
        return next_obs, rewards.astype(np.float64), terminated, truncated

    def close(self) -> None:
        close_all([self.pool])


def describe_spaces(obs: gym.spaces.Box, actions: gym.spaces.Box) -> dict:
    """Return what a checkpoint keeps of the spaces."""
    return {
        "obs_shape": obs.shape,
        "action_low": actions.low.astype(np.float64).tolist(),
        "action_high": actions.high.astype(np.float64).tolist(),
        "action_dtype": str(actions.dtype),
    }


class Rollout(NamedTuple):
    """T x N transitions: raw from collect, normalized and scaled from prepare."""

    obs: Tensor  # (T, N, O)
    next_obs: Tensor  # (T, N, O)  true successors, final observations included
    actions: Tensor  # (T, N, A)  before to_env
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    done: Tensor  # (T, N)  terminated | truncated


def collect(envs: Envs, policy: nn.Module, noise: Tensor) -> Rollout:
    """Run the policy for T steps (PPO Algorithm 1) with noise (T, N, A). Returns raw values."""
    steps = []
    for noise_t in noise:
        obs = envs.obs
        actions = policy.sample(obs, noise_t)
        next_obs, rewards, terminated, truncated = envs.step(policy.to_env(actions))
        done = terminated | truncated
        steps.append((obs, next_obs, actions.cpu().numpy(), rewards, terminated, done))
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
    raw: Rollout, policy: Policy, critic: Critic, running_sum: Tensor, gamma: float, args: Args
) -> tuple[Rollout, Tensor]:
    """Update reward_stats, normalize observations, scale rewards, and move all to the device.

    Rewards are divided by the std of their rolling discounted sum (Engstrom section 3, items 2
    and 5). Returns the rollout and the running sum of the next one.
    """
    rewards = raw.rewards
    if args.norm_reward:
        sums, running_sum = rolling_discounted_sums(rewards, raw.done, running_sum, gamma)
        critic.reward_stats.update(sums.flatten())
        rewards = (rewards / critic.reward_stats.std).clamp(-NORM_LIMIT, NORM_LIMIT)
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
        """Merge rows (B, *shape)."""
        rows = rows.to("cpu", torch.float64)
        self.count += len(rows)
        weight = len(rows) / self.count
        mean = rows.mean(0)
        var = rows.var(0, correction=0) + (1 - weight) * (mean - self.mean).square()
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


class ActionMap:
    """Maps actions of the Gaussian, -1 to 1, to the bounds of a Box.

    Where a bound is infinite or enormous, nothing is scaled. A finite bound still clips.
    """

    def __init__(self, space: gym.spaces.Box):
        self.low = space.low  # (A,)
        self.high = space.high  # (A,)
        low = self.low.astype(np.float64)
        high = self.high.astype(np.float64)
        bounded = (np.abs(low) < HUGE) & (np.abs(high) < HUGE)
        low = np.where(bounded, low, -1)
        high = np.where(bounded, high, 1)
        self.center = (high + low) / 2
        self.half_range = (high - low) / 2

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Takes and returns (…, A)."""
        actions = np.clip(self.center + self.half_range * samples, self.low, self.high)
        return actions.astype(self.low.dtype)


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


def gather_rollouts(own: Rollout, rng_states: list) -> tuple[Rollout, list]:
    """Join the rollouts and the random states of all processes, in the order of environments."""
    rollouts, states = zip(*gather((own, rng_states)), strict=True)
    columns = zip(*rollouts, strict=True)
    return Rollout(*[torch.cat(column, 1) for column in columns]), sum(states, [])


def env_options(args: Args) -> dict[str, int]:
    """Return the arguments of make_envs that are for training, not for evaluation."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # set by torchrun
    return {"env_threads": args.env_threads or cores}


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    rng_states: list | None = None,
    part: slice = ALL,
    env_threads: int = 0,
    **kwargs,
) -> Envs | PoolEnvs:
    """Make those of N environments that `part` selects. `kwargs` go to gym.make. Raises InputError.

    Without `env_threads` (evaluation, film) envpool:Hopper-v5 is Gymnasium's Hopper-v5.
    """
    with suppress(Exception):
        import mujoco

        mujoco.set_mju_user_warning(mujoco_warning)
    if env_id.count(":") > 1 or env_id.startswith(":"):
        raise InputError(f"--env-id {env_id}: write Env-v0 or module:Env-v0")
    pooled = env_id.startswith(POOL) and env_threads > 0
    env_id = env_id.removeprefix(POOL)
    rng_states = rng_states and rng_states[part]
    envs = []
    try:
        if pooled:
            steps = rng_states[0] if rng_states else 0
            seeds = np.random.SeedSequence((seed, steps)).generate_state(num_envs)[part]
            return PoolEnvs(env_id, seeds, steps, env_threads)
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


def mujoco_warning(text: str) -> None:
    """Print a warning that MuJoCo would log to ./MUJOCO_LOG.TXT. Drops those on settotalmass."""
    if "settotalmass" not in text:
        print(text, file=sys.stderr)


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Raise InputError unless observations and actions are flat Boxes and actions are floats."""
    obs = env.observation_space
    actions = env.action_space
    box = isinstance(obs, gym.spaces.Box)
    vectors = box and len(obs.shape) == 1 and obs.shape[0] > 0
    images = box and len(obs.shape) == 3 and obs.dtype == np.uint8 and min(obs.shape[1:]) >= 36
    flat_actions = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1
    float_actions = flat_actions and np.issubdtype(actions.dtype, np.floating)
    if vectors and float_actions and actions.shape[0] > 0:
        return
    space = obs if float_actions else actions
    hint = "No script here takes it"
    if isinstance(actions, gym.spaces.Discrete) and (vectors or images):
        hint = "ppo_atari.py and acer_discrete.py take discrete actions"
        if actions.start != 0:
            hint += " from 0: shift them with the wrapper TransformAction"
    elif float_actions and not vectors and obs.shape != (0,):
        hint = "Wrap it in FlattenObservation"
    needs = "this script needs a flat Box of observations and a flat Box of float actions"
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


def adapt_kl_coef(beta: float, kl: float, kl_target: float) -> float:
    """PPO section 4: the β of the next update, from d, the KL of this one.

    d < d_targ / 1.5: β ← β / 2
    d > d_targ × 1.5: β ← β × 2
    """
    if kl < kl_target / 1.5:
        return beta / 2
    if kl > kl_target * 1.5:
        return beta * 2
    return beta


def ppo(
    args: Args,
    state: dict | None = None,
    compile_step: Callable[[Callable], Callable] = lambda step: step,
) -> Iterator[dict[str, float]]:
    """PPO Algorithm 1, actor-critic style. Yields the metrics of each iteration.

    If the dict `state` holds a checkpoint, the run continues from it. At each yield, `state` is a
    complete checkpoint with the keys policy, critic, adam, exploration, minibatches, step, beta,
    episodes, env_rng_states and spaces. `compile_step` gets minibatch_step and returns what to
    use in its place. Seeds PyTorch's global generator. Raises InputError for an environment that
    does not fit, NonFiniteError for NaN or infinity.
    """
    state = {} if state is None else state
    torch.manual_seed(stream_seed(args.seed, "weights"))
    rngs = {}
    for name in ("exploration", "minibatches"):
        rngs[name] = torch.Generator().manual_seed(stream_seed(args.seed, name))
    env_seed = stream_seed(args.seed, "environments")
    saved_states = state.get("env_rng_states")
    part = own_part(args.num_envs)  # all of them, without torchrun
    options = env_options(args)
    envs = make_envs(args.env_id, args.num_envs, env_seed, saved_states, part, **options)
    with closing(envs):
        policy = Policy(envs.obs.shape[1:], envs.action_space, args).to(args.torch_device)
        critic = Critic(envs.obs.shape[1:], args).to(args.torch_device)
        params = [*policy.parameters(), *critic.parameters()]
        adam = Adam(sum(param.numel() for param in params)).to(args.torch_device)
        modules = {"policy": policy, "critic": critic, "adam": adam}
        if state:
            for name, module in modules.items():
                module.load_state_dict(state[name])
            for name, rng in rngs.items():
                rng.set_state(state[name])
        step = state.get("step", 0)
        beta = state.get("beta", args.kl_coef)
        episodes = Episodes(args.num_envs, state.get("episodes", ()))
        running_sum = torch.zeros(args.num_envs, dtype=torch.float64)
        train_step = compile_step(minibatch_step)

        while step + args.batch_size <= args.total_timesteps:
            iteration = step // args.batch_size + 1
            fraction = step / args.planned_steps
            policy.anneal(fraction)
            final_lr = 0.0 if args.anneal_lr else args.learning_rate
            adam.lr.fill_(line(args.learning_rate, final_lr, fraction))
            final_gamma = args.gamma if args.gamma_final is None else args.gamma_final
            gamma = line(args.gamma, final_gamma, fraction)

            shape = (args.num_steps, args.num_envs, policy.action_dim)
            noise = torch.randn(shape, generator=rngs["exploration"])
            own = collect(envs, policy, noise[:, part])
            raw, rng_states = gather_rollouts(own, envs.rng_states)
            episodes.add(raw.rewards, raw.done)
            check_rollout(raw, iteration, args.norm_obs)
            first = policy.obs_stats.count == 0
            # The first rollout is sampled before there are statistics. They are then computed from
            # it and used in its update, so this π_old is not the policy that took the actions.
            if first:
                policy.obs_stats.update(raw.obs.flatten(0, 1))
            rollout, running_sum = prepare(raw, policy, critic, running_sum, gamma, args)

            rng = rngs["minibatches"]
            metrics = update(policy, critic, adam, train_step, rollout, gamma, beta, rng, args)
            check_update(metrics, params, iteration)
            metrics |= {"kl_coef": beta, "gamma": gamma}
            if args.surrogate == "kl-adaptive":
                beta = adapt_kl_coef(beta, metrics["kl"], args.kl_target)
                beta = min(max(beta, 1e-8), 1e8)  # from 0 or infinity it would never return
            if not first:
                policy.obs_stats.update(raw.obs.flatten(0, 1))

            step += args.batch_size
            state.update({name: module.state_dict() for name, module in modules.items()})
            state.update({name: generator.get_state() for name, generator in rngs.items()})
            state.update(step=step, beta=beta, episodes=list(episodes.last))
            state.update(env_rng_states=rng_states, spaces=envs.spaces)
            metrics |= episodes.means()
            yield metrics


# ==================================================================================================
# The algorithm ends here. Below is what runs it: files, progress, evaluation, command line.
# ==================================================================================================

ALGORITHM = "ppo_continuous"  # what a checkpoint is checked for
GENERATOR = ppo
WHY_AUTO = "the networks are small"  # for the device that --device auto takes
SHOWN = "kl"  # the metric that the progress shows
FIXED_ON_EVALUATION = ("norm_obs", "hidden_sizes")
FIXED_ON_RESUME = (
    "norm_obs",
    "hidden_sizes",
    "env_id",
    "seed",
    "num_envs",
    "norm_reward",
    "orthogonal_init",
    "log_std_init",
    "log_std_final",
    "kl_coef",
)
RANGES = (
    (
        "total_timesteps num_envs env_threads num_steps update_epochs num_minibatches hidden_sizes "
        "learning_rate clip_coef kl_target max_grad_norm",
        lambda x: x > 0,
        "must be positive",
    ),
    (
        "seed eval_episodes kl_coef ent_coef",
        lambda x: x >= 0,
        "must not be negative",
    ),
    (
        "learning_rate clip_coef kl_target kl_coef ent_coef",
        math.isfinite,
        "must be finite",
    ),
    ("gamma gamma_final gae_lambda", lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
    ("log_std_init log_std_final", lambda x: -20 <= x <= 5, "must lie in [-20, 5]"),
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
    """Evaluate mean actions and sampled actions. Prints and returns their returns."""
    policy.to(args.torch_device)
    seed = stream_seed(args.seed, "evaluation")
    rng = torch.Generator().manual_seed(seed)
    acts = {
        "deterministic": policy.act,
        "sampled": lambda obs: policy.act(obs, False, rng),
    }
    evaluation = {}
    for mode, act in acts.items():
        returns = evaluate(interruptible(act, signals), args.env_id, args.eval_episodes, seed)
        evaluation[mode] = returns
        result = "no episode ended"
        if returns:
            result = f"{np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes"
        say(f"evaluation, {mode}: {result}")
    return evaluation


def make_film_env(args: Args) -> Envs:
    """Make one environment that renders. The camera `track` of a MuJoCo model follows the robot."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    seed = stream_seed(args.seed, "evaluation")
    envs = make_envs(args.env_id, 1, seed, render_mode="rgb_array")
    renderer = getattr(envs.envs[0].unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.camera_id == -1:  # the environment chose none
        import mujoco

        kind = mujoco.mjtObj.mjOBJ_CAMERA
        renderer.camera_id = mujoco.mj_name2id(renderer.model, kind, "track")  # -1: none
    return envs


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


def load_policy(path: str) -> Policy:
    """Return the policy of a checkpoint, on the CPU. Its environment need not be installed.

    `policy.act(obs, deterministic=True)` maps raw observations (…, O) to actions (…, A).
    """
    saved = load_checkpoint(path)
    spaces = saved["spaces"]
    dtype = np.dtype(spaces["action_dtype"])
    low = np.array(spaces["action_low"], dtype)
    high = np.array(spaces["action_high"], dtype)
    action_space = gym.spaces.Box(low, high, dtype=dtype)
    policy = Policy(tuple(spaces["obs_shape"]), action_space, Args(**saved["args"]))
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


def check_algorithm_args(args: Args) -> None:
    """Raise InputError for flags that contradict each other."""
    size = f"--num-envs x --num-steps = {args.batch_size}"
    divides = args.batch_size % args.num_minibatches == 0
    require(divides, f"--num-minibatches must divide {size}")
    used = args.env_threads is None or args.env_id.startswith(POOL)
    require(used, f"--env-threads has no effect without EnvPool, such as --env-id {POOL}Hopper-v5")
    surrogate = f"--surrogate {args.surrogate}"
    if args.log_std_final is not None:
        why = "--ent-coef has no effect on an annealed σ: learn it, with --log-std-final None"
        require(args.ent_coef == 0, why)
    if args.surrogate not in ("kl-adaptive", "kl-fixed"):
        why = f"--kl-coef has no effect with {surrogate}: leave it at {Args.kl_coef}"
        require(args.kl_coef == Args.kl_coef, why)
    if args.surrogate != "kl-adaptive":
        why = f"--kl-target has no effect with {surrogate}: leave it at {Args.kl_target}"
        require(args.kl_target == Args.kl_target, why)
    else:
        why = f"{surrogate} needs a constant step size: add --no-anneal-lr"
        require(not args.anneal_lr, why)
        require(args.kl_coef > 0, f"--kl-coef 0 stays 0 with {surrogate}: raise it")


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
