"""Heun's method on a flow's own times: a trial step, then one along the mean of both ends' velocities."""

from __future__ import annotations


class Heun:
    """The sampler: what takes other than one pass a step is an object that says so by `passes`."""

    def __call__(self, flow, z, i=0, memory=None):
        """Return the sample reached from `z` at index `i`: z += h (v(z, t) + v(z + h v, t - h)) / 2."""
        n = len(flow.times)
        ends = [*flow.times[1:], 0.0]
        for step in range(i, n):
            left = 2 * (n - step)
            v = flow.velocity(z, step)
            flow.remaining(left - 1)
            ahead = flow.velocity_at(flow.advance(z, v, step, step + 1), ends[step])
            flow.remaining(left - 2)
            z = flow.advance(z, (v + ahead) / 2, step, step + 1)
            flow.step_done(step, z, {"bend": float(abs(ahead - v).max())})
        return z

    def passes(self, steps):
        """Return the least and the most velocities of so many steps."""
        return 2 * steps, 2 * steps

    def report(self, memory, steps):
        """Return what report.json is to have of a sampling: how far the last step bent."""
        return {"last_bend": memory["bend"]}
