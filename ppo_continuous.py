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
Resume    python ppo_continuous.py --resume runs/<run>/checkpoint.pt
Evaluate  python ppo_continuous.py --evaluate runs/<run>/checkpoint.pt --video-dir videos
From Python: train(Args(env_id="Hopper-v5")), load_policy("runs/<run>/checkpoint.pt").act(obs)

Equation map
    equation                       function                  symbol
    GAE eq. 16, PPO eqs. 11-12     gae                       Â_t, δ_t
    PPO section 4                  adapt_kl_coef             β
    PPO eq. 9                      value_loss                L^VF
    Engstrom section 3, item 1     clipped_value_loss        L^VF with V clipped around V_old
    PPO eq. 6                      importance_surrogate      L^CPI
    PPO eq. 8                      kl_penalized_surrogate    L^KLPEN
    PPO eq. 7                      clipped_surrogate         L^CLIP
    TRPO appendix D                gaussian_logp             log π(a|s)
    PPO eq. 9                      gaussian_entropy          S[π]
    PPO eq. 8                      gaussian_kl               KL[π_old, π]
    PPO eq. 9                      ppo_loss                  L^CLIP - c1 L^VF + c2 S
    Engstrom section 3, item 9     clip_global_norm          gradient clipping
    Kingma Algorithm 1             Adam                      m, v, θ
    Engstrom section 3, item 2     discounted_returns        R_t, whose std scales the rewards
    PPO Algorithm 1                ppo, update               N actors, T steps, K epochs

Departures from the PPO paper that no flag reverts (PAPER below lists the others)
    When a time limit ends an episode, V(final observation) completes its return (Pardo eq. 6).
    Samples are clipped to [-1, 1] and scaled to the bounds of the environment's actions.
    Policy and value network share nothing, so c1 of PPO eq. 9 has no effect. It is left out.
    Adam's ε is 1e-5.

A resumed run restarts unfinished episodes. It repeats the uninterrupted run bit for bit where
episodes end with the iteration.
"""

import csv
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TextIO, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

# ---- Args ----------------------------------------------------------------------------------------


@dataclass
class RunArgs:
    env_id: str = "HalfCheetah-v5"  # Gymnasium id, or module:Env-v0 for an environment of your own
    seed: int = 1  # seed of everything random
    # environment steps, for example 1_000_000 or 1e6; rounded down to whole iterations
    total_timesteps: int | float = 1_000_000
    paper: bool = False  # use the settings of the PPO paper; other flags override them
    # a new folder for this run (default: runs/<environment>__<script>__s<seed>__<date>)
    run_dir: str | None = None
    # continue from this checkpoint.pt with its flags; flags you give override them
    resume: str | None = None
    evaluate: str | None = None  # evaluate this checkpoint.pt instead of training
    eval_episodes: int = 10  # evaluation episodes, deterministic and sampled each; 0: none
    video_dir: str | None = None  # folder for a GIF of one deterministic episode
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is the CPU, the networks are small
    # compile the minibatch step with torch.compile; auto: from 250,000 steps on
    compile: Literal["auto", "on", "off"] = "auto"


@dataclass
class EnvironmentArgs:
    num_envs: int = 16  # N, number of environments, stepped one after another
    # normalize observations by their running mean and std, and clip them to ±10
    norm_obs: bool = True
    # divide rewards by the running std of the discounted return, and clip them to ±10
    norm_reward: bool = True


@dataclass
class AlgorithmArgs:
    num_steps: int = 128  # T, steps per environment and iteration
    update_epochs: int = 10  # K, passes over the batch of N x T samples
    num_minibatches: int = 32  # minibatches per epoch, each of M = N x T / this samples
    learning_rate: float = 2e-4  # α, step size of Adam, for both networks
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    # with --norm-reward: where std[Â + V] is below this, shrink α by their ratio squared; 0: never
    return_floor: float = 0.02
    gamma: float = 0.99  # γ, the discount factor; Swimmer-v5 needs 0.9999
    gamma_final: float | None = None  # anneal γ linearly to this; None: γ is constant
    gae_lambda: float = 0.9  # λ of GAE eq. 16; 0: one-step TD, 1: Monte Carlo
    norm_adv: bool = False  # standardize the advantages of each batch
    recompute_advantages: bool = True  # recompute advantages and value targets before each epoch
    # PPO eq. 7, eq. 8 with adaptive β, eq. 8 with fixed β, eq. 6
    surrogate: Literal["clip", "kl-adaptive", "kl-fixed", "none"] = "clip"
    clip_coef: float = 0.2  # ε of PPO eq. 7
    kl_coef: float = 1.0  # β of PPO eq. 8: the fixed one, or the first adaptive one
    kl_target: float = 0.01  # d_targ of the adaptive β (PPO section 4)
    clip_vloss: bool = False  # clip V to ±ε around its old value; not in the paper
    ent_coef: float = 0.0  # c2 of PPO eq. 9, weight of the entropy bonus
    max_grad_norm: float = 0.5  # largest gradient norm of each network; inf: no clipping
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of each network
    # orthogonal weights: gain √2, policy output 0.01, value output 1; else PyTorch's default
    orthogonal_init: bool = True
    log_std_init: float = -1.0  # log σ at the start
    # log σ at the end; σ is annealed linearly. None: σ is learned, from log_std_init
    log_std_final: float | None = -3.0


@dataclass
class Args(AlgorithmArgs, EnvironmentArgs, RunArgs):
    """All flags, flat. --help shows them in the three groups above."""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return int(self.total_timesteps // self.batch_size)

    @property
    def num_timesteps(self) -> int:
        """total_timesteps in whole iterations."""
        return self.num_iterations * self.batch_size

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.device == "auto" else self.device)


PAPER = {  # --paper: PPO section 6.1 and Table 3
    "num_envs": 1,  # one long rollout instead of several short ones
    "num_steps": 2048,
    "norm_obs": False,
    "norm_reward": False,
    "learning_rate": 3e-4,
    "anneal_lr": False,
    "return_floor": 0.0,
    "gae_lambda": 0.95,
    "recompute_advantages": False,  # once per iteration
    "max_grad_norm": math.inf,
    "orthogonal_init": False,
    "log_std_init": 0.0,
    "log_std_final": None,  # σ is learned; PPO Table 4 anneals log σ linearly, from -0.7 to -1.6
}


CLIP = 10.0  # normalized observations and rewards are clipped to ± this
HUGE = 1e10  # bounds of actions beyond this count as none, plain observations beyond it as errors


class InputError(ValueError):
    """Bad input. The message is one line that says what to change."""


# ---- Equations -----------------------------------------------------------------------------------
# T steps · N environments · B = T·N samples · M minibatch · O observation dims · A action dims


def gaussian_logp(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """TRPO appendix D: log N(a; μ(s), diag σ²).

    mean, actions (…, A), log_std (A,) or (…, A). Returns (…,).
    """
    assert mean.shape == actions.shape
    z = (actions - mean) / log_std.exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """S[π] of PPO eq. 9 in nats: Σ_i log σ_i + ½ log 2πe. (…, A), returns (…,)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def gaussian_kl(mean_old: Tensor, log_std_old: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL[π_old, π] of PPO eq. 8 in nats.

    KL = Σ_i log(σ_i / σ_old,i) + (σ_old,i² + (μ_old,i - μ_i)²) / 2σ_i² - ½

    means (…, A), log stds (A,) or (…, A). Returns (…,).
    """
    assert mean_old.shape == mean.shape
    squares = (2 * log_std_old).exp() + (mean_old - mean).square()
    return (log_std - log_std_old + squares / (2 * (2 * log_std).exp()) - 0.5).sum(-1)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """PPO eq. 9: L^VF = Ê[(V_θ(s_t) - V_t^targ)²], without ½. (B,) each, returns a scalar."""
    assert values.shape == returns.shape
    return (values - returns).square().mean()


def clipped_value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, eps_clip: float
) -> Tensor:
    """Engstrom section 3, item 1; not in the PPO paper. (B,) each, returns a scalar.

    L^VF = Ê[max((V_θ - V^targ)², (clip(V_θ, V_old - ε, V_old + ε) - V^targ)²)]
    """
    assert values.shape == values_old.shape == returns.shape
    clipped = values_old + (values - values_old).clamp(-eps_clip, eps_clip)
    return torch.max((values - returns).square(), (clipped - returns).square()).mean()


def importance_surrogate(ratio: Tensor, adv: Tensor) -> Tensor:
    """PPO eq. 6: L^CPI(θ) = Ê[r_t Â_t], to be maximized. (B,) each, returns a scalar."""
    assert ratio.shape == adv.shape
    return (ratio * adv).mean()


def kl_penalized_surrogate(ratio: Tensor, adv: Tensor, kl: Tensor, beta: Tensor | float) -> Tensor:
    """PPO eq. 8: L^KLPEN(θ) = Ê[r_t Â_t - β KL[π_old, π_θ]], to be maximized. Returns a scalar.

    ratio and adv are (B,). kl is (B,), or its mean.
    """
    return importance_surrogate(ratio, adv) - beta * kl.mean()


def clipped_surrogate(ratio: Tensor, adv: Tensor, eps_clip: float) -> Tensor:
    """PPO eq. 7: L^CLIP(θ) = Ê[min(r_t Â_t, clip(r_t, 1-ε, 1+ε) Â_t)], to be maximized.

    (B,) each, returns a scalar.
    """
    assert ratio.shape == adv.shape
    return torch.min(ratio * adv, ratio.clamp(1 - eps_clip, 1 + eps_clip) * adv).mean()


# ---- Networks ------------------------------------------------------------------------------------


def mlp(sizes: tuple[int, ...], last_gain: float, orthogonal: bool) -> nn.Sequential:
    """Fully connected tanh network with a linear output (Engstrom section 3, items 3 and 8)."""
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    layers.pop()
    if orthogonal:
        for layer in layers[::2]:
            nn.init.orthogonal_(layer.weight, last_gain if layer is layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """π_θ(a|s) = N(μ_θ(s), diag σ²) of raw observations; σ does not depend on s (PPO section 6.1).

    Samples of the Gaussian are in units of [-1, 1]. `to_env` maps them to the action space.
    """

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.spaces.Box, args: Args):
        super().__init__()
        (action_dim,) = action_space.shape
        self.norm_obs = args.norm_obs
        self.obs_stats = RunningMeanStd(*obs_shape)
        sizes = (*obs_shape, *args.hidden_sizes, action_dim)
        self.mean_net = mlp(sizes, 0.01, args.orthogonal_init)
        self.log_std_ends = (args.log_std_init, args.log_std_final)
        log_std = torch.full((action_dim,), args.log_std_init)
        if args.log_std_final is None:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)
        self.action_map = ActionMap(action_space)

    def normalize(self, obs: Tensor) -> Tensor:
        """Raw observations (…, O) to inputs of both networks (…, O), on their device.

        The arithmetic is float64 on the CPU (Engstrom section 3, items 6 and 7).
        """
        obs = obs.to("cpu", torch.float64)
        if self.norm_obs:
            obs = ((obs - self.obs_stats.mean) / self.obs_stats.std).clamp(-CLIP, CLIP)
        return obs.to(self.mean_net[0].weight)  # their dtype and device

    def distribution(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (…, O) to μ_θ(s) (…, A) and log σ, (A,) or (…, A)."""
        return self.mean_net(inputs), self.log_std

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Raw observations (…, O) to μ_θ(s) (…, A) and log σ, (A,) or (…, A)."""
        return self.distribution(self.normalize(obs))

    def anneal(self, fraction: float) -> None:
        """Set σ on the line from its first to its last value, unless it is learned."""
        first, last = self.log_std_ends
        if last is not None:
            std = (1 - fraction) * math.exp(first) + fraction * math.exp(last)
            self.log_std.fill_(math.log(std))

    @torch.no_grad()
    def sample(
        self, obs: np.ndarray, deterministic: bool = False, rng: torch.Generator | None = None
    ) -> Tensor:
        """a ~ π(·|s) for raw observations (…, O), or the mean μ_θ(s); (…, A), before `to_env`."""
        mean, log_std = self(torch.from_numpy(np.array(obs, np.float64)))
        if deterministic:
            return mean
        return mean + log_std.exp() * torch.randn(mean.shape, generator=rng).to(mean)

    def to_env(self, samples: Tensor) -> np.ndarray:
        """Samples (…, A) to actions of the environment (…, A), within its bounds."""
        return self.action_map(samples.cpu().numpy())

    def act(
        self, obs: np.ndarray, deterministic: bool = True, rng: torch.Generator | None = None
    ) -> np.ndarray:
        """Actions of the environment (…, A) for raw observations (…, O): means or samples."""
        return self.to_env(self.sample(obs, deterministic, rng))


class Critic(nn.Module):
    """V(s), in units of scaled reward, from `policy.normalize(obs)` (…, O) to (…,)."""

    def __init__(self, obs_shape: tuple[int, ...], args: Args):
        super().__init__()
        self.return_stats = RunningMeanStd()
        self.value_net = mlp((*obs_shape, *args.hidden_sizes, 1), 1.0, args.orthogonal_init)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value_net(inputs).squeeze(-1)


# ---- Loss and update -----------------------------------------------------------------------------


class Batch(NamedTuple):
    """B samples of a rollout, or a minibatch of M; "old" is under π_old and V_old."""

    inputs: Tensor  # (B, O)  normalized observations
    actions: Tensor  # (B, A)
    mean_old: Tensor  # (B, A)
    log_std_old: Tensor  # (B, A)
    logp_old: Tensor  # (B,)
    values_old: Tensor  # (B,)
    adv: Tensor  # (B,)
    returns: Tensor  # (B,)


def ppo_loss(
    policy: Policy, critic: Critic, batch: Batch, beta: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """-(L^CLIP - L^VF + c2 S), PPO eq. 9 with c1 = 1, or with another surrogate; and metrics."""
    mean, log_std = policy.distribution(batch.inputs)
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
        error = clipped_value_loss(values, batch.values_old, batch.returns, args.clip_coef)
    else:
        error = value_loss(values, batch.returns)
    entropy = gaussian_entropy(log_std).mean()

    metrics = {
        "policy_loss": -surrogate,
        "value_loss": error,
        "entropy": entropy,
        "approx_kl": kl.mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return -(surrogate - error + args.ent_coef * entropy), metrics


def clip_global_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 9: g ← g · min(1, c / ‖g‖₂), g being all tensors in one vector.

    Returns the clipped vector (P,) and the norm before.
    """
    flat = torch.cat([g.flatten() for g in grads])
    norm = flat.norm()
    return flat * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


class Adam(nn.Module):
    """Kingma Algorithm 1 for P weights.

    It takes the steps of torch.optim.Adam, which can't be compiled into one graph with the loss.
    """

    def __init__(self, num_weights: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("lr", torch.tensor(0.0))  # α
        self.register_buffer("beta1_t", torch.tensor(1.0))  # β₁ᵗ
        self.register_buffer("beta2_t", torch.tensor(1.0))  # β₂ᵗ
        self.register_buffer("m", torch.zeros(num_weights))
        self.register_buffer("v", torch.zeros(num_weights))

    @torch.no_grad()
    def step(self, params: list[Tensor], grad: Tensor) -> None:
        """Change `params`, P weights in all, along their gradient (P,).

        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        θ ← θ - α m̂ / (√v̂ + ε)  with  m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
        """
        beta1 = 0.9
        beta2 = 0.999
        self.beta1_t *= beta1
        self.beta2_t *= beta2
        self.m.lerp_(grad, 1 - beta1)
        self.v.lerp_(grad.square(), 1 - beta2)
        m_hat = self.m / (1 - self.beta1_t)
        v_hat = self.v / (1 - self.beta2_t)
        change = self.lr * m_hat / (v_hat.sqrt() + self.eps)
        sizes = [param.numel() for param in params]
        for param, part in zip(params, change.split(sizes), strict=True):
            param -= part.view_as(param)


def minibatch_step(
    policy: Policy, critic: Critic, adam: Adam, batch: Batch, beta: Tensor, args: Args
) -> dict[str, Tensor]:
    """One step of Adam on the loss of one minibatch; returns metrics.

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
    """Generalized advantage estimation, GAE eq. 16, cut at the end of the rollout. All (T, N).

        δ_t = r_t + γ V(s_{t+1}) - V(s_t)                        PPO eq. 12
        Â_t = δ_t + γλ δ_{t+1} + … + (γλ)^{T-1-t} δ_{T-1}        PPO eq. 11
            = δ_t + γλ Â_{t+1}

    PPO eq. 11 misprints the last exponent as T-t+1. `next_values[t]` is V of the state that action
    t led to; at the end of an episode, of its final observation. A termination removes this V, a
    time limit keeps it (Pardo eq. 6). Both (`done`) end the sum.
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
    """Â, the value targets Â + V (GAE footnote 2), and V of the present critic, each (T, N)."""
    values = critic(rollout.obs)
    next_values = torch.cat([values[1:], critic(rollout.next_obs[-1:])])
    next_values[rollout.done] = critic(rollout.next_obs[rollout.done])  # of final observations
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
    step: Callable,
    rollout: "Rollout",
    gamma: float,
    beta: float,
    rng: torch.Generator,
    args: Args,
) -> dict[str, float]:
    """K epochs of minibatches over one prepared rollout (PPO Algorithm 1); returns metrics.

    `step` is minibatch_step, compiled or not. "kl" is KL[π_old, π] of the whole update.

    Steps of Adam are as long for small gradients as for large ones. Where a task is solved, all
    returns are nearly alike, the advantages are errors of V, and full steps undo what was learned.
    So `return_floor` shrinks the steps where the value targets hardly differ.
    """
    with torch.no_grad():
        mean_old, log_std_old = policy.distribution(rollout.obs)
        logp_old = gaussian_logp(mean_old, log_std_old, rollout.actions)
        log_std_old = log_std_old.clone().expand_as(mean_old)
    adv, returns, values_old = advantages(critic, rollout, gamma, args)
    explained_variance = 1 - (returns - values_old).var() / returns.var()
    if args.norm_reward and args.return_floor > 0:
        adam.lr *= (returns.std() / args.return_floor).clamp(max=1.0).square()

    history = []
    beta = torch.tensor(beta, device=adv.device)
    for epoch in range(args.update_epochs):
        if epoch > 0 and args.recompute_advantages:
            adv, returns, _ = advantages(critic, rollout, gamma, args)
        old = (mean_old, log_std_old, logp_old, values_old)
        batch = Batch(rollout.obs, rollout.actions, *old, adv, returns)
        order = torch.randperm(args.batch_size, generator=rng).to(adv.device)
        shuffled = [x.flatten(0, 1).index_select(0, order) for x in batch]
        minibatches = zip(*(x.chunk(args.num_minibatches) for x in shuffled), strict=True)
        for minibatch in minibatches:
            history.append(step(policy, critic, adam, Batch(*minibatch), beta, args))

    metrics = {}
    for name in history[0]:
        metrics[name] = torch.stack([step_metrics[name] for step_metrics in history]).mean().item()
    with torch.no_grad():
        kl = gaussian_kl(mean_old, log_std_old, *policy.distribution(rollout.obs)).mean()
    metrics["learning_rate"] = adam.lr.item()
    metrics["kl"] = kl.item()
    metrics["explained_variance"] = explained_variance.item()
    metrics["action_std"] = log_std_old.exp().mean().item()
    return metrics


# ---- Environments and rollout --------------------------------------------------------------------


class RunningMeanStd(nn.Module):
    """Mean and std of all rows seen so far, in float64 (Chan et al. 1979).

    They are not buffers, so they stay on the CPU when the module moves to another device.
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
        delta = rows.mean(0) - self.mean
        var = rows.var(0, correction=0) + (1 - weight) * delta.square()
        self.mean = (1 - weight) * self.mean + weight * rows.mean(0)
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
    """Samples of the policy, in units of [-1, 1], to actions within the bounds of a Box.

    Infinite and enormous bounds leave a sample as it is.
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
        """(…, A) to (…, A)."""
        actions = np.clip(self.center + self.half_range * samples, self.low, self.high)
        return actions.astype(self.low.dtype)


def plain(value: object) -> object:
    """NumPy and PyTorch numbers and arrays as Python's, paths as strings, also in containers."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(x) for x in value)
    return value


class Envs:
    """N Gymnasium environments, stepped one after another.

    `obs` (N, O) is what to act on next. `episodes` holds (return, length) of the last 100 episodes
    that ended, from raw rewards. `rng_states[i]` is the random state of environment i before its
    last reset. A resumed run starts from these states, so it repeats these resets.
    """

    def __init__(self, envs: list[gym.Env], seed: int, rng_states: list | None = None):
        self.envs = envs
        self.action_space = envs[0].action_space
        space = envs[0].observation_space
        self.obs = np.zeros((len(envs), *space.shape), space.dtype)
        self.spaces = {  # for the checkpoint
            "obs_shape": space.shape,
            "action_low": self.action_space.low.tolist(),
            "action_high": self.action_space.high.tolist(),
            "action_dtype": str(self.action_space.dtype),
        }
        self.episodes = deque(maxlen=100)
        self.returns = np.zeros(len(envs))
        self.lengths = np.zeros(len(envs), int)
        self.rng_states = rng_states or [None] * len(envs)
        seeds = np.random.SeedSequence(seed).generate_state(len(envs))
        for i, env in enumerate(envs):
            env.reset(seed=int(seeds[i]))
            if self.rng_states[i] is not None:
                env.np_random.bit_generator.state = self.rng_states[i]
            self.reset(i)

    def reset(self, i: int) -> None:
        """Start an episode of environment i."""
        env = self.envs[i]
        if isinstance(env.np_random, np.random.Generator):  # other kinds restart from their seed
            self.rng_states[i] = plain(env.np_random.bit_generator.state)
        self.returns[i] = 0
        self.lengths[i] = 0
        result = env.reset()
        try:
            obs, _ = result
            self.obs[i] = same_shape(obs, self.obs[i])
        except (TypeError, ValueError) as error:
            raise self.mistake(i, result) from error

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take actions (N, A), and start an episode where one ends.

        Returns next_obs (N, O), rewards, terminated and truncated, each (N,). `next_obs` are the
        true successors. At the end of an episode this is its final observation.
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
                next_obs[i] = same_shape(obs, next_obs[i])
            except (TypeError, ValueError) as error:
                raise self.mistake(i, result) from error
        self.obs = next_obs.copy()
        self.returns += rewards
        for i in np.flatnonzero(terminated | truncated):
            self.episodes.append((float(self.returns[i]), int(self.lengths[i])))
            self.reset(i)
        return next_obs, rewards, terminated, truncated

    def mistake(self, i: int, result: object) -> InputError:
        """The error for an environment that returned something else than Gymnasium asks for."""
        parts = result if isinstance(result, tuple) else [result]
        names = [f"{type(x).__name__}{getattr(x, 'shape', '')}" for x in parts]
        due = f"an observation of shape {self.obs.shape[1:]}"
        due += ", a number, two booleans and a dict" if self.lengths[i] else " and a dict"
        where = f"environment {i}, step {self.lengths[i]} of its episode"
        return InputError(f"{where}: it returned {', '.join(names)}, but should return {due}")

    def close(self) -> None:
        close_all(self.envs)


def same_shape(obs: np.ndarray, like: np.ndarray) -> np.ndarray:
    """`obs`, unless assigning it to `like` would broadcast: then a ValueError."""
    if np.shape(obs) != like.shape:
        raise ValueError
    return obs


def close_all(envs: list[gym.Env]) -> None:
    """Close every environment, also where another one fails to close."""
    with ExitStack() as stack:
        for env in envs:
            stack.callback(env.close)


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Raise InputError unless observations and actions are flat Boxes, and actions floats."""
    obs = env.observation_space
    actions = env.action_space
    flat_obs = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1
    flat_actions = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1
    if flat_obs and flat_actions and np.issubdtype(actions.dtype, np.floating):
        return
    space = actions if flat_obs else obs
    images = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 3 and obs.dtype == np.uint8
    if isinstance(actions, gym.spaces.Discrete) and (flat_obs or images):
        space = actions
        hint = "acer_discrete.py takes discrete actions"
        if actions.start != 0:
            hint += " from 0: shift them with the wrapper TransformAction"
    elif flat_actions and not flat_obs:
        hint = "wrap it in FlattenObservation"
    else:
        hint = "no script here takes it"
    raise InputError(
        f"--env-id {env_id} has {space}, this script needs flat Boxes of floats: {hint}"
    )


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def make_envs(
    env_id: str, num_envs: int, seed: int, rng_states: list | None = None, **kwargs
) -> Envs:
    """Make `num_envs` environments; `kwargs` are those of gym.make. Raises InputError."""
    with suppress(ImportError):  # MuJoCo repeats this warning and logs it to ./MUJOCO_LOG.TXT
        import mujoco

        mujoco.set_mju_user_warning(
            lambda text: None if "settotalmass" in text else print(text, file=sys.stderr)
        )
    if env_id.count(":") > 1:
        raise InputError(f"--env-id {env_id}: write Env-v0 or module:Env-v0")
    envs = []
    try:
        for _ in range(num_envs):
            envs.append(gym.make(env_id, **kwargs))
        check_spaces(envs[0], env_id)
        return Envs(envs, seed, rng_states)
    except BaseException as error:
        close_all(envs)
        if isinstance(error, gym.error.Error | ImportError):
            raise InputError(f"--env-id {env_id}: {first_line(error)}") from error
        raise


class Rollout(NamedTuple):
    """T x N transitions under π_old."""

    obs: Tensor  # (T, N, O)
    next_obs: Tensor  # (T, N, O)  true successors, final observations included
    actions: Tensor  # (T, N, A)  samples of the Gaussian
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    done: Tensor  # (T, N)  terminated | truncated


def collect(envs: Envs, policy: Policy, rng: torch.Generator, num_steps: int) -> Rollout:
    """Run π_old for T steps in each environment (PPO Algorithm 1). All raw, on the CPU."""
    steps = []
    for _ in range(num_steps):
        obs = envs.obs
        actions = policy.sample(obs, rng=rng)
        next_obs, rewards, terminated, truncated = envs.step(policy.to_env(actions))
        done = terminated | truncated
        steps.append((obs, next_obs, actions.cpu().numpy(), rewards, terminated, done))
    return Rollout(*(torch.from_numpy(np.stack(x)) for x in zip(*steps, strict=True)))


def discounted_returns(
    rewards: Tensor, done: Tensor, carry: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 2: R_t = γ R_{t-1} + r_t, from 0 in each episode.

    rewards and done are (T, N). `carry` (N,) is R_{-1}, carried over from the previous rollout.
    Returns R (T, N) and the next carry.
    """
    returns = np.zeros_like(rewards.numpy())
    total = carry.numpy()
    for t in range(len(returns)):
        total = gamma * total + rewards[t].numpy()
        returns[t] = total
        total = total * ~done[t].numpy()
    return torch.from_numpy(returns), torch.from_numpy(total)


def prepare(
    rollout: Rollout, policy: Policy, critic: Critic, carry: Tensor, gamma: float, args: Args
) -> tuple[Rollout, Tensor]:
    """The rollout as the networks need it: normalized, scaled, on their device; and next `carry`.

    Rewards are divided by the std of the discounted return (Engstrom section 3, items 2 and 5).
    """
    rewards = rollout.rewards
    if args.norm_reward:
        returns, carry = discounted_returns(rewards, rollout.done, carry, gamma)
        critic.return_stats.update(returns.flatten())
        rewards = (rewards / critic.return_stats.std).clamp(-CLIP, CLIP)
    inputs = policy.normalize(rollout.obs)
    next_inputs = policy.normalize(rollout.next_obs)
    ready = rollout._replace(obs=inputs, next_obs=next_inputs, rewards=rewards.to(inputs.dtype))
    return Rollout(*(x.to(inputs.device) for x in ready)), carry


def check_finite(iteration: int, **quantities: Tensor) -> None:
    """Raise FloatingPointError that names the first quantity with a NaN or an infinity."""
    for name, values in quantities.items():
        if not values.isfinite().all():
            raise FloatingPointError(f"NaN or infinity in {name}, iteration {iteration}")


def check_rollout(rollout: Rollout, iteration: int, norm_obs: bool) -> None:
    """Raise FloatingPointError for observations or rewards that can't be trained on."""
    obs = torch.cat([rollout.obs, rollout.next_obs]).double()
    check_finite(iteration, observations=obs, rewards=rollout.rewards.float())
    limit = 1e100 if norm_obs else HUGE  # statistics need their squares
    if obs.abs().max() > limit:
        raise FloatingPointError(f"observations beyond {limit:g}, iteration {iteration}")


def check_update(metrics: dict[str, float], params: list[Tensor], iteration: int) -> None:
    """Raise FloatingPointError for losses or weights that training can't go on with."""
    losses = torch.tensor([metrics["policy_loss"], metrics["value_loss"]])
    check_finite(iteration, losses=losses, parameters=nn.utils.parameters_to_vector(params))


# ---- Algorithm -----------------------------------------------------------------------------------


def mean_of(episodes: Sequence[tuple[float, int]], column: int) -> float:
    """Mean return (column 0) or length (column 1) of episodes, NaN of none."""
    return float(np.mean([episode[column] for episode in episodes])) if episodes else math.nan


STREAMS = ("weights", "exploration", "minibatches", "environments", "evaluation")


def stream_seed(seed: int, stream: str) -> int:
    """Seed of one random stream of a run; the streams of a run differ."""
    sequence = np.random.SeedSequence((seed, STREAMS.index(stream)))
    return int(sequence.generate_state(1)[0])


def adapt_kl_coef(beta: float, kl: float, kl_target: float) -> float:
    """PPO section 4, the β of the next update.

    d < d_targ / 1.5: β ← β / 2
    d > d_targ · 1.5: β ← β · 2
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
    complete checkpoint. `compile_step` takes minibatch_step and returns the function to use.
    Seeds PyTorch's global generator. Raises InputError for an environment that does not fit,
    FloatingPointError for NaN or infinity.
    """
    state = {} if state is None else state
    torch.manual_seed(stream_seed(args.seed, "weights"))
    rngs = {}
    for name in ("exploration", "minibatches"):
        rngs[name] = torch.Generator().manual_seed(stream_seed(args.seed, name))
    env_seed = stream_seed(args.seed, "environments")
    envs = make_envs(args.env_id, args.num_envs, env_seed, state.get("env_rng_states"))
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
        envs.episodes.extend(state.get("episodes", ()))
        carry = torch.zeros(args.num_envs, dtype=torch.float64)  # of the discounted returns
        train_step = compile_step(minibatch_step)

        while step < args.num_timesteps:
            iteration = step // args.batch_size + 1
            fraction = step / args.num_timesteps
            policy.anneal(fraction)
            adam.lr.fill_(args.learning_rate * (1 - fraction if args.anneal_lr else 1))
            gamma_final = args.gamma if args.gamma_final is None else args.gamma_final
            gamma = args.gamma + fraction * (gamma_final - args.gamma)

            raw = collect(envs, policy, rngs["exploration"], args.num_steps)
            check_rollout(raw, iteration, args.norm_obs)
            if step == 0:  # the first update has no earlier statistics to work with
                policy.obs_stats.update(raw.obs.flatten(0, 1))
            rollout, carry = prepare(raw, policy, critic, carry, gamma, args)

            rng = rngs["minibatches"]
            metrics = update(policy, critic, adam, train_step, rollout, gamma, beta, rng, args)
            check_update(metrics, params, iteration)
            if args.surrogate == "kl-adaptive":
                beta = adapt_kl_coef(beta, metrics["kl"], args.kl_target)
                beta = min(max(beta, 1e-8), 1e8)  # from 0 or infinity it would never return
            if step > 0:
                policy.obs_stats.update(raw.obs.flatten(0, 1))

            step += args.batch_size
            state |= {name: module.state_dict() for name, module in modules.items()}
            state |= {name: rng.get_state() for name, rng in rngs.items()}
            state |= {"step": step, "beta": beta, "episodes": list(envs.episodes)}
            state |= {"env_rng_states": list(envs.rng_states), "spaces": envs.spaces}
            yield {
                "episodic_return": mean_of(envs.episodes, 0),
                "episodic_length": mean_of(envs.episodes, 1),
                "gamma": gamma,
                "kl_coef": beta,
                **metrics,
            }


# ==================================================================================================
# The algorithm ends here. Below is what runs it: files, progress, evaluation, command line.
# ==================================================================================================

ALGORITHM = "ppo_continuous"  # what a checkpoint is checked for
GENERATOR = ppo
WHY_AUTO = "the networks are small"  # for the device that --device auto takes
THREADS = 1  # of PyTorch; more do not help networks this small
FIXED_ON_RESUME = (
    *("env_id", "seed", "num_envs", "norm_obs", "norm_reward", "hidden_sizes", "orthogonal_init"),
    *("log_std_init", "log_std_final", "kl_coef"),
)
RANGES = (
    (
        *("total_timesteps", "num_envs", "num_steps", "update_epochs", "num_minibatches"),
        *("learning_rate", "clip_coef", "kl_target", "max_grad_norm", "hidden_sizes"),
        lambda x: x > 0,
        "must be positive",
    ),
    (
        *("seed", "eval_episodes", "return_floor", "kl_coef", "ent_coef"),
        lambda x: x >= 0,
        "must not be negative",
    ),
    (
        *("learning_rate", "return_floor", "clip_coef", "kl_target", "kl_coef", "ent_coef"),
        math.isfinite,
        "must be finite",
    ),
    ("gamma", "gamma_final", "gae_lambda", lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
    ("log_std_init", "log_std_final", lambda x: -20 <= x <= 5, "must lie in [-20, 5]"),
)

FILE = globals().get("__file__")  # a notebook cell has none
SCRIPT = Path(FILE).stem if FILE else ALGORITHM
CHARTS = ("episodic_return", "episodic_length", "SPS", "learning_rate")  # other tags are losses/
SAVE_SECONDS = 60  # between two checkpoints
LINE_SECONDS = 60  # between two lines of progress where stdout is no terminal
COMPILE_FROM = 250_000  # steps, for --compile auto
LONGEST_EVALUATION = 100_000  # steps, for tasks without a time limit
LONGEST_FILM = 3_000  # frames


def train(args: Args, _signals: Sequence[int] = ()) -> dict:
    """Train from the first iteration, or a checkpoint's, to the last; then evaluate.

    Returns steps, episodic_return (mean of the last 100 training episodes, NaN if none ended),
    eval_return (mean of the deterministic evaluation, None if no episode of it ended), checkpoint
    and run_dir. Sets PyTorch's seed and number of threads. Raises InputError for bad input and
    FloatingPointError for NaN or infinity. A KeyboardInterrupt is the caller's; the last
    checkpoint stays.

    With `args.resume`, weights and progress come from the checkpoint, everything else from `args`:
    start from `Args(**load_checkpoint(path)["args"])`.
    """
    args = check_args(args)
    state = {}
    if args.resume:
        state = load_checkpoint(args.resume)
        check_resume(args, state["args"])
    torch.set_num_threads(THREADS)
    with Log(args, state.get("step", 0)) as log:
        saved_at = -math.inf
        with closing(GENERATOR(args, state, partial(compile_or_eager, args=args))) as iterations:
            for metrics in iterations:
                log(state["step"], metrics)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    save_checkpoint(log.run_dir, args, state)
                    saved_at = time.monotonic()
                if _signals:
                    break
        checkpoint = save_checkpoint(log.run_dir, args, state)
        log.end_training(state)
        evaluation = {}
        if args.eval_episodes and not _signals:
            evaluation = evaluate_policy(load_policy(checkpoint), args, _signals)
            log.end_evaluation(state["step"], evaluation)
        say(f"{state['step']:,} steps in {log.seconds:.0f} s  {log.folder / 'checkpoint.pt'}")
        if args.video_dir and not _signals:
            film(load_policy(checkpoint), args, _signals)
    deterministic = evaluation.get("deterministic")
    return {
        "steps": state["step"],
        "episodic_return": mean_of(state["episodes"], 0),
        "eval_return": float(np.mean(deterministic)) if deterministic else None,
        "checkpoint": checkpoint,
        "run_dir": str(log.run_dir),
    }


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], env_id: str, episodes: int, seed: int
) -> list[float]:
    """Raw returns of one whole episode in each of `episodes` environments.

    `act` maps raw observations (episodes, O) to actions of the environment (episodes, A). Each
    environment counts once, since the episodes that end first are the short ones. One that does
    not end within LONGEST_EVALUATION steps is left out, and a line says so.
    """
    totals = np.zeros(episodes)
    running = np.ones(episodes, bool)
    with closing(make_envs(env_id, episodes, seed)) as envs:
        steps = range(LONGEST_EVALUATION)
        for _ in tqdm(iter(steps), "evaluation", unit="step", leave=False, disable=None):
            _, rewards, terminated, truncated = envs.step(act(envs.obs))
            totals[running] += rewards[running]
            running &= ~(terminated | truncated)
            if not running.any():
                break
    if running.any():
        limit = f"within {LONGEST_EVALUATION:,} steps"
        say(f"{running.sum()} of {episodes} episodes did not end {limit}; they are left out")
    return totals[~running].tolist()


def task_name(env_id: str) -> str:
    """The last part of an id, for names of files."""
    return env_id.replace(":", "/").split("/")[-1]


def interruptible(act: Callable, signals: Sequence[int]) -> Callable:
    """`act`, which raises KeyboardInterrupt once a signal came."""

    def checked(*inputs):
        if signals:
            raise KeyboardInterrupt
        return act(*inputs)

    return checked


def evaluate_policy(
    policy: Policy, args: Args, signals: Sequence[int] = ()
) -> dict[str, list[float]]:
    """Print and return the returns of mean actions and of sampled actions, statistics frozen."""
    policy.to(args.torch_device)
    seed = stream_seed(args.seed, "evaluation")
    rng = torch.Generator().manual_seed(seed)
    acts = {
        "deterministic": lambda obs: policy.act(obs),
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


def make_film_env(env_id: str, seed: int) -> Envs:
    """One environment that renders; a MuJoCo model's camera `track` follows its robot."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    envs = make_envs(env_id, 1, seed, render_mode="rgb_array")
    renderer = getattr(envs.envs[0].unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        import mujoco

        kind = mujoco.mjtObj.mjOBJ_CAMERA
        renderer.camera_id = mujoco.mj_name2id(renderer.model, kind, "track")  # -1: none
    return envs


def film(policy: Policy, args: Args, signals: Sequence[int] = ()) -> None:
    """Write a GIF of one episode of mean actions. If that fails, a line says why."""
    path = Path(args.video_dir, f"{task_name(args.env_id)}__{SCRIPT}__s{args.seed}.gif")
    act = interruptible(policy.act, signals)
    try:
        from PIL import Image
        from PIL.GifImagePlugin import getdata, getheader  # to write frame by frame

        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(make_film_env(args.env_id, args.seed)) as envs, path.open("wb") as file:
            env = envs.envs[0]
            fps = env.metadata.get("render_fps") or 30
            stride = max(1, round(fps / 25))  # steps a frame
            milliseconds = round(1000 * stride / fps)
            steps = range(LONGEST_FILM * stride)
            for step in tqdm(iter(steps), "film", unit="step", leave=False, disable=None):
                if step % stride == 0:
                    image = Image.fromarray(env.render()).quantize()
                    if step == 0:
                        file.writelines(getheader(image, info={"loop": 0})[0])
                    frame = getdata(image, duration=milliseconds, include_color_table=True)
                    file.writelines(frame)
                _, _, terminated, truncated = envs.step(act(envs.obs))
                if terminated[0] or truncated[0]:
                    break
            file.write(b";")  # the end of a GIF
        say(f"film {path}")
    except Exception as error:  # every renderer raises types of its own
        say(f"no film {path}: {type(error).__name__}: {first_line(error)}")


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line. A terminal that is gone, or can't show a character, stops nothing."""
    file = file or sys.stdout
    with suppress(OSError, ValueError), tqdm.external_write_mode(file):
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "replace").decode(), file=file, flush=True)


def write_json(path: Path, content: dict) -> None:
    """Write standard JSON, which has no infinity and no NaN: they become strings."""
    content = json.loads(json.dumps(content), parse_constant=str)
    path.write_text(json.dumps(content, indent=1) + "\n")


def save_checkpoint(run_dir: Path, args: Args, state: dict) -> str:
    """Write checkpoint.pt, and return its path. A crash leaves the old file or the new one."""
    new = Path(run_dir, "checkpoint.tmp")
    path = Path(run_dir, "checkpoint.pt")
    torch.save({**state, "algorithm": ALGORITHM, "args": asdict(args)}, new)
    load_checkpoint(str(new))  # never replace a good file by one that can't be read
    os.replace(new, path)
    return str(path)


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint to the CPU. Raises InputError if it is damaged or another script's.

    Its "args" are those of this version: new ones have their default, removed ones are left out.
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
        say(f"{path} has flags that this script does not know; ignored: {', '.join(unknown)}")
    kept = {name: value for name, value in saved["args"].items() if name in names}
    saved["args"] = asdict(Args(**kept))
    return saved


def load_policy(path: str) -> Policy:
    """The policy of a checkpoint, on the CPU. Its environment need not be installed.

    `policy.act(obs, deterministic=True)` maps raw observations (…, O) to actions (…, A).
    """
    saved = load_checkpoint(path)
    spaces = saved["spaces"]
    dtype = np.dtype(spaces["action_dtype"])
    low = np.array(spaces["action_low"], dtype)
    high = np.array(spaces["action_high"], dtype)
    action_space = gym.spaces.Box(low, high, dtype=dtype)
    policy = Policy(tuple(spaces["obs_shape"]), action_space, Args(**saved["args"]))
    policy.load_state_dict(saved["policy"])
    return policy


def whole_rows(path: Path, last_step: int) -> list[dict[str, str]]:
    """Rows of a progress.csv up to `last_step`. Damaged rows, or a damaged file, are left out."""
    rows = []
    with suppress(OSError, csv.Error):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()  # what has no newline is not whole
        for row in csv.DictReader(lines):
            with suppress(KeyError, TypeError, ValueError):
                whole = None not in row and None not in row.values() and float(row["seconds"]) >= 0
                if whole and int(row["step"]) <= last_step:
                    rows.append(row)
    return rows


class Log:
    """A run folder with config.json, progress.csv and TensorBoard events; progress for the user."""

    def __init__(self, args: Args, step: int):
        from torch.utils.tensorboard import SummaryWriter

        unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        default = f"runs/{task_name(args.env_id)}__{SCRIPT}__s{args.seed}__{unique}"
        self.folder = Path(args.resume).parent if args.resume else Path(args.run_dir or default)
        self.run_dir = self.folder.absolute()  # an environment may change the working directory
        try:
            self.run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
        except OSError as error:
            why = f"{error.strerror}; name a folder that can be made"
            raise InputError(f"--run-dir {self.folder}: {why}") from error
        config = {"args": asdict(args), "device": str(args.torch_device)}
        config["python"] = sys.version.split()[0]
        config |= {package.__name__: package.__version__ for package in (torch, gym, np)}
        if FILE:
            config["script_sha256"] = hashlib.sha256(Path(FILE).read_bytes()).hexdigest()
        name = f"config-{step}.json" if args.resume else "config.json"
        write_json(self.run_dir / name, config)

        self.total = args.num_timesteps
        if step < self.total:
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
        self.events = SummaryWriter(str(self.run_dir), purge_step=step + 1)
        self.bar = None
        self.step = step
        self.last = self.last_line = time.monotonic()

        say(f"{SCRIPT}  {args.env_id}  seed {args.seed}  {self.folder}")
        size = f"{args.num_envs} environments x {args.num_steps} steps = batch of"
        size += f" {args.batch_size:,}, {args.num_iterations} iterations = {self.total:,} steps"
        say(size + (f", from {step:,}" if step else ""))
        why = f"auto: {WHY_AUTO}" if args.device == "auto" else "as asked"
        say(f"device {args.torch_device} ({why})")
        if step >= self.total:
            say("nothing is left to train; a larger --total-timesteps trains on")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of one iteration that ended at `step`."""
        elapsed = time.monotonic() - self.last
        sps = (step - self.step) / elapsed
        metrics = {"SPS": sps} | metrics
        if self.bar is None:  # not before: other lines may be printed during the first iteration
            options = {"unit": "step", "unit_scale": True, "dynamic_ncols": True}
            self.bar = tqdm(initial=self.step, total=self.total, disable=None, **options)
        self.step = step
        self.last += elapsed
        self.seconds += elapsed
        try:
            self.write(step, metrics)
        except OSError as error:  # a full disk must not end the run
            say(f"this iteration is not logged: {error}")
        mean_return = f"{metrics['episodic_return']:.1f}"
        kl = f"{metrics['approx_kl']:.4f}"
        self.bar.set_postfix({"return": mean_return, "kl": kl}, refresh=False)
        self.bar.update(step - self.bar.n)
        terminal = sys.stdout is not None and sys.stdout.isatty()
        if not terminal and self.last - self.last_line >= LINE_SECONDS:
            self.last_line = self.last
            done = f"step {step:,} of {self.total:,}"
            say(f"{done}  return {mean_return}  kl {kl}  {sps:.0f} steps/s")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row of progress.csv, and TensorBoard scalars."""
        row = {"step": str(step), "seconds": f"{self.seconds:.2f}"}
        for name, value in metrics.items():
            row[name] = "" if math.isnan(value) else f"{value:.6g}"
            if not math.isnan(value):
                group = "charts" if name in CHARTS else "losses"
                self.events.add_scalar(f"{group}/{name}", value, step)
        if self.columns is None:
            self.columns = list(row)
            self.file.write(",".join(self.columns) + "\n")
        writer = csv.DictWriter(self.file, self.columns, "", "ignore", lineterminator="\n")
        writer.writerow(row)

    def end_training(self, state: dict) -> None:
        """Print the training score."""
        if self.bar is not None:
            self.bar.close()
        count = len(state["episodes"])
        mean = f"{mean_of(state['episodes'], 0):.1f}" if count else "unknown"
        say(f"mean return of the last {count} training episodes {mean}")

    def end_evaluation(self, step: int, evaluation: dict[str, list[float]]) -> None:
        """Write eval.json, and the deterministic score for TensorBoard."""
        write_json(self.run_dir / "eval.json", evaluation)
        if evaluation["deterministic"]:
            self.events.add_scalar("eval/return", np.mean(evaluation["deterministic"]), step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        self.events.close()
        self.file.close()


def compile_or_eager(function: Callable, args: Args) -> Callable:
    """`function` as one compiled graph if --compile asks for it and PyTorch can, else as it is."""
    torch.compiler.reset()  # a process may train many configurations; each recompiles
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
    """The flag of a field of Args."""
    return "--" + name.replace("_", "-")


def check_args(args: Args) -> Args:
    """A copy with plain Python values. Raises InputError for values that can't be trained with."""
    args = replace(args, **plain(asdict(args)))
    for field in fields(args):
        name = flag(field.name)
        value = getattr(args, field.name)
        storable = isinstance(value, str | int | float | tuple | list | dict | None)
        require(storable, f"{name} {value!r} can't be stored in a checkpoint")
        if get_origin(field.type) is Literal:
            choices = get_args(field.type)
            require(value in choices, f"{name} {value!r}: choose from {', '.join(choices)}")
        if field.type in (int, float, int | float):
            require(isinstance(value, int | float), f"{name} {value!r} must be a number")
        if field.type in (int, int | float):
            require(value % 1 == 0, f"{name} {value} must be a whole number")
            setattr(args, field.name, int(value))
        if isinstance(value, list):
            setattr(args, field.name, tuple(value))
    for *names, holds, what in RANGES:
        for name in names:
            value = getattr(args, name)
            values = value if isinstance(value, tuple) else [value]
            good = value is None or all(holds(x) for x in values)
            require(good, f"{flag(name)} {value} {what}")

    size = f"num_envs x num_steps = {args.batch_size}"
    require(args.batch_size >= 2, f"{size} must be 2 or more")
    divides = args.batch_size % args.num_minibatches == 0
    require(divides, f"--num-minibatches must divide {size}")
    require(args.num_iterations >= 1, f"--total-timesteps is less than one batch, {size}")
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
        torch.zeros(1, device=args.torch_device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {args.device}: {first_line(error)}; try cpu") from error
    with closing(
        make_envs(args.env_id, 1, args.seed)
    ):  # a wrong one is found before files are made
        pass
    if args.video_dir:
        args.video_dir = str(Path(args.video_dir).absolute())
        try:
            with closing(make_film_env(args.env_id, args.seed)) as envs:
                envs.envs[0].render()
        except InputError:
            raise
        except Exception as error:  # every renderer raises types of its own
            why = f"{type(error).__name__}: {first_line(error)}"
            hint = "MuJoCo needs MUJOCO_GL=egl with libegl1, or osmesa with libosmesa6"
            raise InputError(f"--video-dir: can't render {args.env_id} ({why}); {hint}") from error
    return args


def check_algorithm_args(args: Args) -> None:
    """Raise InputError for flags that contradict each other."""
    if args.log_std_final is not None:
        why = "--ent-coef has no effect on an annealed σ: learn it, with --log-std-final None"
        require(args.ent_coef == 0, why)
    if args.surrogate == "kl-adaptive":
        why = "--surrogate kl-adaptive needs a constant step size"
        constant = not args.anneal_lr and args.return_floor == 0
        require(constant, f"{why}: add --no-anneal-lr --return-floor 0")
        require(args.kl_coef > 0, "--kl-coef 0 stays 0 with --surrogate kl-adaptive: raise it")


def check_resume(args: Args, saved: dict) -> None:
    """Raise InputError if args differ from a checkpoint's where they can't change."""
    for name in FIXED_ON_RESUME:
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
    description = __doc__.splitlines()[0]
    given = tyro.cli(flags, default=flags(**defaults), description=description, config=config)
    return Args(**{k: v for name in groups for k, v in vars(getattr(given, name)).items()})


def parse_args() -> Args:
    """Args of the command line; --resume and --evaluate start from the checkpoint's."""
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
    """--evaluate: print the scores of a checkpoint, and film it if --video-dir asks for it."""
    args = check_args(args)
    policy = load_policy(args.evaluate)
    with closing(make_envs(args.env_id, 1, args.seed)) as envs:
        fits = policy.obs_stats.mean.shape == envs.obs.shape[1:]
        fits = fits and policy.action_map.low.shape == envs.action_space.shape
        require(fits, f"--env-id {args.env_id} has other sizes than the policy of {args.evaluate}")
    evaluate_policy(policy, args, signals)
    if args.video_dir:
        film(policy, args, signals)


def main() -> int:
    """Run the command line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal may not know Greek
    signals = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    caught = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores one

    def stop(number: int, _) -> None:
        signals.append(number)
        for n in caught:
            signal.signal(n, signal.SIG_DFL)
        with suppress(OSError):
            os.write(2, b"\nstopping as soon as all is saved; once more kills\n")

    for n in caught:
        signal.signal(n, stop)
    try:
        args = parse_args()
        if args.evaluate:
            evaluate_checkpoint(args, signals)
        else:
            train(args, signals)
    except InputError as error:
        say(f"{SCRIPT}.py: {error}", sys.stderr)
        return 2
    except FloatingPointError as error:
        say(f"{SCRIPT}.py: {error}; the last checkpoint, if there is one, stays", sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # nobody reads: give what is left to nobody, or Python complains at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signals[0] if signals else 0


if __name__ == "__main__" and FILE:
    sys.exit(main())
