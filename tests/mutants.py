"""Deliberate faults, one at a time in a copy of the project: each must make a test fail. `make mutants`.

    python tests/mutants.py [WORD ...]      only the faults whose name holds one of the words

Prints `caught N / N`; exit status 1 when a fault survives or changes nothing, 2 when the tests fail without any fault.
A fault counts when its file still parses to another program, the tests named beside it pass without it, and with it an
assertion of theirs fails; a crash, or a test that cannot even be collected, does not count as caught.
"""

import ast
import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
    """In `file`, the one occurrence of `old` becomes `new`; `tests` are what pytest is given to find out."""

    name: str
    file: str
    old: str
    new: str
    tests: str


EQ, STEP, REF = "tests/equations_test.py", "tests/steps_test.py", "tests/reference_test.py"
LOSSES = f"{REF}::test_step_equals_the_algorithms[]"
MUTANTS = [Mutant(*fields) for fields in (
    # equations
    ("MIM measures what it saw", "equations.py", "(error * hidden).sum()", "(error * (1 - hidden)).sum()",
     f"{EQ} -k mim"),
    ("MIM is not divided by the hidden patches", "equations.py", "jnp.maximum(hidden.sum(), 1.0)", "hidden.size",
     f"{EQ} -k mim"),
    ("cross-entropy with the wrong sign", "equations.py", "- f32(target) * f32(z)", "+ f32(target) * f32(z)",
     f"{EQ} -k cross"),
    ("entropy with the wrong sign", "equations.py", "- z * jax.nn.sigmoid(z)", "+ z * jax.nn.sigmoid(z)",
     f"{EQ} -k entropy_loss"),
    ("entropy of what CutOut erased", "equations.py", "(entropy * notcut).sum()", "entropy.sum()",
     f"{EQ} -k entropy_loss"),
    ("deviation with ddof 0", "equations.py", "/ (m - 1))", "/ m)", f"{EQ} -k deviation"),
    ("confidence grows with doubt", "equations.py", "jnp.exp(-f32(sigma) / kappa)", "jnp.exp(f32(sigma) / kappa)",
     f"{EQ} -k confidence"),
    ("keep is inverted", "equations.py", "f32(f32(sigma) < tau_u)", "f32(f32(sigma) > tau_u)", f"{EQ} -k keep_certain"),
    ("EMA with alpha and 1 - alpha swapped", "equations.py", "phi, 1.0 - alpha)", "phi, alpha)", f"{EQ} -k ema"),
    ("EMA remembers the first weights", "equations.py", "jnp.minimum(1.0 - 1.0 / (t + 1.0), alpha)", "alpha",
     f"{EQ} -k ema"),
    ("Dice pooled over the batch", "equations.py", "(2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)",
     "(2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)", f"{EQ} -k dice"),
    ("pixel weights unused in Eq. (8)", "equations.py", "(a * error).sum()", "error.sum()", f"{EQ} -k unsupervised"),
    ("Eq. (8) divided by all pixels", "equations.py", 'if norm == "weights" else a.size', 'if norm == "" else a.size',
     f"{EQ} -k unsupervised"),
    ("the ramp falls", "equations.py", "jnp.exp(-5.0 * jnp.square(1.0 - share))", "jnp.exp(-5.0 * jnp.square(share))",
     f"{EQ} -k ramp"),
    ("the sum forgets beta", "equations.py", "l_sup + beta * l_unsup", "l_sup + l_unsup", f"{EQ} -k total"),
    ("losses in bfloat16", "equations.py", "jnp.asarray(x, jnp.float32)", "jnp.asarray(x)", f"{EQ} -k half"),
    # pseudo-labels
    ("every pass has the same dropout", "pseudo.py", "keys = per_example(key, passes)",
     "keys = per_example(key, 1).repeat(passes)", f"{STEP} -k teacher_passes"),
    ("every image has the same dropout", "pseudo.py", "(per_example(key, image.shape[0]), image)",
     "(per_example(key, 1).repeat(image.shape[0]), image)", f"{STEP} -k teacher_passes"),
    ("a bias learns from a sum in bfloat16", "layers.py", "jnp.broadcast_to(wide(parameter), like.shape).astype(like.dtype)",
     "jnp.broadcast_to(parameter.astype(like.dtype), like.shape)", "tests/precision_test.py -k every_product"),
    ("norms of bfloat16 sum in bfloat16", "layers.py", "x.astype(jnp.promote_types(x.dtype, jnp.float32))", "x",
     "tests/precision_test.py -k norms"),
    ("every network rounds", "steps.py", 'precision = config.train.precision', 'precision = "bfloat16"',
     "tests/precision_test.py -k ends_in"),
    ("passes recompute what is the same in all", "pseudo.py",
     "network.outputs(params, image[None], key=k)[:, 0])",
     "network.outputs(params, image[None] + 0 * jax.random.uniform(k), key=k)[:, 0])",
     "tests/networks_test.py -k once_per_image"),
    ("a gradient flows into mu, sigma and w", "pseudo.py",
     "return jax.lax.stop_gradient(PseudoLabel(mu, sigma, w, keep(mu, sigma, config.pseudo, share), "
     "target))", "return PseudoLabel(mu, sigma, w, keep(mu, sigma, config.pseudo, share), target)",
     f"{STEP} -k carry_no_gradient"),
    ("the teacher is theta, not phi", "pseudo.py", 'weights = state.ema if cfg.weights == "ema" else state.params',
     "weights = state.params", f"{STEP} -k eqs_4_and_5"),
    ("w switched off", "pseudo.py", 'if config.pseudo.weight == "confidence" else',
     'if config.pseudo.weight == "on" else', "tests/pseudo_test.py -k targets_and_weights"),
    ("each teaches itself in cross teaching", "pseudo.py", '{"vit" if learner == "student" else "student": passes}',
     "{learner: passes}", "tests/pseudo_test.py -k passes_for"),
    ("a hard label below the threshold", "pseudo.py", "jnp.maximum(mu, 1 - mu) > cfg.tau_p",
     "jnp.maximum(mu, 1 - mu) < cfg.tau_p", "tests/pseudo_test.py -k filter"),
    # the step
    ("an unlabelled mask leaks", "steps.py", "weak = View(x_w, jnp.ones_like(p_w), p_w, labels)",
     "weak = View(x_w, jnp.ones_like(p_w), p_w, labels)\n"
     "        labels = {n: label.replace(target=truth) for n, label in labels.items()}",
     f"{STEP} -k masks_of_unlabelled"),
    ("w unused in the step", "steps.py", "label.w * label.keep * view.notcut", "label.keep * view.notcut", LOSSES),
    ("keep unused in the step", "steps.py", "label.w * label.keep * view.notcut", "label.w * view.notcut", LOSSES),
    ("what CutOut erased is taught", "steps.py", "label.w * label.keep * view.notcut", "label.w * label.keep", LOSSES),
    ("p_w stays where CutMix moved the image", "steps.py", "View(image, notcut, p_s, labels_s))",
     "View(image, notcut, p_s, labels_s)).replace(p_w=p_s)", f"{REF} -k gradients_are"),
    ("the labels stay where CutMix moved the image", "steps.py", "View(image, notcut, p_s, labels_s))",
     "View(image, notcut, p_s, labels_s)).replace(labels=labels_s)", LOSSES),
    ("p_w carries a gradient", "steps.py", 'part["unsup"] = unsupervised(z_s, strong, name, cfg)',
     "q = jax.nn.sigmoid(z_s[0])\n"
     "                leak = strong.replace(p_w=strong.p_w + q - jax.lax.stop_gradient(q))\n"
     '                part["unsup"] = unsupervised(z_s, leak, name, cfg)', f"{REF} -k constant_labels"),
    ("the ViT gets the student's weak term", "steps.py", 'cfg.lambda_c if learner == "student" else 0.0', "cfg.lambda_c",
     LOSSES),
    ("EMA of the student alone", "steps.py",
     "ema = equations.ema_update(state.ema, state.params, (state.step - 1) // every, alpha)",
     'ema = {**state.ema, "student": equations.ema_update(\n'
     '        state.ema["student"], state.params["student"], (state.step - 1) // every, alpha)}',
     f"{STEP} -k phi_is_their_average"),
    ("EMA of the weights before the update", "steps.py", "state, updated = update(state, grads, tx)",
     "before = state\n    state, updated = update(state, grads, tx)\n"
     "    state = state.replace(ema=equations.ema_update(state.ema, before.params, before.step, config.ema.alpha))\n"
     "    return state, metrics | updated | {'loss': loss} | parts", f"{STEP} -k phi_is_their_average"),
    ("one gradient clip for both networks", "steps.py",
     "return optax.partition(dict.fromkeys(names, adamw), {name: name for name in names})", "return adamw",
     f"{STEP} -k clipped"),
    ("biases decay too", "steps.py", 'path[-1].key == "kernel"', 'path[-1].key != ""', f"{STEP} -k decay"),
    ("the plateau's scale is unused", "steps.py", "lambda u: u * state.plateau.scale", "lambda u: u",
     f"{STEP} -k plateau_scale"),
    ("the same randomness in every step", "steps.py", 'jax.random.fold_in(named(key, "train"), state.step)',
     'named(key, "train")', f"{STEP} -k step_number"),
    ("phi never waits", "steps.py", "due = state.step % every == 0", "due = True", f"{STEP} -k every_few_steps"),
    ("L_MIM in the loop stops before the encoder", "steps.py", '["encoder"]}', '["encoder"]}\n'
     '            encoder = jax.lax.stop_gradient(encoder)', f"{REF} -k reaches_the_encoder"),
    ("the weight of L_MIM in the loop is unused", "steps.py", "config.mim.joint_weight * parts", "parts",
     f"{REF}::test_step_equals_the_algorithms[ablate=alg1]"),
    ("grey modelling sees colour", "steps.py", "if config.mim.grey:", "if False:", f"{STEP} -k grey"),
    ("Eq. (8) is always divided by the weights", "steps.py", "norm=cfg.norm", 'norm="weights"',
     f"{REF}::test_step_equals_the_algorithms[method=fixmatch]"),
    ("stage 2 forgets stage 1", "train.py", 'params[name] | {"encoder": pretrained.params[name]["encoder"]}',
     "params[name]", "tests/train_test.py -k encoders_of_stage_1"),
    # networks
    ("the segmentation head gets no gradient", "student.py", "logits = [self.out(x)]", "logits = [0 * self.out(x)]",
     "tests/networks_test.py -k every_parameter"),
    ("the autoencoder sees what is hidden", "teacher.py", "order = jnp.argsort(hidden, axis=1, stable=True)",
     "order = jnp.argsort(-hidden, axis=1, stable=True)", "tests/networks_test.py -k hidden_pixels"),
    ("tokens do not return to their place", "teacher.py", "place = jnp.argsort(order, axis=1)", "place = order",
     "tests/networks_test.py -k returns_to_its_place"),
    ("window mask not shifted", "layers.py", "mask = window_mask(h, w, wh, ww, shift)",
     "mask = window_mask(h, w, wh, ww, (0, 0))", "tests/layers_test.py -k reaches"),
    ("windows not shifted back", "layers.py", "return jnp.roll(y, shift, (1, 2))[:, :h, :w]", "return y[:, :h, :w]",
     "tests/layers_test.py -k reaches"),
    ("relative bias transposed", "layers.py", "return d_row * (2 * window - 1) + d_col",
     "return d_col * (2 * window - 1) + d_row", "tests/layers_test.py -k bias_points"),
    ("transposed convolution with its taps swapped", "linear.py", "jnp.concatenate([kernel[2:3], kernel[0:1]])",
     "jnp.concatenate([kernel[0:1], kernel[2:3]])", "tests/layers_test.py -k definition"),
    ("gradient of a convolution through its kernel unturned", "linear.py", "swapped(jax.lax.rev(kernel, (0, 1)))",
     "swapped(kernel)", "tests/linear_test.py -k convolution"),
    ("neighbouring outputs in the wrong order", "linear.py", "(i, together - 1 - i, 0)", "(together - 1 - i, i, 0)",
     "tests/linear_test.py -k convolution"),
    ("GroupNorm without its mean", "layers.py", "self.bias[None] - mean * gain", "self.bias[None] - 0 * mean * gain",
     "tests/layers_test.py -k group_norm"),
    # augmentation, data, randomness
    ("strong views turned once more", "augment.py", 'strong_view(named(k, f"strong/{i}"), image)',
     'strong_view(named(k, f"strong/{i}"), warp(image, affine))', "tests/augment_test.py -k fits_the_strong_view"),
    ("the weak view turned as well", "augment.py", "if not cfg.upright:", "if cfg.upright:",
     "tests/augment_test.py -k fits_the_strong_view"),
    ("pseudo-labels stay where the weak view lies", "steps.py", "augment.moved((p_w, labels), affine)", "(p_w, labels)",
     LOSSES),
    ("another cubic kernel", "augment.py", "a: float = -0.75", "a: float = -0.5", "tests/augment_test.py -k definition"),
    ("the mask does not move with its image", "augment.py", "return both[..., :3], both[..., 3]",
     "return both[..., :3], mask", "tests/augment_test.py -k move_together"),
    ("CutMix moves images only", "augment.py", "jnp.where(box if x.ndim == 3 else box[..., None], partner, x)",
     "x if x.ndim == 3 else jnp.where(box[..., None], partner, x)", "tests/augment_test.py -k swaps_one_box"),
    ("CutOut is not reported", "augment.py", "0.5, strong), 1 - cut", "0.5, strong), jnp.ones_like(cut)",
     "tests/augment_test.py -k notcut"),
    ("RandAugment forgets its magnitude", "augment.py", "1.0, -1.0) * magnitude / 10", "1.0, -1.0)",
     "tests/augment_test.py -k rand_augment"),
    ("RandAugment never draws the last operation", "augment.py", "0, len(COLOUR_OPS)), COLOUR_OPS",
     "0, len(COLOUR_OPS) - 1), COLOUR_OPS", "tests/augment_test.py -k rand_augment"),
    ("one strength for all of the jitter", "augment.py", "jax.random.uniform(key, (4,))",
     "jax.random.uniform(key, (1,)).repeat(4)", "tests/augment_test.py -k colour_jitter"),
    ("what validates is taught too", "data.py", "return np.sort(shuffled[count:])", "return np.sort(shuffled)",
     "tests/data_test.py -k hold_out"),
    ("saturation instead of contrast", "augment.py", "blend(image, luma(image).mean(), 1 + 0.5 * m)",
     "blend(image, luma(image), 1 + 0.5 * m)", "tests/augment_test.py -k pillow"),
    ("one order for labelled and unlabelled", "data.py", 'f"{seed}/{stream}"', 'f"{seed}"',
     "tests/data_test.py -k pure_function"),
    ("purposes share their random numbers", "rng.py", "jax.random.fold_in(key, zlib.crc32(name.encode()))", "key",
     "tests/augment_test.py -k differ_in_colour_and_box"),
    # measurement
    ("a missed lesion counts as precision 1", "metrics.py", "(fp + fn == 0).astype(float)", "1.0",
     "tests/metrics_test.py"),
    # people's own images
    ("held-out images are trained on", "data.py", "picked = [i for i, id in enumerate(ids) if id not in held]",
     "picked = [i for i, id in enumerate(ids)]", "tests/files_test.py -k held_out"),
    ("held-out images have taught the weights that a run begins with", "initial.py", "    if taught:", "    if not known:",
     "tests/initial_test.py -k holds_out"),
    ("a run that is begun again takes what its source has become", "initial.py",
     '["weights"] != about["weights"]', '["weights"] == 0',
     "tests/initial_test.py -k gone_on"),
    ("images that taught are measured", "data.py", "[key for key in ids if key not in learned_from]", "list(ids)",
     "tests/files_test.py -k not_measured"),
    ("test images come in under another name", "data.py", "found = known.get(fingerprint(pixels))",
     "found = None", "tests/files_test.py -k extra"),
    ("masks of PH2 are predicted on", "inputs.py", "if not NO_IMAGE.search(at.as_posix()) and not", "if not",
     "tests/predict_test.py -k outlines_of"),
    ("sigma on the mask's file", "predict.py", 'save(output / f"{item.id}_mask.png", mask.astype(np.uint8) * 255)',
     'save(output / f"{item.id}_mask.png", (sigma * 510).astype(np.uint8))', "tests/predict_test.py -k lie_on"),
    ("a call drops the lines of earlier ones", "predict.py", "and row[0] not in ids", "and False",
     "tests/predict_test.py -k adds_to"),
    ("a probability that nobody measured", "predict.py", 'item.maps["mean_logits"], shape) / temperature',
     'item.maps["logits"], shape)', "tests/predict_test.py -k probabilities"),
    ("the whole folder is read at once", "predict.py", "if len(queue) > count:", "if len(queue) > 100 * count:",
     "tests/predict_test.py -k under_way"),
    # measurement, continued
    ("a missed lesion is no distance", "boundary.py", "(0.0, 0.0) if right else (LOST, GRID * 2**0.5)", "(0.0, 0.0)",
     "tests/boundary_test.py -k missed"),
    ("distances in one direction", "boundary.py", "percent = np.concatenate([there, back])", "percent = there",
     "tests/boundary_test.py -k every_pair"),
    ("no outline at the image's edge", "boundary.py", "borderValue=0", "borderValue=1",
     "tests/boundary_test.py -k every_pair"),
    ("the band is twice as wide", "boundary.py", "away <= share *", "away <= 2 * share *",
     "tests/boundary_test.py -k band"),
    ("bins of opposite error cancel", "calibration.py", "np.abs(p - lesion).sum(-1)", "np.abs((p - lesion).sum(-1))",
     "tests/calibration_test.py -k cancel"),
    ("large images weigh more", "calibration.py", "return np.stack(counts) / z.size", "return np.stack(counts)",
     "tests/calibration_test.py -k weighs_the_same"),
    ("a temperature scores what it was fitted on", "calibration.py", "[fit(others) if len(others)",
     "[fit(histograms) if len(others)", "tests/calibration_test.py -k fitted"),
    ("the surest pixels leave first", "calibration.py", "np.unique(-uncertainty", "np.unique(uncertainty",
     "tests/calibration_test.py -k most_uncertain"),
    ("masks of the mean of the passes", "evaluate.py", "predicted = mask_of(logits,", "predicted = mask_of(mean,",
     "tests/evaluate_test.py -k masks_resolution"),
    ("the smallest part instead of the largest", "trained.py", "np.argmax(stats[1:", "np.argmin(stats[1:",
     "tests/evaluate_test.py -k largest_part"),
    ("of all networks only the first predicts", "trained.py", "for name, network in self.networks]).mean(0)",
     "for name, network in self.networks])[0]", "tests/evaluate_test.py -k together"),
    ("networks together share their dropout keys", "trained.py", "key if key is None else named(key, name)", "key",
     "tests/evaluate_test.py -k together"),
    ("a learner hears another's pseudo-label where it is moved", "augment.py", "[found[id(x)] for x in leaves]",
     "list(found.values()) + leaves[len(found):]", "tests/augment_test.py -k fits_the_strong_view"),
    ("the ViT's head without the image", "teacher.py", "x = block(nnx.gelu(norm(up(x)) + detail))",
     "x = block(nnx.gelu(norm(up(x)) + 0 * detail))", "tests/networks_test.py -k gradient"),
    ("flips are not flipped back", "trained.py", "jnp.flip(part, axis)", "part", "tests/evaluate_test.py -k four_views"),
    ("a normal interval for few pairs", "runs.py", "student_t.ppf(0.975, n - 1)", "1.96", "tests/runs_test.py -k students"),
    ("better before there are five pairs", "runs.py", "found.count < ENOUGH:", "found.count < 2:",
     "tests/runs_test.py -k words"),
    ("two take one cell", "grid.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     "tests/grid_test.py -k left_alone"),
    ("another run takes the place of a finished cell", "grid.py", "if json.loads(here.read_text()) == known else []", "",
     "tests/grid_test.py -k another_run"),
    ("every row is possible", "consistency.py", "if by > EXACT]", "if by > 1]",
     "tests/consistency_test.py -k catches"),
    ("an empty mask is a sure one", "selective.py", "np.maximum(area, 1), pixels)", "np.maximum(area, 1), 0.0)",
     "tests/selective_test.py -k empty"),
    ("ties count whole", "selective.py", "- good / 2", "- good", "tests/selective_test.py -k auroc"),
    ("the most doubtful are kept", "selective.py",
     "kept = np.clip(share * total - (np.cumsum(times, -1) - times), 0, times)",
     "kept = np.clip(np.cumsum(times, -1) - (1 - share) * total, 0, times)", "tests/selective_test.py -k surest"),
    ("a damaged checkpoint is believed", "checkpoint.py", "wrong = wrong or differing(tree, metadata)",
     "pass", "tests/checkpoint_test.py -k values_that_decode"),
    ("what another process cannot read is taken", "checkpoint.py", "if elsewhere and not wrong:", "if False:",
     "tests/checkpoint_test.py -k one_process_cannot_read"),
    ("a checksum without places", "checkpoint.py", "(2 * places[shard.index] + 1)", "(1 + 0 * places[shard.index])",
     "tests/checkpoint_test.py -k every_word"),
    ("none intact is none there", "checkpoint.py", "    if steps:\n        raise", "    if not steps:\n        raise",
     "tests/checkpoint_test.py -k none_is_intact"),
    ("a resumed stream starts again", "data.py", "(self.first + step) * self.batch", "step * self.batch",
     "tests/data_test.py -k gives_the_batches"),
    ("every process reads the first share", "data.py", "+ self.places[place]", "+ place",
     "tests/properties_test.py -k shares_of_all"),
    ("FSDP spreads the first axis that fits", "sharding.py", "longest = max(fitting", "longest = min(fitting",
     "tests/sharding_test.py -k rule"),
    ("a workdir is never locked", "workdir.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     "tests/workdir_test.py -k second"),
    ("told to leave, and stays", "preemption.py", "        self.told = True", "        self.told = False",
     "tests/workdir_test.py -k sigterm"),
)]


def changed(mutant: Mutant) -> str:
    """The whole file with its fault; raises ValueError where the text is not there once or the program stays the same."""
    text = (ROOT / "mira_u_jax" / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} holds {text.count(mutant.old)} times {mutant.old!r}")
    fault = text.replace(mutant.old, mutant.new)
    if ast.dump(ast.parse(fault)) == ast.dump(ast.parse(text)):
        raise ValueError(f"{mutant.name}: changes nothing")
    return fault


def asserted(output: str) -> bool:
    """Whether pytest says that an assertion failed, its own or NumPy's, or that an expected error did not come."""
    return re.search(r"^E +(AssertionError|assert |Failed: DID NOT RAISE)", output, re.MULTILINE) is not None


def pytest(folder: pathlib.Path, cache: pathlib.Path, tests: str) -> tuple[int, str]:
    """Exit status and output of pytest in a copy; compiled programs that a fault does not touch are shared."""
    environment = os.environ | {
        "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-m", "slow or not slow", "-p", "no:cacheprovider", *shlex.split(tests)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def copy_to(folder: pathlib.Path):
    for name in ("mira_u_jax", "configs", "tfds_builders", "tests", "docs", "benchmarks", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)


def main(words: list[str]) -> int:
    mutants = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    try:
        faults = {m: changed(m) for m in mutants}
    except (ValueError, SyntaxError) as error:
        print(f"error: {error}")
        return 1
    workers = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 1)
    with tempfile.TemporaryDirectory() as top:
        cache, folders = pathlib.Path(top) / "cache", queue.SimpleQueue()
        for i in range(workers):
            folder = pathlib.Path(top) / f"copy{i}"
            copy_to(folder)
            folders.put(folder)

        def run(tests: str, file: str = "__init__.py", fault: str = ""):
            folder, started = folders.get(), time.perf_counter()
            path = folder / "mira_u_jax" / file
            before = path.read_text()
            path.write_text(fault or before)
            try:
                return *pytest(folder, cache, tests), time.perf_counter() - started
            finally:
                path.write_text(before)
                folders.put(folder)

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            selections = list(dict.fromkeys(m.tests for m in mutants))
            for tests, (status, output, _) in zip(selections, pool.map(run, selections), strict=True):
                if status:
                    print(f"error: without any fault, pytest {tests} ends with {status}\n{output[-2000:]}")
                    return 2
            print(f"{len(selections)} selections of tests pass without a fault", flush=True)
            caught = 0
            jobs = {m: pool.submit(run, m.tests, m.file, faults[m]) for m in mutants}
            for m, job in jobs.items():
                status, output, seconds = job.result()
                found = status == 1 and asserted(output)
                caught += found
                verdict = "caught" if found else "SURVIVED" if status == 0 else f"CRASHED with {status}\n{output[-2000:]}\n"
                print(f"{verdict:<8} {m.file:<13} {m.name} ({seconds:.0f} s)", flush=True)
    print(f"caught {caught} / {len(mutants)}")
    return int(caught < len(mutants))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
