# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Trust region policy optimization (TRPO) for continuous actions, in one file.

Papers   TRPO      Schulman et al. 2015, arXiv:1502.05477v5       GAE     Schulman et al. 2016, arXiv:1506.02438v6
         Kakade    Kakade 2001, A Natural Policy Gradient         Pardo   Pardo et al. 2018, arXiv:1712.00378v4
         Engstrom  Engstrom et al. 2020, arXiv:2005.12729v1       PPO     Schulman et al. 2017, arXiv:1707.06347v2
         Kingma    Kingma & Ba 2015, arXiv:1412.6980v9
Install  pip install --requirements-from-script trpo_continuous.py      (pip 26 or later; or `uv run` the file)
Run      python trpo_continuous.py --env-id HalfCheetah-v5 --seed 1
Resume   python trpo_continuous.py --resume runs/<run>/checkpoint.pt
Evaluate python trpo_continuous.py --evaluate runs/<run>/checkpoint.pt --eval-episodes 20 --video-dir videos

From TRPO eq. 14 to the update, in six lines (section 6 and appendix C; Δ = θ - θ_old):
    max_θ L(θ) = Ê[π_θ(a|s) / π_old(a|s) Â]  subject to  Ê[KL(π_old(·|s) ‖ π_θ(·|s))] ≤ δ            (TRPO eq. 14)
    to first order L(θ) ≈ L(θ_old) + gᵀΔ; to second order the mean KL ≈ ½ ΔᵀFΔ, as it and its gradient vanish at θ_old
    max_Δ gᵀΔ  subject to  ½ ΔᵀFΔ ≤ δ                                                              (TRPO eq. 17)
    Lagrangian gᵀΔ - λ (½ ΔᵀFΔ - δ): its gradient g - λFΔ is zero for Δ = x / λ, where Fx = g: the natural gradient x
    on the boundary ½ xᵀFx / λ² = δ, so Δ = √(2δ / xᵀFx) x; conjugate gradients solve Fx = g with products Fv alone
    where the two approximations err, a line search shortens Δ until L rises and the mean KL is at most δ

Equation map: equation -> function -> symbol
    GAE eq. 16                     linear_recursion          Σ_l (γλ)^l δ_{t+l}
    GAE eq. 16, PPO eqs. 11-12     gae                       Â_t, δ_t
    TRPO eq. 14, PPO eq. 6         importance_surrogate      L(θ)
    TRPO eqs. 56-57                fisher_operator           v -> (F + damping I) v
    TRPO appendix C                conjugate_gradient        x, F x = g
    TRPO appendix C                max_kl_step               √(2δ / xᵀFx) x
    TRPO appendix C                line_search               θ_new
    PPO eq. 9                      value_loss                L^VF
    TRPO appendix D                gaussian_logp             log π(a|s)
    PPO eq. 9                      gaussian_entropy          S[π]
    TRPO eq. 12                    gaussian_kl               KL(π_old ‖ π)
    Engstrom section 3, item 2     discounted_sums           R_t, whose std scales the rewards
    Kingma Algorithm 1             Adam                      θ, m̂, v̂
    TRPO section 6                 policy_step               g, Δ
    TRPO section 6                 train                     collect, estimate, step
Flags by task, for 1,000,000 steps; the defaults are for all others
    Ant-v5                              --gae-lambda 0.9 --num-steps 32 --num-minibatches 4 --cg-damping 5
    HalfCheetah-v5                      --gae-lambda 0.95 --num-steps 128 --num-minibatches 16 --max-kl 0.02
                                        --cg-damping 0.1
    Hopper-v5                           --gamma 0.995
    Humanoid-v5                         --gae-lambda 0.9 --num-steps 32 --num-minibatches 4
    Swimmer-v5                          --gamma 0.9999 --gae-lambda 0.98 --log-std-init 0 --return-floor 0
                                        --num-envs 2 --num-steps 512
    Walker2d-v5                         --gamma 0.995 --log-std-final -2.5
Departures from the TRPO paper, and the flags that give the paper back
    --gae-lambda 1                      Â from sums of discounted rewards, instead of GAE
    --no-norm-adv                       advantages not standardized
    --no-anneal-kl --return-floor 0     δ constant, 0.01 as in the paper's experiments
    --num-envs 50 --num-steps 1000 --num-minibatches 400  50,000 steps an iteration
    --cg-damping 0 --cg-tol 0           F as it is; else F + damping I takes the place of F in the six lines above, step
                                        length included, so that a full step ends inside the trust region
    --hidden-sizes 30                   one hidden layer, of 30 or 50 units
    --fisher-subsample 0.1              F estimated on a tenth of the batch
    --no-norm-reward --clip-reward inf  rewards not divided by the std of the discounted return
    --no-norm-obs --clip-obs inf        observations as they are
    --no-orthogonal-init                PyTorch's initialization instead of scaled orthogonal layers
    --log-std-final None                σ without a limit; the limit, and statistics of observations, change the policy
                                        between iterations, outside of the trust region
    --action-map none                   actions not clipped and scaled to the environment's bounds
    (always on)                         a value network, fitted after the policy's step (GAE section 6.1)
    (always on)                         V(final observation) completes returns cut by a time limit (Pardo eq. 6)
Relatives of TRPO
    --no-line-search                    truncated natural policy gradient: the full step, whatever it does
    --no-line-search --natural-step 0.1 --cg-damping 0
                                        natural policy gradient (Kakade eqs. 2-4): θ ← θ + 0.1 x, whatever δ

Resuming restores weights, optimizer, statistics and random generators. Episodes in flight start anew: a resumed run is
bit-exact where episodes end with the rollout.
"""

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
    seed: int = 1  # seed of everything random: initialization, action noise, minibatch order, environments
    total_timesteps: int = 1_000_000  # environment steps, rounded down to whole iterations (1_000_000, not 1e6)
    run_dir: str | None = None  # folder of this run, not existing yet; default runs/<env>__<script>__s<seed>__<unique>
    resume: str | None = None  # checkpoint.pt to go on from, with its configuration; flags given win, or are refused
    evaluate: str | None = None  # checkpoint.pt to evaluate instead of training
    eval_episodes: int = 10  # episodes of the evaluation at the end, deterministic and sampled each; 0 = none
    video_dir: str | None = None  # folder for a GIF of the first evaluation episode
    save_every: int = 25  # iterations between checkpoints; one is always written at the end
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is the CPU, since the networks are small
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the minibatch step; auto = from 250,000 steps on
    # environment
    env_id: str = "HalfCheetah-v5"  # Gymnasium id, or module:Env-v0 for one of your own; flags by task: see docstring
    num_envs: int = 16  # N, environments stepped in turn
    action_map: Literal["rescale", "clip", "none"] = "rescale"  # clip to ±1, scale to bounds; clip to bounds; as it is
    norm_obs: bool = True  # normalize observations by their running mean and std
    clip_obs: float = 10.0  # clip (normalized) observations to ± this; inf = off
    norm_reward: bool = True  # divide rewards by the running std of the discounted return
    clip_reward: float = 10.0  # clip (divided) rewards to ± this; inf = off
    # algorithm
    num_steps: int = 64  # T, steps per environment and iteration
    gamma: float = 0.99  # γ, discount factor; Swimmer-v5 needs 0.9999
    gae_lambda: float = 0.97  # λ of GAE eq. 16; 0 = one-step TD, 1 = Monte Carlo
    norm_adv: bool = True  # standardize advantages over the batch
    max_kl: float = 0.01  # δ of TRPO eq. 14, the largest mean KL(old‖new) of a step
    anneal_kl: bool = True  # anneal δ to zero, by 1 - f² after the fraction f of all steps
    return_floor: float = 0.1  # where std[Â + V], of scaled rewards, is less, shrink δ by their ratio²; 0 = never
    cg_iterations: int = 10  # iterations of conjugate gradients
    cg_tol: float = 1e-10  # stop them at this squared norm of the residual, in absolute units
    cg_damping: float = 0.5  # added to the diagonal of F, in direction and step length, against the noise in F and g
    fisher_subsample: float = 1.0  # fraction of the batch that F is estimated on; TRPO appendix C.1 takes 0.1
    line_search: bool = True  # shorten the step until the surrogate rises and the mean KL is at most δ
    line_search_steps: int = 10  # lengths tried before the step is rejected
    line_search_decay: float = 0.8  # each length is the one before times this
    natural_step: float | None = None  # α of a step α x, instead of the length by δ; δ bounds the line search alone
    update_epochs: int = 10  # passes of the value network over the batch of N x T samples
    num_minibatches: int = 8  # minibatches per pass; the minibatch size is N x T / this
    learning_rate: float = 1e-3  # Adam's step size, for the value network
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    adam_eps: float = 1e-5  # Adam's ε (PyTorch's default is 1e-8)
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers, of both networks
    activation: Literal["tanh", "relu"] = "tanh"  # activation, of both networks
    orthogonal_init: bool = True  # orthogonal weights: gain √2, policy output 0.01, value output 1; else PyTorch's own
    log_std_init: float = -0.5  # initial log σ of the policy, in the scale of its samples
    log_std_final: float | None = -3.5  # log of the largest σ at the end, annealed linearly in σ; None = no limit

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


# ---- Equations -------------------------------------------------------------------------------------------------------
# T steps per rollout · N environments · B = T·N samples · M minibatch · O observation dims · A action dims


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


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalized advantage estimation, GAE eq. 16, cut at the end of the rollout (PPO eqs. 11-12). All (T, N).

        δ_t = r_t + γ V(s_{t+1}) - V(s_t)
        Â_t = δ_t + γλ δ_{t+1} + … + (γλ)^{T-1-t} δ_{T-1} = δ_t + γλ Â_{t+1}

    PPO eq. 11 misprints the last exponent as T-t+1. `next_values[t]` is V of the state that action t led to: at an
    episode end, of the final observation. A termination removes that V, a truncation keeps it (Pardo eq. 6); both
    (`done`) end the sum.
    """
    assert rewards.shape == values.shape == next_values.shape == terminated.shape == done.shape
    delta = rewards + gamma * next_values * ~terminated - values  # (T, N)
    return linear_recursion(delta, gamma * lam * (~done).to(delta.dtype))


def importance_surrogate(logp: Tensor, logp_old: Tensor, adv: Tensor) -> Tensor:
    """PPO eq. 6, L^CPI(θ) = Ê[r_t Â_t], r_t = π_θ(a_t|s_t) / π_old(a_t|s_t), to be maximized. (B,) each -> scalar.

    TRPO eq. 14 is the same with q = π_old and Q in place of Â.
    """
    assert logp.shape == logp_old.shape == adv.shape
    return ((logp - logp_old).exp() * adv).mean()


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """PPO eq. 9, L^VF = Ê[(V_θ(s_t) - V_t^targ)²], without ½. (B,) each -> scalar."""
    assert values.shape == returns.shape
    return (values - returns).square().mean()


def gaussian_logp(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """TRPO appendix D: log N(a; μ(s), diag σ²). mean, actions (…, A), log_std (A,) -> (…,)."""
    assert mean.shape == actions.shape
    squares = ((actions - mean) * (-log_std).exp()).square()  # (…, A)
    return (-0.5 * squares - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """S[π] of PPO eq. 9 for a diagonal Gaussian, in nats: Σ_i log σ_i + ½ log 2πe. (A,) -> scalar."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def gaussian_kl(mean_old: Tensor, log_std_old: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL[π_old, π] of PPO eq. 8 and TRPO eq. 12 for diagonal Gaussians, in nats. means (…, A), log stds (A,) -> (…,).

    KL = Σ_i log(σ_i / σ_old,i) + (σ_old,i² + (μ_old,i - μ_i)²) / 2σ_i² - ½
    """
    assert mean_old.shape == mean.shape
    squares = (2 * log_std_old).exp() + (mean_old - mean).square()  # (…, A)
    return (log_std - log_std_old + 0.5 * squares * (-2 * log_std).exp() - 0.5).sum(-1)


def discounted_sums(rewards: Tensor, done: Tensor, start: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 2: R_t = γ R_{t-1} + r_t, from 0 in each episode. rewards, done (T, N) -> R (T, N).

    `start` (N,) is γ R_{-1}, what the rollout before left; the second result is what this one leaves.
    """
    decay = gamma * (~done).to(rewards.dtype)  # (T, N)  decay[t] leads from R_t to R_{t+1}
    first = torch.cat([rewards[:1] + start, rewards[1:]])
    sums = linear_recursion(first.flip(0), decay.roll(1, 0).flip(0)).flip(0)  # the recursion runs forward in time
    return sums, decay[-1] * sums[-1]


def conjugate_gradient(matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int, residual_tol: float) -> Tensor:
    """Solve A x = b for symmetric positive definite A, given as v -> A v (TRPO appendix C). (P,) -> (P,).

    Stops after `iterations`, or once the squared norm of the residual b - A x is at most `residual_tol`.
    """
    x, residual, direction, squared = torch.zeros_like(b), b, b, b @ b
    for _ in range(iterations):
        if squared <= residual_tol:
            break
        product = matvec(direction)
        curvature = direction @ product
        if curvature <= 0:  # A is singular in this direction, up to rounding
            break
        alpha = squared / curvature
        x, residual, last = x + alpha * direction, residual - alpha * product, squared
        squared = residual @ residual
        direction = residual + squared / last * direction
    return x


def max_kl_step(direction: Tensor, fisher_direction: Tensor, max_kl: float) -> Tensor:
    """TRPO appendix C: √(2δ / xᵀFx) x, the step along x at whose end ½ ΔᵀFΔ = δ. x and Fx (P,) -> (P,)."""
    curvature = (direction @ fisher_direction).clamp(min=torch.finfo(direction.dtype).tiny)  # 0 for x = 0
    return (2 * max_kl / curvature).sqrt() * direction


def line_search(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], theta: Tensor, full_step: Tensor, max_kl: float,
    backtracks: int, shrink: float,
) -> tuple[Tensor, bool]:  # fmt: skip
    """TRPO appendix C: the first of θ + shrinkᵏ Δ, k = 0, 1, …, that raises L and keeps the mean KL; whether any did.

    `evaluate(θ')` -> (L(θ') - L(θ), mean KL(π_θ ‖ π_θ')). The second result is False, and the first `theta`, if none of
    `backtracks` tries satisfies both.
    """
    for k in range(backtracks):
        candidate = theta + shrink**k * full_step
        gain, kl = evaluate(candidate)
        if gain > 0 and kl <= max_kl:
            return candidate, True
    return theta, False


# ---- Networks --------------------------------------------------------------------------------------------------------


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("inverse_std", torch.ones(shape))
        self.register_buffer("count", torch.tensor(0))

    def update(self, rows: Tensor) -> None:  # (B, *shape)
        var, mean = torch.var_mean(rows, 0, correction=0)
        self.count += len(rows)
        share, delta = len(rows) / self.count, mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var + (1 - share) * delta.square())
        self.inverse_std.copy_((self.var + 1e-8).rsqrt())


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


class Policy(nn.Module):
    """π_θ(a|s) = N(μ_θ(s), diag σ²) of raw observations; σ is not a function of s (PPO section 6.1).

    log σ is a parameter that `train` keeps below a limit.
    """

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.norm_obs, self.clip_obs, (action_dim,) = args.norm_obs, args.clip_obs, action_space.shape
        self.obs_stats = RunningMeanStd(*obs_shape)
        self.mean_net = MLP((*obs_shape, *args.hidden_sizes, action_dim), args, last_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), args.log_std_init))
        low, high = torch.tensor(np.array([action_space.low, action_space.high]), dtype=torch.float32)  # (A,) each
        if args.action_map == "none":
            low, high = torch.full_like(low, -math.inf), torch.full_like(high, math.inf)
        rescale = low.isfinite() & high.isfinite() & (args.action_map == "rescale")  # infinite bounds pass through
        self.register_buffer("scale", torch.where(rescale, (high - low) / 2, 1.0))
        self.register_buffer("shift", torch.where(rescale, (high + low) / 2, 0.0))
        self.register_buffer("low", torch.where(rescale, -1.0, low))
        self.register_buffer("high", torch.where(rescale, 1.0, high))

    def normalize(self, obs: Tensor) -> Tensor:
        """Raw observations (…, O) -> what both networks see (…, O) (Engstrom section 3, items 6 and 7)."""
        if self.norm_obs:
            obs = (obs - self.obs_stats.mean) * self.obs_stats.inverse_std
        return obs.clamp(-self.clip_obs, self.clip_obs)

    def forward(self, obs: Tensor) -> Tensor:
        """Raw observations (…, O) -> μ_θ(s) (…, A), before the action map."""
        return self.mean_net(self.normalize(obs))

    @torch.inference_mode()
    def act(self, obs: np.ndarray, noise: Tensor | float = 0.0) -> tuple[Tensor, np.ndarray]:
        """Raw observations (N, O), noise of std σ (N, A) -> sample μ + noise, its action for the environment (N, A)."""
        actions = self(torch.from_numpy(obs).to(self.log_std.device)) + noise
        return actions, (actions.clamp(self.low, self.high) * self.scale + self.shift).cpu().numpy()


class Critic(nn.Module):
    """V(s) in units of scaled reward, from `policy.normalize(obs)` (…, O) -> (…,)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.return_stats = RunningMeanStd()
        self.value_net = MLP((obs_dim, *args.hidden_sizes, 1), args, last_gain=1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.value_net(obs).squeeze(-1)


class Adam(nn.Module):
    """Kingma Algorithm 1 for P weights in all, its state in buffers.

    It takes the steps of torch.optim.Adam, which can't be compiled into one graph with the gradient.
    """

    def __init__(self, num_weights: int, lr: float, eps: float):
        super().__init__()
        self.eps = eps
        self.register_buffer("lr", torch.tensor(lr))  # α
        self.register_buffer("t", torch.tensor(0.0))
        self.register_buffer("m", torch.zeros(num_weights))
        self.register_buffer("v", torch.zeros(num_weights))

    @torch.no_grad()
    def step(self, params: list[Tensor], grad: Tensor) -> None:
        """m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  θ ← θ - α m̂ / (√v̂ + ε). `grad` (P,) is that of all `params`."""
        beta1, beta2 = 0.9, 0.999
        self.t += 1
        self.m.lerp_(grad, 1 - beta1)
        self.v.lerp_(grad.square(), 1 - beta2)
        m_hat = self.m / -torch.expm1(self.t * math.log(beta1))  # m / (1 - β₁ᵗ)
        v_hat = self.v / -torch.expm1(self.t * math.log(beta2))
        change = self.lr * m_hat / (v_hat.sqrt() + self.eps)
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


def make_envs(env_id: str, num_envs: int, seed: int, rng_states: list[dict] | None = None, **kwargs) -> Envs:
    """`num_envs` environments with flat Box observations and actions; raises InputError for any other."""
    with suppress(ImportError):  # MuJoCo would repeat this warning for each environment and log it to ./MUJOCO_LOG.TXT
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(text, file=sys.stderr))
    try:
        envs = [gym.make(env_id, **kwargs) for _ in range(num_envs)]
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"--env-id {env_id}: {str(error).splitlines()[0]}") from error
    check_spaces(envs[0], env_id)
    return Envs(envs, seed, rng_states)


# ---- Rollout ---------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T x N transitions under π_old; done = terminated | truncated."""

    obs: Tensor  # (T, N, O)
    next_obs: Tensor  # (T, N, O)  true successors
    actions: Tensor  # (T, N, A)  samples of the Gaussian, before the action map
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    done: Tensor  # (T, N)


def collect(envs: Envs, policy: Policy, rng: torch.Generator, num_steps: int) -> Rollout:
    """Run π_old for T steps in each of N environments (PPO Algorithm 1)."""
    device, std = policy.log_std.device, policy.log_std.detach().exp()
    noise = torch.randn(num_steps, len(envs.envs), len(std), generator=rng).to(device) * std  # (T, N, A)
    steps, samples = [], []
    for noise_t in noise:
        actions, env_actions = policy.act(obs := envs.obs, noise_t)
        next_obs, rewards, terminated, truncated, _ = envs.step(env_actions)
        steps.append((obs, next_obs, rewards.astype(np.float32), terminated, terminated | truncated))
        samples.append(actions)
    obs, next_obs, *rest = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*steps, strict=True))
    return Rollout(obs, next_obs, torch.stack(samples), *rest)


def scale_rewards(rewards: Tensor, done: Tensor, start: Tensor, critic: Critic, args: Args) -> tuple[Tensor, Tensor]:
    """(T, N) rewards over the std of the discounted return, clipped (Engstrom section 3, items 2, 5); next `start`."""
    if args.norm_reward:
        sums, start = discounted_sums(rewards, done, start, args.gamma)
        critic.return_stats.update(sums.flatten())
        rewards = rewards * critic.return_stats.inverse_std
    return rewards.clamp(-args.clip_reward, args.clip_reward), start


@torch.no_grad()
def advantages(policy: Policy, critic: Critic, rollout: Rollout, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, value targets Â + V (GAE footnote 2) and values V under the critic as it is, each (T, N)."""
    values = critic(policy.normalize(rollout.obs))  # (T, N)
    next_values = torch.cat([values[1:], critic(policy.normalize(rollout.next_obs[-1:]))])  # (T, N)
    next_values[rollout.done] = critic(policy.normalize(rollout.next_obs[rollout.done]))  # of the final observations
    adv = gae(rollout.rewards, values, next_values, rollout.terminated, rollout.done, args.gamma, args.gae_lambda)
    returns = adv + values
    if args.norm_adv:
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    return adv, returns, values


# ---- Update ----------------------------------------------------------------------------------------------------------


def fisher_operator(policy: Policy, obs: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping I) v, F the Hessian of the mean KL(π_old ‖ π_θ) at θ_old. obs (B, O), v (P,) -> (P,).

    TRPO eqs. 56-57: F = Ê[JᵀMJ], J the Jacobian of the distribution's parameters μ and log σ, M the Hessian of the KL
    in them, diag(1/σ²) and 2; the other term is zero at θ_old. Jv is the derivative of Jᵀu, linear in u, by u. Both
    graphs are built once for all products.
    """
    params = list(policy.parameters())
    mean = policy(obs)
    outputs = torch.cat([mean, policy.log_std.expand_as(mean)], -1)  # (B, 2A)
    metric = torch.cat([(-2 * policy.log_std).exp(), torch.full_like(policy.log_std, 2.0)]).detach()  # (2A,)
    u = torch.zeros_like(outputs, requires_grad=True)
    jt_u = nn.utils.parameters_to_vector(torch.autograd.grad(outputs, params, u, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        (j_v,) = torch.autograd.grad(jt_u, u, vector, retain_graph=True)  # (B, 2A)
        jt_m_j_v = torch.autograd.grad(outputs, params, metric * j_v / len(obs), retain_graph=True)
        return nn.utils.parameters_to_vector(jt_m_j_v) + damping * vector

    return product


def fisher_vector_product(policy: Policy, obs: Tensor, vector: Tensor, damping: float) -> Tensor:
    """(F + damping I) v of `fisher_operator`, for one product alone; `policy_step` takes many of one operator."""
    return fisher_operator(policy, obs, damping)(vector)


def policy_step(
    policy: Policy, obs: Tensor, actions: Tensor, adv: Tensor, rng: torch.Generator, args: Args
) -> dict[str, float]:
    """TRPO section 6: one step of the policy on the whole batch. obs (B, O), actions (B, A), adv (B,) -> figures."""
    params = list(policy.parameters())
    theta = nn.utils.parameters_to_vector(params).detach()  # (P,)
    mean_old, log_std_old = policy(obs), policy.log_std.detach().clone()  # (B, A), (A,)
    logp_old = gaussian_logp(mean_old, policy.log_std, actions)  # (B,)
    surrogate = importance_surrogate(logp_old, logp_old.detach(), adv)
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(surrogate, params))  # (P,)

    subset = torch.randperm(len(obs), generator=rng)[: math.ceil(args.fisher_subsample * len(obs))].to(obs.device)
    fisher = fisher_operator(policy, obs[subset], args.cg_damping)
    x = conjugate_gradient(fisher, gradient, args.cg_iterations, args.cg_tol)  # (P,)
    step = args.natural_step * x if args.natural_step else max_kl_step(x, fisher(x), args.max_kl)

    @torch.no_grad()
    def evaluate(candidate: Tensor) -> tuple[Tensor, Tensor]:
        nn.utils.vector_to_parameters(candidate, params)
        mean = policy(obs)
        logp = gaussian_logp(mean, policy.log_std, actions)
        gain = importance_surrogate(logp, logp_old, adv) - surrogate
        return gain, gaussian_kl(mean_old, log_std_old, mean, policy.log_std).mean()

    new, accepted = theta + step, True
    if args.line_search:
        new, accepted = line_search(evaluate, theta, step, args.max_kl, args.line_search_steps, args.line_search_decay)
    gain, kl = evaluate(new)  # leaves the parameters at `new`
    figures = {"policy_loss": -(surrogate + gain).item(), "surrogate_gain": gain.item(), "approx_kl": kl.item()}
    figures |= {"policy_grad_norm": gradient.norm().item(), "rejected": float(not accepted), "max_kl": args.max_kl}
    return figures | {"step_fraction": ((new - theta).norm() / step.norm()).item()}


def value_step(critic: Critic, adam: Adam, obs: Tensor, returns: Tensor) -> Tensor:
    """One step of Adam on the value loss of a minibatch; obs (M, O) normalized, returns (M,) -> the loss."""
    loss = value_loss(critic(obs), returns)
    grads = torch.autograd.grad(loss, list(critic.parameters()))
    adam.step(list(critic.parameters()), torch.cat([grad.flatten() for grad in grads]))
    return loss.detach()


def update(
    policy: Policy, critic: Critic, adam: Adam, step: Callable, rollout: Rollout, rng: torch.Generator, args: Args
) -> dict[str, float]:
    """The policy's step, then the regression of V on targets from before it (GAE section 6.1).

    A step is as long as δ allows, however little is to be gained. Once a task is solved, returns hardly differ, the
    advantages are V's error, and full steps along it lose what was learned. So where the std of the value targets,
    Â + V, is below `return_floor`, δ shrinks by `trust`, the square of their ratio. Other causes of returns that are
    all but equal, such as a large constant reward or an idle policy, shrink it too; 0 turns this off. With
    `norm_reward` off the floor is in units of raw rewards. `step` is value_step, compiled or not.
    """
    adv, returns, values = (x.flatten() for x in advantages(policy, critic, rollout, args))  # (B,)
    obs, actions = rollout.obs.flatten(0, 1), rollout.actions.flatten(0, 1)
    explained_variance = 1 - (returns - values).var() / returns.var()
    trust = min(1.0, returns.std().item() / args.return_floor) ** 2 if args.return_floor else 1.0
    stats = policy_step(policy, obs, actions, adv, rng, replace(args, max_kl=args.max_kl * trust))
    obs, total = policy.normalize(obs), torch.zeros((), device=obs.device)
    for _ in range(args.update_epochs):
        order = torch.randperm(args.batch_size, generator=rng).to(obs.device)
        shuffled = (x.index_select(0, order).chunk(args.num_minibatches) for x in (obs, returns))
        for mb_obs, mb_returns in zip(*shuffled, strict=True):
            total += step(critic, adam, mb_obs, mb_returns)
    stats["value_loss"] = total.item() / (args.update_epochs * args.num_minibatches)
    return stats | {"explained_variance": explained_variance.item(), "entropy": gaussian_entropy(policy.log_std).item()}


# ---- Train -----------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """TRPO section 6 from the first iteration, or a checkpoint's, to the last, then evaluation.

    Returns steps, episodic_return (mean of the last 100 training episodes), eval_return (mean of the deterministic
    evaluation), checkpoint, run_dir, and signal (that ended it early). Sets PyTorch's thread count and seed for the
    process. Raises InputError for bad input, FloatingPointError for NaN or infinity. With `args.resume`, weights and
    progress come from the checkpoint, all else from `args`: start from `Args(**load_checkpoint(path)["args"])`.
    """
    check_args(args)
    device, saved = pick_device(args.device), load_checkpoint(args.resume, args, FIXED_ON_RESUME) if args.resume else {}
    torch.set_num_threads(1)  # more do not help networks this small
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed + 2**32)  # another stream than that of the weights
    envs = make_envs(args.env_id, args.num_envs, args.seed, saved.get("env_rng_states"))
    policy = Policy(envs.obs.shape[1:], envs.envs[0].action_space, args).to(device)
    critic = Critic(envs.obs.shape[1], args).to(device)
    params = list(critic.parameters())
    adam = Adam(sum(param.numel() for param in params), args.learning_rate, args.adam_eps).to(device)
    modules = {"policy": policy, "critic": critic, "adam": adam}
    for name, module in modules.items() if saved else ():
        module.load_state_dict(saved[name])
    rng.set_state(saved.get("rng", rng.get_state()))
    step, rejected = saved.get("step", 0), saved.get("rejected", 0)
    episodes = deque(saved.get("episodes", ()), maxlen=100)  # (return, length) of the last that ended
    reward_start = torch.zeros(args.num_envs, device=device)  # (N,)  γ R_{-1} of discounted_sums
    total_steps = args.num_iterations * args.batch_size
    with Log(args, device, step, sum(param.numel() for param in (*policy.parameters(), *params))) as log:

        def checkpoint() -> str:
            state = {"step": step, "rejected": rejected, "episodes": list(episodes), "env_rng_states": envs.rng_states}
            state |= {name: module.state_dict() for name, module in modules.items()} | {"rng": rng.get_state()}
            return save_checkpoint(log.run_dir, args, state)

        compiled_step = compile_or_eager(value_step, args, device)
        with stop_signals() as signals:
            while step + args.batch_size <= args.total_timesteps and not signals:
                fraction = step / total_steps
                now = replace(args, max_kl=args.max_kl * (1 - fraction**2 if args.anneal_kl else 1.0))
                adam.lr.fill_(args.learning_rate * (1 - fraction if args.anneal_lr else 1.0))
                if args.log_std_final is not None:
                    std = (1 - fraction) * math.exp(args.log_std_init) + fraction * math.exp(args.log_std_final)
                    policy.log_std.data.clamp_(max=math.log(std))

                rollout = collect(envs, policy, rng, args.num_steps)
                check_finite(step, observations=torch.cat([rollout.obs, rollout.next_obs]), rewards=rollout.rewards)
                episodes.extend(envs.ended)
                envs.ended.clear()
                rewards, reward_start = scale_rewards(rollout.rewards, rollout.done, reward_start, critic, args)

                stats = update(policy, critic, adam, compiled_step, rollout._replace(rewards=rewards), rng, now)
                rejected += int(stats.pop("rejected"))
                weights = nn.utils.parameters_to_vector([*policy.parameters(), *params])
                losses = torch.tensor([stats[name] for name in ("policy_loss", "value_loss", "approx_kl")])
                check_finite(step, losses=losses, parameters=weights)
                policy.obs_stats.update(rollout.obs.flatten(0, 1))  # after the update: π_old is the policy that acted

                step += args.batch_size
                stats |= {"rejected_steps": rejected, "action_std": policy.log_std.exp().mean().item()}
                log(step, adam.lr.item(), episodes, stats)
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

SCRIPT = "trpo_continuous"
CHECKS = (
    (
        "total_timesteps save_every num_envs num_steps update_epochs num_minibatches learning_rate clip_obs "
        "clip_reward max_kl cg_iterations fisher_subsample line_search_steps line_search_decay natural_step "
        "hidden_sizes",
        lambda x: x > 0,
        "must be positive",
    ),
    ("seed eval_episodes adam_eps return_floor cg_tol cg_damping", lambda x: x >= 0, "must not be negative"),
    ("gamma gae_lambda fisher_subsample line_search_decay", lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
    ("log_std_init log_std_final", lambda x: -20 <= x <= 5, "must lie in [-20, 5]"),
)
FIXED_ON_EVALUATION = "action_map norm_obs clip_obs hidden_sizes activation"
FIXED_ON_RESUME = f"{FIXED_ON_EVALUATION} seed env_id num_envs norm_reward orthogonal_init log_std_init log_std_final"
AUTO_DEVICE = "the networks are small"
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


def evaluate_policy(policy: Policy, args: Args) -> dict[str, list[float]]:
    """Returns of the policy with frozen statistics, deterministic and sampled."""
    rng, seed = torch.Generator().manual_seed(args.seed), 1_000_000 + args.seed  # apart from the training seeds
    std = policy.log_std.detach().exp()

    def sample(obs: np.ndarray) -> np.ndarray:
        return policy.act(obs, torch.randn(len(obs), len(std), generator=rng).to(std.device) * std)[1]

    deterministic = evaluate(lambda obs: policy.act(obs)[1], args.env_id, args.eval_episodes, seed, args.video_dir)
    return {"deterministic": deterministic, "sampled": evaluate(sample, args.env_id, args.eval_episodes, seed)}


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


def pick_device(name: str) -> torch.device:
    """The device of --device. Raises InputError if it is not there."""
    try:
        return torch.zeros(1, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0].splitlines()[0]
        raise InputError(f"--device {name} can't be used here ({why}): try cpu") from error


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Raise InputError unless observations and actions are flat Boxes."""
    for space, hint in (
        (env.action_space, "for discrete actions use acer_discrete.py"),
        (env.observation_space, "for images use ppo_atari.py, else the wrapper FlattenObservation"),
    ):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"--env-id {env_id} has the space {space}, but this script needs a flat Box: {hint}")


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
        env = make_envs(args.env_id, 1, args.seed).envs[0]
        policy = Policy(env.observation_space.shape, env.action_space, args).to(pick_device(args.device))
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
