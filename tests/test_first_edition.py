"""What trpo_continuous.py, ppo_atari.py and acer_discrete.py share, on the first or on the script that has it."""

import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
from conftest import Chain, PerfectCritic, fingerprint, random_ends

import ppo_atari
import trpo_continuous as ppo
from trpo_continuous import Args, train

SCRIPT = Path(ppo.__file__)
SMALL = {"num_envs": 2, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2, "compile": "off", "eval_episodes": 0}

each_script = pytest.mark.parametrize("script", [ppo], ids=lambda script: script.SCRIPT)


def make_parts(script, env_id="Pendulum-v1", **flags):
    """Networks with statistics from one rollout, and the next rollout; the generator they drew from, the arguments."""
    args = script.Args(**{**SMALL, "env_id": env_id, **flags})
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(0)
    envs = script.make_envs(args.env_id, args.num_envs, args.seed)
    policy = script.Policy(envs.obs.shape[1:], envs.envs[0].action_space, args)
    critic = script.Critic(envs.obs.shape[1], args)
    policy.obs_stats.update(script.collect(envs, policy, rng, args.num_steps).obs.flatten(0, 1))
    return policy, critic, script.collect(envs, policy, rng, args.num_steps), rng, args


# ---- Equations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 100])
def test_gae_eq16_linear_recursion(steps):
    x, decay = torch.randn(2, steps, 3, dtype=torch.float64).unbind()
    y = torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(steps)):
        y = x[t] + decay[t] * y
        torch.testing.assert_close(ppo.linear_recursion(x, decay)[t], y)


@pytest.mark.parametrize(
    "ratio, adv, value, clipped",
    [
        (1.1, 2.0, 2.2, False),
        (1.1, -2.0, -2.2, False),
        (0.7, 2.0, 1.4, False),
        (0.7, -2.0, -1.6, True),
        (1.3, 2.0, 2.4, True),
        (1.3, -2.0, -2.6, False),
    ],
)
def test_ppo_eq7_clipped_surrogate_six_cases(ratio, adv, value, clipped):
    logp_old = torch.tensor([-1.0], dtype=torch.float64)
    logp = (logp_old + math.log(ratio)).requires_grad_()
    objective = ppo_atari.clipped_surrogate(logp, logp_old, torch.tensor([adv], dtype=torch.float64), 0.2)
    (gradient,) = torch.autograd.grad(objective, logp)
    assert objective.item() == pytest.approx(value)
    if clipped:
        assert gradient.item() == 0.0
    else:
        assert gradient.item() == pytest.approx(ratio * adv)


def test_ppo_eq6_importance_surrogate():
    logp, logp_old, adv = torch.randn(3, 50, dtype=torch.float64).unbind()
    expected = np.mean(np.exp(logp.numpy()) / np.exp(logp_old.numpy()) * adv.numpy())
    assert ppo.importance_surrogate(logp, logp_old, adv).item() == pytest.approx(expected)


def test_engstrom_item2_discounted_sums_over_two_rollouts():
    rewards, (done, _) = torch.randn(20, 3, dtype=torch.float64), random_ends(20, 3)
    expected, total = [], np.zeros(3)
    for reward, end in zip(rewards.numpy(), done.numpy(), strict=True):
        total = 0.9 * total + reward
        expected.append(total)
        total = np.where(end, 0.0, total)
    first, start = ppo.discounted_sums(rewards[:7], done[:7], torch.zeros(3, dtype=torch.float64), 0.9)
    second, _ = ppo.discounted_sums(rewards[7:], done[7:], start, 0.9)
    torch.testing.assert_close(torch.cat([first, second]), torch.from_numpy(np.stack(expected)))


def test_equations_refuse_shapes_that_would_broadcast():
    flat, column = torch.zeros(4), torch.zeros(4, 1)
    for call in (
        lambda: ppo_atari.clipped_surrogate(flat, column, flat, 0.2),
        lambda: ppo.importance_surrogate(flat, flat, column),
        lambda: ppo.value_loss(flat, column),
        lambda: ppo_atari.clipped_value_loss(flat, flat, column, 0.2),
        lambda: ppo.gae(column, flat, flat, flat.bool(), flat.bool(), 0.9, 0.9),
    ):
        with pytest.raises(AssertionError):
            call()


# ---- Networks --------------------------------------------------------------------------------------------------------


def test_running_statistics_in_batches_are_those_of_all_rows():
    rows = 3 + 5 * torch.randn(1000, 4)
    stats = ppo.RunningMeanStd(4)
    for batch in rows.split(137):
        stats.update(batch)
    torch.testing.assert_close(stats.mean, rows.mean(0))
    torch.testing.assert_close(stats.var, rows.var(0, correction=0))
    assert stats.count == 1000


def make_policy(low=-1.0, high=1.0, dims=2, **flags):
    space = gym.spaces.Box(np.full(dims, low, np.float32), np.full(dims, high, np.float32))
    return ppo.Policy((3,), space, Args(**flags))


@pytest.mark.parametrize(
    "action_map, low, high, sample, expected",
    [
        ("rescale", -0.4, 0.4, 0.5, 0.2),
        ("rescale", 0.0, 10.0, -3.0, 0.0),
        ("rescale", -math.inf, math.inf, 3.0, 3.0),
        ("rescale", -1.0, math.inf, 3.0, 3.0),
        ("clip", -0.4, 0.4, 0.5, 0.4),
        ("clip", -0.4, math.inf, -3.0, -0.4),
        ("none", -0.4, 0.4, 3.0, 3.0),
    ],
)
def test_action_map(action_map, low, high, sample, expected):
    policy = make_policy(low, high, action_map=action_map)
    with torch.no_grad():
        policy.log_std.zero_()
        noise = sample - policy(torch.zeros(1, 3))
    raw, action = policy.act(np.zeros((1, 3), np.float32), noise)
    torch.testing.assert_close(raw, torch.full((1, 2), sample))  # the unclipped sample, whose log-prob is used
    np.testing.assert_allclose(action, np.full((1, 2), expected, np.float32), atol=1e-6)
    assert action.dtype == np.float32


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_networks_compute_what_stock_modules_do(activation):
    policy = make_policy(activation=activation, orthogonal_init=False)
    (a, b, c), act = policy.mean_net.layers, {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[activation]()
    stock = torch.nn.Sequential(a, act, b, act, c)
    for rows in (1, 500):  # fast_tanh treats small and large inputs differently
        x = torch.randn(rows, 3)
        torch.testing.assert_close(policy.mean_net(x), stock(x), rtol=1e-5, atol=1e-6)
    policy.load_state_dict(make_policy(activation=activation).state_dict())
    torch.testing.assert_close(policy.mean_net(x), stock(x), rtol=1e-5, atol=1e-6)  # new weights reach both
    double = copy.deepcopy(policy).to(torch.float64)
    torch.testing.assert_close(double.mean_net(x.double()).float(), policy.mean_net(x), rtol=1e-5, atol=1e-6)


def test_fast_tanh():
    for size in (100, 10_000):
        x = torch.linspace(-20, 20, size).requires_grad_()
        y = ppo.fast_tanh(x)
        torch.testing.assert_close(y, torch.tanh(x), rtol=0, atol=1e-6)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(slope, 1 - torch.tanh(x.detach()).square(), rtol=0, atol=1e-6)


def test_kingma_algorithm_1_adam():
    ours = [torch.randn(3, 4), torch.randn(5)]
    theirs = [torch.nn.Parameter(x.clone()) for x in ours]
    adam = ppo.Adam(17, lr=0.1, eps=1e-3)
    stock = torch.optim.Adam(theirs, lr=0.1, eps=1e-3)
    for step in range(300):
        lr = 0.1 * 0.99**step
        adam.lr.fill_(lr)
        stock.param_groups[0]["lr"] = lr
        grad = torch.randn(17) * 10 ** torch.randn(17)
        for param, part in zip(theirs, grad.split([12, 5]), strict=True):
            param.grad = part.view_as(param)
        adam.step(ours, grad)
        stock.step()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-4, atol=1e-5)
    m, v = 0.1 * grad[0], 0.001 * grad[0] ** 2  # the first step is α g / (|g| + ε)
    first, fresh = [torch.zeros(1)], ppo.Adam(1, lr=0.5, eps=1e-3)
    fresh.step(first, grad[:1])
    expected = -0.5 * (m / 0.1) / ((v / 0.001) ** 0.5 + 1e-3)
    torch.testing.assert_close(first[0], expected.view(1), rtol=1e-5, atol=1e-7)


def test_observations_are_normalized_and_clipped():
    policy = make_policy()
    policy.obs_stats.update(torch.tensor([[0.0, 1.0, 2.0], [2.0, 5.0, 2.0]]))
    torch.testing.assert_close(policy.normalize(torch.tensor([2.0, 1.0, 2.0])), torch.tensor([1.0, -1.0, 0.0]))
    assert policy.normalize(torch.full((3,), 1e9)).tolist() == [10.0, 10.0, 10.0]
    plain = make_policy(norm_obs=False, clip_obs=math.inf)
    plain.obs_stats.update(torch.randn(50, 3))
    assert torch.equal(plain.normalize(torch.tensor([1e9, -3.0, 0.1])), torch.tensor([1e9, -3.0, 0.1]))


# ---- Environments and rollout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id, finite", [("Chain-v0", True), ("EndlessChain-v0", False)])
def test_perfect_critic_has_no_advantage_to_report(env_id, finite):
    args = Args(norm_obs=False, norm_adv=False)
    envs = ppo.make_envs(env_id, 2, seed=0)
    policy = ppo.Policy((1,), envs.envs[0].action_space, args)
    rollout = ppo.collect(envs, policy, torch.Generator(), num_steps=10)
    assert rollout.done.sum() == 6 and rollout.terminated.sum() == (6 if finite else 0)
    adv, returns, values = ppo.advantages(policy, PerfectCritic(finite, args.gamma), rollout, args)
    torch.testing.assert_close(adv, torch.zeros(10, 2), atol=2e-5, rtol=0)
    torch.testing.assert_close(returns, values)


def test_step_gives_the_true_successor_and_the_observation_to_act_on():
    envs = ppo.make_envs("Chain-v0", 1, seed=0)
    seen = [(float(envs.obs[0, 0]), float(envs.step(np.zeros((1, 1)))[0][0, 0])) for _ in range(4)]
    assert seen == [(0, 1), (1, 2), (2, 3), (0, 1)] and envs.obs == 1.0


def test_seeds_do_not_share_environment_streams():
    first, second = (ppo.make_envs("Pendulum-v1", 4, seed).obs for seed in (1, 2))
    assert len(np.unique(np.concatenate([first, second])[:, 0])) == 8


def test_logged_returns_are_those_of_an_unwrapped_environment():
    envs = ppo.make_envs("Hopper-v5", 1, seed=5)
    start = envs.rng_states[0]
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 1, 3)).astype(np.float32)
    for action in actions:
        envs.step(action)

    env, expected = gym.make("Hopper-v5").unwrapped, []
    env.reset(seed=0)
    env.np_random.bit_generator.state = start
    env.reset()
    total, length = 0.0, 0
    for action in actions[:, 0]:
        _, reward, terminated, _, _ = env.step(action)
        total, length = total + float(reward), length + 1
        if terminated:
            expected.append((total, length))
            total, length = 0.0, 0
            env.reset()
    assert len(expected) > 3
    np.testing.assert_allclose(envs.ended, expected, rtol=1e-6)


def test_rewards_are_scaled_by_the_std_of_the_discounted_return():
    args, critic = Args(clip_reward=0.5), ppo.Critic(1, Args())
    rewards, done = torch.randn(64, 4), torch.zeros(64, 4, dtype=torch.bool)
    scaled, start = ppo.scale_rewards(rewards, done, torch.zeros(4), critic, args)
    sums, _ = ppo.discounted_sums(rewards, done, torch.zeros(4), args.gamma)
    torch.testing.assert_close(scaled, (rewards / sums.std(correction=0)).clamp(-0.5, 0.5))
    torch.testing.assert_close(start, args.gamma * sums[-1])
    plain, _ = ppo.scale_rewards(rewards, done, torch.zeros(4), critic, Args(norm_reward=False, clip_reward=math.inf))
    assert torch.equal(plain, rewards)


# ---- Update ----------------------------------------------------------------------------------------------------------


def test_normalized_advantages_do_not_depend_on_the_scale_of_rewards():
    policy, critic, rollout, _, args = make_parts(ppo, norm_adv=True)
    with torch.no_grad():
        for param in critic.value_net.layers[-1].parameters():
            param.zero_()
    adv, _, _ = ppo.advantages(policy, critic, rollout, args)
    scaled, _, _ = ppo.advantages(policy, critic, rollout._replace(rewards=10 * rollout.rewards), args)
    torch.testing.assert_close(adv, scaled, rtol=1e-4, atol=1e-5)
    assert adv.mean().abs() < 1e-5 and adv.std().item() == pytest.approx(1, abs=1e-4)


def test_without_a_compiler_it_goes_on_uncompiled(monkeypatch, capsys):
    def broken(function, **options):
        def call(*inputs):
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    gradient = ppo.compile_or_eager(lambda x: x + 1, Args(compile="on"), torch.device("cpu"))
    assert [gradient(1), gradient(2)] == [2, 3]
    assert capsys.readouterr().out.count("not compiled: no compiler here") == 1


# ---- Train -----------------------------------------------------------------------------------------------------------


def test_log_std_is_learned_if_not_annealed(tmp_path):
    args = Args(**SMALL, env_id="Pendulum-v1", total_timesteps=128, log_std_init=-0.3, log_std_final=None)
    result = train(dataclasses.replace(args, run_dir=str(tmp_path / "run")))
    (log_std,) = ppo.load_checkpoint(result["checkpoint"])["policy"]["log_std"].tolist()
    assert log_std != pytest.approx(-0.3, abs=1e-6) and log_std == pytest.approx(-0.3, abs=0.05)


def test_checkpoint_round_trip_and_frozen_statistics(tmp_path, monkeypatch):
    trained, original = [], ppo.evaluate_policy
    monkeypatch.setattr(ppo, "evaluate_policy", lambda policy, *rest: trained.append(policy) or original(policy, *rest))
    flags = {**SMALL, "eval_episodes": 2, "env_id": "Pendulum-v1", "total_timesteps": 256}
    result = train(Args(**flags, run_dir=str(tmp_path / "run")))
    saved = ppo.load_checkpoint(result["checkpoint"])
    policy = ppo.Policy((3,), gym.make("Pendulum-v1").action_space, Args(**saved["args"]))
    policy.load_state_dict(saved["policy"])
    obs = 3 * np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(policy.act(obs)[1], trained[0].act(obs)[1], rtol=1e-5)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    assert before["obs_stats.count"] == 256
    evaluation = original(policy, Args(**saved["args"]))
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert np.mean(evaluation["deterministic"]) == pytest.approx(result["eval_return"], rel=1e-3)
    written = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert np.mean(written["deterministic"]) == result["eval_return"] and len(written["sampled"]) == 2
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_run_folder_has_the_tags_of_dashboards_and_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = SMALL | {"env_id": "Chain-v0", "total_timesteps": 256, "eval_episodes": 1, "gamma": 0.9}
    result = train(Args(**flags, run_dir=str(tmp_path / "run")))
    events = EventAccumulator(result["run_dir"]).Reload()
    charts = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "learning_rate")}
    losses = ["policy_loss", "value_loss", "entropy", "approx_kl", "explained_variance"]
    assert charts | {f"losses/{name}" for name in losses} | {"eval/return"} <= set(events.Tags()["scalars"])
    assert [(x.step, x.value) for x in events.Scalars("charts/episodic_return")] == [
        (64 * i, 3.0) for i in (1, 2, 3, 4)
    ]
    assert [(x.step, x.value) for x in events.Scalars("eval/return")] == [(256, 3.0)]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["gamma"] == 0.9 and config["device"] == "cpu" and config["torch"] == torch.__version__
    assert config["script_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()


def test_evaluation_counts_one_whole_episode_each():
    assert ppo.evaluate(lambda obs: np.zeros((len(obs), 1)), "EndlessChain-v0", 4, seed=0) == [3.0] * 4


def test_evaluation_of_a_task_without_end_stops(monkeypatch):
    monkeypatch.setattr(ppo, "LONGEST_EVALUATION", 7)
    assert ppo.evaluate(lambda obs: np.zeros((len(obs), 1)), "Unlimited-v0", 2, seed=0) == [7.0, 7.0]


@pytest.mark.parametrize("poison", ["observations", "successors", "rewards"])
def test_nan_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys, poison):
    monkeypatch.setitem(gym.registry["Poison-v0"].kwargs, "poison", poison)
    flags = "--num-envs 2 --num-steps 8 --num-minibatches 4 --save-every 1 --compile off"
    command = f"{SCRIPT} --env-id Poison-v0 {flags} --total-timesteps 999 --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert ppo.main() == 1
    culprit = "rewards" if poison == "rewards" else "observations"
    assert f"NaN or infinity in {culprit}, in the iteration after step 32" in capsys.readouterr().err
    saved = ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))
    assert saved["step"] == 32 and all(x.isfinite().all() for x in saved["policy"].values() if x.is_floating_point())


def test_diverging_loss_is_reported(tmp_path, monkeypatch, capsys):
    command = f"{SCRIPT} --env-id Pendulum-v1 --learning-rate 1e38 --total-timesteps 9999 --compile off"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--run-dir", str(tmp_path / "run")])
    assert ppo.main() == 1
    assert "NaN or infinity in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id CartPole-v1", "acer_discrete.py"),
        ("--env-id NoSuchTask-v0", "NoSuchTask"),
        ("--env-id nomodule:Task-v0", "nomodule"),
        ("--total-timesteps 1023", "less than one batch, num_envs x num_steps = 1024"),
        ("--num-minibatches 3", "--num-minibatches must divide"),
        ("--num-envs 1 --num-steps 1 --num-minibatches 1", "2 or more"),
        ("--gamma 1.1", "--gamma 1.1 must lie in [0, 1]"),
        ("--gae-lambda -0.1", "--gae-lambda -0.1 must lie in [0, 1]"),
        ("--gamma nan", "--gamma nan must lie in [0, 1]"),
        ("--learning-rate 0", "--learning-rate 0.0 must be positive"),
        ("--num-envs 0", "--num-envs 0 must be positive"),
        ("--hidden-sizes 64 0", "--hidden-sizes (64, 0) must be positive"),
        ("--seed -1", "--seed -1 must not be negative"),
        ("--return-floor -1", "--return-floor -1.0 must not be negative"),
        ("--device nothing", "--device nothing"),
        ("--env-id CartPole-v1 --video-dir videos", "acer_discrete.py"),
        ("--resume nothing.pt", "nothing.pt is not a readable checkpoint"),
        ("--evaluate nothing.pt", "nothing.pt is not a readable checkpoint"),
        ("--resume {garbage}", "is not a readable checkpoint"),
        ("--resume {copy}", "name its checkpoint.pt, not best.pt"),
        ("--resume {checkpoint} --log-std-init 0", "--log-std-init"),
        ("--resume {checkpoint} --log-std-final None", "--log-std-final"),
        ("--log-std-init nan", "--log-std-init nan must lie in [-20, 5]"),
        ("--log-std-final 100", "--log-std-final 100.0 must lie in [-20, 5]"),
        ("--evaluate {checkpoint} --hidden-sizes 32", "--hidden-sizes"),
        ("--evaluate {checkpoint} --env-id Hopper-v5", "other sizes than Pendulum-v1"),
        ("--evaluate {checkpoint} --eval-episodes 0", "--eval-episodes of 1 or more"),
        ("--resume {foreign}", "was written by ppo_atari.py"),
        ("--resume {checkpoint} --env-id Hopper-v5", "--env-id"),
        ("--resume {checkpoint} --hidden-sizes 32", "--hidden-sizes"),
        ("--resume {checkpoint} --run-dir elsewhere", "own folder"),
        ("--run-dir {folder}", "File exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    result = train(Args(**SMALL, env_id="Pendulum-v1", total_timesteps=64, run_dir="run"))
    Path("garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"script": "ppo_atari", "args": {}}, "foreign.pt")
    Path("best.pt").write_bytes(Path(result["checkpoint"]).read_bytes())
    places = {
        "garbage": "garbage.pt",
        "copy": "best.pt",
        "foreign": "foreign.pt",
        "checkpoint": result["checkpoint"],
        "folder": "run",
    }
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.format(**places).split()])
    capsys.readouterr()
    assert ppo.main() == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before


def test_explicit_flags_win_over_the_checkpoint(tmp_path, monkeypatch):
    result = train(Args(**SMALL, env_id="Pendulum-v1", gamma=0.9, total_timesteps=128, run_dir=str(tmp_path / "run")))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--resume", result["checkpoint"], "--total-timesteps", "256"])
    assert ppo.main() == 0
    saved = ppo.load_checkpoint(result["checkpoint"])
    assert saved["step"] == 256 and saved["args"]["gamma"] == 0.9 and saved["args"]["num_steps"] == 32


def test_sigterm_saves_and_exits_143_and_the_run_resumes(tmp_path):
    command = [sys.executable, str(SCRIPT), "--env-id", "Pendulum-v1", "--compile", "off"]
    process = subprocess.Popen([*command, "--run-dir", "run"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    progress = tmp_path / "run" / "progress.csv"
    while not (progress.exists() and len(progress.read_text().splitlines()) > 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    step = ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"]
    assert step > 0
    more = ["--resume", "run/checkpoint.pt", "--total-timesteps", str(step + 1024), "--eval-episodes", "1"]
    assert subprocess.run([*command[:2], *more], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    assert ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"] == step + 1024
    steps = [int(line.split(",")[0]) for line in progress.read_text().splitlines()[1:]]
    assert steps == list(range(1024, step + 1025, 1024))


def test_evaluate_from_the_command_line_with_a_gif(tmp_path, monkeypatch, capsys):
    args = Args(**SMALL, env_id="Chain-v0", total_timesteps=64, run_dir=str(tmp_path / "run"))
    path = train(args)["checkpoint"]
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--evaluate", path, "--seed", "9", "--video-dir", str(tmp_path / "v")]
    )
    assert ppo.main() == 0
    (video,) = (tmp_path / "v").iterdir()
    frames = imageio.v3.imread(video)
    assert frames.shape == (2, 16, 16, 3)  # 50 steps/s make 25 frames/s: positions 0 and 2
    out = capsys.readouterr().out
    assert "deterministic: 3.0 ± 0.0 over 10 episodes" in out and "sampled: 3.0 ± 0.0 over 10 episodes" in out


def test_a_video_that_can_not_be_made_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chain, "render", lambda self: 1 / 0)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--env-id", "Chain-v0", "--video-dir", "videos"])
    assert ppo.main() == 2
    assert "--video-dir: can't render Chain-v0" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_signal_is_caught_though_nobody_reads_stderr(monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs the tests in the background
    monkeypatch.setattr(os, "write", broken)
    with ppo.stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


@each_script
def test_same_seed_same_run(tmp_path, script):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = {**SMALL, "env_id": "Hopper-v5", "total_timesteps": 320, "seed": seed}
        result = script.train(script.Args(**flags, run_dir=str(tmp_path / name)))
        hashes.append(fingerprint(result["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "script, own",
    [(ppo, {"fisher_subsample": 0.5})],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, script, own):
    flags = {**SMALL, "num_steps": 1000, "num_minibatches": 10, "total_timesteps": 8000, **own}
    whole = script.train(script.Args(**flags, run_dir=str(tmp_path / "whole")))
    assert whole["steps"] == 8000

    original = script.check_finite
    monkeypatch.setattr(
        script,
        "check_finite",
        lambda step, **x: os.kill(os.getpid(), signal.SIGTERM) if step == 2000 and "losses" in x else None,
    )
    half = script.train(script.Args(**flags, run_dir=str(tmp_path / "parts")))
    monkeypatch.setattr(script, "check_finite", original)
    assert half["steps"] == 4000 and half["signal"] == signal.SIGTERM and half["eval_return"] is None
    rest = script.train(script.Args(**flags, resume=half["checkpoint"]))
    assert rest["steps"] == 8000 and rest["run_dir"] == half["run_dir"]
    assert fingerprint(rest["checkpoint"]) == fingerprint(whole["checkpoint"])

    def curve(run_dir):
        rows = [line.split(",") for line in Path(run_dir, "progress.csv").read_text().splitlines()]
        keep = [i for i, name in enumerate(rows[0]) if name not in ("seconds", "SPS")]
        return [[row[i] for i in keep] for row in rows]

    assert curve(rest["run_dir"]) == curve(whole["run_dir"]) and len(curve(rest["run_dir"])) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_script
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_trains_on_cuda(tmp_path, script, compiled):
    flags = {**SMALL, "compile": compiled, "device": "cuda", "eval_episodes": 1, "env_id": "Pendulum-v1"}
    result = script.train(script.Args(**flags, total_timesteps=640, run_dir=str(tmp_path / "run")))
    assert result["steps"] == 640 and math.isfinite(result["eval_return"])


@each_script
@pytest.mark.parametrize("seed", [1, 2])
def test_learns_inverted_pendulum(tmp_path, script, seed):
    flags = {"env_id": "InvertedPendulum-v5", "total_timesteps": 100_000, "seed": seed, "compile": "off"}
    assert script.train(script.Args(**flags, run_dir=str(tmp_path / "run")))["eval_return"] >= 900
