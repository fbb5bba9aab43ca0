"""Products and convolutions against their definitions, in every form that may be chosen, gradients included."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mira_u_jax import linear


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def correlation(x, kernel, stride):
    """y[i, j] = sum over p, q of x[stride i + p - k/2, stride j + q - l/2] kernel[p, q], zeros outside the map. float64."""
    rows, cols = kernel.shape[:2]
    padded = np.pad(x.astype(float), ((0, 0), (rows // 2, rows // 2), (cols // 2, cols // 2), (0, 0)))
    h, w = (-(-side // stride) for side in x.shape[1:3])
    taps = [
        padded[:, p : p + stride * (h - 1) + 1 : stride, q : q + stride * (w - 1) + 1 : stride] @ kernel[p, q].astype(float)
        for p in range(rows) for q in range(cols)
    ]
    return sum(taps)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize("stride, side", [(1, 3), (2, 3), (1, 1), (2, 1), (1, 5)])
@pytest.mark.parametrize("h, w", [(8, 12), (5, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("c, d", [(3, 16), (16, 16), (40, 8), (8, 40)])
def test_convolution_and_its_gradients_equal_the_definition(c, d, h, w, stride, side):
    """It is linear in either argument, so a gradient is right when <g, f(other)> = <gradient, other> for drawn others."""
    x, kernel = normal(2, h, w, c), normal(side, side, c, d)
    y, pull = jax.vjp(lambda x, kernel: linear.convolution(x, kernel, stride), x, kernel)
    wanted = correlation(x, kernel, stride)
    assert y.shape == wanted.shape
    close(y, wanted)
    g = normal(*y.shape, seed=1)
    to_x, to_kernel = (np.asarray(a, float) for a in pull(g))
    assert to_x.shape == x.shape and to_kernel.shape == kernel.shape
    for seed in range(2, 6):
        other_x, other_kernel = normal(*x.shape, seed=seed), normal(*kernel.shape, seed=seed)
        scale = np.sqrt(g.size)  # of a sum of so many products
        assert abs((to_x * other_x).sum() - (g * correlation(other_x, kernel, stride)).sum()) < 1e-3 * scale
        assert abs((to_kernel * other_kernel).sum() - (g * correlation(x, other_kernel, stride)).sum()) < 1e-3 * scale


@pytest.mark.parametrize("c, d", [(3, 5), (16, 8), (40, 16)])
def test_transposed_convolution_is_the_adjoint_of_the_strided_one_and_so_are_its_gradients(c, d):
    x, kernel, g = normal(2, 5, 6, c), normal(3, 3, c, d), normal(2, 10, 12, d)
    y, pull = jax.vjp(linear.transposed_convolution, x, kernel)
    to_x, to_kernel = (np.asarray(a, float) for a in pull(g))
    adjoint = lambda kernel: (x * correlation(g, kernel.swapaxes(2, 3), 2)).sum()  # noqa: E731, <x, C g> = <C^T x, g>
    assert abs((np.asarray(y, float) * g).sum() - adjoint(kernel)) < 1e-3 * np.sqrt(g.size)
    close(to_x, correlation(g, kernel.swapaxes(2, 3), 2))
    for seed in range(4):
        other = normal(*kernel.shape, seed=seed)
        assert abs((to_kernel * other).sum() - adjoint(other)) < 1e-3 * np.sqrt(g.size)


def test_forms_differ_with_the_channels_on_a_cpu_only():
    """A program that is lowered here for another platform, as an exported one, has the plain convolution."""
    assert [linear.outputs_together(c, d) for c, d in ((3, 16), (16, 16), (32, 32), (3, 32), (16, 1))] == [4, 2, 1, 2, 4]
    traced = jax.jit(linear.convolution).trace(jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 16)))
    kernels = {}
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        kernels[platform] = re.findall(r"stablehlo.convolution.*tensor<1x8x8x3xf32>, tensor<(\w+)xf32>", text)
    assert kernels == {"cpu": ["3x6x3x64"], "cuda": ["3x3x3x16"], "tpu": ["3x3x3x16"]}


def test_a_kernel_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="no middle"):
        linear.convolution(jnp.zeros((1, 4, 4, 2)), jnp.zeros((2, 3, 2, 2)))
