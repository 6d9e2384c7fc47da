"""The mathematics of one step: closed forms against Bayes' rule, log-determinants against autograd's full Jacobian."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import covariance, randomize
from torch.autograd.functional import jacobian
from torch.distributions import Normal

from flow import (Attention, Layer, Transporter, attend, forward_trajectory, reverse_posterior, rotated, time_grid,
                  trajectory_covariance)

TOKENS, DIM = 5, 3
METHODS = "cache", "jacobi"
GRID = torch.tensor([0.02, 0.263, 0.509, 0.754, 1.0], dtype=torch.float64)


def alpha_beta(t, s):
    """The Markov step as the paper states it, before any rearrangement."""
    alpha = (1 - t) / (1 - s)
    return alpha, (t**2 - alpha**2 * s**2) ** 0.5


# ---------------------------------------------------------------------------------------------------------------
# Time grid


def test_grid_has_the_published_levels():
    # e^m = e^0.5 at 256 tokens; at 4096, m = 0.5 + 0.65
    torch.testing.assert_close(time_grid(4, 0.02, 256), torch.tensor([0.02, 0.35466, 0.62246, 0.83182, 1.0]),
                               atol=1e-5, rtol=0)
    a = math.exp(1.15)
    torch.testing.assert_close(time_grid(2, 0.0, 4096), torch.tensor([0, a / (a + 1), 1]))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 16, 64])
@pytest.mark.parametrize("shift", [None, 0.1, 1.0, 3.0])
def test_grid_ascends_to_exactly_one(steps, shift):
    for t_min in (0.001, torch.tensor(0.001), torch.tensor(0.001).double()):
        ts = time_grid(steps, t_min, 37, shift)
        assert ts.shape == (steps + 1,) and (ts.diff() > 0).all()
        assert ts[-1] == 1  # exactly: the transporter tells pure noise by it


def test_shift_replaces_the_formula():
    torch.testing.assert_close(time_grid(4, 0.0, 9, shift=1.0), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    # sigma / (1 - sigma) = shift * k / (T - k): the shift multiplies the odds of every level
    sigma = time_grid(5, 0.0, 9, shift=0.3)[1:-1]
    torch.testing.assert_close(sigma / (1 - sigma), 0.3 * torch.tensor([1 / 4, 2 / 3, 3 / 2, 4 / 1]))


def test_grid_per_example():
    t_min = torch.tensor([0.0, 0.01, 0.05], dtype=torch.float64)
    ts = time_grid(4, t_min, 256)
    assert ts.shape == (3, 5) and ts.dtype == torch.float64
    for row, start in zip(ts, t_min):
        torch.testing.assert_close(row.float(), time_grid(4, start.item(), 256))


@pytest.mark.parametrize("t_min", [-0.01, 0.25, 0.6])
def test_grid_refuses_a_start_outside_the_first_step(t_min):
    with pytest.raises(ValueError, match=str(t_min)):
        time_grid(4, t_min, 64, shift=1.0)  # whose first level is 1/4


# ---------------------------------------------------------------------------------------------------------------
# Forward trajectory


@pytest.mark.parametrize("ts", [GRID, GRID[:2], GRID[2:4], GRID[3:], torch.tensor([0, 0.3, 1]).double()])
def test_forward_is_linear_with_the_right_mean_and_covariance(ts):
    K = len(ts)
    x0 = torch.randn(K, 2, 3).double()
    mean = forward_trajectory(x0, ts.expand(K, K), noise=torch.zeros(K, K, 2, 3).double())
    torch.testing.assert_close(mean, (1 - ts)[:, None, None] * x0[:, None])
    # example k has unit noise at level k only, so what comes out is column k of a factor of the covariance
    noise = torch.eye(K).double()[:, :, None, None].expand(K, K, 2, 3)
    factor = (forward_trajectory(x0, ts.expand(K, K), noise=noise) - mean).permute(2, 3, 1, 0)
    torch.testing.assert_close(factor @ factor.mT, covariance(ts).expand(2, 3, K, K))
    assert (factor.triu(1) == 0).all()  # no level knows the noise of a later one


def test_forward_draws_have_the_right_mean_and_covariance():
    n, x0 = 100_000, torch.tensor([0.7, -0.4]).double()
    x = forward_trajectory(x0[:, None].expand(n, 2, 1), GRID.expand(n, 5), torch.Generator().manual_seed(1))
    noise = x[..., 0] - (1 - GRID)[:, None] * x0  # (n, levels, tokens)
    S = covariance(GRID)
    # the sample mean of a normal variable has the standard error sqrt(S_ii / n), a sample covariance
    # sqrt((S_ii S_jj + S_ij^2) / n): five of them, for a chance of one in 10^5 over the entries compared here
    assert (noise.mean(0).abs() < 5 * (S.diag() / n).sqrt()[:, None]).all()
    error = 5 * ((S.diag()[:, None] * S.diag() + S**2) / n).sqrt()
    for token in noise.unbind(2):
        assert ((token.T @ token / n - S).abs() < error).all()
    assert ((noise[:, :, 0].T @ noise[:, :, 1] / n).abs() < error).all()  # tokens are independent


def test_forward_takes_a_grid_per_example():
    x0, noise = torch.randn(2, 4, 3), torch.randn(2, 5, 4, 3)
    ts = time_grid(4, torch.tensor([0.0, 0.05]), 256)
    x = forward_trajectory(x0, ts, noise=noise)
    for b in range(2):
        torch.testing.assert_close(x[b:b + 1], forward_trajectory(x0[b:b + 1], ts[b:b + 1], noise=noise[b:b + 1]))
    assert torch.equal(x[0, 0], x0[0])  # t_0 = 0 is the data itself
    torch.testing.assert_close(x[:, -1], noise[:, -1])  # t_T = 1 is noise and nothing else


def test_forward_is_reproducible_from_its_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return forward_trajectory(torch.ones(2, 4, 3), GRID.expand(2, 5).float(), generator)

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert draw(3).shape == (2, 5, 4, 3)
    noise = forward_trajectory(torch.ones(2, 4, 3).double(), GRID.expand(2, 5))[:, -1]
    assert noise.dtype == torch.float64 and (noise != noise.float()).any()  # its own precision, to the last digit


@pytest.mark.parametrize("t, s, expected", [(0.754, 0.509, (0.2283, 0.4348, 0.4790)),
                                            (0.509, 0.263, (0.1779, 0.6497, 0.2469)),
                                            (0.263, 0.020, (0.0043, 0.9768, 0.0200)),
                                            (1.0, 0.300, (0, 0.7, 0.3)),
                                            (0.4, 0.0, (0, 1, 0))])
def test_posterior_has_the_published_coefficients(t, s, expected):
    result = torch.stack(reverse_posterior(torch.tensor(t).double(), torch.tensor(s).double()))
    torch.testing.assert_close(result, torch.tensor(expected).double(), atol=6e-5, rtol=0)


def test_posterior_is_bayes_rule():
    times = torch.rand(20, 2).double() * 0.96 + 0.02
    for s, t in times.sort(dim=1).values:
        x0, noise = torch.randn(2).double()
        xt = (1 - t) * x0 + t * noise
        alpha, beta = alpha_beta(t, s)
        grid = (1 - s) * x0 + s * torch.linspace(-12, 12, 20_001, dtype=torch.float64)  # all of q(x_s | x_0)
        log_density = Normal((1 - s) * x0, s).log_prob(grid) + Normal(alpha * grid, beta).log_prob(xt)
        weight = log_density.softmax(0)
        mean = (weight * grid).sum()
        std = (weight * (grid - mean)**2).sum().sqrt()
        A, B, C = reverse_posterior(t, s)
        torch.testing.assert_close(torch.stack([A * xt + B * x0, C]), torch.stack([mean, std]), atol=1e-9, rtol=1e-9)


def test_posterior_keeps_its_shape_and_its_digits():
    t, s = torch.rand(4) * 0.5 + 0.5, torch.rand(4) * 0.5
    for result, exact in zip(reverse_posterior(t, s), reverse_posterior(t.double(), s.double())):
        assert result.shape == (4,) and result.dtype == torch.float32
        torch.testing.assert_close(result, exact.float(), rtol=1e-5, atol=0)
    # nearby times: beta^2 = t^2 - alpha^2 s^2 written so would have lost half of float32's digits
    t, s = torch.tensor(0.5001), torch.tensor(0.5)
    for result, exact in zip(reverse_posterior(t, s), reverse_posterior(t.double(), s.double())):
        torch.testing.assert_close(result, exact.float(), rtol=1e-5, atol=0)


def test_covariance_is_the_formula():
    ts = time_grid(4, torch.tensor([0.0, 0.02, 0.05]).double(), 256)
    S = trajectory_covariance(ts)
    for row, result in zip(ts, S):
        torch.testing.assert_close(result, covariance(row))
    torch.testing.assert_close(trajectory_covariance(ts[1]), S[1])
    assert (S[:, -1, -1] == 1).all() and (S[:, -1, :-1] == 0).all()  # pure noise, independent of the rest
    assert (S[0, 0] == 0).all()  # nothing is noisy at t = 0
    assert (torch.linalg.eigvalsh(S) > -1e-12).all()


# ---------------------------------------------------------------------------------------------------------------
# Transporter


def make_transporter(blocks=3, scale=1.0, dtype=torch.float64, num_tokens=TOKENS):
    return randomize(Transporter(num_tokens, DIM, 16, blocks, 2, 2), scale).to(dtype)


def make_input(batch=3, dtype=torch.float64, num_tokens=TOKENS):
    """x, t and steps; no two examples have the same."""
    steps = torch.tensor([4, 8, 16, 2])[:batch]
    return torch.randn(batch, num_tokens, DIM, dtype=dtype), torch.linspace(0.02, 0.9, batch, dtype=dtype), steps


def log_scales(transporter, x, t, steps):
    """Every log-scale l as the map itself shows it: u_n = (x_n - mu) exp(-l), so l = -log du_n/dx_n."""
    result, c = [], transporter.condition(t, steps)
    for block in transporter.blocks:
        unit = torch.eye(x[0].numel(), dtype=x.dtype)
        for example, condition in zip(x, c):
            J = jacobian(lambda one: block(one[None], condition[None])[0][0], example).reshape_as(unit)
            result.append(-J.diag().log())
        x = block(x, c)[0]
    return torch.cat(result)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_logdet_is_that_of_the_full_jacobian(blocks):
    transporter, (x, t, steps) = make_transporter(blocks), make_input()
    u, logdet = transporter(x, t, steps)
    for b in range(len(x)):
        J = jacobian(lambda one: transporter(one[None], t[b:b + 1], steps[b:b + 1])[0][0], x[b])
        sign, expected = torch.linalg.slogdet(J.reshape(TOKENS * DIM, -1))
        assert sign == 1
        torch.testing.assert_close(logdet[b], expected, rtol=1e-8, atol=0)
    assert logdet.abs().max() > 0.5


def test_blocks_are_triangular_in_alternating_order():
    transporter, (x, t, steps) = make_transporter(4), make_input(1)
    c = transporter.condition(t, steps)
    for i, block in enumerate(transporter.blocks):
        J = jacobian(lambda one: block(one[None], c)[0][0], x[0]).permute(0, 2, 1, 3)  # (n, m, d, e): du_nd / dx_me
        for n in range(TOKENS):
            for m in range(TOKENS):
                before = m < n if i % 2 == 0 else m > n
                if before:
                    assert (J[n, m] != 0).all()
                elif m == n:
                    assert (J[n, n].diag() > 0).all() and (J[n, n] - J[n, n].diag().diag() == 0).all()
                else:
                    assert (J[n, m] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_moves_no_parameters_at_or_before_itself(dtype):
    block, c = make_transporter(1, dtype=dtype).blocks[0], torch.randn(2, 16, dtype=dtype)
    x = make_input(2, dtype)[0]
    before = block.affine(x, c)
    for n in range(TOKENS):
        moved = x.clone()
        moved[:, n] += 10
        for a, b in zip(before, block.affine(moved, c)):
            assert torch.equal(a[:, :n + 1], b[:, :n + 1])
            assert (a[:, n + 1:] != b[:, n + 1:]).all()


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_inverse_undoes_forward_and_forward_inverse(blocks, method, dtype, atol):
    transporter, (x, t, steps) = make_transporter(blocks, dtype=dtype), make_input(dtype=dtype)
    size = log_scales(transporter, x, t, steps).abs()
    assert 0.5 < size.mean() < 2 and size.max() > 1.5  # the scales really stretch
    u = transporter(x, t, steps)[0]
    assert (u - x).abs().mean() > 0.5
    back = transporter.inverse(u, t, steps, method, tol=0)
    torch.testing.assert_close(back, x, atol=atol, rtol=0)
    there = transporter(transporter.inverse(x, t, steps, method, tol=0), t, steps)[0]
    torch.testing.assert_close(there, x, atol=atol, rtol=0)


def test_log_scales_stay_bounded():
    transporter, (x, t, steps) = make_transporter(1, scale=30.0), make_input()
    size = log_scales(transporter, x, t, steps).abs()
    assert 3.9 < size.max() <= 4


def test_jacobi_counts_sweeps_and_is_exact_after_as_many_as_tokens():
    transporter, (x, t, steps) = make_transporter(3), make_input()
    u = transporter(x, t, steps)[0]
    back = transporter.inverse(u, t, steps, "jacobi", tol=0)
    assert transporter.sweeps == [TOKENS] * 3
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)


def test_sweeps_stop_early_where_tokens_depend_weakly():
    transporter, (x, t, steps) = make_transporter(2, scale=0.3, num_tokens=24), make_input(num_tokens=24)
    u = transporter(x, t, steps)[0]
    sweeps = []
    for tol in (1e-2, 1e-5, 1e-8):
        back = transporter.inverse(u, t, steps, "jacobi", tol=tol)
        torch.testing.assert_close(back, x, atol=10 * tol, rtol=0)
        sweeps.append(max(transporter.sweeps))
    assert 1 <= sweeps[0] <= sweeps[1] <= sweeps[2] <= 24 and sweeps[0] < 24


def test_on_a_cpu_an_inverse_is_by_the_scan_and_counts_no_sweeps():
    transporter, (x, t, steps) = make_transporter(2, num_tokens=11), make_input(num_tokens=11)
    u = transporter(x, t, steps)[0]
    transporter.inverse(u, t, steps, "jacobi")
    assert len(transporter.sweeps) == 2
    back = transporter.inverse(u, t, steps)
    assert torch.equal(back, transporter.inverse(u, t, steps, "cache")) and transporter.sweeps == []
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)


def test_jacobi_goes_on_whichever_way_tokens_move():
    """One example of two numbers at a time, whose first sweep raises both, lowers both, or neither."""
    transporter = Transporter(2, 1, 16, 1, 1, 2).double()
    t, steps, ways = torch.tensor([0.5]).double(), torch.tensor([4]), set()
    for u in torch.randn(12, 1, 2, 1).double():
        randomize(transporter)
        exact = transporter.inverse(u, t, steps)
        torch.testing.assert_close(transporter.inverse(u, t, steps, "jacobi", tol=1e-9), exact, rtol=0, atol=1e-7)
        shift, log_scale = transporter.blocks[0].affine(u, transporter.condition(t, steps))
        ways.add(tuple((u * torch.exp(log_scale) + shift > u).flatten().tolist()))
    assert {(True, True), (False, False)} <= ways


def test_identity_at_initialisation():
    x, t, steps = make_input(dtype=torch.float32)
    transporter = Transporter(TOKENS, DIM, 16, 3, 2, 2)
    u, logdet = transporter(x, t, steps)
    assert torch.equal(u, x) and (logdet == 0).all()
    for method in METHODS:
        assert torch.equal(transporter.inverse(x, t, steps, method), x)


def test_identity_at_pure_noise():
    transporter, (x, t, steps) = make_transporter(), make_input()
    t[1] = 1
    u, logdet = transporter(x, t, steps)
    assert torch.equal(u[1], x[1]) and logdet[1] == 0
    assert not (u[::2] == x[::2]).any() and (logdet[::2] != 0).all()
    for method in METHODS:
        back = transporter.inverse(x, t, steps, method)
        assert torch.equal(back[1], x[1]) and not (back[::2] == x[::2]).any()


def test_no_blocks_is_the_identity():
    transporter, (x, t, steps) = make_transporter(0), make_input()
    u, logdet = transporter(x, t, steps)
    assert torch.equal(u, x) and torch.equal(logdet, torch.zeros(3).double())
    for method in METHODS:
        assert torch.equal(transporter.inverse(x, t, steps, method), x)


def test_unknown_inversion_method_is_named():
    with pytest.raises(ValueError, match="newton"):
        make_transporter().inverse(*make_input(), method="newton")


def test_times_enter_as_cosines_and_sines():
    """Of 32 frequencies, geometric from 1 to 1,000 radians per unit of time; T enters as 1/T."""
    transporter, seen = make_transporter(1, dtype=torch.float32), []
    transporter.time.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0]))
    transporter.condition(torch.tensor([0.5, 0.001]), torch.tensor([4, 8]))
    for row, times in zip(seen[0], ((0.5, 0.25), (0.001, 0.125))):
        angles = [[t * 1000 ** (k / 31) for k in range(32)] for t in times]
        expected = [f(angle) for of_one in angles for f in (math.cos, math.sin) for angle in of_one]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=2e-4)


def test_time_and_step_count_condition_every_token():
    transporter, (x, t, steps) = make_transporter(1), make_input()
    u = transporter(x, t, steps)[0]
    assert not (u == transporter(x, t + 0.01, steps)[0]).any()
    assert not (u == transporter(x, t, 2 * steps)[0]).any()


def test_examples_do_not_mix():
    transporter, (x, t, steps) = make_transporter(), make_input()
    u, logdet = transporter(x, t, steps)
    back = transporter.inverse(x, t, steps)
    for b in range(len(x)):
        one = slice(b, b + 1)
        torch.testing.assert_close(transporter(x[one], t[one], steps[one]), (u[one], logdet[one]))
        torch.testing.assert_close(transporter.inverse(x[one], t[one], steps[one]), back[one])


def test_logdet_is_float32_under_bfloat16():
    transporter, (x, t, steps) = make_transporter(dtype=torch.float32), make_input(dtype=torch.float32)
    u, logdet = transporter(x, t, steps)
    with torch.autocast("cpu", torch.bfloat16):
        rough_u, rough = transporter(x, t, steps)
        parameters = transporter.blocks[0].affine(x, transporter.condition(t, steps))
        back = transporter.inverse(u, t, steps)
    assert all(a.dtype == torch.float32 for a in (rough_u, rough, *parameters))
    assert not torch.equal(rough, logdet)  # the layers did run in bfloat16
    # bfloat16 keeps 8 bits; the log-determinant is a sum of blocks x tokens x numbers of its log-scales
    assert (rough - logdet).abs().max() < 2**-6 * 3 * TOKENS * DIM
    assert torch.equal(back, transporter.inverse(u, t, steps))  # an inverse is never rough


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_trained_weights_invert(dtype, atol):
    transporter = Transporter(TOKENS, DIM, 16, 2, 2, 2).to(dtype)
    optimizer = torch.optim.Adam(transporter.parameters(), 1e-2)
    x, t, steps = make_input(3, dtype)
    walk = 0.3 * torch.randn(64, TOKENS, DIM, dtype=dtype).cumsum(1)  # a density with correlations to learn
    for _ in range(40):
        u, logdet = transporter(walk, t[:1].expand(64), steps[:1].expand(64))
        loss = (0.5 * u**2).sum() / 64 - logdet.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    u, logdet = transporter(walk[:3], t, steps)
    assert logdet.min() > 5  # it has learnt to widen the walk's steps
    for method in METHODS:
        back = transporter.inverse(u, t, steps, method, tol=0)
        torch.testing.assert_close(back, walk[:3], atol=atol, rtol=0)


def test_inversion_computes_a_modulation_once(monkeypatch):
    """It is the same for every token."""
    transporter, calls = randomize(Transporter(6, 4, 16, blocks=2, layers=3, heads=2)), []
    for block in transporter.blocks:
        for layer in block.layers:
            layer.modulation.register_forward_hook(lambda *_: calls.append(1))
    transporter.inverse(torch.randn(2, 6, 4), torch.full((2,), 0.3), torch.full((2,), 4))
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_that_of_float64(causal):
    """Written out on a CPU; its gradients too. Rounded to eight bits, sums of ten numbers err by some hundredths."""
    exact = torch.randn(3, 2, 2, 10, 8, dtype=torch.float64, requires_grad=True)
    rounded = exact.detach().bfloat16().requires_grad_()
    of_exact, of_rounded = F.scaled_dot_product_attention(*exact, is_causal=causal), attend(*rounded, causal)
    weights = torch.randn_like(of_exact)
    (of_exact * weights).sum().backward()
    (of_rounded * weights).sum().backward()
    assert of_rounded.dtype == torch.bfloat16
    torch.testing.assert_close(of_rounded.double(), of_exact, atol=0.03, rtol=0)
    torch.testing.assert_close(rounded.grad.double(), exact.grad, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("M", [1, 5])
def test_attention_of_the_last_token_is_that_of_all(M):
    """In either precision: bfloat16 has a formula of its own on a CPU."""
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    for dtype, atol in (torch.float32, 1e-5), (torch.bfloat16, 0.05):
        last = attend(q[:, :, -M:].to(dtype), k.to(dtype), v.to(dtype), causal=True).float()
        torch.testing.assert_close(last, attend(q, k, v, causal=True)[:, :, -M:], atol=atol, rtol=0)


def test_queries_and_keys_are_normalised():
    """However large they are the logits are not: those of a head of d numbers stay within sqrt(d)."""
    attention = randomize(Attention(16, 2)).double()
    x = torch.randn(2, 5, 16).double()
    before = attention(x)
    q, k, v = attention.qkv.weight.data.chunk(3)
    of_q, of_k, of_v = attention.qkv.bias.data.chunk(3)
    for part in q, of_q, k, of_k:
        part *= 100
    torch.testing.assert_close(attention(x), before, rtol=0, atol=1e-3)
    for part in v, of_v:
        part *= 100
    assert (attention(x) - before).abs().max() > 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_rotation", [False, True])
def test_attention_is_its_formula(causal, with_rotation):
    """Head by head and query by query: q and k normalised, then rotated, a softmax of their products, and values."""
    attention, x = randomize(Attention(8, 2)).double(), torch.randn(1, 5, 8).double()
    angles = torch.randn(5, 2).double()
    rotation = torch.stack([angles.cos(), angles.sin()]) if with_rotation else None
    q, k, v = attention.qkv(x[0]).view(5, 3, 2, 4).permute(1, 2, 0, 3)
    q, k = (F.layer_norm(a, (4,)) for a in (q, k))
    if with_rotation:
        q, k = (rotated(a, rotation) for a in (q, k))
    heads = []
    for head in range(2):
        rows = []
        for n in range(5):
            seen = slice(n + 1) if causal else slice(None)
            weights = (k[head, seen] @ q[head, n] / 2).softmax(0)
            rows.append(weights @ v[head, seen])
        heads.append(torch.stack(rows))
    expected = attention.out(torch.cat(heads, dim=1))
    torch.testing.assert_close(attention(x, causal, rotation=rotation)[0], expected)


def test_a_rotation_turns_pairs_of_numbers():
    x, angle = torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.tensor([[0.3, 0.5]])
    found = rotated(x, torch.stack([angle.cos(), angle.sin()]))
    c, s = angle.cos()[0], angle.sin()[0]  # the first and third number are a pair, the second and fourth
    torch.testing.assert_close(found, torch.stack([c[0], -2 * s[1], s[0], 2 * c[1]])[None])


def test_a_layer_is_attention_and_mlp_each_shifted_scaled_and_gated():
    layer, x, condition = randomize(Layer(8, 2)).double(), torch.randn(2, 5, 8).double(), torch.randn(2, 8).double()
    shift1, scale1, gate1, shift2, scale2, gate2 = layer.modulation(condition)[:, None].chunk(6, dim=2)
    h = x + gate1 * layer.attention(F.layer_norm(x, (8,)) * (1 + scale1) + shift1)
    expected = h + gate2 * layer.mlp(F.layer_norm(h, (8,)) * (1 + scale2) + shift2)
    torch.testing.assert_close(layer(x, condition), expected)
    assert torch.equal(Layer(8, 2)(x.float(), condition.float()), x.float())  # the identity at initialisation


def test_a_blocks_head_sees_normalised_states():
    """So that the size of its numbers does not grow with that of the hidden states."""
    block, h = make_transporter(1).blocks[0], torch.randn(2, TOKENS, 16).double()
    for a, b in zip(block.offset_and_log_scale(h), block.offset_and_log_scale(100 * h)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_sweeps_are_listed_first_block_first():
    transporter, (x, t, steps) = make_transporter(2), make_input()
    for parameter in transporter.blocks[0].head.parameters():
        parameter.data.zero_()  # the identity, which the first sweep confirms
    transporter.inverse(x, t, steps, "jacobi")
    assert transporter.sweeps[0] == 1 < transporter.sweeps[1]
