"""A trained run as one file for a product: StableHLO with the weights inside, to be run by jax and flatbuffers alone.

    python -m mira_u_jax.export --workdir=DIR --output=lesion.stablehlo

also writes the weights as lesion.safetensors and a model card, lesion.md. docs/usage.md has the ten lines that load it. The
program takes uint8 images (n, s, s, 3), any n, and runs on CPUs, CUDA GPUs and TPUs.
"""

import json
import pathlib

import jax
import jax.export
import numpy as np
import safetensors.numpy
from absl import flags

from mira_u_jax import command, trained
from mira_u_jax.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")


def export(workdir, output, *, passes: int = 0, network: str = "student") -> jax.export.Exported:
    """Write `output`, its .safetensors and its .md; returns the program.

    Its call takes images (n, s, s, 3) uint8 and gives {"probability", "logit", "sigma"}, (n, s, s) float32, as predict's:
    the mean of `passes` dropout passes of the averaged network (0: as the run is evaluated) after the run's temperature, the
    logit without dropout, of which the mask is made, and the deviation of the passes; over flips where the run is evaluated
    so. Raises UserError.
    """
    output = pathlib.Path(output)
    if output.suffix in (".safetensors", ".md", "") or output.is_dir():
        raise UserError(f"--output={output}: give a file such as lesion.stablehlo; .safetensors and .md come beside it")
    predictor = trained.Predictor(workdir, network)
    settings, params, passes = predictor.settings, predictor.params, passes or predictor.passes
    size, temperature = settings.size, predictor.temperature

    @jax.jit
    def program(image):
        found = trained.look(params, image, network=predictor.network, passes=passes)
        probability = jax.nn.sigmoid(found["mean_logits"] / temperature)
        return {"probability": probability, "logit": found["logits"], "sigma": found["sigma"]}

    (n,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(program, platforms=PLATFORMS)(jax.ShapeDtypeStruct((n, size, size, 3), np.uint8))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(exported.serialize())
    leaves = {".".join(str(k.key) for k in path): np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tree = {k: v for k, v in json.loads(settings.to_json()).items() if k not in ("data_dir", "files")}  # nobody's business
    facts = {"network": predictor.name, "size": str(size), "config": json.dumps(tree)}
    safetensors.numpy.save_file(leaves, output.with_suffix(".safetensors"), metadata=facts)
    output.with_suffix(".md").write_text(card(workdir, output.name, predictor, passes, leaves))
    return exported


DATA = {
    "isic2016": "ISIC-2016 Part 1 (lesion segmentation, 900 training images), of the ISIC archive",
    "ph2": "PH2, four of five folds", "synthetic_lesions": "400 drawn lesions; it has never seen skin",
    "folder": "a folder of the person who trained it",
}


def card(workdir, file: str, predictor: trained.Predictor, passes: int, leaves) -> str:
    """The model card, Markdown: what it is, what it was trained on, how it was measured, what it is not for."""
    workdir, settings = pathlib.Path(workdir), predictor.settings
    run = json.loads((workdir / "config.json").read_text())
    measured = workdir / "evaluation.json"
    parameters = sum(leaf.size for leaf in leaves.values())
    split = "a fifth of the training images, held out" if settings.split == "dev" else "its test images"
    s, versions = settings.size, ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    network, *views = predictor.name.split("+")
    names = sorted({leaf.split(".")[0] for leaf in leaves}) if network == "all" else [network]
    averaged, each = " and ".join(names), " of each" if len(names) > 1 else ""
    heat = predictor.temperature
    cooled = "no temperature fitted" if heat == 1 else f"its logit divided by the temperature {heat:.3f}"
    rows = {
        "network": f"the averaged {'+'.join([averaged, *views])} of a `{settings.method}` run, {parameters:,} parameters,"
        " float32",
        "input": f"`uint8 (n, {s}, {s}, 3)`, RGB, the whole photograph squashed to a square (area mean)",
        "output": f"`probability` of lesion, the mean of {passes} dropout passes{each}, {cooled}; `logit`, dropout off;"
        f" `sigma`, the deviation of the passes; `float32 (n, {s}, {s})`",
        "mask": "`logit` resized to the photograph (bilinear, half-pixel centres): lesion where > 0"
        + (", of that the largest connected part" if settings.evaluation.largest else ""),
        "trained on": seen(settings, run.get("data", {})),
        "commit": run.get("commit") or "unknown", "versions": versions,
    }
    lines = [f"# {file}", "", INTENDED, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows.items()] + ["", "## Measured", ""]
    result = json.loads(measured.read_text()) if measured.exists() else {}
    if result and result.get("network", "student") == network:
        count = f"{result['images']} images, {result['missed']} lesions missed altogether"
        lines += [f"On {result['dataset']}, {split}: {count}. {INTERVAL}", "", "| | mean | 95% |", "|---|---|---|"]
        known = {name: bounds for name, bounds in result["ci95"].items() if isinstance(result.get(name), float)}
        lines += [f"| {name} | {result[name]:.4f} | {low:.4f} to {high:.4f} |" for name, (low, high) in known.items()]
    else:
        lines.append("Nothing: this network was not evaluated.")
    return "\n".join([*lines, "", "## Limits", "", LIMITS, ""])


def seen(settings, data: dict) -> str:
    """What a network learned from; data: "images" and "labelled" of its run, which older runs do not know."""
    used = f"{100 * settings.frac:g}% of them"
    if data:
        more = ", some of them added by the person who trained it," if settings.files.extra else ""
        used = f"{data['labelled']} of {data['images']} images{more}"
    began = ", starting from the weights of another run, which learned from images of its own" if settings.files.init else ""
    said = f"outlines of {used} used, label seed {settings.label_seed}, seed {settings.seed}"
    return f"{DATA[settings.dataset]}; {said}{began}"


INTENDED = """\
Outlines of skin lesions in dermoscopic photographs, with a map of where the network is unsure. **Not a medical device**: for
research, not for diagnosis or for choosing a treatment."""
INTERVAL = """\
Means over images at the size of the outlines; the interval is a 95% bootstrap over these images: how exact the figure is for
images like them. It says nothing about other cameras, hospitals or skins. What is `calibrated` is of `probability` above
if a temperature stands there, `ece` and `brier` of the same without a temperature, `ause` of `sigma`."""
LIMITS = """\
* It outlines one thing in every photograph. It does not say whether that is a lesion, nor of which kind.
* ISIC-2016 and PH2 are dermoscopic images, mostly of light skin. It has not been measured on photographs by phone, on dark
  skin, on nails or on mucosa.
* Hair, rulers, ink, stickers and dark corners mislead it; `sigma` is often high there, not always.
* `sigma` says where the passes disagree. It is not a probability of error, and a confident mask may be wrong.
* The images belong to their publishers and come under their terms; whether a network trained on them may be sold is
  for them and for your lawyers to say."""


def main():
    f = flags.FLAGS
    trained.check_passes(f.passes)
    exported = export(f.workdir, f.output, passes=f.passes, network=f.network)
    size = pathlib.Path(f.output).stat().st_size / 1e6
    takes = f"{exported.in_avals[0].dtype} {exported.in_avals[0].shape}"
    print(f"{f.output}: {size:.1f} MB, {', '.join(exported.platforms)}, takes {takes}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run of main.")
    flags.DEFINE_string("output", None, "File of the program; .safetensors and .md are written beside it.")
    flags.DEFINE_integer("passes", 0, "Dropout passes behind sigma; 0: as the run is evaluated.")
    flags.DEFINE_enum("network", "student", trained.NETWORKS, "Whose average is exported; all: the mean of both.")
    command.run(main, required=("workdir", "output"))
