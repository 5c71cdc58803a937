"""Statistics, networks, and the map from samples to actions."""

import math
import sys
import types
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    CONTINUOUS,
    DISCRETE,
    double_policy,
    draw_noise,
    each_continuous,
    each_discrete,
    each_script,
    each_with,
    hessian_of_mean_kl,
    make_args,
)

import ppo_atari
import ppo_continuous
import trpo_continuous

FRAMES = (4, 84, 84)


def make_policy(script, low=-1.0, high=1.0, dims=2, dtype=np.float32, **flags):
    """Policy of observations of three numbers, with actions in a Box or, if discrete, `dims`."""
    if script not in CONTINUOUS:
        return make_actor_critic(script, (3,), dims, **flags)
    space = gym.spaces.Box(np.full(dims, low, dtype), np.full(dims, high, dtype), dtype=dtype)
    return script.Policy((3,), space, script.Args(**flags))


def make_actor_critic(script, obs_shape, num_actions, **flags):
    args = script.fill_defaults(script.Args(**flags), images=len(obs_shape) == 3)
    return script.ActorCritic(obs_shape, num_actions, args)


def learned_sigma(script):
    """Flags with which σ is learned."""
    return {"log_std_final": None} if script in CONTINUOUS else {}


def random_frames(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def logits_of(script, policy, obs):
    """Logits of π, up to a constant in each state."""
    first, _ = policy(obs)
    return first if script is ppo_atari else first.log()


# ---- Statistics ----


@each_with("RunningMeanStd")
@pytest.mark.parametrize("scale, offset", [(5, 3), (1e-12, 0), (1.0, 1.7e9), (1e40, -1e41)])
def test_statistics_in_batches_are_those_of_all_rows(script, scale, offset):
    rows = offset + scale * torch.randn(1000, 4, dtype=torch.float64)
    stats = script.RunningMeanStd(4)
    for batch in rows.split(137):
        stats.update(batch)
    torch.testing.assert_close(stats.mean, rows.mean(0), rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(stats.std, rows.std(0, correction=0), rtol=1e-6, atol=0)
    assert stats.count == 1000


@each_with("RunningMeanStd")
@pytest.mark.parametrize("value", [0.0, 0.1, -1e12, 1e-200])
def test_what_never_varies_has_std_one(script, value):
    stats = script.RunningMeanStd(2)
    for _ in range(3):
        stats.update(torch.full((50, 2), value, dtype=torch.float64))
    assert stats.std.tolist() == [1.0, 1.0]


@each_with("RunningMeanStd")
def test_statistics_stay_float64_on_the_cpu_and_are_saved(script):
    policy = make_policy(script)
    policy.obs_stats.update(torch.randn(50, 3))
    policy.to(torch.float16).to("meta")
    assert policy.obs_stats.mean.dtype == policy.obs_stats.std.dtype == torch.float64
    assert policy.obs_stats.mean.device.type == "cpu"
    other = script.RunningMeanStd(3)
    other.load_state_dict(policy.obs_stats.state_dict())
    for name in ("count", "mean", "var", "std"):
        assert np.array_equal(getattr(other, name), getattr(policy.obs_stats, name))


@each_with("RunningMeanStd")
def test_observations_are_normalized_and_clipped(script):
    policy = make_policy(script)
    policy.obs_stats.update(torch.tensor([[0.0, 1.0, 2.0], [2.0, 5.0, 2.0]]))
    normalized = policy.normalize(torch.tensor([2.0, 1.0, 2.0]))
    torch.testing.assert_close(normalized, torch.tensor([1.0, -1.0, 0.0]))
    assert normalized.dtype == torch.float32
    assert policy.normalize(torch.full((3,), 1e9)).tolist() == [10.0, 10.0, 10.0]


@each_with("RunningMeanStd")
def test_without_normalizing_nothing_is_clipped(script):
    policy = make_policy(script, norm_obs=False)
    policy.obs_stats.update(torch.randn(50, 3))
    obs = torch.tensor([1e9, -3.0, 0.1])
    assert torch.equal(policy.normalize(obs), obs)
    args = make_args(script, norm_reward=False)
    if script is ppo_atari:
        args = script.fill_defaults(args, images=False)
    rewards = torch.full((4, 2), 500.0, dtype=torch.float64)
    never = torch.zeros(4, 2, dtype=torch.bool)
    resets = [never] if script is ppo_atari else []
    obs = torch.zeros(4, 2, 3)
    raw = script.Rollout(obs, obs, rewards, rewards, never, never, *resets)
    networks = [policy]
    if script in CONTINUOUS:
        networks.append(script.Critic((3,), args))
    ready, _ = script.prepare(raw, *networks, torch.zeros(2), 0.9, args)
    assert torch.equal(ready.rewards, rewards.float())


@each_with("RunningMeanStd")
def test_differences_of_tiny_and_of_far_observations_reach_the_networks(script):
    for scale, offset in ((1e-6, 0.0), (1.0, 1.7e9), (1e-30, 0.0), (1e30, 0.0)):
        policy = make_policy(script)
        rows = offset + scale * torch.randn(500, 3, dtype=torch.float64)
        policy.obs_stats.update(rows)
        inputs = policy.normalize(rows)
        torch.testing.assert_close(inputs.std(0), torch.ones(3), rtol=1e-2, atol=0)


# ---- Actions ----

F32, F64 = np.finfo(np.float32).max, np.finfo(np.float64).max


@each_continuous
@pytest.mark.parametrize(
    "low, high, sample, expected",
    [
        (-0.4, 0.4, 0.5, 0.2),
        (0.0, 10.0, -3.0, 0.0),
        (0.0, 10.0, 0.0, 5.0),
        (-math.inf, math.inf, 3.0, 3.0),
        (-1.0, math.inf, 3.0, 3.0),
        (-1.0, math.inf, -3.0, -1.0),
        (-F32, F32, 3.0, 3.0),
        (-1e30, 2.0, 3.0, 2.0),
    ],
)
def test_samples_are_mapped_to_the_bounds(script, low, high, sample, expected):
    policy = make_policy(script, low, high)
    action = policy.to_env(torch.full((1, 2), sample))
    np.testing.assert_allclose(action, np.full((1, 2), expected), atol=1e-6)
    assert action.dtype == np.float32


@each_continuous
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("low, high", [(-0.1, 0.1), (1e3, 1e3 + 1), (-F64, F64)])
def test_actions_lie_in_the_action_space(script, low, high, dtype):
    if high == F64:
        low, high = np.finfo(dtype).min, np.finfo(dtype).max
    policy = make_policy(script, low, high, dtype=dtype)
    space = gym.spaces.Box(dtype(low), dtype(high), (2,), dtype=dtype)
    for sample in (-5.0, -1.0, -0.3, 0.0, 1.0, 5.0):
        action = policy.to_env(torch.full((2,), sample))
        assert space.contains(action) and np.isfinite(action).all()


@each_script
def test_act_takes_one_observation_or_a_batch_of_any_type(script):
    policy = make_policy(script)
    if hasattr(script, "RunningMeanStd"):
        policy.obs_stats.update(torch.randn(50, 3))
    obs = np.arange(6).reshape(2, 3)
    batch = policy.act(obs)
    assert batch.shape == ((2, 2) if script in CONTINUOUS else (2,))
    for dtype in (np.float16, np.float32, np.float64, np.int64, np.uint8):
        np.testing.assert_array_equal(policy.act(obs.astype(dtype)), batch)
    np.testing.assert_allclose(policy.act(obs[0].tolist()), batch[0], rtol=1e-5)


@each_discrete
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_act_takes_one_image_or_a_batch_of_any_type(script, dtype):
    torch.manual_seed(0)
    policy = make_actor_critic(script, FRAMES, 6, hidden_sizes=(32,))
    obs = random_frames(20, *FRAMES).numpy()
    for i in range(20):
        obs[i, :, : 4 * i] = 0  # so that they differ in more than noise
    batch = policy.act(obs)
    assert batch.shape == (20,) and len(set(batch.tolist())) > 1
    np.testing.assert_array_equal(policy.act(obs.astype(dtype)), batch)
    one = policy.act(obs[3].astype(dtype))
    assert one.shape == () and one == batch[3]


VECTORS_AND_IMAGES = [(script, (3,)) for script in CONTINUOUS + DISCRETE]
VECTORS_AND_IMAGES += [(script, FRAMES) for script in DISCRETE]


@pytest.mark.parametrize("script, obs_shape", VECTORS_AND_IMAGES)
def test_act_takes_a_read_only_array_without_a_warning(script, obs_shape):
    if obs_shape == FRAMES:
        policy = make_actor_critic(script, FRAMES, 6, hidden_sizes=(32,))
    else:
        policy = make_policy(script)
    obs = np.ones(obs_shape, np.uint8 if obs_shape == FRAMES else np.float32)
    frozen = obs.copy()
    frozen.flags.writeable = False
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            action = policy.act(frozen)
    finally:
        torch.set_warn_always(False)
    np.testing.assert_array_equal(action, policy.act(obs))


@each_script
def test_act_refuses_observations_of_another_size(script):
    policy = make_policy(script)
    for shape in ((4,), (5, 2), ()):
        with pytest.raises(AssertionError):
            policy.act(np.zeros(shape, np.float32))


@each_discrete
def test_act_refuses_images_of_another_shape(script):
    policy = make_actor_critic(script, FRAMES, 6, hidden_sizes=(32,))
    for shape in ((84, 84, 4), (5, 3, 84, 84), (84, 84)):
        with pytest.raises(AssertionError):
            policy.act(np.zeros(shape, np.uint8))


@each_discrete
def test_act_takes_the_most_probable_action_or_a_sample(script):
    policy = make_policy(script, dims=4, orthogonal_init=False)
    obs = np.random.default_rng(0).normal(size=(100, 3))
    logits = logits_of(script, policy, torch.from_numpy(obs))
    np.testing.assert_array_equal(policy.act(obs), logits.argmax(-1).numpy())
    sampled = policy.act(obs, deterministic=False, rng=torch.Generator().manual_seed(0))
    expected = policy.sample(obs, draw_noise(policy, 1, 100)[0])
    np.testing.assert_array_equal(sampled, expected.numpy())
    assert (sampled != policy.act(obs)).any()
    for action in (sampled[0], policy.act(obs[0]), policy.act(obs[0], deterministic=False)):
        assert gym.spaces.Discrete(4).contains(action)


@each_discrete
def test_samples_have_the_probabilities_of_the_softmax(script):
    policy = make_policy(script, dims=3)
    with torch.no_grad():
        policy.policy_head[-1].weight.zero_()
        policy.policy_head[-1].bias.copy_(torch.tensor([0.0, 1.0, -2.0]))
    samples = policy.sample(np.ones((100_000, 3)), draw_noise(policy, 1, 100_000)[0])
    frequencies = samples.bincount(minlength=3) / 100_000
    expected = torch.tensor([0.0, 1.0, -2.0]).softmax(-1)
    torch.testing.assert_close(frequencies, expected, atol=0.005, rtol=0)


@each_continuous
def test_samples_have_the_mean_and_the_std_of_the_distribution(script):
    policy = make_policy(script, log_std_init=-0.5, **learned_sigma(script))
    obs = np.ones((20_000, 3))
    samples = policy.sample(obs, draw_noise(policy, 1, len(obs))[0])
    mean, log_std = policy(torch.ones(3))
    torch.testing.assert_close(samples.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(samples.std(0), log_std.exp(), atol=0.02, rtol=0)
    again = policy.act(obs, deterministic=False, rng=torch.Generator().manual_seed(0))
    expected = policy.to_env(samples)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_allclose(policy.act(obs)[0], mean.detach().numpy(), rtol=1e-6, atol=1e-6)


@each_continuous
def test_sigma_is_annealed_on_a_line(script):
    """A line in σ in PPO, in log σ in TRPO."""
    policy = make_policy(script, log_std_init=-1.0, log_std_final=-3.0)
    assert "log_std" not in dict(policy.named_parameters())
    for fraction in (0.0, 0.25, 1.0):
        policy.anneal(fraction)
        std = (1 - fraction) * math.exp(-1) + fraction * math.exp(-3)
        if script is trpo_continuous:
            std = math.exp(-1 - 2 * fraction)
        torch.testing.assert_close(policy(torch.zeros(3))[1].exp(), torch.full((2,), std))


@each_continuous
def test_a_learned_sigma_is_not_annealed(script):
    policy = make_policy(script, log_std_init=-1.0, log_std_final=None)
    policy.anneal(0.5)
    assert dict(policy.named_parameters())["log_std"].tolist() == [-1.0, -1.0]


@each_continuous
def test_a_learned_sigma_is_a_parameter(script):
    policy = make_policy(script, log_std_init=-0.7, **learned_sigma(script))
    log_std = dict(policy.named_parameters())["log_std"]
    assert log_std.tolist() == pytest.approx([-0.7, -0.7])
    assert policy(torch.zeros(3))[1].tolist() == log_std.tolist()


# ---- Networks ----


@each_continuous
def test_initialization_and_size(script):
    args = script.Args()
    policy = make_policy(script, **learned_sigma(script))
    critic = script.Critic((3,), args)
    sizes = {"policy": (3 * 64 + 64) + (64 * 64 + 64) + (64 * 2 + 2)}
    sizes["critic"] = (3 * 64 + 64) + (64 * 64 + 64) + (64 + 1)
    assert sum(p.numel() for p in policy.parameters()) == sizes["policy"] + 2
    annealed = make_policy(script, log_std_final=-3.0)
    assert sum(p.numel() for p in annealed.parameters()) == sizes["policy"]
    assert sum(p.numel() for p in critic.parameters()) == sizes["critic"]
    for net, last_gain in ((policy.mean_net, 0.01), (critic.value_net, 1.0)):
        layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
            singular = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(singular, torch.full_like(singular, gain))
            assert not layer.bias.any()
    plain = make_policy(script, orthogonal_init=False).mean_net[2].weight
    assert not torch.allclose(torch.linalg.svdvals(plain), torch.tensor(2**0.5))


@each_script
def test_networks_are_tanh_networks_of_these_sizes(script):
    net = script.mlp((3, 7, 5, 2), 0.01, orthogonal=False)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [net[i].out_features for i in (0, 2, 4)] == [7, 5, 2]
    x = torch.randn(4, 3)
    hidden = torch.tanh(net[2](torch.tanh(net[0](x))))
    torch.testing.assert_close(net(x), net[4](hidden))


@each_discrete
def test_the_network_for_images_has_the_size_and_the_gains_of_dqn(script):
    policy = make_actor_critic(script, FRAMES, 6)
    convolutions = (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64
    trunk = convolutions + (64 * 7 * 7 + 1) * 512  # 84 -> 20 -> 9 -> 7 pixels
    outputs = 1 if script is ppo_atari else 6
    size = sum(p.numel() for p in policy.parameters())
    assert size == trunk + 513 * 6 + 513 * outputs
    heads = {policy.policy_head[0]: 0.01, list(policy.children())[-1][0]: 1.0}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [layer for layer in policy.modules() if isinstance(layer, kinds)]
    assert len(layers) == 6
    for layer in layers:
        weight = layer.weight.flatten(1)
        gram = weight @ weight.T
        expected = heads.get(layer, math.sqrt(2)) ** 2 * torch.eye(len(gram))
        torch.testing.assert_close(gram, expected, atol=1e-5, rtol=1e-5)
        assert not layer.bias.any()


@each_discrete
def test_the_networks_for_vectors_have_these_sizes_and_gains(script):
    policy = make_actor_critic(script, (3,), 4, hidden_sizes=(8, 5))
    trunk = (3 + 1) * 8 + (8 + 1) * 5
    expected = trunk + 6 * 4 + 6 if script is ppo_atari else 2 * (trunk + 6 * 4)
    assert sum(p.numel() for p in policy.parameters()) == expected
    heads = {policy.policy_head[0]: 0.01, list(policy.children())[-1][0]: 1.0}
    layers = [layer for layer in policy.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == (4 if script is ppo_atari else 6)
    for layer in layers:
        singular = torch.linalg.svdvals(layer.weight)
        gain = heads.get(layer, math.sqrt(2))
        torch.testing.assert_close(singular, torch.full_like(singular, gain))
        assert not layer.bias.any()


@each_discrete
def test_the_network_for_images_computes_what_functions_of_torch_do(script):
    policy = make_actor_critic(script, FRAMES, 6, orthogonal_init=False)
    frames = random_frames(3, 5, *FRAMES)
    parameters = list(policy.parameters())
    x = frames.flatten(0, 1).double().div(255).float()
    for i, stride in enumerate((4, 2, 1)):
        x = torch.conv2d(x, parameters[2 * i], parameters[2 * i + 1], stride).relu()
    x = torch.nn.functional.linear(x.flatten(1), *parameters[6:8]).relu()
    first = torch.nn.functional.linear(x, *parameters[8:10]).view(3, 5, 6)
    second = torch.nn.functional.linear(x, *parameters[10:12])
    second = second.view(3, 5) if script is ppo_atari else second.view(3, 5, 6)
    logits = logits_of(script, policy, frames).log_softmax(-1)
    torch.testing.assert_close(logits, first.log_softmax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(policy(frames)[1], second, atol=1e-5, rtol=1e-4)
    assert logits.std((0, 1)).min() > 1e-4 and second.std() > 1e-4  # it sees the frames


@each_discrete
def test_the_networks_for_vectors_compute_what_functions_of_torch_do(script):
    policy = make_actor_critic(script, (3,), 4, orthogonal_init=False, hidden_sizes=(8, 5))
    obs = torch.randn(7, 2, 3)
    x = obs
    for linear in [layer for layer in policy.trunk.modules() if isinstance(layer, torch.nn.Linear)]:
        x = torch.tanh(x @ linear.weight.T + linear.bias)
    logits = policy.policy_head[0](x).log_softmax(-1)
    torch.testing.assert_close(logits_of(script, policy, obs).log_softmax(-1), logits)
    first, second = policy(obs)
    if script is ppo_atari:
        torch.testing.assert_close(second, policy.value_head[0](x).squeeze(-1))
        assert second.shape == (7, 2)
        return
    torch.testing.assert_close(first.sum(-1), torch.ones(7, 2))
    x = obs
    for linear in (policy.q_trunk[0][0], policy.q_trunk[0][2]):
        x = torch.tanh(x @ linear.weight.T + linear.bias)
    torch.testing.assert_close(second, policy.q_head[0](x))
    assert second.shape == (7, 2, 4)


@each_with("nature_cnn")
def test_the_convolutions_of_dqn(script):
    net = script.nature_cnn(FRAMES, (512,), orthogonal=False)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Conv2d", "ReLU"] * 3 + ["Flatten", "Linear", "ReLU"]
    convolutions = [layer for layer in net if isinstance(layer, torch.nn.Conv2d)]
    shapes = [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions]
    assert shapes == [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
    assert net(torch.rand(2, *FRAMES)).shape == (2, 512)
    deeper = script.nature_cnn((1, 40, 50), (16, 8), orthogonal=True)
    assert deeper(torch.rand(3, 1, 40, 50)).shape == (3, 8)


@each_discrete
@pytest.mark.parametrize("size", [(36, 36), (84, 61), (210, 160)])
def test_images_may_have_any_size_from_36_pixels_on(script, size):
    policy = make_actor_critic(script, (3, *size), 5, hidden_sizes=(16, 8))
    assert policy.trunk[-2].out_features == 8 and policy.trunk[-4].out_features == 16
    assert policy.act(random_frames(2, 3, *size).numpy()).shape == (2,)


def test_bf16_is_close_and_leaves_parameters_in_float32():
    policy = make_actor_critic(ppo_atari, FRAMES, 6, bf16=True, orthogonal_init=False)
    frames = random_frames(5, *FRAMES)
    rough = policy(frames)
    policy.bf16 = False
    for x, exact in zip(rough, policy(frames), strict=True):
        assert x.dtype == torch.float32 and 0 < (x - exact).abs().max() < 0.01
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


class Trunk(torch.nn.Module):
    """Keeps what the convolutions get."""

    def forward(self, x):
        self.inputs = x
        return torch.zeros(len(x), 32)


def normalized_pixels(policy, images):
    policy.trunk = Trunk()
    policy(images)
    return policy.trunk.inputs


def test_pixels_are_normalized_by_their_statistics_and_clipped():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(50, 2, 40, 40), dtype=np.uint8)
    images[:, 0] = 7  # never changes
    images[:, 1, 0] = 7
    images[0, 1, 0] = 8  # hardly ever
    frames = torch.from_numpy(images)
    plain = torch.from_numpy(images / np.float32(255))
    policy = make_actor_critic(ppo_atari, (2, 40, 40), 3, hidden_sizes=(32,))
    torch.testing.assert_close(normalized_pixels(policy, frames), plain)  # of no statistics
    for batch in frames.split(20):
        policy.update_stats(batch)
    expected = (images - images.mean(0)) / np.maximum(images.std(0), 1.0)
    found = normalized_pixels(policy, frames)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    for level, limit in ((255, 5.0), (0, -5.0)):
        image = torch.full((1, 2, 40, 40), level, dtype=torch.uint8)
        assert normalized_pixels(policy, image)[0, 0].unique().tolist() == [limit]

    without = make_actor_critic(ppo_atari, (2, 40, 40), 3, hidden_sizes=(32,), norm_obs=False)
    without.update_stats(frames)
    torch.testing.assert_close(normalized_pixels(without, frames), plain)
    assert without.obs_stats.count == 0


def test_pixel_statistics_are_saved():
    frames = random_frames(50, 1, 40, 40)
    policy = make_actor_critic(ppo_atari, (1, 40, 40), 3, hidden_sizes=(32,))
    policy.update_stats(frames)
    other = make_actor_critic(ppo_atari, (1, 40, 40), 3, hidden_sizes=(32,))
    other.load_state_dict(policy.state_dict())
    for x, expected in zip(other(frames), policy(frames), strict=True):
        assert torch.equal(x, expected)
    for net in (policy, other):
        net.update_stats(frames // 2)  # goes on from the 50 images before
    assert torch.equal(other.pixel_mean, policy.pixel_mean) and other.obs_stats.count == 100
    both = torch.cat([frames, frames // 2]).double()
    torch.testing.assert_close(other.pixel_mean.double(), both.mean(0), rtol=1e-5, atol=0)


@each_discrete
@pytest.mark.parametrize("obs_shape", [(3,), FRAMES])
def test_an_actor_critic_exports_with_a_batch_of_any_size(script, obs_shape):
    policy = make_actor_critic(script, obs_shape, 4, orthogonal_init=False)
    example = torch.randn(5, 3)
    obs = torch.randn(9, 3)
    if len(obs_shape) == 3:
        example = random_frames(5, *obs_shape)
        obs = random_frames(9, *obs_shape, seed=1)
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(policy, (example,), dynamic_shapes=sizes)
    torch.testing.assert_close(exported.module()(obs), policy(obs))


@each_continuous
def test_a_policy_exports_with_a_batch_of_any_size(script):
    policy = make_policy(script)
    policy.obs_stats.update(5 + 3 * torch.randn(50, 3))
    with torch.no_grad():
        policy.mean_net[-1].weight.normal_()
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(policy, (torch.randn(5, 3),), dynamic_shapes=sizes)
    obs = 5 + 3 * torch.randn(9, 3)
    torch.testing.assert_close(exported.module()(obs), policy(obs))


@each_continuous
def test_a_policy_exports_to_onnx(script, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    policy = make_policy(script)
    policy.obs_stats.update(5 + 3 * torch.randn(50, 3))
    sizes = ({0: torch.export.Dim("batch")},)
    path, example = tmp_path / "policy.onnx", torch.randn(5, 3)
    torch.onnx.export(policy, (example,), path, dynamo=True, dynamic_shapes=sizes)
    session = runtime.InferenceSession(path)
    obs = torch.randn(9, 3)
    mean, _ = session.run(None, {session.get_inputs()[0].name: obs.numpy()})
    np.testing.assert_allclose(mean, policy(obs)[0].detach().numpy(), rtol=1e-4, atol=1e-5)


STATE_DEPENDENT_SIGMA = (
    ("sizes = (*obs_shape, *args.hidden_sizes, action_dim)",
     "sizes = (*obs_shape, *args.hidden_sizes, 2 * action_dim)"),
    ("return self.mean_net(inputs), self.log_std",
     "mean, spread = self.mean_net(inputs).chunk(2, -1)\n"
     "        return mean, self.log_std + spread"),
)  # fmt: skip


@pytest.fixture
def with_state_dependent_sigma():
    """Return a script as a module whose Policy is changed by STATE_DEPENDENT_SIGMA."""

    def patch(script):
        source = Path(script.__file__).read_text(encoding="utf-8")
        start = source.index("class Policy(")
        end = source.index("class Critic(")
        policy = source[start:end]
        for old, new in STATE_DEPENDENT_SIGMA:
            assert policy.count(old) == 1
            policy = policy.replace(old, new)
        module = types.ModuleType("patched")
        sys.modules["patched"] = module
        exec(compile(source[:start] + policy + source[end:], "patched", "exec"), vars(module))
        return module

    yield patch
    del sys.modules["patched"]


@pytest.mark.parametrize(
    "script, flags",
    [
        (ppo_continuous, {"log_std_final": None}),
        (ppo_continuous, {"log_std_final": -3.0}),
        (trpo_continuous, {"log_std_final": None}),
        (trpo_continuous, {"log_std_final": -3.0}),
    ],
)
def test_a_sigma_that_depends_on_the_state_is_a_patch_of_policy_alone(
    script, flags, with_state_dependent_sigma
):
    module = with_state_dependent_sigma(script)
    args = make_args(module, total_timesteps=192, **flags)
    state = {}
    for metrics in module.GENERATOR(args, state):
        kl = metrics["kl" if script is ppo_continuous else "kl_iteration"]
        assert math.isfinite(kl) and kl > 0
    net = module.Policy((3,), gym.make("Pendulum-v1").action_space, args)
    net.load_state_dict(state["policy"])
    _, log_std = net(torch.randn(5, 3))
    assert log_std.shape == (5, 1) and len(log_std.unique()) == 5


def test_the_fisher_product_allows_for_a_sigma_that_depends_on_the_state(
    with_state_dependent_sigma,
):
    module = with_state_dependent_sigma(trpo_continuous)
    policy = double_policy(module)
    inputs = torch.randn(100, 3, dtype=torch.float64)
    _, log_std = policy.mean_and_log_std(inputs)
    assert log_std.std(0).min() > 0.01
    fisher = hessian_of_mean_kl(policy, inputs)
    product = module.fisher_operator(policy, inputs, 0.1)
    for vector in torch.randn(3, len(fisher), dtype=torch.float64):
        expected = fisher @ vector + 0.1 * vector
        torch.testing.assert_close(product(vector), expected, rtol=1e-9, atol=1e-11)
