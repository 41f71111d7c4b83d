"""The iterations against PyTorch: gradients by its autograd, preconditioners by its `pinv`."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import nyscaled as nys  # noqa: E402

STEPS = 8


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def torch_scaled_gd(loss, factors, learning_rate):
    """Tong, Ma and Chi's iteration; a single factor is its own partner."""
    factors = [torch.tensor(np.array(f), dtype=torch.float64, requires_grad=True) for f in factors]
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(*factors), factors)
        partners = factors[::-1]
        factors = [
            (f - learning_rate * g @ torch.linalg.pinv(p.T @ p)).detach().requires_grad_()
            for f, g, p in zip(factors, grads, partners, strict=True)
        ]
    return [f.detach().numpy() for f in factors]


@pytest.mark.parametrize("rank", [3, 2], ids=["exactly", "under"])
def test_symmetric_iterates(rank):
    a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.6, 0.2])
    start = nys.initializers.nystrom(jax.random.key(1), a, rank)
    target = torch.tensor(np.array(a))
    (expected,) = torch_scaled_gd(lambda x: ((x @ x.T - target) ** 2).sum() / 4, [start], 0.5)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    np.testing.assert_allclose(nys.solvers.run(step, start, STEPS).params, expected, atol=1e-10)


@pytest.mark.parametrize("rank", [3, 2], ids=["exactly", "under"])
@pytest.mark.parametrize("fused", [True, False])
def test_asymmetric_iterates(rank, fused):
    a, _, _ = nys.spectra.rectangular(jax.random.key(0), 30, 20, [1.0, 0.6, 0.2])
    start = nys.initializers.nystrom_factors(jax.random.key(1), a, rank)
    target = torch.tensor(np.array(a))
    expected = torch_scaled_gd(lambda x, y: ((x @ y.T - target) ** 2).sum() / 2, start, 0.5)
    problem = nys.problems.Asymmetric(a)
    if fused:
        step = nys.solvers.scaled_step(problem, 0.5)
    else:
        step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
    got = nys.solvers.run(step, start, STEPS).params
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-10)
