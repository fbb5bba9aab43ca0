"""The method: pretrain_step, train_step and eval_step, pure functions that the loop compiles once each.

A network is a pure function of a plain parameter tree. theta = state.params = {"student": ..., "vit": ...} are the online
parameters, phi = state.ema = EMA(theta) has the same tree; a network that nothing reads is not in it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx, struct

from mira_u_jax import augment, equations
from mira_u_jax.rng import named, per_example
from mira_u_jax.student import MaskedReconstruction, Student
from mira_u_jax.teacher import MaskedAutoencoder, Teacher, to_patches


@struct.dataclass
class TrainState:
    """What a checkpoint holds. plateau.scale multiplies the learning rate; 1 unless the plateau schedule lowers it."""

    step: jax.Array
    params: dict
    ema: dict
    opt: optax.OptState
    plateau: optax.contrib.ReduceLROnPlateauState


@dataclasses.dataclass(frozen=True)
class Network:
    """network(params, *inputs, key=None): the module as a pure function; a key turns dropout on."""

    graphdef: nnx.GraphDef

    def __call__(self, params, *inputs, key=None):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(self.graphdef, params)(*inputs, rngs=rngs)


# --- networks, optimiser, state -------------------------------------------------------------------------------------


def network_names(config) -> tuple[str, ...]:
    """The networks in theta: the student, and the ViT when the teacher reads it."""
    reads_vit = config.loss.beta > 0 and config.teacher.source in ("both", "vit")
    return ("student", "vit") if reads_vit else ("student",)


def make_module(name: str, stage: str, config, rngs: nnx.Rngs) -> nnx.Module:
    """The module of one network: a segmenter in stage "train", a masked autoencoder around its encoder in "pretrain"."""
    module = Student(**config.student, rngs=rngs) if name == "student" else Teacher(**config.vit, rngs=rngs)
    if stage == "train":
        return module
    if name == "student":
        return MaskedReconstruction(module, ratio=config.mim.ratio, rngs=rngs)
    return MaskedAutoencoder(module, ratio=config.mim.ratio, **config.mim.decoder, rngs=rngs)


def make_networks(names, stage: str, config) -> dict[str, Network]:
    """The pure functions of a stage, by network name. Builds no parameters."""

    def graphdef(name):
        module = nnx.eval_shape(lambda: make_module(name, stage, config, nnx.Rngs(params=0)))
        return nnx.split(module)[0]

    return {name: Network(graphdef(name)) for name in names}


def fresh_params(names, stage: str, config, key) -> dict:
    """Fresh parameters of a stage, {name: plain tree of float32 arrays}; `key` is the run's key."""

    def init(name):
        rngs = nnx.Rngs(params=named(named(key, f"init/{stage}"), name))
        return nnx.to_pure_dict(nnx.split(make_module(name, stage, config, rngs))[1])

    return {name: init(name) for name in names}


# Runs once: compiling hundreds of small random draws well would take longer than drawing them.
init_params = jax.jit(fresh_params, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 0})


def abstract_params(config) -> dict:
    """Shapes and types of the parameters of stage "train", nothing computed."""
    make = functools.partial(fresh_params, network_names(config), "train", config)
    return jax.eval_shape(make, jax.random.key(0))


def init_state(params, tx, optim) -> TrainState:
    """State at step 0. phi starts as a COPY of theta: both are donated, so they must not share buffers."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=jax.tree.map(jnp.copy, params), opt=tx.init(params),
        plateau=make_plateau(optim).init(params),
    )


def make_schedule(optim, steps: int, *, lr: float, schedule: str):
    """Learning rate by step: linear warm-up to lr, then cosine to zero, or constant under the plateau schedule."""
    warmup = max(int(optim.warmup * steps), 1)
    if schedule == "plateau":
        return optax.schedules.warmup_constant_schedule(0.0, lr, warmup)
    return optax.schedules.warmup_cosine_decay_schedule(0.0, lr, warmup, max(steps, warmup + 1))


def make_plateau(optim) -> optax.GradientTransformationExtraArgs:
    """ReduceLROnPlateau on 1 - validation Dice. optax cuts one validation earlier than PyTorch for the same patience."""
    cfg = optim.plateau
    return optax.contrib.reduce_on_plateau(
        factor=cfg.factor, patience=cfg.patience + 1, cooldown=cfg.cooldown, min_scale=cfg.min_scale
    )


def make_optimizer(optim, names, schedule) -> optax.GradientTransformation:
    """AdamW with one global-norm clip PER network (a joint norm would couple them); only kernels decay."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    adamw = optax.chain(
        optax.clip_by_global_norm(optim.clip), optax.adamw(schedule, weight_decay=optim.weight_decay, mask=decays)
    )
    return optax.partition(dict.fromkeys(names, adamw), {name: name for name in names})


# --- the three steps -------------------------------------------------------------------------------------------------


def pretrain_step(state: TrainState, data, index, key, *, networks, tx, config):
    """Stage 1, masked image modelling on every network of theta. Eq. (1), section 3.1.1.

    data["image"]: (n, h, w, 3) uint8, resident; index: (b,) int32; key: the run's key. Returns (state, metrics).
    """
    key = jax.random.fold_in(named(key, "pretrain"), state.step)
    image = to_float(data["image"][index])
    image, _ = augment.labelled_view(named(key, "view"), image, jnp.zeros(image.shape[:3]), config.augment)

    def loss_fn(params):
        losses = {}
        for name, network in networks.items():
            k = named(key, name)
            rebuilt, hidden = network(params[name], image, named(k, "hide"), key=named(k, "dropout"))
            patch = round((rebuilt.shape[-1] / 3) ** 0.5)
            losses[name] = equations.mim_loss(rebuilt, to_patches(image, patch), hidden)
        return sum(losses.values()), losses

    (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, metrics = update(state, grads, tx, config.ema)
    return state, metrics | {"loss": loss} | {f"mim_{name}": value for name, value in losses.items()}


def train_step(state: TrainState, data, index, key, *, networks, tx, config, steps: int):
    """Stage 2, one step of MIRA-U: M teacher passes, student and ViT update, EMA. DESIGN of the step in docs/paper.md.

    data: {"image": (n, h, w, 3), "mask": (n, h, w)} uint8, resident; index: {"labelled", "unlabelled"}, (b,) int32 each;
    key: the run's key; steps: the length of the stage. Returns (state, metrics), metrics all float32 scalars.
    """
    key = jax.random.fold_in(named(key, "train"), state.step)
    student, vit = networks["student"], networks.get("vit")
    cfg, semi = config.loss, config.loss.beta > 0
    x, y = to_float(data["image"][index["labelled"]]), to_float(data["mask"][index["labelled"]])
    x, y = augment.labelled_view(named(key, "labelled"), x, y, config.augment)
    beta = cfg.beta * equations.ramp_up(state.step, cfg.ramp * steps)
    metrics = {"beta": beta}

    if semi:
        # 1. Weak and strong view, one geometry. The masks of these images are for the report in `metrics` only.
        u, hidden_truth = to_float(data["image"][index["unlabelled"]]), to_float(data["mask"][index["unlabelled"]])
        x_w, x_s, notcut, truth = augment.weak_strong_views(named(key, "unlabelled"), u, hidden_truth, config.augment)
        # 2., 3. The teacher's M passes on the weak view: mu, sigma, w, keep.
        mu, sigma, w, keep = pseudo_labels(state, x_w, named(key, "passes"), networks=networks, config=config)
        p_w = jax.lax.stop_gradient(jax.nn.sigmoid(student(state.params["student"], x_w)))
        metrics |= label_report(mu, sigma, w, p_w, truth)
        if config.pseudo.filter != "none":
            metrics["keep"] = keep.mean()
        # 4. CutMix moves everything that belongs to a pixel.
        x_s, mu, w, keep, notcut, p_w = augment.cutmix(
            named(key, "cutmix"), config.augment.cutmix, x_s, mu, w, keep, notcut, p_w
        )
        a = w * keep * notcut
        target = {"mu": mu, "hard": equations.f32(mu > 0.5), "paper": w * mu}[config.pseudo.label]
        x = jnp.concatenate([x, x_s])  # one forward pass for the labelled and the strong batch

    def loss_fn(params):
        # 5. The losses; dropout is on in every trained pass.
        z = student(params["student"], x, key=named(key, "student"))
        z, z_s = z[: y.shape[0]], z[y.shape[0] :]
        parts = {"sup": equations.supervised_loss(z, y, lambda_dice=cfg.lambda_dice, lambda_bce=cfg.lambda_bce)}
        if not semi:
            return parts["sup"], parts
        unsupervised = functools.partial(equations.unsupervised_loss, lambda_u=cfg.lambda_u, norm=cfg.norm)
        parts["unsup"] = unsupervised(z_s, target, p_w, a, lambda_c=cfg.lambda_c)
        parts["ent"] = equations.entropy_loss(z_s, notcut)
        loss = equations.total_loss(parts["sup"], parts["unsup"], parts["ent"], beta, cfg.gamma * beta)
        if vit is not None:
            z = vit(params["vit"], x, key=named(key, "vit"))
            z, z_s = z[: y.shape[0]], z[y.shape[0] :]
            parts["vit_sup"] = equations.supervised_loss(z, y, lambda_dice=cfg.lambda_dice, lambda_bce=cfg.lambda_bce)
            parts["vit_unsup"] = unsupervised(z_s, target, p_w, a, lambda_c=0.0)
            loss += equations.total_loss(parts["vit_sup"], parts["vit_unsup"], 0.0, beta, 0.0)
        return loss, parts

    (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    # 6., 7. AdamW on theta, then phi.
    state, updated = update(state, grads, tx, config.ema)
    return state, metrics | updated | {"loss": loss} | {f"loss_{name}": value for name, value in parts.items()}


def eval_step(params, image, *, network: Network):
    """Logits (b, h, w) float32 of uint8 images (b, h, w, 3), dropout off."""
    return network(params, to_float(image))


# --- their parts ----------------------------------------------------------------------------------------------------


def update(state: TrainState, grads, tx, ema):
    """AdamW step on theta and Eq. (6) on phi. Returns (state, metrics)."""
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: u * state.plateau.scale, updates))
    averaged = equations.ema_update(state.ema, params, state.step, ema.alpha)
    metrics = {f"grad_{name}": optax.global_norm(g) for name, g in grads.items()}
    return state.replace(step=state.step + 1, params=params, ema=averaged, opt=opt), metrics


def teacher_passes(network: Network, params, image, key, passes: int):
    """`passes` stochastic probabilities of each image, (m, b, h, w). Section 3.1.3.

    vmap over examples outside and over keys inside, key = fold_in(key, global example, pass): the masks do not depend on
    the number of devices, nothing is gathered, and what lies before the first dropout is computed once per example.
    """

    def one(key, image):
        keys = per_example(key, passes)
        return jax.vmap(lambda k: jax.nn.sigmoid(network(params, image[None], key=k)[0]))(keys)

    return jax.vmap(one, out_axes=1)(per_example(key, image.shape[0]), image)


def pseudo_labels(state: TrainState, image, key, *, networks, config):
    """mu, sigma, w, keep of weak views (b, h, w, 3), each (b, h, w), no gradient. Eqs. (4), (5), Algorithm 2.

    teacher.source "both" shares the passes between ViT and student; teacher.weights picks phi (ema) or theta (online).
    """
    cfg = config.teacher
    weights = state.ema if cfg.weights == "ema" else state.params
    share = {"vit": {"vit": cfg.passes}, "ema": {"student": cfg.passes}}.get(
        cfg.source, {"vit": cfg.passes - cfg.passes // 2, "student": cfg.passes // 2}
    )
    if cfg.dropout:
        passes = [teacher_passes(networks[n], weights[n], image, named(key, n), m) for n, m in share.items()]
    else:
        passes = [jax.nn.sigmoid(networks[n](weights[n], image))[None] for n in share]
    mu, sigma = jax.lax.stop_gradient(equations.mean_and_deviation(jnp.concatenate(passes)))
    w = equations.confidence(sigma, config.pseudo.kappa) if config.pseudo.weight == "confidence" else jnp.ones_like(mu)
    keep = {
        "sigma": equations.keep_certain(sigma, config.pseudo.tau_u),
        "probability": equations.f32(jnp.maximum(mu, 1 - mu) > config.pseudo.tau_p),
        "none": jnp.ones_like(mu),
    }[config.pseudo.filter]
    return mu, sigma, w, keep


def label_report(mu, sigma, w, p_w, truth):
    """What a run watches about its pseudo-labels; nothing here reaches a loss.

    sigma is also averaged over the band around the teacher's outline (a pixel whose 5x5 neighbourhood holds both classes),
    where it must be alive: over plain skin every teacher is sure. Dice of mu and of the student's own weak prediction
    against the hidden masks tells whether the teacher is worth listening to.
    """
    hard = equations.f32(mu > 0.5)
    pool = functools.partial(
        jax.lax.reduce_window, init_value=-jnp.inf, computation=jax.lax.max, window_dimensions=(1, 5, 5),
        window_strides=(1, 1, 1), padding="SAME",
    )
    band = equations.f32((pool(hard) > 0.5) & (pool(1 - hard) > 0.5))
    truth = equations.f32(truth > 0.5)

    def dice(p):
        p = equations.f32(p > 0.5)
        return ((2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)).mean()

    return {
        "sigma": sigma.mean(), "sigma_band": (sigma * band).sum() / jnp.maximum(band.sum(), 1), "w": w.mean(),
        "w_band": (w * band).sum() / jnp.maximum(band.sum(), 1), "teacher_dice": dice(mu), "student_dice": dice(p_w),
    }


def to_float(x):
    """uint8 0..255 -> float32 in [0, 1]."""
    return x.astype(jnp.float32) / 255
