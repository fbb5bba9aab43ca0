"""The linear maps that the layers are made of: products and convolutions, and the gradients of both.

Each computes what its name says; which of several equal forms it takes is a matter of time on a CPU alone
(docs/performance.md). b batch, h w pixels, c d channels.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

COLUMNS = 32  # below so many channels XLA's convolutions on a CPU spend their time on fetching and not on multiplying


@jax.custom_vjp
def product(x, kernel):  # ... c, c d -> ... d
    """x @ kernel. Its gradient for the kernel is x^T g; JAX's own rule takes (g^T x)^T, for which XLA copies g on a CPU."""
    return x @ kernel


def product_backward(inputs, g):
    x, kernel = inputs
    x, g_rows = rearrange(x, "... c -> (...) c"), rearrange(g, "... d -> (...) d")
    return g @ kernel.T, jax.lax.dot_general(x, g_rows, (((0,), (0,)), ((), ())))


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(x, kernel, stride: int = 1):  # b h w c, k l c d -> b h/stride w/stride d
    """Cross-correlation with half a kernel of zeros around the map; ValueError unless the kernel's sides are odd."""
    if not all(side % 2 for side in kernel.shape[:2]):
        raise ValueError(f"convolution: a kernel of {kernel.shape[:2]} has no middle")
    if stride == 1 and kernel.shape[:2] == (1, 1):
        return product(x, kernel[0, 0])
    plain = functools.partial(convolve, strides=(stride, stride), border=half(kernel))
    together = outputs_together(*kernel.shape[2:]) if stride == 1 else 1
    if together == 1 or x.shape[2] % together:
        return plain(x, kernel)
    # Asked when the program is lowered, not when it is traced: an exported one is lowered for platforms that are not here.
    return jax.lax.platform_dependent(x, kernel, cpu=functools.partial(neighbours, together=together), default=plain)


def convolution_backward(stride, inputs, g):
    x, kernel = inputs
    if kernel.shape[:2] == (1, 1) and stride == 1:
        to_x, to_kernel = product_backward((x, kernel[0, 0]), g)
        return to_x, to_kernel[None, None]
    plain = functools.partial(convolve, strides=(stride, stride), border=half(kernel))
    (to_kernel,) = jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](g)
    narrow, even = x.shape[3] < COLUMNS, not any(side % 2 for side in x.shape[1:3])
    if stride == 1:
        to_x = convolution(g, swapped(jax.lax.rev(kernel, (0, 1))))
    elif stride == 2 and kernel.shape[:2] == (3, 3) and narrow and even:
        to_x = transposed_convolution(g, swapped(kernel))
    else:
        (to_x,) = jax.vjp(lambda x: plain(x, kernel), x)[1](g)
    return to_x, to_kernel


convolution.defvjp(lambda x, kernel, stride: (convolution(x, kernel, stride), (x, kernel)), convolution_backward)


@jax.custom_vjp
def transposed_convolution(x, kernel):  # b h w c, 3 3 c d -> b 2h 2w d
    """Transposed convolution of stride 2 that doubles h and w exactly, the adjoint of `convolution` at stride 2.

    Equals PyTorch's ConvTranspose2d(3, stride=2, padding=1, output_padding=1), kernel (3, 3, in, out) unflipped.
    Computed in sub-pixel form, a 2x2 convolution to 4 x channels and depth-to-space: output (2i, 2j) sees input
    (i, j) only, output (2i+1, 2j+1) sees (i..i+1, j..j+1). The usual input dilation multiplies zeros and is far slower.
    """
    # Along one axis: phase 0 (even outputs) is tap 1 at x[i]; phase 1 (odd) is tap 2 at x[i] and tap 0 at x[i+1].
    zero = jnp.zeros_like(kernel[:1])
    rows = jnp.stack([jnp.concatenate([kernel[1:2], zero]), jnp.concatenate([kernel[2:3], kernel[0:1]])])  # p 2 3 c d
    zero = jnp.zeros_like(rows[:, :, :1])
    taps = jnp.stack(
        [
            jnp.concatenate([rows[:, :, 1:2], zero], axis=2),
            jnp.concatenate([rows[:, :, 2:3], rows[:, :, 0:1]], axis=2),
        ]
    )  # q p 2 2 c d, phases p of the rows and q of the columns
    taps = rearrange(taps, "q p i j c d -> i j c (p q d)")
    y = convolve(x, taps, (1, 1), [(0, 1), (0, 1)])
    return rearrange(y, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)


def transposed_convolution_backward(inputs, g):
    x, kernel = inputs
    down = functools.partial(convolve, g, strides=(2, 2), border=half(kernel))
    to_x, to_kernel = jax.vjp(down, swapped(kernel))
    return to_x, swapped(*to_kernel(x))


transposed_convolution.defvjp(
    lambda x, kernel: (transposed_convolution(x, kernel), (x, kernel)), transposed_convolution_backward
)


def convolve(x, kernel, strides, border):
    """XLA's convolution; border: zeros before and after the map along each axis."""
    return jax.lax.conv_general_dilated(x, kernel, strides, border, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def half(kernel) -> list[tuple[int, int]]:
    """A border of half a kernel, as `convolve` takes it."""
    return [(side // 2, side // 2) for side in kernel.shape[:2]]


def swapped(kernel):  # k l c d -> k l d c
    return jnp.swapaxes(kernel, 2, 3)


def neighbours(x, kernel, *, together: int):
    """`convolution` of stride 1: a wider kernel with a copy of its taps for each of `together` neighbouring outputs, which
    become channels of one. together divides the width of x.
    """
    zero, still = jnp.zeros((), kernel.dtype), (0, 0, 0)
    shifted = [jax.lax.pad(kernel, zero, (still, (i, together - 1 - i, 0), still, still)) for i in range(together)]
    y = convolve(x, jnp.concatenate(shifted, -1), (1, together), half(kernel))
    return rearrange(y, "b h w (n d) -> b h (w n) d", n=together)


def outputs_together(c: int, d: int) -> int:
    """Neighbouring outputs that one product of a stride-1 convolution computes on a CPU, where it is the fastest.

    Two of 16 channels cost a third more operations than one by one, and a quarter less time.
    """
    columns = 2 * COLUMNS if c < 8 else COLUMNS  # an image's three channels leave the most to gain
    return min(max(columns // d, 1), 4)
