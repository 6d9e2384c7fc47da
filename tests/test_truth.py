"""The true density of noisy scenes, against quadrature and plain averages; and how far a model is from it."""
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHORT, SMALL, fails, run
from torch.distributions import MultivariateNormal, Normal

import evaluate
from data import get_dataset, get_tokenizer
from flow import reverse_posterior
from model import NTM, NTMConfig
from plumbing import shapes, truth

SIZE = 8


def drawn(caption):
    """The draws of the first held-out scene with such a caption, a regular expression, and its image in [-1, 1]."""
    for i in itertools.count():
        u = shapes.uniforms(0, [~i], shapes.DRAWS)
        scene = shapes.compose(u)
        if re.fullmatch(caption, shapes.captions(scene)[0]):
            return u[0], (shapes.render(scene, SIZE)[0] + 0.5) / 128 - 1


def noisy(image, t, rng):
    return ((1 - t) * image + t * rng.standard_normal(image.shape)).astype(np.float32)


def mean_density(x, t, u):
    """The log of the mean over scenes, given by all of their draws (P, DRAWS), of N(x; (1-t) x_0, t^2)."""
    x0 = (shapes.render(shapes.compose(u), SIZE) + 0.5) / 128 - 1
    variance = t**2 + (1 - t)**2 / 128**2 / 12
    log_p = -0.5 * ((x - (1 - t) * x0)**2).sum((1, 2, 3)) / variance - 0.5 * x.size * math.log(2 * math.pi * variance)
    return np.logaddexp.reduce(log_p) - math.log(len(u))


def test_one_object_by_quadrature():
    """Its size and two places are all that the caption leaves open: a grid of 27,000 scenes."""
    rng, t = np.random.default_rng(0), 0.4
    u, image = drawn(r"a \w+ \w+")
    x = noisy(image, t, rng)
    grid = np.broadcast_to(u, (30**3, shapes.DRAWS)).copy()
    middle = (np.arange(30) + 0.5) / 30
    grid[:, [8, 12, 16]] = np.array(list(itertools.product(middle, repeat=3)))
    estimates = [truth.posterior(x, t, u, rng, particles=400)[0] for _ in range(4)]
    assert np.mean(estimates) == pytest.approx(mean_density(x, t, grid), abs=0.25)


@pytest.mark.parametrize("caption, relation", [("three .*", True), ("a .* left of .*", False)])
def test_several_objects_by_the_mean_over_scenes(caption, relation):
    """Where the noise is so strong that scenes as they are drawn explain an image; a relation is the caption's."""
    rng, t = np.random.default_rng(1), 0.9
    u, image = drawn(caption)
    x = noisy(image, t, rng)
    scenes = rng.random((20_000, shapes.DRAWS))
    fixed = [0, 2, 3, 4] + ([] if relation else [1])
    scenes[:, fixed] = u[fixed]
    estimates = [truth.posterior(x, t, u, rng, particles=400)[0] for _ in range(4)]
    assert np.mean(estimates) == pytest.approx(mean_density(x, t, scenes), abs=0.1)


def test_nearest_gaussians_have_the_moments_of_the_posterior():
    """Of a step from noise so strong that scenes as they are drawn, weighted, are those that explain it."""
    rng, (s, t) = np.random.default_rng(2), (0.7, 0.9)
    u, image = drawn("two .*")
    x_t, x_s = noisy(image, t, rng), noisy(image, s, rng)
    scenes = rng.random((20_000, shapes.DRAWS))
    scenes[:, [0, 2, 3, 4]] = u[[0, 2, 3, 4]]
    x0 = (shapes.render(shapes.compose(scenes), SIZE).reshape(20_000, -1) + 0.5) / 128 - 1
    log_p = -0.5 * np.square(x_t.flatten() - (1 - t) * x0).sum(1) / t**2
    weights = np.exp(log_p - np.logaddexp.reduce(log_p))
    A, B, C = reverse_posterior(torch.tensor(t), torch.tensor(s))
    mean = A.item() * x_t.flatten() + B.item() * weights @ x0
    covariance = B.item()**2 * np.cov(x0.T, aweights=weights, ddof=0) + C.item()**2 * np.eye(x_t.size)
    found = truth.log_gaussians(*map(torch.from_numpy, (x_s, x_t)), A, B, C, *truth.posterior(x_t, t, u, rng, 4000)[1:])
    x_s = torch.from_numpy(x_s).flatten().double()
    full = MultivariateNormal(*map(torch.from_numpy, (mean, covariance))).log_prob(x_s)
    deviation = torch.from_numpy(covariance.diagonal().copy()).sqrt()
    independent = Normal(torch.from_numpy(mean), deviation).log_prob(x_s).sum()
    assert found == pytest.approx((independent.item(), full.item()), abs=0.3)


def test_a_model_that_knows_the_truth_is_at_no_distance(monkeypatch):
    """The first step's is p(x_0.7), as pure noise says nothing of an image; the second's is q(x_t | x_s) p(x_s) / p(x_t)."""
    monkeypatch.setattr(evaluate, "truth_examples", 3)
    dataset, tokenizer = get_dataset("shapes", "val", SIZE, 3), get_tokenizer()
    network = NTM(NTMConfig(image_size=SIZE, channels=3, width=8, depth=1, heads=1, transporter_blocks=0))
    ts = torch.tensor([0.02, 0.5, 0.7, 1.0])

    def trajectory_nll(x, ts, text):
        levels = network.unpatchify(x.flatten(0, 1)).unflatten(0, x.shape[:2]).numpy()
        nll = torch.zeros(len(x), ts.shape[1])
        for i, (t1, t2) in enumerate(ts[:, 1:3].double().tolist()):
            draws, rng = shapes.uniforms(0, [~i], shapes.DRAWS)[0], np.random.default_rng(9)
            log_q = [np.mean([truth.posterior(levels[i, k], t, draws, rng, 2000)[0] for _ in range(2)])
                     for k, t in ((1, t1), (2, t2))]
            alpha, variance = (1 - t2) / (1 - t1), t2**2 - ((1 - t2) / (1 - t1) * t1)**2
            transition = -0.5 * ((levels[i, 2] - alpha * levels[i, 1])**2 / variance + math.log(2 * math.pi * variance)).sum()
            nll[i, 1], nll[i, 2] = -(log_q[0] + transition - log_q[1]), -log_q[1]
        return nll

    network.trajectory_nll = trajectory_nll
    model = SimpleNamespace(network=network, tokenizer=tokenizer, device=torch.device("cpu"), ts=ts)
    found = evaluate.evaluate_truth(model, dataset)
    assert list(found) == [f"step {k}{name}" for k in (1, 2)
                           for name in ("", ", nearest diagonal Gaussian", ", nearest full Gaussian")]
    assert abs(found["step 2"]["mean"]) < 0.3 and abs(found["step 1"]["mean"]) < 0.8
    assert found["step 2, nearest diagonal Gaussian"]["mean"] > found["step 2, nearest full Gaussian"]["mean"] - 0.2


def test_of_shapes_alone(tmp_path, trained):
    out = [f"--out_dir={tmp_path}", "--device=cpu"]
    run("train.py", *SHORT, *SMALL, *out, "--dataset=shapes", f"--image_size={SIZE}", "--channels=3", "--text_len=8",
        "--transporter_blocks=0", "--max_iters=1")
    _, printed = run("evaluate.py", *out, "--parts=truth", "--truth_examples=1")
    assert "nearest full Gaussian" in printed
    results = json.loads((tmp_path / "evaluate.json").read_text())["truth"]
    assert len(results) == 9 and "step 1, nearest full Gaussian" in results
    out = [f"--out_dir={tmp_path / 'one'}", "--device=cpu"]
    run("train.py", *SHORT, *SMALL, *out, "--dataset=shapes", f"--image_size={SIZE}", "--channels=3", "--text_len=8",
        "--transporter_blocks=0", "--max_iters=1", "--steps=1")
    assert "part 'truth' is unknown of an NTM" in fails("evaluate.py", *out, "--parts=truth")
    assert "part 'truth' is unknown of an NTM" in fails("evaluate.py", f"--out_dir={trained}", "--device=cpu",
                                                        "--parts=truth")
