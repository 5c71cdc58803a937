"""Statistics, networks, and the map from samples to actions."""

import math
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SMALL, each_continuous, make_args


def make_policy(script, low=-1.0, high=1.0, dims=2, dtype=np.float32, **flags):
    space = gym.spaces.Box(np.full(dims, low, dtype), np.full(dims, high, dtype), dtype=dtype)
    return script.Policy((3,), space, script.Args(**flags))


# ---- Statistics ----


@each_continuous
@pytest.mark.parametrize("scale, offset", [(5, 3), (1e-12, 0), (1.0, 1.7e9), (1e40, -1e41)])
def test_statistics_in_batches_are_those_of_all_rows(script, scale, offset):
    rows = offset + scale * torch.randn(1000, 4, dtype=torch.float64)
    stats = script.RunningMeanStd(4)
    for batch in rows.split(137):
        stats.update(batch)
    torch.testing.assert_close(stats.mean, rows.mean(0), rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(stats.std, rows.std(0, correction=0), rtol=1e-6, atol=0)
    assert stats.count == 1000


@each_continuous
@pytest.mark.parametrize("value", [0.0, 0.1, -1e12, 1e-200])
def test_what_never_varies_has_std_one(script, value):
    stats = script.RunningMeanStd(2)
    for _ in range(3):
        stats.update(torch.full((50, 2), value, dtype=torch.float64))
    assert stats.std.tolist() == [1.0, 1.0]


@each_continuous
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


@each_continuous
def test_observations_are_normalized_and_clipped(script):
    policy = make_policy(script)
    policy.obs_stats.update(torch.tensor([[0.0, 1.0, 2.0], [2.0, 5.0, 2.0]]))
    normalized = policy.normalize(torch.tensor([2.0, 1.0, 2.0]))
    torch.testing.assert_close(normalized, torch.tensor([1.0, -1.0, 0.0]))
    assert normalized.dtype == torch.float32
    assert policy.normalize(torch.full((3,), 1e9)).tolist() == [10.0, 10.0, 10.0]


@each_continuous
def test_without_normalizing_nothing_is_clipped(script):
    policy = make_policy(script, norm_obs=False)
    policy.obs_stats.update(torch.randn(50, 3))
    obs = torch.tensor([1e9, -3.0, 0.1])
    assert torch.equal(policy.normalize(obs), obs)
    args = make_args(script, norm_reward=False)
    rewards = torch.full((4, 2), 500.0, dtype=torch.float64)
    never = torch.zeros(4, 2, dtype=torch.bool)
    raw = script.Rollout(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), rewards, rewards, never, never)
    ready, _ = script.prepare(raw, policy, script.Critic((3,), args), torch.zeros(2), 0.9, args)
    assert torch.equal(ready.rewards, rewards.float())


@each_continuous
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


@each_continuous
def test_act_takes_one_observation_or_a_batch_of_any_type(script):
    policy = make_policy(script)
    policy.obs_stats.update(torch.randn(50, 3))
    obs = np.arange(6).reshape(2, 3)
    batch = policy.act(obs)
    assert batch.shape == (2, 2)
    for dtype in (np.float16, np.float32, np.float64, np.int64, np.uint8):
        np.testing.assert_array_equal(policy.act(obs.astype(dtype)), batch)
    frozen = obs.astype(np.float64)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(policy.act(frozen), batch)
    np.testing.assert_allclose(policy.act(obs[0].tolist()), batch[0], rtol=1e-5)


@each_continuous
def test_samples_have_the_mean_and_the_std_of_the_distribution(script):
    policy = make_policy(script, log_std_init=-0.5, log_std_final=None)
    obs = np.ones((20_000, 3))
    samples = policy.sample(obs, rng=torch.Generator().manual_seed(0))
    mean, log_std = policy(torch.ones(3))
    torch.testing.assert_close(samples.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(samples.std(0), log_std.exp(), atol=0.02, rtol=0)
    again = policy.sample(obs, rng=torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)
    np.testing.assert_allclose(policy.act(obs)[0], mean.detach().numpy(), rtol=1e-6)


@each_continuous
def test_sigma_is_annealed_on_a_line_or_learned(script):
    policy = make_policy(script, log_std_init=-1.0, log_std_final=-3.0)
    assert "log_std" not in dict(policy.named_parameters())
    for fraction in (0.0, 0.25, 1.0):
        policy.anneal(fraction)
        std = (1 - fraction) * math.exp(-1) + fraction * math.exp(-3)
        torch.testing.assert_close(policy(torch.zeros(3))[1].exp(), torch.full((2,), std))
    policy = make_policy(script, log_std_final=None)
    policy.anneal(0.5)
    assert dict(policy.named_parameters())["log_std"].tolist() == [-1.0, -1.0]


# ---- Networks ----


@each_continuous
def test_initialization_and_size(script):
    args = script.Args()
    policy, critic = make_policy(script, log_std_final=-3.0), script.Critic((3,), args)
    sizes = {"policy": (3 * 64 + 64) + (64 * 64 + 64) + (64 * 2 + 2)}
    sizes["critic"] = (3 * 64 + 64) + (64 * 64 + 64) + (64 + 1)
    assert sum(p.numel() for p in policy.parameters()) == sizes["policy"]
    learned = make_policy(script, log_std_final=None)
    assert sum(p.numel() for p in learned.parameters()) == sizes["policy"] + 2
    assert sum(p.numel() for p in critic.parameters()) == sizes["critic"]
    for net, last_gain in ((policy.mean_net, 0.01), (critic.value_net, 1.0)):
        layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
            singular = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(singular, torch.full_like(singular, gain))
            assert not layer.bias.any()
    plain = make_policy(script, orthogonal_init=False).mean_net[2].weight
    assert not torch.allclose(torch.linalg.svdvals(plain), torch.tensor(2**0.5))


@each_continuous
def test_networks_are_tanh_networks_of_these_sizes(script):
    net = script.mlp((3, 7, 5, 2), 0.01, orthogonal=False)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [net[i].out_features for i in (0, 2, 4)] == [7, 5, 2]
    x = torch.randn(4, 3)
    hidden = torch.tanh(net[2](torch.tanh(net[0](x))))
    torch.testing.assert_close(net(x), net[4](hidden))


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


@each_continuous
@pytest.mark.parametrize("log_std_final", [None, -3.0])
def test_a_sigma_that_depends_on_the_state_is_a_patch_of_policy_alone(
    script, tmp_path, log_std_final
):
    source = Path(script.__file__).read_text(encoding="utf-8")
    start, end = source.index("class Policy("), source.index("class Critic(")
    policy = source[start:end]
    for old, new in STATE_DEPENDENT_SIGMA:
        assert policy.count(old) == 1
        policy = policy.replace(old, new)
    module = types.ModuleType("patched")
    sys.modules["patched"] = module
    exec(compile(source[:start] + policy + source[end:], "patched", "exec"), vars(module))
    args = module.Args(**SMALL, total_timesteps=192, log_std_final=log_std_final)
    state = {}
    for metrics in module.ppo(args, state):
        assert math.isfinite(metrics["kl"]) and metrics["kl"] > 0
    net = module.Policy((3,), gym.make("Pendulum-v1").action_space, args)
    net.load_state_dict(state["policy"])
    _, log_std = net(torch.randn(5, 3))
    assert log_std.shape == (5, 1) and len(log_std.unique()) == 5
    del sys.modules["patched"]
