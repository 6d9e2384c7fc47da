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

from flow import forward_kernel, full_precision, taken_again, zeroed
from predictor import CaptionedTransformer, ImageModel, null_caption

EULER_STEPS = 50  # unless one says otherwise


class FlowMatching(ImageModel):
    """A velocity network; config: NTMConfig, of which what belongs to the transporter and the time grid is unused."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = CaptionedTransformer(config, times=1)
        self.head = zeroed(nn.Linear(config.width, config.token_dim))

    @torch.no_grad()
    def hand_over(self, predictor):
        """Gives its weights to the predictor of an NTM of the same size and parametrization "posterior".

        What it does not have is zero there: the weights of the times s and 1/T, and the correction to the scale. The
        directions of a correlated Gaussian stay as they are.
        """
        state, first = self.state_dict(), "trunk.time.mlp.0.weight"
        state[first] = F.pad(state[first], (0, predictor.trunk.time.mlp[0].in_features - state[first].shape[1]))
        for name in ("head.weight", "head.bias"):
            own = predictor.head.state_dict()[name.removeprefix("head.")]
            state[name] = torch.cat([state[name], torch.zeros_like(state[name]), own[2 * len(state[name]):]])
        predictor.load_state_dict(state)

    def velocity(self, x, t, text):
        """x (B, N, D), t (B,), text (B, L) to v of Eq. (22), an estimate of noise - data, (B, N, D)."""
        return full_precision(self.head, self.trunk(x, text, t[:, None]))

    def forward(self, images, text, randomness=None):
        """Eq. (22), the training loss: the mean squared error of the velocity, per number, a scalar.

        images (B, C, H, W), text (B, L). randomness: t and noise as from randomness(), by default new ones.
        """
        t, noise = randomness or self.randomness(len(images), images.device)
        x0, times = self.patchify(images), t[:, None, None]
        return F.mse_loss(self.velocity((1 - times) * x0 + times * noise, t, text), noise - x0)

    def randomness(self, batch, device=None, generator=None, rows=slice(None), randn=torch.randn):
        """What is random about rows of a batch: times (B,), logit-normal, most of them in the middle; and noise
        (B, N, D), the rows of it that randn(shape, generator=, device=) draws."""
        t = torch.randn(batch, generator=generator, device=device).sigmoid()
        shape = batch, self.config.num_tokens, self.config.token_dim
        return t[rows], randn(shape, generator=generator, device=device)

    @torch.no_grad()
    def sample(self, text, ts=None, guidance=0.0, generator=None, restarts=0, randn=None):
        """Eq. (24): follows the velocity from noise to data by Euler's method, a step between any two of the times.

        text (B, L); ts (T+1,), ascending from 0 to 1, by default 50 equal steps; guidance: weight w >= 0 of
        v_c + w (v_c - v_u); restarts: of Eq. (34)'s steps; what is standard normal, randn(*shape), (B, *shape), by
        `generator`. Returns all levels (B, T+1, N, D), the image first and the noise last.
        """
        kwargs = dict(dtype=self.head.weight.dtype, device=text.device)
        randn = randn or (lambda *shape: torch.randn(len(text), *shape, generator=generator, **kwargs))
        ts = (torch.linspace(0, 1, EULER_STEPS + 1) if ts is None else ts).to(**kwargs)
        T, shape = len(ts) - 1, (self.config.num_tokens, self.config.token_dim)
        levels = [randn(*shape)]
        for k in reversed(range(T)):
            for again in range(1 + restarts * (k in taken_again(T))):
                if again:
                    alpha, beta = forward_kernel(ts[k + 1], ts[k])
                    levels[:2] = [alpha * levels[0] + beta * randn(*shape)]
                step = levels[0], ts[k + 1].expand(len(text))
                v = self.velocity(*step, text)
                if guidance:
                    v = v + guidance * (v - self.velocity(*step, null_caption(text)))
                levels.insert(0, levels[0] - v * (ts[k + 1] - ts[k]))
        return torch.stack(levels, dim=1)
