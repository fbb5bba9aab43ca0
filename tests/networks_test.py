"""Student, teacher and their masked autoencoders: shapes, what hidden pixels may reach, no dead parameter, sizes, work."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import isic
from mira_u_jax import config as configuration
from mira_u_jax import equations, pseudo, steps, teacher
from mira_u_jax.student import Student

RNG = np.random.default_rng(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["student", "vit"])
@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 64, 64), (1, 32, 96), (1, 64, 32)])
def test_logits_have_the_shape_of_the_image(networks, name, shape):
    nets, params = networks
    for image in (jnp.float32, jnp.bfloat16):
        out = jax.eval_shape(nets[name], params[name], jax.ShapeDtypeStruct((*shape, 3), image))
        assert (out.shape, out.dtype) == (shape, jnp.float32)


def test_every_parameter_gets_a_gradient(networks, reached_bias_rows):
    """From Eq. (7) alone at 32 px. Excepted: rows of relative_bias whose offset a map under 8 cells cannot hold (the 2x2
    map of stage 4, the 4x4 of skip 3): these are exactly 0."""
    nets, params = networks
    image = RNG.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    mask = np.zeros((2, 32, 32), np.float32)
    mask[:, 8:20, 4:24] = 1
    loss = lambda params: sum(equations.supervised_loss(nets[n](params[n], image), mask) for n in nets)  # noqa: E731
    grads, leaves = jax.jit(jax.grad(loss))(params), 0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        reached = reached_bias_rows(name, 32)
        grad = np.abs(np.asarray(grad))
        if reached is not None:
            assert not grad[~reached].any(), name
            assert (grad[reached].max(1) > 0).all(), name
            assert reached.all() == ("[2]" in name), name  # 8x8: the whole table is alive
        assert grad.max() > 1e-6, name
        leaves += 1
    assert leaves == len(jax.tree.leaves(params)) > 60


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arg", "name", "k"), [("", "student", 1), ("", "vit", 1), ("method=udamt", "student", 2)])
def test_heads_have_an_axis_of_their_own(tiny_config, arg, name, k):
    config = tiny_config(arg)
    network, params = steps.make_networks((name,), "train", config)[name], steps.abstract_params(config)[name]
    out = jax.eval_shape(network.outputs, params, jax.ShapeDtypeStruct((3, 64, 32, 3), jnp.float32))
    assert (out.shape, out.dtype) == ((k, 3, 64, 32), jnp.float32)


@pytest.fixture(scope="module")
def two_outputs():
    """(graphdef, params) of a student of three convolution stages, without dropout, with an auxiliary head."""
    make = lambda: Student(  # noqa: E731
        widths=(8, 16, 24), stages=("conv",) * 3, skips=("gate",) * 2, window=4, head_width=8, mlp_ratio=2, dropout=0.0,
        outputs=2, rngs=nnx.Rngs(0),
    )
    graphdef, shapes = nnx.split(nnx.eval_shape(make))

    def draw(path, leaf):
        noise = RNG.normal(size=leaf.shape).astype(np.float32)
        return {"kernel": noise / math.prod(leaf.shape[:-1]) ** 0.5, "scale": 1 + 0.1 * noise, "bias": noise}[path[-1].key]

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(shapes))


def test_the_first_head_predicts_and_every_head_learns(two_outputs):
    network, params = steps.Network(two_outputs[0]), two_outputs[1]
    image = RNG.uniform(size=(2, 16, 24, 3)).astype(np.float32)
    mask = (RNG.uniform(size=(2, 16, 24)) > 0.5).astype(np.float32)

    @jax.jit
    def everything(params):
        def losses(params):  # one a head
            heads = network.outputs(params, image)
            return jax.vmap(lambda z: equations.supervised_loss(z, mask))(heads), heads

        found, pull, heads = jax.vjp(losses, params, has_aux=True)
        return found, heads, network(params, image), jax.vmap(pull)(jnp.eye(2))[0]

    losses, heads, logits, grads = jax.device_get(everything(params))
    np.testing.assert_allclose(heads[0], logits, atol=1e-5)
    assert np.abs(heads[1] - heads[0]).mean() > 1e-2  # the second head is another one
    mean = steps.over_outputs(equations.supervised_loss, heads, mask)
    assert float(mean) == pytest.approx(losses.mean(), rel=1e-5)
    for path, (first, second) in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        auxiliary, shared = name.startswith("['auxiliary']"), name.startswith("['encoder']")
        assert (np.abs(first).max() > 1e-6) == (not auxiliary), name  # a prediction does not read the second head
        assert (np.abs(second).max() > 1e-6) or not (auxiliary or shared), name


class Spy:
    """Stands where a part of the network is, and keeps the last thing that is handed to it."""

    def __call__(self, *inputs, **_):
        self.seen = inputs[-1]
        return inputs[0]


def test_perturbation_drops_whole_channels_of_every_feature(two_outputs):
    """What reaches the skips and the bottleneck, finest first: each channel of an image twice or not at all."""
    features = [RNG.normal(size=shape).astype(np.float32) for shape in ((3, 16, 24, 8), (3, 8, 12, 16), (3, 4, 6, 24))]

    @jax.jit
    def seen(key):
        def through(key, **options):
            student = nnx.merge(two_outputs[0], two_outputs[1])
            student.encoder, student.skip, student.bottleneck = lambda *_, **__: features, [Spy(), Spy()], Spy()
            student.outputs(jnp.zeros((3, 16, 24, 3)), rngs=steps.dropout_of(key), **options)
            return [spy.seen for spy in (*student.skip, student.bottleneck)]

        off = [through(key, perturb=0.0), through(key)]  # 0, and by default
        with pytest.raises(ValueError, match="rngs"):
            through(None, perturb=0.5)
        return through(key, perturb=0.5), off

    perturbed, off = jax.device_get(seen(jax.random.key(0)))
    dropped = []
    for x, y in zip(features, perturbed, strict=True):
        gone = (y == 0).all((1, 2))  # b c
        np.testing.assert_allclose(y, np.where(gone[:, None, None], 0, 2 * x), rtol=1e-6)
        assert (gone != gone[:1]).any()  # each image loses its own
        dropped.append(gone)
    assert 0.3 < np.concatenate(dropped, 1).mean() < 0.7
    assert (dropped[1][:, :8] != dropped[0]).any() and (dropped[2][:, :8] != dropped[0]).any()  # and so does each stride
    for found in off:
        for x, y in zip(features, found, strict=True):
            np.testing.assert_array_equal(x, y)


# --- masked image modelling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ratio"), [(64, 0.75), (16, 0.75), (4, 0.75), (4, 0.99), (4, 0.01), (2, 0.5), (10, 0.33)])
def test_exactly_hidden_count_patches_are_hidden(n, ratio):
    wanted = min(max(round(n * ratio), 1), n - 1)  # something to rebuild, something to see
    assert teacher.hidden_count(n, ratio) == wanted
    hidden = np.asarray(teacher.hidden_patches(jax.random.key(0), 50, n, ratio))
    assert set(np.unique(hidden)) == {0, 1}
    assert (hidden.sum(1) == wanted).all()
    assert (hidden.max(0) == 1).all()  # any patch may be
    assert (hidden.min(0) == 0).all()
    assert (hidden != hidden[:1]).any()  # each image has its own


def test_to_patches_runs_row_by_row():
    image = RNG.uniform(size=(2, 8, 12, 3)).astype(np.float32)
    patches = np.asarray(teacher.to_patches(image, 4))
    assert patches.shape == (2, 6, 48)
    for n in range(6):
        top, left = 4 * (n // 3), 4 * (n % 3)
        np.testing.assert_array_equal(patches[:, n].reshape(2, 4, 4, 3), image[:, top : top + 4, left : left + 4])


@pytest.fixture(scope="module")
def autoencoders(tiny_config, pretrain_params):
    """{name: (patch, compiled network(image, key))} of stage "pretrain", dropout off."""
    config = tiny_config()
    names = ("student", "vit")
    nets = steps.make_networks(names, "pretrain", config)
    bind = lambda name: jax.jit(lambda image, key: nets[name](pretrain_params[name], image, key))  # noqa: E731
    return {"student": (16, bind("student")), "vit": (config.vit.patch, bind("vit"))}


@pytest.mark.parametrize("name", ["student", "vit"])
def test_hidden_pixels_do_not_matter_and_visible_ones_do(autoencoders, name):
    patch, network = autoencoders[name]
    image, key = RNG.uniform(size=(2, 32, 32, 3)).astype(np.float32), jax.random.key(1)
    rebuilt, hidden = network(image, key)
    n = (32 // patch) ** 2
    assert rebuilt.shape == (2, n, patch * patch * 3) and rebuilt.dtype == jnp.float32
    assert (hidden.sum(1) == round(0.75 * n)).all()
    # Patch n of `hidden` is the n-th of to_patches: paint by a route of its own.
    where = np.asarray(hidden).reshape(2, 32 // patch, 32 // patch).repeat(patch, 1).repeat(patch, 2)[..., None]
    noise = RNG.uniform(size=image.shape).astype(np.float32)
    np.testing.assert_array_equal(network(np.where(where == 1, noise, image), key)[0], rebuilt)
    assert np.abs(network(np.where(where == 0, noise, image), key)[0] - rebuilt).max() > 1e-3


@pytest.mark.parametrize("name", ["student", "vit"])
def test_the_mask_is_a_function_of_the_key(autoencoders, name):
    _, network = autoencoders[name]
    image = RNG.uniform(size=(8, 32, 32, 3)).astype(np.float32)[:2]
    masks = [np.asarray(network(image, jax.random.key(k))[1]) for k in (0, 0, 1, 2)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any() or (masks[0] != masks[3]).any()


def test_each_visible_token_returns_to_its_place():
    """Without a block no token meets another: a changed pixel may change its own patch's reconstruction only."""
    rngs = nnx.Rngs(0)
    vit = teacher.Teacher(patch=4, channels=8, depth=0, heads=2, hidden=8, head_widths=(8, 8), dropout=0.0, rngs=rngs)
    mae = teacher.MaskedAutoencoder(vit, ratio=0.5, channels=8, depth=0, heads=2, rngs=rngs)
    image = RNG.uniform(size=(1, 12, 16, 3)).astype(np.float32)
    changed = np.repeat(image, 12, 0)  # image n has another patch n; the same key hides other patches of each
    for n in range(12):
        top, left = 4 * (n // 4), 4 * (n % 4)
        changed[n, top : top + 4, left : left + 4] = RNG.uniform(size=(4, 4, 3))
    before, hidden = mae(np.repeat(image, 12, 0), jax.random.key(0))
    difference = np.abs(np.asarray(mae(changed, jax.random.key(0))[0] - before)).max(-1)  # image, patch
    np.testing.assert_array_equal(difference > 1e-6, np.eye(12, dtype=bool) & (np.asarray(hidden) == 0))


# --- size -------------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_the_full_preset():
    """Pinned: a change of the architecture must be meant, and docs name these figures."""
    config = configuration.check(isic.get_config("preset=full"))
    params = steps.abstract_params(config)
    assert {name: count(tree) for name, tree in params.items()} == {"student": 7_020_125, "vit": 2_450_097}
    encoder = params["vit"]["encoder"]
    # By hand from section 3.1.1, 4 layers of width 256 and hidden 512: attention, MLP, two norms; then embedding and norm.
    block = 4 * (256 * 256 + 256) + 2 * 256 * 512 + 512 + 256 + 4 * 256
    assert count(encoder) == 4 * block + (8 * 8 * 3 + 1) * 256 + 2 * 256


# --- work -------------------------------------------------------------------------------------------------------------

IMAGES, PASSES = 3, 5


MOVES = "reshape|transpose|slice|pad|concatenate|broadcast_in_dim|reverse"  # a kernel is the same after these


def work(function, params, *inputs):
    """{kernel: numbers that its convolutions or products write} in the lowered program of function(params, *inputs)."""
    text = jax.jit(function, keep_unused=True).lower(params, *inputs).as_text()
    main = next(part for part in re.split(r"(?=func\.func )", text) if "@main(" in part)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    source = {f"%arg{i}": name for i, name in enumerate(names)}  # of a value, where it is one parameter rearranged
    found = {}
    for value, operation, operands, shape in re.findall(
        r"(%\w+) = stablehlo\.(\w+)\(?\s*((?:%\w+(?:, )?)+).*tensor<(?:([\dx]+)x)?\w+>", main
    ):
        operands = operands.split(", ")
        if re.fullmatch(MOVES, operation):
            sources = {source[o] for o in operands if o in source}
            if len(sources) == 1:
                source[value] = sources.pop()
        elif operation in ("convolution", "dot_general") and operands[1] in source:
            name = source[operands[1]]
            found[name] = found.get(name, 0) + math.prod(map(int, shape.split("x")))
    return found


def images_by_kernel(network, params, passes):
    """{kernel: on how many images passes(params, image, key) runs it}, in terms of the work of one image."""
    image, key = (jax.ShapeDtypeStruct((n, 32, 32, 3), jnp.float32) for n in (1, IMAGES)), jax.random.key(0)
    single = work(network, params, next(image))
    found = work(passes, params, next(image), key)
    assert found.keys() == single.keys()
    return {name: found[name] / single[name] for name in found}


# What lies before the first dropout. It sits behind the attention of the first block. What the skips ask of the encoder too.
ATTENTION = [f"['attention']['{name}']" for name in ("query", "key_value", "out")]
BEFORE = {
    "student": ["['encoder']['stem']"] + [f"['encoder']['down'][{i}]" for i in range(4)]
    + [f"['encoder']['stages'][{i}]['conv{j}']" for i in range(4) for j in (1, 2)]
    + [f"['encoder']['stages'][4]['regular']['attention']{name}" for name in ATTENTION]
    + [f"['skip'][{i}]['attention']['attention']['key_value']" for i in (2, 3)],
    "vit": ["['encoder']['embedding']"] + [f"['details']['convs'][{i}]" for i in (0, 1)]
    + [f"['encoder']['blocks'][0]{name}" for name in ATTENTION],
}


@pytest.mark.parametrize("name", ["student", "vit"])
def test_what_lies_before_the_first_dropout_is_computed_once_per_image(networks, name):
    """teacher_passes in the lowered program, before any compiler could help: 3 images before, 3 x 5 after."""
    network, params = networks[0][name], networks[1][name]
    found = images_by_kernel(network, params, lambda p, image, key: pseudo.teacher_passes(network, p, image, key, PASSES))
    once = {f"{part}['kernel']" for part in BEFORE[name]}
    gates = {f"['skip'][{i}]['gate']['kernel']" for i in (0, 1)} if name == "student" else set()  # half reads the encoder
    assert {kernel for kernel, images in found.items() if images == IMAGES} == once
    assert {kernel for kernel, images in found.items() if images == (IMAGES + IMAGES * PASSES) / 2} == gates
    assert {found[kernel] for kernel in found.keys() - once - gates} == {IMAGES * PASSES}
    kernels = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert found.keys() == {kernel for kernel in kernels if kernel.endswith("['kernel']")}  # none was overlooked


@pytest.mark.parametrize("name", ["student", "vit"])
def test_the_count_sees_a_pass_that_repeats_its_image(networks, name):
    """The obvious way, each image once a pass: the count above is then that of every layer, so it can tell."""
    network, params = networks[0][name], networks[1][name]

    def repeated(params, image, key):
        keys = jax.random.split(key, IMAGES * PASSES)
        one = lambda key, image: network.outputs(params, image[None], key=key)  # noqa: E731
        return jax.vmap(one)(keys, jnp.repeat(image, PASSES, axis=0))

    assert set(images_by_kernel(network, params, repeated).values()) == {IMAGES * PASSES}
