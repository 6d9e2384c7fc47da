"""Flow matching: the model that an NTM is measured against, and one that it can start from.

Data and noise are joined by straight lines x_t = (1 - t) x_0 + t eps, and a network v(x_t, t) is trained to predict
their velocity eps - x_0: it learns the mean velocity of all lines through x_t. Sampling follows it from noise (t = 1)
to data (t = 0), an ordinary differential equation that takes many small steps to solve: a large step jumps towards a
mean, and means of images are blurred. Equations (22) to (24) of docs/method.md.

The network is the predictor's own trunk, with one time instead of three and half the outputs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from beyond import restarted_steps
from flow import forward_kernel, full_precision, zeroed
from model import noise_source
from predictor import CaptionedTransformer, ImageModel, null_caption

EULER_STEPS = 50  # unless one says otherwise


class FlowMatching(ImageModel):
    """A velocity network; config: NTMConfig, of which what belongs to the transporter and the time grid is unused."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = CaptionedTransformer(config, num_times=1)
        self.head = zeroed(nn.Linear(config.width, config.token_dim))

    def velocity(self, x, t, text):
        """x (B, N, D), t (B,), text (B, L) to v of Eq. (22), an estimate of noise - data, (B, N, D)."""
        h = self.trunk(x, text, t[:, None])
        return full_precision(self.head, h)

    def forward(self, images, text, drawn=None):
        """Eq. (22), the training loss: the mean squared error of the velocity, per number, a scalar.

        images (B, channels, H, W), text (B, L). drawn: times (B,) and noise (B, N, D), by default new ones.
        """
        x0 = self.patchify(images)
        if drawn is None:
            drawn = self.draw_times(len(images), device=images.device), torch.randn_like(x0)
        t, noise = drawn
        times = t[:, None, None]
        x = (1 - times) * x0 + times * noise
        return F.mse_loss(self.velocity(x, t, text), noise - x0)

    def draw_times(self, batch, generator=None, device=None):
        """Times of training, (B,): logit-normal, most of them in the middle."""
        return torch.randn(batch, generator=generator, device=device).sigmoid()

    @torch.no_grad()
    def sample(self, text, ts=None, guidance=0.0, generator=None, restarts=0, randn=None):
        """Eq. (24): follows the velocity from noise to data by Euler's method, a step between any two of the times.

        text (B, L); ts (T+1,), ascending from 0 to 1, by default 50 equal steps; guidance: w >= 0. restarts: (ours) of
        restarted_steps, Eq. (34). Noise is randn(*shape), (B, *shape), by default of `generator`. Returns all levels
        (B, T+1, N, D), the image first and the noise last.
        """
        randn = randn or noise_source(self, text, generator)
        if ts is None:
            ts = torch.linspace(0, 1, EULER_STEPS + 1)
        ts = ts.to(text.device, self.head.weight.dtype)
        T = len(ts) - 1
        shape = self.config.num_tokens, self.config.token_dim
        levels = [randn(*shape)]
        for k in reversed(range(T)):
            s, t = ts[k], ts[k + 1]
            x = self.step(levels[0], t, s, text, guidance)
            levels.insert(0, x)
            if k not in restarted_steps(T):
                continue
            for _ in range(restarts):
                alpha, beta = forward_kernel(t, s)
                levels[1] = alpha * levels[0] + beta * randn(*shape)
                levels[0] = self.step(levels[1], t, s, text, guidance)
        return torch.stack(levels, dim=1)

    def step(self, x, t, s, text, guidance=0.0):
        """Eq. (24): x (B, N, D) at time t to time s, scalar tensors."""
        times = t.expand(len(x))
        v = self.velocity(x, times, text)
        if guidance:
            unconditional = self.velocity(x, times, null_caption(text))
            v = v + guidance * (v - unconditional)
        return x - v * (t - s)

    @torch.no_grad()
    def hand_over(self, predictor):
        """Gives its weights to the predictor of an NTM of the same size and parametrization "posterior".

        What it does not have is zero there: the weights of the times s and 1/T, and the correction to the scale. What
        is ours, directions and the flow over pixels, stays as it is.
        """
        state = predictor.state_dict() | self.state_dict()
        first = "trunk.time.mlp.0.weight"
        inputs = predictor.trunk.time.mlp[0].in_features
        extra_inputs = inputs - state[first].shape[1]
        state[first] = F.pad(state[first], (0, extra_inputs))
        own = predictor.head.state_dict()
        for name in ("weight", "bias"):
            velocity = state[f"head.{name}"]
            directions = own[name][2 * len(velocity) :]
            correction = torch.zeros_like(velocity)
            state[f"head.{name}"] = torch.cat([velocity, correction, directions])
        predictor.load_state_dict(state)
