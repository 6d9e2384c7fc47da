"""The Gaussian of a step, its guidance, and the network that makes it."""
import pytest
import torch
from conftest import randomize
from tiny import TINY, dense, make_gaussian, make_model, make_text
from torch.distributions import MultivariateNormal, Normal

from correlated import CorrelatedGaussian
from flow import rotated
from model import NTM, NTMConfig
from plumbing.tokenizer import get_tokenizer
from predictor import CaptionedTransformer, Gaussian, null_caption, rotations, standard_normal_nll


def guide(conditional, unconditional, weight):
    """Of two diagonal Gaussians, (mean, log_std) each."""
    return Gaussian(*conditional).guided(Gaussian(*unconditional), weight)


# ---------------------------------------------------------------------------------------------------------------
# The Gaussian


def test_density_is_that_of_the_dense_covariance():
    gaussian, u = make_gaussian(0), 3 * torch.randn(2, 5, 3, 4).double()
    expected = -MultivariateNormal(*dense(gaussian)).log_prob(u.flatten(-2))
    torch.testing.assert_close(gaussian.nll(u), expected, rtol=1e-8, atol=1e-8)


def test_standard_normal_density():
    z = torch.randn(2, 5, 3, 4).double()
    torch.testing.assert_close(standard_normal_nll(z), -Normal(0, 1).log_prob(z).sum(dim=(2, 3)))


def test_a_sample_is_mean_and_scaled_noise():
    gaussian, z = make_gaussian(0), torch.randn(2, 5, 3, 4).double()
    expected = gaussian.mean + gaussian.log_std.exp() * z
    torch.testing.assert_close(gaussian.sample(z), expected)
    torch.testing.assert_close(gaussian.sample(z, torch.zeros(2, 5, 0).double()), expected)  # as NTM.sample asks for it


@pytest.mark.parametrize("R", [0, 2])
def test_a_batch_of_gaussians_is_split_in_all_its_parts(R):
    gaussian = make_gaussian(R, batch=(6,))
    split = gaussian.unflatten((-1, 3))
    assert type(split) is type(gaussian)
    for part, whole in zip(split, gaussian):
        assert torch.equal(part, whole.reshape(2, 3, *whole.shape[1:]))


@pytest.mark.parametrize("rank, kind", [(0, Gaussian), (1, CorrelatedGaussian), (3, CorrelatedGaussian)])
def test_mean_and_log_std_come_first_whatever_the_rank(rank, kind):
    model = make_model(rank=rank)
    assert kind._fields[:2] == ("mean", "log_std") and kind._fields[2:] == (("directions",) if rank else ())
    t, s = torch.tensor([0.5, 0.9]).double(), torch.tensor([0.2, 0.4]).double()
    gaussian = model.predict(torch.randn(2, 6, 4).double(), t, s, torch.tensor([4, 4]), make_text(2))
    assert type(gaussian) is kind
    mean, log_std, *directions = gaussian
    assert mean is gaussian.mean and log_std is gaussian.log_std
    assert mean.shape == log_std.shape == (2, 6, 4)
    assert [part.shape for part in directions] == [(2, rank, 6, 4)] * (rank > 0)
    ts = torch.tensor([[0.1, 0.5, 1.0]] * 2).double()
    of_steps = model.predict_all(torch.randn(2, 3, 6, 4).double(), ts, torch.tensor([2, 2]), make_text(2))
    assert type(of_steps) is kind and of_steps.mean.shape == (2, 2, 6, 4)
    assert type(of_steps.guided(of_steps, 1.0)) is kind


@pytest.mark.parametrize("method", ["nll", "sample"])
@pytest.mark.parametrize("R", [0, 2])
def test_densities_and_samples_are_exact_under_bfloat16(R, method):
    gaussian, u = make_gaussian(R, dtype=torch.float32), torch.randn(2, 5, 3, 4)
    arguments = (u, torch.randn(2, 5, R)) if method == "sample" else (u,)
    exact = getattr(gaussian, method)(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(getattr(gaussian, method)(*arguments), exact)


# ---------------------------------------------------------------------------------------------------------------
# Guidance


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 4.0])
def test_guided_gaussian_is_the_normalised_product_of_powers(weight):
    mean_c, log_std_c = torch.tensor([[0.3, -1.0, 0.0], [-0.4, -1.2, 0.0]]).double()
    mean_u, log_std_u = torch.tensor([[-0.5, 0.2, 1.0], [-0.1, 0.3, 0.0]]).double()  # the last as wide as its partner
    mean, log_std = guide((mean_c, log_std_c), (mean_u, log_std_u), weight)
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)[:, None]
    log_density = ((1 + weight) * Normal(mean_c, log_std_c.exp()).log_prob(x)
                   - weight * Normal(mean_u, log_std_u.exp()).log_prob(x))
    p = log_density.softmax(0)
    torch.testing.assert_close(mean, (p * x).sum(0))
    torch.testing.assert_close(log_std.exp(), (p * (x - mean)**2).sum(0).sqrt())


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_guidance_keeps_the_spread_where_the_caption_widens_it(weight):
    mean, log_std = guide((torch.tensor(0.3), torch.tensor(-0.2)), (torch.tensor(-0.5), torch.tensor(-0.9)), weight)
    torch.testing.assert_close(mean, torch.tensor(0.3 + weight * 0.8))
    torch.testing.assert_close(log_std, torch.tensor(-0.2))


def test_no_guidance_is_the_conditional_itself():
    conditional, unconditional = torch.randn(2, 2, 3, 6, 4)
    assert torch.equal(torch.stack(guide(conditional, unconditional, 0.0)), conditional)


@pytest.mark.parametrize("weight", [1.0, 3e7, 1e9, 1e12])
def test_guidance_keeps_its_digits_in_float32(weight):
    """Of sigma_c a little below sigma_u, where 1 + w - w r loses all digits to cancellation."""
    generator = torch.Generator().manual_seed(0)
    mean_c, mean_u, log_std_u = torch.randn(3, 1000, generator=generator)
    log_std_c = log_std_u - 10 ** (-4 * torch.rand(1000, generator=generator) - 1)
    pairs = (mean_c, log_std_c), (mean_u, log_std_u)
    mean, log_std = guide(*pairs, weight)
    (c, log_c), (u, log_u) = ((a.double(), b.double()) for a, b in pairs)
    precision_c, precision_u = torch.exp(-2 * log_c), torch.exp(-2 * log_u)
    precision = (1 + weight) * precision_c - weight * precision_u  # of p_c^(1+w) / p_u^w
    expected = ((1 + weight) * precision_c * c - weight * precision_u * u) / precision
    torch.testing.assert_close(log_std, (-0.5 * precision.log()).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, expected.float(), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# The network


def test_null_caption_is_the_id_1_and_padding():
    text = torch.tensor([[5, 6, 7], [8, 0, 0]])
    assert null_caption(text).tolist() == [[1, 0, 0], [1, 0, 0]] and text[0, 0] == 5
    assert torch.equal(null_caption(text), get_tokenizer().encode(["", " "], 3))  # what training drops captions to


def test_at_first_the_trunk_is_the_image_tokens_normalised():
    """No layer does anything yet: what comes out is what went in for each patch, and no word."""
    trunk = CaptionedTransformer(NTMConfig(**TINY), num_times=2)
    tokens = torch.randn(2, 6, 4)
    expected = torch.nn.functional.layer_norm(trunk.proj_in(tokens), (16,))
    torch.testing.assert_close(trunk(tokens, make_text(2), torch.rand(2, 2)), expected)
    randomize(trunk)
    hidden = trunk(tokens, make_text(2), torch.rand(2, 2))
    torch.testing.assert_close(hidden.mean(dim=2), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.var(dim=2, correction=0), torch.ones(2, 6), atol=1e-3, rtol=0)


def test_the_trunk_knows_where_a_token_is():
    """Patches that change places, or words that do, are another image and another caption."""
    trunk = randomize(CaptionedTransformer(NTMConfig(**TINY), num_times=1)).double()
    tokens, times, text = torch.randn(1, 6, 4).double(), torch.rand(1, 1).double(), torch.tensor([[2, 3, 4]])
    before = trunk(tokens, text, times)
    swapped = [1, 0, 2, 3, 4, 5]
    assert (trunk(tokens[:, swapped], text, times)[:, swapped] - before).abs().max() > 0.01
    assert (trunk(tokens, text[:, [1, 0, 2]], times) - before).abs().max() > 0.01


def test_rotary_angles():
    """Pairs encode row, column and place in the caption, in turn; the first three turn by 1 radian a place, the next by
    100 to the power of minus their share of all. Words count from 1, for patches have place 0 in the caption."""
    found = rotations(2, 2, 3, 6).double()
    places = [(0, 0, 1), (0, 0, 2), *((row, column, 0) for row in range(2) for column in range(3))]
    frequencies = [1, 1, 1, 0.1, 0.1, 0.1]
    angles = torch.tensor([[place[p % 3] * frequencies[p] for p in range(6)] for place in places]).double()
    torch.testing.assert_close(found, torch.stack([angles.cos(), angles.sin()]), atol=1e-6, rtol=0)


def test_rotary_positions_are_distances():
    """Products of a rotated query and key: those of words by how far apart they are in the caption, of patches by rows
    and columns; and no two of them alike."""
    L, rows, columns, pairs = 5, 4, 3, 6
    rotation = rotations(L, rows, columns, pairs).double()
    q, k = torch.randn(2, 2 * pairs).double()
    products = torch.einsum("nd,md->nm", *(rotated(a.expand(L + rows * columns, -1), rotation) for a in (q, k)))
    torch.testing.assert_close(products[:L, :L][1:, 1:], products[:L, :L][:-1, :-1], atol=1e-5, rtol=0)
    patches = products[L:, L:].view(rows, columns, rows, columns)
    torch.testing.assert_close(patches[1:, 1:, 1:, 1:], patches[:-1, :-1, :-1, :-1], atol=1e-5, rtol=0)
    distances = torch.cat([products[0, 1:L], patches[0, 0].flatten()])
    assert (distances[:, None] - distances).abs().add(torch.eye(len(distances))).min() > 1e-4


def test_width_of_an_odd_head_is_named():
    with pytest.raises(ValueError, match="width 15 is not divisible by twice 3 heads"):
        NTM(NTMConfig(width=15, heads=3))
