"""The method: pretrain_step, train_step and eval_step, pure functions that the loop compiles once each.

A network is a pure function of a plain parameter tree. theta = state.params = {"student": ..., "vit": ...} are the online
parameters, phi = state.ema = EMA(theta) has the same tree; a network that nothing reads is not in it. Stage 1 has no phi.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from einops import rearrange
from flax import nnx, struct

from mira_u_jax import augment, equations, pseudo
from mira_u_jax.config import outlined, steps_of
from mira_u_jax.errors import UserError
from mira_u_jax.rng import named, stream
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


@struct.dataclass
class View:
    """Unlabelled images as a learner sees them, (b, h, w, 3), and all that belongs to their pixels, (b, h, w) each."""

    image: jax.Array
    notcut: jax.Array  # 0 where CutOut erased the image
    p_w: jax.Array  # the student's own prediction on the weak view, no gradient
    labels: dict[str, pseudo.PseudoLabel]  # by learner


@dataclasses.dataclass(frozen=True)
class Network:
    """network(params, *inputs, key=None): the module as a pure function; a key turns dropout on.

    network.outputs(...): the same for the method that gives all logits, (k, b, h, w), the first of which predict.

    precision: of products and of what a layer hands to the next. With "bfloat16" parameters and inputs are rounded here, so
    inside what is differentiated: gradients come back float32. Layers keep the sums of norms and softmax in float32, and
    a module's results are float32 always.
    """

    graphdef: nnx.GraphDef
    precision: str = "float32"

    def __call__(self, params, *inputs, key=None):
        params, inputs = self.rounded((params, inputs))
        return nnx.merge(self.graphdef, params)(*inputs, rngs=dropout_of(key))

    def outputs(self, params, *inputs, key=None, **options):
        params, inputs = self.rounded((params, inputs))
        return nnx.merge(self.graphdef, params).outputs(*inputs, rngs=dropout_of(key), **options)

    def rounded(self, tree):
        if self.precision == "float32":  # as it comes: tests run the networks in float64
            return tree
        return jax.tree.map(lambda x: jnp.asarray(x, self.precision) if x.dtype == jnp.float32 else x, tree)


def dropout_of(key) -> nnx.Rngs | None:
    return None if key is None else stream(key)


# --- networks, optimiser, state -------------------------------------------------------------------------------------


def network_names(config) -> tuple[str, ...]:
    """The networks in theta: the student, the ViT when a teacher reads it, and what joint pretraining adds to them."""
    reads_vit = config.loss.beta > 0 and config.teacher.source != "ema"
    learners = ("student", "vit") if reads_vit else ("student",)
    return learners + tuple(f"{name}_mim" for name in learners if config.mim.joint_weight and name in mim_targets(config))


def mim_targets(config) -> tuple[str, ...]:
    """The networks whose encoder masked image modelling trains."""
    return ("student", "vit") if config.mim.target == "both" else (config.mim.target,)


def make_module(name: str, stage: str, config, rngs: nnx.Rngs) -> nnx.Module:
    """The module of one network: a segmenter; in stage "pretrain" and as NAME_mim the masked autoencoder on its encoder."""
    name, autoencoder = name.removesuffix("_mim"), stage == "pretrain" or name.endswith("_mim")
    module = Student(**config.student, rngs=rngs) if name == "student" else Teacher(**config.vit, rngs=rngs)
    if not autoencoder:
        return module
    if name == "student":
        return MaskedReconstruction(module, ratio=config.mim.ratio, rngs=rngs)
    return MaskedAutoencoder(module, ratio=config.mim.ratio, **config.mim.decoder, rngs=rngs)


def make_networks(names, stage: str, config) -> dict[str, Network]:
    """The pure functions of a stage, by network name. Builds no parameters."""

    def graphdef(name):
        module = nnx.eval_shape(lambda: make_module(name, stage, config, stream(jax.random.key(0))))
        return nnx.split(module)[0]

    precision = config.train.precision
    return {name: Network(graphdef(name), precision) for name in names}


def fresh_params(names, stage: str, config, key) -> dict:
    """Fresh parameters of a stage, {name: plain tree of float32 arrays}; `key` is the run's key.

    NAME_mim holds only what the autoencoder adds: its encoder is that of NAME.
    """

    def init(name):
        rngs = stream(named(named(key, f"init/{stage}"), name))
        params = nnx.to_pure_dict(nnx.split(make_module(name, stage, config, rngs))[1])
        return {k: v for k, v in params.items() if k != "encoder"} if name.endswith("_mim") else params

    return {name: init(name) for name in names}


# Runs once: compiling hundreds of small random draws well would take longer than drawing them.
init_params = jax.jit(fresh_params, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 0})


def abstract_params(config, names=None) -> dict:
    """Shapes and types of the parameters of stage "train", nothing computed. UserError for an older run's ViT.

    names: those of its networks that are asked for; None is all.
    """
    names = tuple(names or network_names(config))
    if "vit" in names and "head_widths" not in config.vit:
        raise UserError(
            "a run with vit.head_channels: its ViT has a head that is no longer here; the commit in its config.json reads it"
        )
    make = functools.partial(fresh_params, names, "train", config)
    return jax.eval_shape(make, jax.random.key(0))


def init_state(params, tx, optim, *, averaged: bool = True) -> TrainState:
    """State at step 0. phi starts as a COPY of theta: both are donated, so they must not share buffers.

    averaged: False leaves phi out, {}, where nothing reads it.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=jax.tree.map(jnp.copy, params) if averaged else {},
        opt=tx.init(params), plateau=make_plateau(optim).init(params),
    )


def make_schedule(optim, steps: int, *, lr: float, schedule: str):
    """Learning rate by step: linear warm-up to lr, then cosine to zero, or constant under the plateau schedule.

    A warm-up has one step at least; optim.warmup=0 is none.
    """
    warmup = max(int(optim.warmup * steps), 1) if optim.warmup else 0
    first = 0.0 if warmup else lr
    if schedule == "plateau":
        return optax.schedules.warmup_constant_schedule(first, lr, warmup)
    return optax.schedules.warmup_cosine_decay_schedule(first, lr, warmup, max(steps, warmup + 1))


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

    data, index as in `rows`, one batch "unlabelled"; key: the run's key. Returns (state, metrics).
    """
    key = jax.random.fold_in(named(key, "pretrain"), state.step)
    image = to_float(rows(data, index, "unlabelled")["image"])
    image, _ = augment.labelled_view(named(key, "view"), image, jnp.zeros(image.shape[:3]), config.augment)

    def loss_fn(params):
        losses = {f"mim_{name}": mim(network, params[name], image, named(key, name), config)
                  for name, network in networks.items()}
        return sum(losses.values()), losses

    (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, metrics = update(state, grads, tx)
    return state, metrics | {"loss": loss} | losses


def train_step(state: TrainState, data, index, key, *, networks, tx, config, steps: int, epoch: int):
    """Stage 2, one step of MIRA-U: M teacher passes, student and ViT update, EMA. The step in words: docs/paper.md.

    data, index as in `rows`, batches "labelled" and, unless beta is 0, "unlabelled"; key: the run's key; steps: the length
    of the stage, epoch: that of a pass over the pool. Returns (state, metrics), metrics all float32 scalars. Every method
    and ablation is a configuration of this one function.
    """
    key = jax.random.fold_in(named(key, "train"), state.step)
    cfg, semi = config.loss, config.loss.beta > 0
    learners = {name: networks[name] for name in pseudo.LEARNERS if name in networks}
    batch = rows(data, index, "labelled")
    x, y = to_float(batch["image"]), to_float(batch["mask"])
    x, y = augment.labelled_view(named(key, "labelled"), x, y, config.augment)
    beta = cfg.beta * equations.ramp_up(state.step - cfg.wait * steps, cfg.ramp * steps)
    metrics = {"beta": beta}

    if semi:
        # 1. Weak and strong views. The masks of these images are for the report in `metrics` only.
        batch = rows(data, index, "unlabelled")
        x_w, strong, affine, truth = augment.weak_strong_views(
            named(key, "unlabelled"), to_float(batch["image"]), to_float(batch["mask"]), config.augment
        )
        # 2., 3. The teacher's M passes on the weak view: mu, sigma, w, keep for each learner.
        labels = pseudo.pseudo_labels(
            state, x_w, named(key, "passes"), networks=networks, config=config, share=state.step / steps
        )
        p_w = jax.lax.stop_gradient(jax.nn.sigmoid(learners["student"](state.params["student"], x_w)))
        truth = truth if outlined(config) else None
        metrics |= pseudo.report(labels["student"], p_w, truth, filtered=config.pseudo.filter != "none")
        weak = View(x_w, jnp.ones_like(p_w), p_w, labels)
        # 4. What belongs to a pixel goes with it to the strong views, and with CutMix, which has other boxes for each.
        p_s, labels_s = augment.moved((p_w, labels), affine)
        mixed = [
            augment.cutmix(named(key, f"cutmix/{i}"), config.augment.cutmix, View(image, notcut, p_s, labels_s))
            for i, (image, notcut) in enumerate(strong)
        ]
        strong = jax.tree.map(interleaved, *mixed)
        x = interleaved(x, *(view.image for view in mixed))  # one forward pass for the labelled and the strong batch

    def loss_fn(params):
        # 5. The losses; dropout is on in every trained pass.
        loss, parts = 0.0, {}
        for name, network in learners.items():
            z = network.outputs(params[name], x, key=named(key, name))
            z = rearrange(z, "k (b v) h w -> k b v h w", b=y.shape[0])
            z, z_s = z[:, :, 0], rearrange(z[:, :, 1:], "k b v h w -> k (b v) h w")
            part = {"sup": over_outputs(
                equations.supervised_loss, z, y, lambda_dice=cfg.lambda_dice, lambda_bce=cfg.lambda_bce
            )}
            if semi:
                part["unsup"] = unsupervised(z_s, strong, name, cfg)
            if semi and name == "student":
                part["ent"] = over_outputs(equations.entropy_loss, z_s, strong.notcut)
                if cfg.feature:
                    z_w = network.outputs(params[name], x_w, key=named(key, "feature"), perturb=0.5)
                    part["unsup"] *= 1 - cfg.feature
                    part["unsup"] += cfg.feature * unsupervised(z_w, weak, name, cfg)
            loss += equations.total_loss(part["sup"], part.get("unsup", 0.0), part.get("ent", 0.0), beta, cfg.gamma * beta)
            parts |= {f"loss_{k}" if name == "student" else f"loss_{name}_{k}": v for k, v in part.items()}
        for name in [name for name in networks if name not in learners]:  # Algorithm 1: L_MIM in the same loop
            encoder = {"encoder": params[name.removesuffix("_mim")]["encoder"]}
            parts[f"loss_{name}"] = mim(networks[name], params[name] | encoder, x_w, named(key, name), config)
            loss += config.mim.joint_weight * parts[f"loss_{name}"]
        return loss, parts

    (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    # 6. AdamW on theta.
    state, updated = update(state, grads, tx)
    # 7. phi.
    every = min(max(steps_of(config.ema.every, epoch=epoch), 1), steps)  # a run shorter than that averages at its end
    state = average(state, config.ema.alpha, every)
    return state, metrics | updated | {"loss": loss} | parts


def eval_step(params, image, *, network: Network):
    """Logits (b, h, w) float32 of uint8 images (b, h, w, 3), dropout off."""
    return network(params, to_float(image))


# --- their parts ----------------------------------------------------------------------------------------------------


def rows(data, index, name: str) -> dict[str, jax.Array]:
    """The batch `name`, {"image": (b, h, w, 3), "mask": (b, h, w)} uint8.

    Resident: data is {"image": (n, h, w, 3), "mask": (n, h, w)}, index[name] (b,) int32. Streamed: data[name] is the batch
    and index None.
    """
    return data[name] if index is None else {part: values[index[name]] for part, values in data.items()}


def interleaved(*batches):
    """Arrays (b, ...) as one (b v, ...) in which those of one place are neighbours, so that none leaves its device."""
    return rearrange(jnp.stack(batches, 1), "b v ... -> (b v) ...")


def unsupervised(z, view: View, learner: str, cfg):
    """Eq. (8) of one learner's logits (k, b, h, w) on a view; the ViT has no weak term. Scalar."""
    label = view.labels[learner]
    return over_outputs(
        equations.unsupervised_loss, z, label.target, view.p_w, label.w * label.keep * view.notcut,
        lambda_u=cfg.lambda_u, lambda_c=cfg.lambda_c if learner == "student" else 0.0, distance=cfg.distance, norm=cfg.norm,
    )


def over_outputs(loss, z, *targets, **settings):
    """Mean of a loss over the outputs in z (k, b, h, w)."""
    return jax.vmap(lambda z: loss(z, *targets, **settings))(z).mean()


def mim(network: Network, params, image, key, config):
    """Eq. (1) of one masked autoencoder on images (b, h, w, 3) in [0, 1]."""
    if config.mim.grey:
        image = jnp.broadcast_to(augment.luma(image), image.shape)
    rebuilt, hidden = network(params, image, named(key, "hide"), key=named(key, "dropout"))
    patch = round((rebuilt.shape[-1] / 3) ** 0.5)
    return equations.mim_loss(rebuilt, to_patches(image, patch), hidden)


def update(state: TrainState, grads, tx):
    """AdamW step on theta. Returns (state, metrics)."""
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: u * state.plateau.scale, updates))
    metrics = {f"grad_{name}": optax.global_norm(g) for name, g in grads.items()}
    return state.replace(step=state.step + 1, params=params, opt=opt), metrics


def average(state: TrainState, alpha: float, every: int = 1) -> TrainState:
    """Eq. (6) on phi after every `every`-th step, state.step of which are done."""
    ema = equations.ema_update(state.ema, state.params, (state.step - 1) // every, alpha)
    if every > 1:
        due = state.step % every == 0
        ema = jax.tree.map(lambda new, old: jnp.where(due, new, old), ema, state.ema)
    return state.replace(ema=ema)


def to_float(x):
    """uint8 0..255 -> float32 in [0, 1]."""
    return x.astype(jnp.float32) / 255
