# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "ale-py==0.12.1", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Proximal policy optimization (PPO) for Atari games and other tasks seen as images, in one file.

Papers   PPO       Schulman et al. 2017, arXiv:1707.06347v2       GAE    Schulman et al. 2016, arXiv:1506.02438v6
         Engstrom  Engstrom et al. 2020, arXiv:2005.12729v1       DQN    Mnih et al. 2015, doi:10.1038/nature14236
         Pardo     Pardo et al. 2018, arXiv:1712.00378v4          Kingma Kingma & Ba 2015, arXiv:1412.6980v9
         Machado   Machado et al. 2018, arXiv:1709.06009v2        TRPO   Schulman et al. 2015, arXiv:1502.05477v5
Install  pip install --requirements-from-script ppo_atari.py            (pip 26 or later; or `uv run` the file)
Run      python ppo_atari.py --env-id ALE/Breakout-v5 --seed 1
Resume   python ppo_atari.py --resume runs/<run>/checkpoint.pt
Evaluate python ppo_atari.py --evaluate runs/<run>/checkpoint.pt --eval-episodes 20 --video-dir videos

Equation map: equation -> function -> symbol
    GAE eq. 16                     linear_recursion          Σ_l (γλ)^l δ_{t+l}
    GAE eq. 16, PPO eqs. 11-12     gae                       Â_t, δ_t
    PPO eq. 7                      clipped_surrogate         L^CLIP
    PPO eq. 9                      value_loss                L^VF
    Engstrom section 3, item 1     clipped_value_loss        L^VF with V clipped around V_old
    TRPO appendix D                categorical_logp          log π(a|s)
    PPO eq. 9                      categorical_entropy       S[π]
    TRPO eq. 12                    categorical_kl            KL(π_old ‖ π)
    Engstrom section 3, item 9     clip_global_norm          gradient clipping
    PPO eq. 9                      minibatch_gradient        L^CLIP - c1 L^VF + c2 S
    Kingma Algorithm 1             Adam                      θ, m̂, v̂
    PPO Algorithm 1                train                     N actors x T steps, K epochs of minibatches
Departures from the PPO paper (section 6.4, Table 5), and the flags that give the paper back
    --update-epochs 3                   3 epochs instead of the 4 of OpenAI's baselines, which others compare with
    --anneal-clip                       ε annealed to zero, as the learning rate is
    --vf-coef 1                         c1 = 1; 0.25 is what baselines' 0.5, of a halved error, amounts to
    --no-norm-adv                       advantages not standardized over the minibatch
    --max-grad-norm inf                 gradients unclipped
    --no-norm-obs                       pixels over 255, instead of normalized by their running mean and std
    --no-orthogonal-init                PyTorch's initialization instead of scaled orthogonal layers
    (always on)                         DQN's network, as in baselines, instead of the smaller one of Mnih et al. 2016
    (always on)                         V(final observation) completes games cut by a time limit (Pardo eq. 6)

Resuming restores weights, optimizer and random generators. Episodes in flight start anew, and ALE's random states can't
be saved: its games then go on from new seeds. Elsewhere a run is bit-exact where episodes end with the rollout.
"""

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
    seed: int = 1  # seed of everything random: initialization, action noise, minibatch order, environments
    total_timesteps: int = 10_000_000  # environment steps, rounded down to whole iterations; four frames each in ALE
    run_dir: str | None = None  # folder of this run, not existing yet; default runs/<env>__<script>__s<seed>__<unique>
    resume: str | None = None  # checkpoint.pt to go on from, with its configuration; flags given win, or are refused
    evaluate: str | None = None  # checkpoint.pt to evaluate instead of training
    eval_episodes: int = 10  # full games of the evaluation at the end, deterministic and sampled each; 0 = none
    video_dir: str | None = None  # folder for a GIF of the first evaluation episode
    save_every: int = 100  # iterations between checkpoints; one is always written at the end
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto is CUDA where there is a GPU
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the minibatch step; auto = from 250,000 steps on
    bf16: bool = False  # run the network in bfloat16 (autocast), its parameters, heads and losses in float32
    # environment
    env_id: str = "ALE/Breakout-v5"  # Gymnasium id of images, or of an ALE game, whose other settings are these flags
    num_envs: int = 8  # N, environments; ALE's are stepped in parallel, others in turn
    frame_skip: int = 4  # ALE: frames that an action is repeated for, the last two max-pooled (DQN methods)
    frame_stack: int = 4  # ALE: 84 x 84 gray frames in an observation (DQN methods)
    noop_max: int = 30  # ALE: a game starts after up to this many no-ops (DQN methods)
    fire_on_reset: bool = True  # ALE: press fire to begin a game, and as the first action of each life (baselines)
    life_loss_terminal: bool = True  # ALE: a lost life ends the return to learn from, not the game (DQN methods)
    repeat_action_probability: float = 0.0  # ALE: sticky actions; Machado recommends 0.25, baselines have none
    max_episode_frames: int = 108_000  # ALE: frames until a game is truncated, 30 minutes
    norm_obs: bool = True  # normalize each pixel by its running mean and std; else divide it by 255
    clip_obs: float = 5.0  # clip normalized pixels to ± this; inf = off
    clip_rewards: bool = True  # learn from the sign of the reward (DQN methods); scores logged are raw
    # algorithm
    num_steps: int = 128  # T, steps per environment and iteration
    update_epochs: int = 4  # K, passes over the batch of N x T samples
    num_minibatches: int = 4  # minibatches per epoch; the minibatch size M is N x T / this
    learning_rate: float = 2.5e-4  # Adam's step size
    anneal_lr: bool = True  # anneal the learning rate linearly to zero
    adam_eps: float = 1e-5  # Adam's ε (PyTorch's default is 1e-8)
    gamma: float = 0.99  # γ, discount factor
    gae_lambda: float = 0.95  # λ of GAE eq. 16; 0 = one-step TD, 1 = Monte Carlo
    norm_adv: bool = True  # standardize advantages over the minibatch
    clip_coef: float = 0.1  # ε of PPO eq. 7
    anneal_clip: bool = False  # anneal ε linearly to zero
    clip_vloss: bool = False  # clip V around its old value by ε; not in the paper
    vf_coef: float = 0.25  # c1 of PPO eq. 9, weight of the un-halved squared error
    ent_coef: float = 0.01  # c2 of PPO eq. 9, weight of the entropy bonus
    max_grad_norm: float = 0.5  # largest norm of the gradient; inf = off
    hidden_size: int = 512  # units of the layer after the convolutions
    orthogonal_init: bool = True  # orthogonal weights: gain √2, policy output 0.01, value output 1; else PyTorch's own

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

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
# T steps per rollout · N environments · B = T·N samples · M minibatch · A actions · (C, H, W) image


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


def clipped_surrogate(logp: Tensor, logp_old: Tensor, adv: Tensor, eps_clip: float) -> Tensor:
    """PPO eq. 7, L^CLIP(θ) = Ê[min(r_t Â_t, clip(r_t, 1-ε, 1+ε) Â_t)], to be maximized. (B,) each -> scalar."""
    assert logp.shape == logp_old.shape == adv.shape
    ratio = (logp - logp_old).exp()  # (B,)
    return torch.min(ratio * adv, ratio.clamp(1 - eps_clip, 1 + eps_clip) * adv).mean()


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """PPO eq. 9, L^VF = Ê[(V_θ(s_t) - V_t^targ)²], without ½. (B,) each -> scalar."""
    assert values.shape == returns.shape
    return (values - returns).square().mean()


def clipped_value_loss(values: Tensor, values_old: Tensor, returns: Tensor, eps_clip: float) -> Tensor:
    """Engstrom section 3, item 1, not in the PPO paper. (B,) each -> scalar.

    L^VF = Ê[max((V_θ - V^targ)², (clip(V_θ, V_old-ε, V_old+ε) - V^targ)²)]
    """
    assert values.shape == values_old.shape == returns.shape
    clipped = values_old + (values - values_old).clamp(-eps_clip, eps_clip)  # (B,)
    return torch.max((values - returns).square(), (clipped - returns).square()).mean()


def categorical_logp(logits: Tensor, actions: Tensor) -> Tensor:
    """TRPO appendix D: log π(a|s) = z_a - log Σ_b exp z_b, z the logits. (…, A), (…,) -> (…,)."""
    assert logits.shape[:-1] == actions.shape
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """S[π] of PPO eq. 9 for discrete actions, in nats: -Σ_a π(a|s) log π(a|s). (…, A) -> (…,)."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def categorical_kl(logits_old: Tensor, logits: Tensor) -> Tensor:
    """KL(π_old ‖ π) of TRPO eq. 12 for discrete actions, in nats: Σ_a π_old log(π_old / π). (…, A) each -> (…,)."""
    assert logits_old.shape == logits.shape
    logp_old = logits_old.log_softmax(-1)
    return (logp_old.exp() * (logp_old - logits.log_softmax(-1))).sum(-1)


def clip_global_norm(grads: tuple[Tensor, ...], max_norm: float) -> tuple[Tensor, Tensor]:
    """Engstrom section 3, item 9: g ← g · min(1, c / ‖g‖₂) for g, all the tensors as one flat vector; and ‖g‖₂."""
    flat = torch.cat([g.flatten() for g in grads])
    norm = flat.norm()
    return flat * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


# ---- Networks --------------------------------------------------------------------------------------------------------


class PixelStats(nn.Module):
    """Mean and std of each pixel (1, C, H, W) over all images so far, merged batch by batch (Chan et al. 1979).

    A std below one gray level counts as one; the first changes of such a pixel still reach the clip of `normalize`.
    Before the first update, mean and std are 0 and 255.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, *shape))
        self.register_buffer("var", torch.ones(1, *shape))
        self.register_buffer("inverse_std", torch.full((1, *shape), 1 / 255))
        self.register_buffer("count", torch.tensor(0))

    def update(self, images: Tensor) -> None:  # (B, C, H, W)
        images = images.float()
        mean = images.mean(0, keepdim=True)
        var = (images - mean).square().mean(0, keepdim=True)  # torch.var_mean is slower
        self.count += len(images)
        share, delta = len(images) / self.count, mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var + (1 - share) * delta.square())
        self.inverse_std.copy_(self.var.clamp(min=1).rsqrt())


class Policy(nn.Module):
    """π_θ(a|s) = softmax z_θ(s) and V_θ(s) of raw images: the network of DQN (Methods) with two heads."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.spaces.Discrete, args: Args):
        super().__init__()
        self.bf16, self.norm_obs, self.clip_obs, (channels, *size) = args.bf16, args.norm_obs, args.clip_obs, obs_shape
        self.obs_stats = PixelStats(*obs_shape)
        convolutions = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # filters, kernel, stride
        self.convs = nn.ModuleList()
        for filters, kernel, stride in convolutions:
            self.convs.append(nn.Conv2d(channels, filters, kernel, stride))
            channels, size = filters, [(x - kernel) // stride + 1 for x in size]
        self.hidden = nn.Conv2d(channels, args.hidden_size, size)  # fully connected, to 7 x 7 of 84 x 84 pixels
        self.policy_head = nn.Linear(args.hidden_size, int(action_space.n))
        self.value_head = nn.Linear(args.hidden_size, 1)
        gains = {self.policy_head: 0.01, self.value_head: 1.0}
        for layer in (*self.convs, self.hidden, *gains) if args.orthogonal_init else ():
            nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
            nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU

    def normalize(self, obs: Tensor) -> Tensor:
        """Raw images (B, C, H, W) in 0-255 -> what the network sees (Engstrom section 3, items 6 and 7)."""
        obs = obs.to(torch.float32, memory_format=torch.channels_last)
        if not self.norm_obs:
            return obs / 255
        return ((obs - self.obs_stats.mean) * self.obs_stats.inverse_std).clamp(-self.clip_obs, self.clip_obs)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Raw images (…, C, H, W) in 0-255 -> logits z (…, A) and V (…,)."""
        x = self.normalize(obs.flatten(0, -4))
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            for conv in (*self.convs, self.hidden):
                x = torch.relu(conv(x))
        x = x.float().view(*obs.shape[:-3], -1)
        return self.policy_head(x), self.value_head(x).squeeze(-1)

    @torch.inference_mode()
    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Raw images (N, C, H, W), standard Gumbel noise (N, A) -> samples argmax z + noise (N,), z (N, A), V (N,)."""
        logits, values = self(obs)
        return (logits + noise).argmax(-1), logits, values


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
    """`num_envs` ALE games, with the arguments `ale`, or environments of uint8 images (C, H, W) and discrete actions.

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
    envs.obs = envs.obs.astype(np.uint8)  # and so all that `step` returns
    return envs


# ---- Rollout ---------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T x N transitions under π_old; done = terminated | truncated."""

    obs: Tensor  # (T, N, C, H, W)  uint8
    actions: Tensor  # (T, N)
    logits: Tensor  # (T, N, A)  z of π_old
    values: Tensor  # (T, N)  V of obs
    next_values: Tensor  # (T, N)  V of the true successors, but for terminations, which have none
    rewards: Tensor  # (T, N)
    terminated: Tensor  # (T, N)
    done: Tensor  # (T, N)


def gumbel_noise(rng: torch.Generator, *shape: int) -> Tensor:
    """-log E, E ~ Exp(1): argmax z + noise is a sample of softmax z, from random numbers drawn ahead and on the CPU."""
    return -torch.empty(shape).exponential_(generator=rng).log()


def collect(envs: Envs | AtariEnvs, policy: Policy, rng: torch.Generator, frames: Tensor) -> Rollout:
    """Run π_old for T steps in each of N environments (PPO Algorithm 1), into `frames` (T, N, C, H, W)."""
    device, num_actions = frames.device, policy.policy_head.out_features
    noise = gumbel_noise(rng, *frames.shape[:2], num_actions).to(device)  # (T, N, A)

    def to_device(obs: np.ndarray) -> Tensor:
        return torch.from_numpy(obs).pin_memory() if device.type == "cuda" else torch.from_numpy(obs)

    samples, steps, cut = [], [], []
    for t, noise_t in enumerate(noise):
        obs = frames[t].copy_(to_device(envs.obs), non_blocking=True)
        samples.append(policy.act(obs, noise_t))
        next_obs, rewards, terminated, truncated, _ = envs.step(samples[-1][0].cpu().numpy())
        steps.append((rewards.astype(np.float32), terminated, terminated | truncated))
        cut += [(t, n, next_obs[n]) for n in np.flatnonzero(truncated & ~terminated)]
    actions, logits, values = (torch.stack(x) for x in zip(*samples, strict=True))
    rewards, terminated, done = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*steps, strict=True))
    next_values = torch.cat([values[1:], policy.act(torch.from_numpy(envs.obs).to(device))[2][None]])
    for t, n, final_obs in cut:
        next_values[t, n] = policy.act(torch.from_numpy(final_obs[None]).to(device))[2]
    return Rollout(frames, actions, logits, values, next_values, rewards, terminated, done)


# ---- Update ----------------------------------------------------------------------------------------------------------


class Minibatch(NamedTuple):
    """M samples of the batch; "old" is under π_old and V_old, those of the rollout."""

    obs: Tensor  # (M, C, H, W)
    actions: Tensor  # (M,)
    logits_old: Tensor  # (M, A)
    logp_old: Tensor  # (M,)
    values_old: Tensor  # (M,)
    adv: Tensor  # (M,)
    returns: Tensor  # (M,)


LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


def minibatch_gradient(policy: Policy, mb: Minibatch, eps_clip: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Clipped gradient of -(L^CLIP - c1 L^VF + c2 S), PPO eq. 9, as one vector; the figures of LOSSES."""
    logits, values = policy(mb.obs)  # (M, A), (M,)
    logp = categorical_logp(logits, mb.actions)  # (M,)
    adv = (mb.adv - mb.adv.mean()) / (mb.adv.std() + 1e-8) if args.norm_adv else mb.adv
    objective = clipped_surrogate(logp, mb.logp_old, adv, eps_clip)
    if args.clip_vloss:
        value_error = clipped_value_loss(values, mb.values_old, mb.returns, eps_clip)
    else:
        value_error = value_loss(values, mb.returns)
    entropy = categorical_entropy(logits).mean()
    loss = -(objective - args.vf_coef * value_error + args.ent_coef * entropy)
    grad, norm = clip_global_norm(torch.autograd.grad(loss, list(policy.parameters())), args.max_grad_norm)
    kl = categorical_kl(mb.logits_old, logits).mean()
    clipfrac = ((logp - mb.logp_old).exp() - 1).abs().gt(eps_clip).float().mean()
    return grad, torch.stack([-objective, value_error, entropy, kl, clipfrac, norm]).detach()


def minibatch_step(policy: Policy, adam: Adam, mb: Minibatch, eps_clip: Tensor, args: Args) -> Tensor:
    """One step of Adam on the gradient of one minibatch; the figures of LOSSES."""
    grad, figures = minibatch_gradient(policy, mb, eps_clip, args)
    adam.step(list(policy.parameters()), grad)
    return figures


def update(
    policy: Policy, adam: Adam, step: Callable, rollout: Rollout, eps_clip: float, rng: torch.Generator, args: Args
) -> dict[str, float]:
    """K epochs of minibatches over one batch (PPO Algorithm 1); `step` is minibatch_step, compiled or not.

    -> means over all minibatches.
    """
    _, _, _, values, next_values, rewards, terminated, done = rollout
    adv = gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)  # (T, N)
    returns, logp_old = adv + values, categorical_logp(rollout.logits, rollout.actions)  # (T, N)
    explained_variance = 1 - (returns - values).var() / returns.var()
    batch = Minibatch(rollout.obs, rollout.actions, rollout.logits, logp_old, values, adv, returns)
    batch, eps = [x.flatten(0, 1) for x in batch], torch.tensor(eps_clip, device=adv.device)
    total = torch.zeros(len(LOSSES), device=adv.device)
    for _ in range(args.update_epochs):
        order = torch.randperm(args.batch_size, generator=rng).to(adv.device)
        for index in order.chunk(args.num_minibatches):
            total += step(policy, adam, Minibatch(*(x.index_select(0, index) for x in batch)), eps, args)
    stats = dict(zip(LOSSES, (total / args.update_epochs / args.num_minibatches).tolist(), strict=True))
    return stats | {"explained_variance": explained_variance.item()}


# ---- Train -----------------------------------------------------------------------------------------------------------


def train(args: Args) -> dict:
    """PPO Algorithm 1 from the first iteration, or a checkpoint's, to the last, then evaluation.

    Returns steps, episodic_return (mean raw score of the last 100 training games), eval_return (mean of the
    deterministic evaluation), checkpoint, run_dir, and signal (that ended it early). Sets PyTorch's seed, and what
    glibc does with freed memory, for the process. Raises InputError for bad input, FloatingPointError for NaN or
    infinity. With `args.resume`, weights and progress come from the checkpoint, all else from `args`: start from
    `Args(**load_checkpoint(path)["args"])`.
    """
    check_args(args)
    if args.norm_adv and args.num_minibatches == args.batch_size:
        raise InputError("--num-minibatches leaves one sample in each, which can't be standardized: --no-norm-adv")
    device, saved = pick_device(args.device), load_checkpoint(args.resume, args, FIXED_ON_RESUME) if args.resume else {}
    if device.type == "cpu":
        keep_memory()
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed + 2**32)  # another stream than that of the weights
    step, episodes = saved.get("step", 0), deque(saved.get("episodes", ()), maxlen=100)  # (return, length) of the last
    ale = {**args.ale, "life_loss_info": args.life_loss_terminal}
    envs = make_envs(args.env_id, args.num_envs, (args.seed, step), saved.get("env_rng_states"), ale)
    policy = Policy(envs.obs.shape[1:], envs.envs[0].action_space, args).to(device)
    params = list(policy.parameters())
    adam = Adam(sum(param.numel() for param in params), args.learning_rate, args.adam_eps).to(device)
    modules = {"policy": policy, "adam": adam}
    for name, module in modules.items() if saved else ():
        module.load_state_dict(saved[name])
    rng.set_state(saved.get("rng", rng.get_state()))
    frames = torch.empty(args.num_steps, *envs.obs.shape, dtype=torch.uint8, device=device)  # (T, N, C, H, W)
    total_steps = args.num_iterations * args.batch_size
    with Log(args, device, step, len(adam.m)) as log:

        def checkpoint() -> str:
            state = {"step": step, "episodes": list(episodes), "env_rng_states": envs.rng_states}
            state |= {name: module.state_dict() for name, module in modules.items()} | {"rng": rng.get_state()}
            return save_checkpoint(log.run_dir, args, state)

        compiled_step = compile_or_eager(minibatch_step, args, device)
        with stop_signals() as signals:
            while step + args.batch_size <= args.total_timesteps and not signals:
                fraction = step / total_steps
                adam.lr.fill_(args.learning_rate * (1 - fraction if args.anneal_lr else 1.0))
                eps_clip = args.clip_coef * (1 - fraction if args.anneal_clip else 1.0)

                rollout = collect(envs, policy, rng, frames)
                check_finite(step, rewards=rollout.rewards)
                episodes.extend(envs.ended)
                envs.ended.clear()
                if args.clip_rewards:
                    rollout = rollout._replace(rewards=rollout.rewards.sign())

                stats = update(policy, adam, compiled_step, rollout, eps_clip, rng, args)
                losses = torch.tensor([stats[name] for name in LOSSES])
                weights = torch.cat([param.detach().flatten() for param in params])
                check_finite(step, losses=losses, parameters=weights)

                if args.norm_obs:  # after the update: π_old is the policy that acted
                    stride = args.frame_stack if isinstance(envs, AtariEnvs) else 1  # each frame is in one stack
                    policy.obs_stats.update(rollout.obs[::stride].flatten(0, 1))

                step += args.batch_size
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

SCRIPT = "ppo_atari"
CHECKS = (
    (
        "total_timesteps save_every num_envs num_steps update_epochs num_minibatches learning_rate clip_coef "
        "max_grad_norm frame_skip frame_stack max_episode_frames clip_obs hidden_size",
        lambda x: x > 0,
        "must be positive",
    ),
    ("seed eval_episodes adam_eps noop_max vf_coef ent_coef", lambda x: x >= 0, "must not be negative"),
    ("gamma gae_lambda repeat_action_probability", lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
)
FIXED_ON_EVALUATION = "frame_stack norm_obs clip_obs hidden_size"
FIXED_ON_RESUME = f"{FIXED_ON_EVALUATION} seed env_id num_envs orthogonal_init"
AUTO_DEVICE = "CUDA where there is a GPU"
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
    """Raw scores of full games, deterministic and sampled."""
    rng, seed = torch.Generator().manual_seed(args.seed), 1_000_000 + args.seed  # apart from the training seeds
    device, num_actions = policy.policy_head.weight.device, policy.policy_head.out_features

    def act(obs: np.ndarray) -> np.ndarray:
        return policy.act(torch.from_numpy(obs).to(device))[0].cpu().numpy()

    def sample(obs: np.ndarray) -> np.ndarray:
        noise = gumbel_noise(rng, len(obs), num_actions).to(device)
        return policy.act(torch.from_numpy(obs).to(device), noise)[0].cpu().numpy()

    deterministic = evaluate(act, args.env_id, args.eval_episodes, seed, args.video_dir, ale=args.ale)
    return {
        "deterministic": deterministic,
        "sampled": evaluate(sample, args.env_id, args.eval_episodes, seed, ale=args.ale),
    }


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
        return torch.zeros(1, device=name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu").device
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


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Raise InputError unless observations are uint8 images and actions discrete."""
    actions, obs, needs = env.action_space, env.observation_space, f"--env-id {env_id} has the space"
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        hint = "for continuous ones use ppo_continuous.py"
        raise InputError(f"{needs} {actions}, but this script needs discrete actions from 0: {hint}")
    if not isinstance(obs, gym.spaces.Box) or obs.dtype != np.uint8 or len(obs.shape) != 3 or min(obs.shape[1:]) < 36:
        hint = "for vectors use acer_discrete.py, for images of shape (H, W, C) the wrapper TransformObservation"
        raise InputError(
            f"{needs} {obs}, but this script needs uint8 images (C, H, W) of 36 x 36 pixels or more: {hint}"
        )


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
