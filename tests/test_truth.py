"""The true density of noisy scenes, against quadrature and plain averages; and how far a model is from it."""
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHORT, SMALL, run
from torch.distributions import MultivariateNormal, Normal

from data import get_dataset, get_tokenizer
from evidence import truth
from flow import reverse_posterior
from model import NTM, NTMConfig
from plumbing import shapes
from plumbing.rng import uniforms

SIZE = 8


def drawn(caption):
    """The draws of the first held-out scene with such a caption, a regular expression, and its image in [-1, 1]."""
    for i in itertools.count():
        u = uniforms(0, [~i], shapes.DRAWS)
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


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.9])
def test_resampling_is_systematic(offset):
    """Places at equal distances from a random first one, and each number as often as places fall into its share."""
    weights, rng = np.array([1.0, 0.0, 2.0, 5.0]), SimpleNamespace(random=lambda: offset)
    places = [(i + offset) / 16 for i in range(16)]
    expected = [0 if place <= 1 / 8 else 2 if place <= 3 / 8 else 3 for place in places]
    assert truth.resample(weights, 16, rng).tolist() == expected


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


@pytest.mark.slow
def test_a_model_that_knows_the_truth_is_at_no_distance():
    """The first step's is p(x_0.7), as pure noise says nothing of an image; the second's is q(x_t | x_s) p(x_s) / p(x_t)."""
    dataset, tokenizer = get_dataset("shapes", "val", SIZE, 3), get_tokenizer()
    network = NTM(NTMConfig(image_size=SIZE, channels=3, width=8, depth=1, heads=1, transporter_blocks=0))
    ts = torch.tensor([0.02, 0.5, 0.7, 1.0])

    def trajectory_nll(x, ts, text):
        levels = network.unpatchify(x.flatten(0, 1)).unflatten(0, x.shape[:2]).numpy()
        nll = torch.zeros(len(x), ts.shape[1])
        for i, (t1, t2) in enumerate(ts[:, 1:3].double().tolist()):
            draws, rng = uniforms(0, [~i], shapes.DRAWS)[0], np.random.default_rng(9)
            log_q = [np.mean([truth.posterior(levels[i, k], t, draws, rng, 2000)[0] for _ in range(2)])
                     for k, t in ((1, t1), (2, t2))]
            alpha, variance = (1 - t2) / (1 - t1), t2**2 - ((1 - t2) / (1 - t1) * t1)**2
            transition = -0.5 * ((levels[i, 2] - alpha * levels[i, 1])**2 / variance + math.log(2 * math.pi * variance)).sum()
            nll[i, 1], nll[i, 2] = -(log_q[0] + transition - log_q[1]), -log_q[1]
        return nll

    network.trajectory_nll = trajectory_nll
    found = truth.summary(truth.distances(network, tokenizer, ts, dataset, 3))
    assert list(found) == [f"step {k}{name}" for k in (1, 2)
                           for name in ("", ", nearest diagonal Gaussian", ", nearest full Gaussian")]
    assert abs(found["step 2"]["mean"]) < 0.3 and abs(found["step 1"]["mean"]) < 0.8
    assert found["step 2, nearest diagonal Gaussian"]["mean"] > found["step 2, nearest full Gaussian"]["mean"] - 0.2


def test_the_numbers_are_summed_up_by_step():
    rows = torch.tensor([[[1.0, 2, 3], [4, 5, 6]], [[3.0, 2, 3], [4, 5, 8]]])
    found = truth.summary(rows)
    assert found["step 1"] == {"mean": 2.0, "standard_error": pytest.approx(1.0)}
    assert found["step 1, nearest diagonal Gaussian"] == {"mean": 2.0, "standard_error": 0.0}
    assert found["step 2, nearest full Gaussian"]["mean"] == 7
    assert truth.summary(rows[:1])["step 2"] == {"mean": 4.0}  # one image has no standard error


def test_of_shapes_alone(tmp_path, trained, capsys):
    shapes = ["--dataset=shapes", f"--image_size={SIZE}", "--channels=3", "--text_len=8", "--transporter_blocks=0"]
    settings = [*SHORT, *SMALL, *shapes, "--max_iters=1"]
    run("train.py", *settings, f"--out_dir={tmp_path}")
    truth.main([str(tmp_path), "--device=cpu", "--examples=1"])
    assert "nearest full Gaussian" in capsys.readouterr().out
    results = json.loads((tmp_path / "truth.json").read_text())["truth"]
    assert len(results) == 9 and "step 1, nearest full Gaussian" in results
    run("train.py", *settings, f"--out_dir={tmp_path / 'one'}", "--steps=1")
    with pytest.raises(SystemExit, match="steps is 1, but the truth is known for all steps except the last"):
        truth.main([str(tmp_path / "one"), "--device=cpu"])
    with pytest.raises(SystemExit, match="data set digits, channels 1: the truth is known for shapes with 3 channels"):
        truth.main([str(trained), "--device=cpu"])


@pytest.mark.parametrize("settings, channels, steps, first_noise, message", [
    ("digits", 3, 4, 1, "data set digits, channels 3"), ("shapes", 1, 4, 1, "data set shapes, channels 1"),
    ("shapes", 3, 1, 1, "steps is 1"), ("shapes", 3, 4, 0.5, "first_noise 0.5")])
def test_models_whose_truth_is_not_known_are_refused(settings, channels, steps, first_noise, message):
    config = SimpleNamespace(channels=channels, first_noise=first_noise)
    with pytest.raises(ValueError, match=message) as error:
        truth.check("ckpt.pt", {"dataset": settings}, config, steps)
    assert "\n" not in str(error.value)
    truth.check("ckpt.pt", {"dataset": "shapes"}, SimpleNamespace(channels=3), 2)


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: out_dir"), (["nowhere"], "no checkpoint nowhere/ckpt.pt"),
    (["x", "--examples=0"], "--examples is 0, but must be at least 1"), (["x", "--steps=-1"], "--steps is -1"),
    (["x", "--examples=many"], "invalid int value: 'many'"), (["x", "--device=abacus"], "device 'abacus'")])
def test_what_the_program_cannot_do_is_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        truth.main(arguments)
    assert message in stop.value.code and "\n" not in stop.value.code
