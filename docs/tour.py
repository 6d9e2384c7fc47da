# %% [markdown]
# # A tour of Normalizing Trajectory Models
#
# A Normalizing Trajectory Model (NTM) draws an image in four steps, from noise to picture. It also tells how likely an
# image is under a caption. A diffusion model needs many steps because each of its steps is a simple Gaussian. An NTM
# makes each step a normalizing flow, so that a few large steps can be right.
#
# This notebook uses two small models that come with the repository: one of coloured shapes, one of emoji. Nothing is
# downloaded. The whole notebook takes less than three minutes on a CPU, of which training takes two.
#
# Start Jupyter (`pip install notebook`, then `jupyter notebook`) in the folder of the repository, so that the imports
# find its files.

# %% [markdown]
# ## 1. Draw images
#
# `load` opens a trained model, and `sample` draws one image for each caption. `guidance` makes images follow their
# captions more closely. The same seed always gives the same images.

# %%
from pipeline import load
from plumbing.images import contact_sheet

model = load("assets/shapes")
prompts = [
    "a red circle",
    "two yellow squares",
    "a blue triangle and a green circle",
    "a purple square above a cyan circle",
]
captions = prompts * 2
images = model.sample(captions, guidance=1.0, seed=0)
print(tuple(images.shape), "values from", round(images.min().item(), 2), "to", round(images.max().item(), 2))
contact_sheet(images, captions, columns=4)

# %% [markdown]
# The model of shapes knows circles, squares and triangles in six colours: one alone, up to four alike, or two that
# differ. Its images have 16 × 16 pixels. The model of emoji has 64 × 64 pixels and four styles: google, twitter,
# openmoji and fluent. It knows the names of emoji and nothing else: for "a unicorn wearing a hat" it draws a smudge.
# `temperature=0.3` lowers the noise of the last step, which leaves less grain.
#
# Some images do not follow their caption. Two things are harder than one. `restarts=1` repeats a step, and `best_of=4`
# keeps the likeliest of four images; both make such failures rarer and take more time.

# %%
emoji = load()  # emoji of 64 × 64 pixels
captions = [
    "a red apple, twitter style",
    "a grinning face, google style",
    "a cat face, openmoji style",
    "a red heart, fluent style",
]
contact_sheet(emoji.sample(captions, guidance=1.0, seed=0, temperature=0.3), captions, columns=4)

# %% [markdown]
# ## 2. Watch the noise levels
#
# The model has five noise levels, from t = 1, pure noise, to t = 0.02, almost an image. Four steps lead from one to the
# next. A small network, the denoiser, removes the noise that remains at t = 0.02.

# %%
caption = "a red circle and a blue square"
final, trajectory, nll = model.sample_trajectories([caption], [0], guidance=1.0, seed=4, in_x_space=True)
levels = model.network.unpatchify(trajectory[0]).flip(0)
names = [f"t = {t:.2f}" for t in model.ts.flip(0).tolist()]
contact_sheet([*levels, final[0]], [*names, "denoised"], columns=6)

# %% [markdown]
# The likelihood of this trajectory is exact: it is the density of the noise at t = 1 times the densities of the four
# steps. Each row below is −log p in nats, the natural unit of information. A lower number means a more likely step. It
# is negative where the density is above 1, which happens near the image, because the noise there is narrow.

# %%
parts = model.network.trajectory_nll(trajectory, model.ts[None], model.encode([caption]))[0].tolist()
for k in reversed(range(4)):
    print(f"step from t = {model.ts[k + 1]:.2f} to {model.ts[k]:.2f}: {parts[k]:8.1f} nats")
print(f"noise at t = 1.00:         {parts[4]:8.1f} nats")
print(f"whole trajectory:          {sum(parts):8.1f} nats")

# %% [markdown]
# ## 3. Score a real picture
#
# This picture is from the held-out set: the model was not trained on it.

# %%
from data import get_dataset

held_out = get_dataset("shapes", "val", image_size=16, channels=3)
picture, true_caption = held_out[3]
contact_sheet([picture], [true_caption], scale=10)

# %% [markdown]
# How likely is this picture under its own caption, and under nine others? `log_likelihood` gives a lower bound on log p
# in nats. It averages over several trajectories from the picture to noise. Every caption gets the same trajectories, so
# that captions can be compared. A higher number means that the caption describes the picture better.

# %%
captions = [
    true_caption,
    "a green circle left of a red triangle",
    "a green circle above a red triangle",
    "a red circle right of a green triangle",
    "a green square right of a red triangle",
    "a blue circle right of a red triangle",
    "a green circle right of a purple triangle",
    "a green circle and a red triangle",
    "a green circle",
    "three red squares",
]
scores = model.log_likelihood(picture.expand(10, -1, -1, -1), captions)
best = scores.nats.max()
for i in scores.nats.argsort(descending=True).tolist():
    print(f"{scores.nats[i]:8.1f} nats, {best - scores.nats[i]:6.1f} below the best: {captions[i]}")

# %% [markdown]
# One other caption is true as well: it leaves out where the circle is. It fits more pictures, so each of them is less
# likely under it.
#
# ## 4. Look inside one step
#
# The last step turns x_t, a noisy image, into x_s, an image with little noise. In a diffusion model every number of x_s
# is Gaussian, and independent of the others once x_t is known. Here a normalizing flow leads from x_s to such a
# Gaussian; sampling goes the same way backwards. First a map h bends every number by itself. Then a filter subtracts
# from every number what its neighbours tell about it. How much do they tell? We take the trajectory of an emoji, and
# compare neighbours before and after the filter.

# %%
import torch

caption = "a cat face, google style"
network = emoji.network
_, trajectory, _ = emoji.sample_trajectories([caption], [0], guidance=1.0, seed=0, in_x_space=True)
x_s, x_t = trajectory[:, 0], trajectory[:, 1]
s, t = emoji.ts[:1], emoji.ts[1:2]
with torch.no_grad():
    step = network.predict(x_t, t, s, network.step_count(emoji.ts[None]), emoji.encode([caption]))
    std = torch.exp(step.log_std)
    mapped, _ = step.mixture.map((x_s - step.mean) / std)
    drawn = step.filtered(mapped * std) / std

for name, tokens in {"before": mapped, "after": drawn}.items():
    image = network.unpatchify(tokens)[0]
    neighbours = torch.stack([image[..., 1:].flatten(), image[..., :-1].flatten()])
    print(f"correlation of neighbours {name} the filter: {torch.corrcoef(neighbours)[0, 1]:.2f}")
names = [f"x_t, t = {t.item():.2f}", f"x_s, s = {s.item():.2f}"]
contact_sheet(network.unpatchify(torch.cat([x_t, x_s])), names, scale=3)

# %% [markdown]
# What is left after the filter is almost independent noise. And the map h? The plot shows the density that h gives to
# one number, beside the Gaussian of the same mean and variance. We take the number where the two differ most. Their
# distance is a Kullback–Leibler divergence in nats. In the mean it is small: in this model the filter does most.

# %%
from plumbing.plots import plot

width = 0.05
z = torch.arange(-6, 6 + width, width)  # values, in standard deviations of the step
h, log_slope = step.mixture.map(z[:, None, None].expand(-1, *x_s.shape[1:]).to(x_s))
log_density = (log_slope - h**2 / 2).cpu()
density = torch.softmax(log_density, dim=0) / width
mean = (density * z[:, None, None]).sum(dim=0) * width
variance = (density * (z[:, None, None] - mean) ** 2).sum(dim=0) * width
gaussian = torch.distributions.Normal(mean, variance.sqrt()).log_prob(z[:, None, None])
distance = (density * (torch.log(density + 1e-30) - gaussian)).sum(dim=0) * width
token, place = torch.unravel_index(distance.argmax(), distance.shape)
print(f"{distance[token, place]:.3f} nats from a Gaussian; {distance.mean():.4f} in the mean over all numbers")

curves = {"the map h": density[:, token, place], "Gaussian": gaussian[:, token, place].exp()}
points = {name: list(zip(z.tolist(), curve.tolist())) for name, curve in curves.items()}
plot({"density of one number of x_s, given x_t": points}, "in units of the predicted standard deviation")

# %% [markdown]
# ## 5. Train a model
#
# Training needs a data set of images with captions, a model and a loop. The repository has 1,797 handwritten digits of
# 8 × 8 pixels. This model is small. Unlike the models above it has the flow that the paper describes, an autoregressive
# transporter. The predictor is the Transformer that predicts the Gaussian of each step.

# %%
from data import get_tokenizer
from model import NTM, NTMConfig

digits = get_dataset("digits", "train", image_size=8, channels=1)
tokenizer = get_tokenizer("captions")
small = NTM(
    NTMConfig(
        image_size=8,
        channels=1,
        patch_size=2,
        vocab_size=tokenizer.vocab_size,
        text_len=4,
        width=64,
        depth=3,
        heads=4,
        transporter_width=32,
        transporter_blocks=2,
        transporter_layers=1,
        transporter_heads=2,
        steps=4,
        shift=0.5,
    )
)
print(sum(parameter.numel() for parameter in small.parameters()), "parameters")
examples = [digits[i] for i in range(20)]
contact_sheet([image for image, _ in examples], [caption for _, caption in examples], columns=10)

# %% [markdown]
# An update adds noise to a batch of images, evaluates −log p of one step of each trajectory, and follows the gradient.
# There is no other loss: training is maximum likelihood. The loop ends after 120 seconds of processor time.

# %%
import math
import time

from plumbing.images import dequantize
from plumbing.optim import make_optimizers, update_weights

seconds = 120
batch_size = 64
optimizers = make_optimizers(small, "muon", weight_decay=1e-4, device=torch.device("cpu"))
losses = []
progress = 0.0
start = time.thread_time()
while progress < 1:
    numbers = torch.randint(len(digits), (batch_size,)).tolist()
    batch, words = zip(*digits.__getitems__(numbers))
    batch = dequantize(torch.stack(batch))  # 8-bit values become real numbers, which can have a density
    text = tokenizer.encode(words, 4)

    steps, ts = small.draw_pairs(batch_size)
    x = small.noised(small.patchify(batch), text, ts)
    loss = small(batch, text, (steps, ts, x))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)

    warmup = min(1, (len(losses) + 1) / 50)
    update_weights(optimizers, 5e-3 * warmup * (1 + math.cos(math.pi * progress)) / 2)
    small.zero_grad()
    losses.append(loss.item())
    progress = min(1, (time.thread_time() - start) / seconds)

print(len(losses), "updates; loss at the end", round(sum(losses[-20:]) / len(losses[-20:]), 3), "nats per dimension")
averages = [(i, sum(losses[i - 20:i]) / 20) for i in range(20, len(losses), 10)]
plot({"training loss, nats per dimension": {"mean of 20 updates": averages}}, "updates", shown=0.95)

# %% [markdown]
# The new model draws digits in four steps. After two minutes not all of them can be read; `make demo` trains for longer,
# to a loss of −0.08. The model has no denoiser yet, so it removes the last noise by the gradient of its
# own likelihood, the score. `distill.py` would train a denoiser, which does this in one pass.

# %%
captions = [f"the digit {word}" for word in "zero one two three four five six seven eight nine".split()]
text = tokenizer.encode(captions * 2, 4)
ts = small.config.time_grid(0.02)
u = small.sample(text, ts)
x = small.invert(u, ts)
drawn = small.unpatchify(small.score_denoise(x, ts, text))
contact_sheet(drawn, captions * 2, columns=10)

# %% [markdown]
# ## Where to go from here
#
# - `python train.py` trains a better model of digits. `make demo` also distils and samples it.
# - [README.md](README.md) has the commands, the results and the order in which to read the code.
# - [docs/method.md](docs/method.md) has the mathematics. Start reading the code at `NTM.forward` in `model.py`.
# - [docs/data.md](docs/data.md) explains how to train on your own images.
