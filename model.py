"""Normalizing Trajectory Models: the exact likelihood, four-step sampling, score denoising and the learned denoiser.

Notable about the model:
- a reverse step p(x_s | x_t) is a conditional flow: the transporter (flow.py) carries both levels into u-space, the
  predictor (predictor.py) puts a Gaussian there over u_s given u_t, and the change of variables makes the likelihood
  exact;
- the T levels of a trajectory are one batch: a step needs its own u_t and nothing else (the chain is Markov), so one
  pass gives every step's Gaussian, with no causal mask and no loop in training;
- what is learned is a density, so it has a score: score_denoise() cleans a sampled trajectory with it, and the
  Denoiser learns to do the same in one pass.

Text id 0 is padding, 1 the null caption. Images are in [-1, 1]. "Eq. (3)" is equation (3) of docs/method.md.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from flow import (TimeEmbedding, Transporter, forward_chain, forward_log_prob, forward_trajectory, full_precision,
                  gaussian_nll, reverse_posterior, taken_again, time_grid, trajectory_covariance, zeroed)
from predictor import (CaptionedTransformer, Gaussian, ImageModel, NTMConfig, Predictor,  # noqa: F401: the config, for
                       StandardNormal, gaussian_head, null_caption)  # whoever imports a model and wants both


class NTM(ImageModel):
    def __init__(self, config):
        super().__init__(config)
        self.transporter = Transporter(config.num_tokens, config.token_dim, config.transporter_width,
                                       config.transporter_blocks, config.transporter_layers, config.transporter_heads)
        if config.predictor == "sit":
            from plumbing.sit import SiTPredictor  # a published network: nothing else needs it
            head = gaussian_head(config.width, 1, config.rank, config.token_dim)
            self.predictor = SiTPredictor(config, TimeEmbedding(2, config.width), head)
        else:
            self.predictor = Predictor(config) if config.depth else StandardNormal()

    def go_on_from(self, other):
        """Takes the weights of another NTM. A transporter or directions that it does not have stay as they are: a map
        that is the identity, directions that are small."""
        theirs, ours = other.state_dict(), self.state_dict()
        for name in ours.keys() - theirs.keys() | ours.keys() & {"predictor.head.weight", "predictor.head.bias"}:
            theirs[name] = torch.cat([theirs[name], ours[name][len(theirs[name]):]]) if name in theirs else ours[name]
        self.load_state_dict(theirs)

    def forward(self, images, text, randomness=None, target=None, parts=False):
        """Eq. (16), the training loss in nats per dimension, a scalar: the mean of -log p(x_s | x_t), weighted by
        level_weights; with closed_form of its expectation, Eq. (31), and velocity_weight times Eq. (22) beside it.

        images (B, C, H, W), text (B, L). randomness: steps, ts and noise as from randomness(), by default new ones.
        parts: returns {"objective": the loss, "nll": -log p alone, unweighted} instead, and with target, means
        (B, K-1, N, D) to stay close to, "aux", the mean squared distance in Eq. (26).
        """
        steps, ts, noise = randomness or self.randomness(len(images), images.device)
        x0 = self.patchify(images)
        x = forward_trajectory(x0, ts, noise=noise)
        if self.config.closed_form:
            t, A, B, C = (a[..., None, None] for a in (ts[:, 1:], *reverse_posterior(ts[:, 1:], ts[:, :-1])))
            gaussian, mean = self.gaussians(x, ts, text, steps), A * x[:, 1:] + B * x0[:, None]
            if self.config.first_noise < 1:  # x_1 tells of x_s, which Eq. (3) does not know: x_s itself, as drawn
                mean, C = torch.where(t == 1, x[:, :-1], mean), torch.where(t == 1, 0.0, C)
            nll = gaussian.expected_nll(mean, C[..., 0, 0])
        else:
            nll, gaussian = self.transitions(x, ts, text, steps, not self.config.pairs or self.config.steps == (1,))
        nll = nll / x0[0].numel()
        loss = (self.level_weights(ts, steps) * nll).mean() if self.config.level_weight else nll.mean()
        if self.config.velocity_weight:  # a mean errs by B t times what its velocity errs by
            loss = loss + self.config.velocity_weight * ((gaussian.mean - mean) / (B * t)).square().mean()
        if not parts:
            return loss
        aux = {} if target is None else {"aux": (gaussian.mean - target).square().mean()}
        return {"objective": loss, "nll": nll.mean(), **aux}

    def level_weights(self, ts, steps):
        """Eq. (30): s^p of every step that ends at s, over its mean over the grid, (B, K-1); ts (B, K), steps (B,).

        They leave each step's optimum where it is. Without them the gradients of the last step, tens of times those of
        the first, drown what the first have to learn: what the image shows.
        """
        config, t_min = self.config, ts.new_full((), self.config.max_t_min / 2 or 0.01)
        grids = {T: time_grid(T, t_min, config.num_tokens, config.shift)[:-1] for T in config.steps}
        mean = sum(torch.where(steps == T, (s ** config.level_weight).mean(), 0.0) for T, s in grids.items())
        return ts[:, :-1] ** config.level_weight / mean[:, None]

    def randomness(self, batch, device=None, generator=None, rows=slice(None), randn=torch.randn):
        """What is random about rows of a batch: steps (B,), times ts (B, K), noise (B, K, N, D). K = T+1: trajectories
        of one T; or 2: a step of one at random, which has the same expected loss, each example with its own T. Where
        first_noise is below 1, one example in T+1 learns a velocity of Eq. (35) instead: in a step to s t from a t in
        [s, 1), where s is the level next to noise. randn(shape, generator=, device=): draws the rows of noise."""
        config, several, kwargs = self.config, self.config.steps, dict(generator=generator, device=device)
        choice = torch.randint(len(several), (batch if config.pairs and len(several) > 1 else 1,), **kwargs)
        T = torch.tensor(several).to(device, non_blocking=True)[choice].expand(batch)
        t_min = config.max_t_min * (1 - torch.rand(batch, **kwargs))  # never 0, where a posterior has no density
        grids = [time_grid(steps, t_min, config.num_tokens, config.shift) for steps in several]
        if config.pairs:
            padded = torch.stack([F.pad(grid, (0, max(several) + 1 - grid.shape[1])) for grid in grids])
            between = int(config.first_noise < 1)
            first = torch.randint(math.lcm(*several) + between, (1,), **kwargs)
            i = torch.arange(batch, device=device)
            k = ((first + i) % (T + between))[:, None]  # uniform, and of a batch as many of each
            ts = padded[choice, i].gather(1, torch.cat([k, k + 1], dim=1).clamp(max=padded.shape[2] - 1))
            if between:
                s = padded[0, :, -2:-1]
                t = torch.lerp(s, torch.ones_like(s), torch.randint(4, (batch, 1), **kwargs) / 4)
                ts = torch.where(k == T[:, None], torch.cat([s * t, t], dim=1), ts)
        else:
            ts = grids[choice.item() if len(several) > 1 else 0]
        return T[rows], ts[rows], randn((*ts.shape, config.num_tokens, config.token_dim), **kwargs)

    def transitions(self, x, ts, text, steps, from_noise=False):
        """Eq. (11): -log p(x_{t_{k-1}} | x_{t_k}) in nats for all neighbouring levels of x, in one pass.

        x (B, K, N, D), ts (B, K) ascending, text (B, L), steps (B,): T, which ts need not cover; from_noise: as below.
        Returns it, (B, K-1), and each step's Gaussian in u-space, a batch of (B, K-1).
        """
        return self.transitions_in_u(*self.transport(x, ts, steps, from_noise), ts, text, steps)

    def transport(self, x, ts, steps, from_noise=False):
        """Eq. (8) for all levels of x (B, K, N, D): u like x, and the log-determinants (B, K). from_noise: the last
        level has t = 1 in every example, and so the identity, which is not worth a pass."""
        K = x.shape[1] - from_noise
        u, logdet = self.transporter(x[:, :K].flatten(0, 1), ts[:, :K].flatten(), steps.repeat_interleave(K))
        u, logdet = u.unflatten(0, (-1, K)), logdet.unflatten(0, (-1, K))
        return torch.cat([u, x[:, K:]], dim=1), F.pad(logdet, (0, int(from_noise)))

    def transitions_in_u(self, u, logdet, ts, text, steps):
        """The same, once the transporter has carried the levels to u (B, K, N, D), with its log-determinants (B, K)."""
        gaussian = self.gaussians(u, ts, text, steps)
        return gaussian.nll(u[:, :-1]) - logdet[:, :-1], gaussian

    def gaussians(self, u, ts, text, steps):
        """Eq. (10): every step's Gaussian, a batch of (B, K-1); u (B, K, N, D), ts (B, K)."""
        K = u.shape[1] - 1
        return Gaussian(*self.predict(u[:, 1:].flatten(0, 1), ts[:, 1:].flatten(), ts[:, :-1].flatten(),
                                      steps.repeat_interleave(K), text.repeat_interleave(K, dim=0))).unflatten((-1, K))

    def step_nll(self, x_s, x_t, s, t, steps, text):
        """Eq. (11): exact -log p(x_s | x_t, text) in nats, (B,). x_s, x_t (B, N, D); s < t, steps (B,); text (B, L)."""
        x, ts = torch.stack([x_s, x_t], dim=1), torch.stack([s, t], dim=1)
        return self.transitions(x, ts, text, steps)[0][:, 0]

    def trajectory_nll(self, x, ts, text):
        """Eq. (12): exact -log p of each part of a trajectory in nats, (B, T+1); the row sum is that of the whole.

        x (B, T+1, N, D), ts (B, T+1), text (B, L). Column k < T is the step that ends at t_k, column T the prior.
        """
        steps = torch.full((len(x),), ts.shape[1] - 1, device=x.device)
        return torch.cat([self.transitions(x, ts, text, steps, from_noise=True)[0], gaussian_nll(x[:, -1:])], dim=1)

    def trajectory_bound(self, x, ts, text):
        """trajectory_nll (B, T+1), and from it Eq. (14)'s upper bound on -log p(x_{t_0}) in nats, (B,), both of a
        forward_trajectory x (B, T+1, N, D), with an x_1 that is coupled() where the model wants one."""
        nll = self.trajectory_nll(self.coupled(x, ts, text), ts, text)
        log_q = forward_log_prob(x, ts) - x[0, 0].numel() * math.log(self.config.first_noise)  # x_1 has c of it
        return nll, nll.sum(dim=1) + log_q

    @torch.no_grad()
    def coupled(self, x, ts, text):
        """Eq. (36): the levels x (B, K, N, D) of a forward_trajectory, whose x_1, where it is the noisiest, is fresh,
        with an x_1 that follows for the most part from the next cleaner level. ts (B, K), text (B, L)."""
        if (c := self.config.first_noise) == 1:
            return x
        x_1 = math.sqrt(1 - c**2) * self.flowed_to_noise(x[:, -2], ts[:, -2], text) + c * x[:, -1]
        return torch.cat([x[:, :-1], torch.where(ts[:, -1:, None] == 1, x_1, x[:, -1])[:, None]], dim=1)

    @torch.no_grad()
    def couple(self, images, text, randomness):
        """In what randomness() drew for a batch, makes the noise of pairs from t = 1 that of Eq. (36), in place: there
        a level is its noise. images (B, C, H, W), text (B, L)."""
        _, ts, noise = randomness
        rows = ts[:, -1].topk(math.ceil(len(ts) / (self.config.steps[0] + 1))).indices  # one in T + 1; others stay
        x = forward_trajectory(self.patchify(images[rows]), ts[rows], noise=noise[rows])
        noise[rows] = torch.where(ts[rows, :, None, None] == 1, self.coupled(x, ts[rows], text[rows]), noise[rows])

    def flowed_to_noise(self, x, s, text):
        """Eq. (35): x_s (B, N, D) carried to t = 1 by the velocities of the model's own estimates, along which the
        marginals of Eq. (1) flow; by the midpoint method, in two steps. s (B,), text (B, L)."""
        T, h = torch.full((len(x),), self.config.steps[0], device=x.device), (1 - s) / 2
        velocity = lambda x, t: self.predictor(x, t, t * s, T, text)[0]
        for t in (s, s + h):
            midpoint = x + h[:, None, None] / 2 * velocity(x, t)
            x = x + h[:, None, None] * velocity(midpoint, t + h / 2)
        return x

    def predict(self, u, t, s, steps, text):
        """Eq. (10): mean and log standard deviation of p(u_s | u_t = u), each (B, N, D), and with rank R > 0 directions
        (B, R, N, D): what Gaussian takes. t, s, steps (B,), text (B, L).

        "direct": the head emits both. "posterior", Eq. (25): it emits a velocity v, so an estimate x_0 = u - t v, and a
        correction delta to the standard deviation C of the exact posterior q(x_s | x_t, x_0), which delta = 0 leaves.
        """
        mean, log_std, *directions = self.predictor(u, t, s, steps, text)
        if self.config.parametrization == "posterior":
            A, B, C = reverse_posterior(t, s)
            if (c := self.config.first_noise) < 1:  # x_1 tells the noise of x_s, but for c of it
                A, C = torch.where(t == 1, math.sqrt(1 - c**2) * s, A), torch.where(t == 1, c * s, C)
            A, B, C = (a[:, None, None] for a in (A, B, C))
            mean = A * u + B * (u - t[:, None, None] * mean)
            # At the cleanest step C, some t_min, is many times smaller than the deviation of x_s given x_t, for data of
            # variance 1 at most sqrt(C^2 + B^2). In units of the way between the two, delta is as large at every step.
            log_std = C.log() + log_std * 0.5 * torch.log1p((B / C) ** 2)
        return (mean, log_std, torch.stack(directions, dim=1)) if directions else (mean, log_std)

    @torch.no_grad()
    def sample(self, text, ts, guidance=0.0, generator=None, restarts=0, noise=None, randn=None):
        """Eq. (19): a trajectory sampled in u-space, noisiest level first, all tokens in parallel.

        text (B, L); ts (T+1,); guidance: w >= 0; restarts: of Eq. (34)'s steps, after which x_1 is not coupled(). Noise
        comes from randn(*shape), (B, *shape), by default of `generator`; noise (B, T+1, N, D), if given: each level's
        own, x_1 the last. Returns u (B, T+1, N, D), cleanest first.
        """
        B, T, shape = len(text), len(ts) - 1, (self.config.num_tokens, self.config.token_dim)
        kwargs = dict(generator=generator, dtype=next(self.parameters()).dtype, device=text.device)
        randn = randn or (lambda *shape: torch.randn(B, *shape, **kwargs))
        u = randn(T + 1, *shape) if noise is None else noise.clone()  # each level's noise, then the levels
        along, steps, ts = randn(T, self.config.rank), torch.full((B,), T, device=text.device), ts.expand(B, -1)
        for k in reversed(range(T)):
            for again in range(1 + restarts * (k in taken_again(T))):
                if again:
                    x = self.transporter.inverse(u[:, k], ts[:, k], steps)
                    x = forward_chain(x, ts[:, k:], randn(T - k, *shape))
                    u[:, k + 1:] = self.transport(x[:, 1:], ts[:, k + 1:], steps, from_noise=True)[0]
                step = u[:, k + 1], ts[:, k + 1], ts[:, k], steps
                gaussian = Gaussian(*self.predict(*step, text))
                if guidance:
                    gaussian = gaussian.guided(Gaussian(*self.predict(*step, null_caption(text))), guidance)
                z, w = (randn(*shape), randn(self.config.rank)) if again else (u[:, k], along[:, k])
                u[:, k] = gaussian.sample(z, w)
        return u

    def invert(self, u, ts, method="", tol=1e-5, steps=0):
        """Levels u (B, K, N, D) to x-space, a batch, as Transporter.inverse. ts (K,) or (B, K); steps: T, or 0: K-1."""
        B, levels = u.shape[:2]
        steps = torch.full((B * levels,), steps or levels - 1, device=u.device)
        x = self.transporter.inverse(u.flatten(0, 1), ts.expand(B, levels).flatten(), steps, method, tol)
        return x.unflatten(0, (B, levels))

    @torch.no_grad()
    def guided_score(self, x0, ts, text, guidance, noise):
        """Eq. (32), nats (B,), to compare candidates x0 (B, N, D) for captions (B, L): the density that guidance stands
        for, of the middle steps of R forward trajectories. ts (T+1,), T > 1; noise (R, T+1, N, D)."""
        T, score = torch.full((len(x0),), len(ts) - 1, device=x0.device), 0.0
        ts, x_1_is_last = ts[:max(3, len(ts) - 1)].expand(len(x0), -1), len(ts) == 3
        for noise_of_one in noise[:, :ts.shape[1]]:
            x = forward_trajectory(x0, ts, noise=noise_of_one.expand(len(x0), -1, -1, -1))
            x = (self.coupled(x, ts, text) if x_1_is_last else x)[:, 1:]
            u, logdet = self.transport(x, ts[:, 1:], T)
            for weight, caption in [(1 + guidance, text), (-guidance, null_caption(text))][:2 if guidance else 1]:
                score -= weight * self.transitions_in_u(u, logdet, ts[:, 1:], caption, T)[0].sum(dim=1)
        return score / len(noise)

    def score_denoise(self, x, ts, text, chunk=0):
        """Eq. (21): E[x_0 | x_{t_0}, ..., x_{t_T}] under the model, (B, N, D), Tweedie's formula for the trajectory.

        x (B, T+1, N, D), ts (B, T+1) or (T+1,), text (B, L); chunk: examples at once, 0 for what fits into some 4 GB.
        """
        return self.distillation_pair(x, ts, text, chunk)[1]

    @torch.enable_grad()
    def distillation_pair(self, x, ts, text, chunk=0):
        """Eq. (27): u_{t_0}, what the denoiser sees, and score_denoise, what it is to make of it, each (B, N, D)."""
        pairs = []
        chunk = chunk or self.config.examples_at_once(x.shape[1] - 1)
        for x, ts, text in zip(x.detach().split(chunk), ts.expand(x.shape[:2]).split(chunk), text.split(chunk)):
            x.requires_grad_()
            steps = torch.full((len(x),), ts.shape[1] - 1, device=x.device)
            K = x.shape[1] - (self.config.first_noise < 1 and x.shape[1] > 2)  # without a coupled first step, Eq. (36)
            u, logdet = self.transport(x[:, :K], ts[:, :K], steps, from_noise=K == x.shape[1])
            g, = torch.autograd.grad(self.transitions_in_u(u, logdet, ts[:, :K], text, steps)[0].sum(), x)
            weights, t0 = trajectory_covariance(ts)[:, 0, :, None, None], ts[:, 0, None, None]
            pairs.append((u[:, 0].detach(), (x[:, 0].detach() - (weights * g).sum(dim=1)) / (1 - t0)))
        return [torch.cat(tensors) for tensors in zip(*pairs)]


class Denoiser(ImageModel):
    """g_phi: the cleanest level in u-space to the clean image, in one pass; trained by Eq. (27) to do as Eq. (21)."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = CaptionedTransformer(config, times=1)
        self.head = zeroed(nn.Linear(config.width, config.token_dim))

    def forward(self, u0, text):
        """u0 (B, N, D) at t_min, text (B, L). Returns x0 (B, N, D)."""
        return full_precision(self.head, self.trunk(u0, text, u0.new_zeros(len(u0), 1)))  # of one noise level: no time
