"""Catch: a ball falls from a random column, the paddle below moves left, stays or moves right. Seen as an image."""

import gymnasium as gym
import numpy as np

SIZE = 7  # cells of 12 x 12 pixels


class Catch(gym.Env):
    """Episodes of six steps; the last one's reward is `reward` for a catch and its negative for a miss."""

    observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, reward=1, cut=False, render_mode=None):
        self.reward, self.cut, self.render_mode = reward, cut, render_mode

    def picture(self):
        cells = np.zeros((SIZE, SIZE), np.uint8)
        cells[self.row, self.ball] = 255
        cells[-1, self.paddle] = 255
        return cells.repeat(12, 0).repeat(12, 1)[None]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.paddle, self.ball = 0, SIZE // 2, int(self.np_random.integers(SIZE))
        return self.picture(), {}

    def step(self, action):
        self.row, self.paddle = self.row + 1, int(np.clip(self.paddle + action - 1, 0, SIZE - 1))
        over = self.row == SIZE - 1
        reward = self.reward * (1 if self.ball == self.paddle else -1) if over else 0
        return self.picture(), reward, over and not self.cut, over and self.cut, {}

    def render(self):
        return self.picture()[0, ..., None].repeat(3, -1)


gym.register("Catch-v0", Catch)
