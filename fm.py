"""Flow matching: the model that an NTM is measured against, and one that it can start from.

A straight line x_t = (1 - t) x_0 + t eps joins an image to noise. A network v(x_t, t), trained to predict the line's
velocity eps - x_0, learns the mean velocity of all lines through x_t. Sampling follows this velocity from noise (t = 1)
to data (t = 0), which is an ordinary differential equation and takes many small steps: a large step jumps towards a
mean, and a mean of images is blurred. Equations (22) to (24) of docs/method.md.

The network is the predictor's own trunk, with one time instead of three and half the outputs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from beyond import restarted_steps
from flow import forward_kernel, full_precision, zeroed
from model import noise_source
from predictor import CaptionedTransformer, ImageModel, null_caption

EULER_STEPS = 50  # of sampling, by default


class FlowMatching(ImageModel):
    """A velocity network. config: an NTMConfig, whose transporter and time grid are not used."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = CaptionedTransformer(config, num_times=1)
        self.head = zeroed(nn.Linear(config.width, config.token_dim))

    def velocity(self, x, t, text):
        """The velocity v of Eq. (22), (B, N, D), an estimate of noise - data. x (B, N, D), t (B,), text (B, L)."""
        h = self.trunk(x, text, t[:, None])
        return full_precision(self.head, h)

    def forward(self, images, text, drawn=None):
        """The training loss, Eq. (22), a scalar: the mean squared error of the velocity over all numbers.

        images (B, channels, H, W), text (B, L). drawn: times (B,) and noise (B, N, D); None: draw new ones.
        """
        x0 = self.patchify(images)
        if drawn is None:
            drawn = self.draw_times(len(images), device=images.device), torch.randn_like(x0)
        t, noise = drawn
        times = t[:, None, None]
        x = (1 - times) * x0 + times * noise
        return F.mse_loss(self.velocity(x, t, text), noise - x0)

    def draw_times(self, batch, generator=None, device=None):
        """Draw training times (B,) from a logit-normal distribution, most of them in the middle of [0, 1]."""
        return torch.randn(batch, generator=generator, device=device).sigmoid()

    @torch.no_grad()
    def sample(self, text, ts=None, guidance=0.0, generator=None, restarts=0, randn=None):
        """Follow the velocity from noise to data by Euler's method, one step per interval of the times ts, Eq. (24).

        text (B, L). ts (T+1,): times, ascending from 0 to 1; None: 50 equal steps. guidance: w >= 0. restarts: (ours)
        repetitions of each of restarted_steps, Eq. (34). randn(*shape): draws noise (B, *shape); None: with
        `generator`. Returns all levels (B, T+1, N, D), the image first and the noise last.
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
        """One Euler step, Eq. (24): takes x (B, N, D) from time t to time s, scalar tensors."""
        times = t.expand(len(x))
        v = self.velocity(x, times, text)
        if guidance:
            unconditional = self.velocity(x, times, null_caption(text))
            v = v + guidance * (v - unconditional)
        return x - v * (t - s)

    @torch.no_grad()
    def hand_over(self, predictor):
        """Copy the weights into the predictor of an NTM of the same size and parametrization "posterior".

        The weights of the parts that flow matching lacks become zero: of the inputs s and 1/T, and of the output rho.
        Directions and the flow over pixels (ours) stay as they are.
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
