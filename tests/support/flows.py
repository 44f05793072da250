"""Flows whose velocity is a formula: what the samplers are tried on."""

import math

import torch


class Formula:
    """A flow of velocity(z, t) at times 1 - i / n; notes what a sampler asks and tells."""

    straight = True

    def __init__(self, velocity, n=30, times=None):
        self.times = [1 - i / n for i in range(n)] if times is None else times
        self.formula = velocity
        self.asked, self.told, self.done = [], [], []

    def velocity(self, z, i):
        self.asked.append(i)
        return self.formula(z, self.times[i])

    def velocity_at(self, z, t):
        self.asked.append(t)
        return self.formula(z, t)

    def at(self, i):
        return self.times[i] if i < len(self.times) else 0.0

    def advance(self, z, v, i, to):
        assert i < to <= len(self.times)
        return z + v * (self.at(i) - self.at(to))

    def remaining(self, n):
        self.told.append((len(self.asked), n))

    def step_done(self, i, z, memory):
        self.done.append((i, z, memory))

    def state(self):
        return {}


def euler(flow, z):
    for i in range(len(flow.times)):
        z = flow.advance(z, flow.velocity(z, i), i, i + 1)
    return z


def straight(direction):
    return lambda z, t: direction


def bending(z, t):
    """Curved at both ends, straight in the middle, as trained flows are."""
    ends = torch.linspace(-1, 1, z[0].numel()).reshape(z[0].shape)
    return (torch.cos(ends * 9 * (t - 0.5) ** 3) + 0.3 * torch.sin(z)).to(z.dtype)


def turning(z, t):
    """As curved everywhere as a flow can be on its grid: the direction is another at every step."""
    phase = torch.arange(float(z[0].numel())).reshape(z[0].shape)
    return (torch.cos(phase + 1e4 * t) * math.sqrt(2)).to(z.dtype).expand_as(z)
