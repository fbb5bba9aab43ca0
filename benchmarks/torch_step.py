"""The MIRA-U train step in PyTorch, CPU or CUDA: what mira_u_jax is compared with.

Written as a PyTorch user would for speed: channels-last, SDPA, M teacher passes as one batch, fused AdamW, foreach EMA, no
host synchronisation. `losses` takes the views as arguments, so that equality with our step can be checked on our views. Of
the method's switches it has those of method=mira_u; of our step it leaves out only the report that reaches no loss.

Shapes: b images, h w pixels, m passes; images (b, 3, h, w) in [0, 1], maps (b, h, w).
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import torch_augment as augment
from benchmarks.torch_networks import Student, Teacher, leaves, load

LEARNERS = ("student", "vit")


def check(config):
    """ValueError for a configuration that the peer does not have."""
    wanted = {
        "teacher.weights": (config.teacher.weights, "ema"), "teacher.dropout": (config.teacher.dropout, True),
        "pseudo.label": (config.pseudo.label, "mu"), "pseudo.weight": (config.pseudo.weight, "confidence"),
        "pseudo.filter": (config.pseudo.filter, "sigma"), "loss.distance": (config.loss.distance, "cross_entropy"),
        "loss.norm": (config.loss.norm, "weights"), "loss.feature": (config.loss.feature, 0.0),
        "augment.strong_views": (config.augment.strong_views, 1), "mim.joint_weight": (config.mim.joint_weight, 0.0),
        "optim.schedule": (config.optim.schedule, "cosine"), "ema.every": (config.ema.every, 1),
        "teacher.source": (config.teacher.source, "both"),
    }
    for key, (value, only) in wanted.items():
        if value != only:
            raise ValueError(f"the PyTorch step has no {key}={value!r}, only {only!r}")


class Peer:
    """theta, phi and the optimiser; `step` is one whole step on index batches of resident uint8 tensors.

    params: our plain trees {"student", "vit"}; ema: the same for phi, by default a copy. passes: "batched" or "loop", one
    pass at a time as published code does it.
    """

    def __init__(self, config, params, *, ema=None, steps: int, device="cpu", passes="batched", compiled=False, seed=0):
        check(config)
        self.config, self.steps, self.device, self.passes = config, steps, torch.device(device), passes
        make = {"student": lambda: Student(**config.student), "vit": lambda: Teacher(**config.vit)}
        to = dict(device=self.device, memory_format=torch.channels_last)
        self.theta = {name: load(make[name](), params[name]).to(**to).train() for name in LEARNERS}
        self.phi = {name: copy.deepcopy(net).requires_grad_(False) for name, net in self.theta.items()}
        for name in LEARNERS if ema else ():
            load(self.phi[name], ema[name])
        self.eager = {(name, kind): net for kind in ("theta", "phi") for name, net in getattr(self, kind).items()}
        self.call = self.eager  # (network, weights) -> what runs it
        if compiled:
            self.compile()
        self.optimizer = torch.optim.AdamW(self.groups(), lr=config.optim.lr, fused=True)
        self.weights = [[list(net.parameters()) for net in nets.values()] for nets in (self.theta, self.phi)]
        self.generator, self.at = torch.Generator().manual_seed(seed), 0

    def groups(self):
        """Parameter groups: only kernels decay."""
        decay, rest = [], []
        for net in self.theta.values():
            for path, parameter, *_ in leaves(net):
                (decay if path[-1] == "kernel" else rest).append(parameter)
        return [{"params": decay, "weight_decay": self.config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def compile(self):
        """Run the networks through torch.compile from here on; `self.call = self.eager` undoes it."""
        self.call = {which: torch.compile(net, dynamic=False) for which, net in self.eager.items()}

    # --- schedules ----------------------------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero, as optax counts."""
        optim, steps = self.config.optim, self.steps
        warmup = max(int(optim.warmup * steps), 1) if optim.warmup else 0
        if step < warmup:
            return optim.lr * step / warmup
        share = min((step - warmup) / (max(steps, warmup + 1) - warmup), 1.0)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * share))

    def beta(self, step: int) -> float:
        cfg = self.config.loss
        begun, length = step - cfg.wait * self.steps, cfg.ramp * self.steps
        share = min(begun / length, 1.0) if length else 1.0
        return cfg.beta * math.exp(-5 * (1 - share) ** 2) if begun >= 0 else 0.0

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, data, index) -> dict:
        """data: {"image": (n, 3, h, w), "mask": (n, h, w)} uint8; index: {"labelled", "unlabelled"} (b,) int64."""
        losses = self.losses(**self.views(data, index))
        return losses | self.update(losses["loss"])

    @torch.no_grad()
    def views(self, data, index) -> dict:
        """The arguments of `losses` for index batches."""
        cfg = self.config.augment

        def batch(which):
            rows = index[which].to(self.device, non_blocking=True)
            return data["image"][rows].float().div_(255), data["mask"][rows].float().div_(255)

        x, y = augment.labelled_view(self.generator, *batch("labelled"), cfg)
        x_w, x_s, notcut, affine, _ = augment.weak_strong_views(self.generator, *batch("unlabelled"), cfg)
        box = augment.cutmix_boxes(self.generator, *notcut.shape, cfg.cutmix, self.device)
        return dict(x=x, y=y, x_w=x_w, x_s=x_s, notcut=notcut, affine=affine, box=box)

    def losses(self, x, y, x_w, x_s, notcut, affine, box) -> dict:
        """Eqs. (7), (8), (3) and their sum (9), scalars; "loss" carries the gradient.

        x, y: labelled view; x_w, x_s, notcut: weak and strong view and where CutOut spared it, before CutMix, whose boxes
        are `box` (b, h, w) bool; affine: from the weak view to the strong one.
        """
        cfg, beta = self.config.loss, self.beta(self.at)
        mu, w, keep, p_w = augment.warp(torch.stack(self.pseudo_label(last(x_w)), 1), affine).unbind(1)
        a = w * keep
        mu, a, p_w, x_s, notcut = (augment.cutmix(box, part) for part in (mu, a, p_w, x_s, notcut))
        a, x = a * notcut, last(torch.cat([x, x_s]))
        found, total = {}, 0.0
        for name in LEARNERS:
            z, z_s = self.logits(name, "theta", x).split([len(y), len(x_s)])
            sup = supervised_loss(z, y, cfg)
            unsup = unsupervised_loss(z_s, mu, p_w, a, cfg.lambda_u, cfg.lambda_c if name == "student" else 0.0)
            total = total + sup + beta * unsup
            prefix = "loss_" if name == "student" else f"loss_{name}_"
            found |= {f"{prefix}sup": sup.detach(), f"{prefix}unsup": unsup.detach()}
            if name == "student":
                entropy = entropy_loss(z_s, notcut)
                total = total + cfg.gamma * beta * entropy
                found["loss_ent"] = entropy.detach()
        return found | {"loss": total}

    @torch.no_grad()
    def pseudo_label(self, x_w):
        """mu, w, keep and the student's own prediction on weak views, Eqs. (4), (5); (b, h, w) each."""
        m = self.config.teacher.passes
        p = torch.cat([self.teacher_passes("vit", x_w, m - m // 2), self.teacher_passes("student", x_w, m // 2)])
        mu, sigma = p.mean(0), p.std(0)
        w, keep = torch.exp(-sigma / self.config.pseudo.kappa), (sigma < self.config.pseudo.tau_u).float()
        self.theta["student"].eval()
        p_w = torch.sigmoid(self.logits("student", "theta", x_w))
        self.theta["student"].train()
        return mu, w, keep, p_w

    def teacher_passes(self, name: str, image, m: int):
        """m stochastic probabilities of phi's network, (m, b, h, w); dropout differs along the batch, so one call does."""
        if self.passes == "loop":
            return torch.stack([torch.sigmoid(self.logits(name, "phi", image)) for _ in range(m)])
        return torch.sigmoid(self.logits(name, "phi", last(image.repeat(m, 1, 1, 1)))).unflatten(0, (m, -1))

    def logits(self, name: str, weights: str, image):
        """A network's logits, float32; train.precision=bfloat16 is PyTorch's autocast around the network."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16"):
            return self.call[name, weights](image).float()

    def update(self, loss) -> dict:
        """Backward pass, a clip of each network's norm, AdamW on theta, Eq. (6) on phi. Returns the norms."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = {
            f"grad_{name}": nn.utils.clip_grad_norm_(net.parameters(), self.config.optim.clip, foreach=True)
            for name, net in self.theta.items()
        }
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.at)
        self.optimizer.step()
        alpha = min(1 - 1 / (self.at + 1), self.config.ema.alpha)
        with torch.no_grad():
            for theta, phi in zip(*self.weights, strict=True):
                torch._foreach_lerp_(phi, theta, 1 - alpha)
        self.at += 1
        return norms


# --- losses -----------------------------------------------------------------------------------------------------------


def last(image):
    return image.contiguous(memory_format=torch.channels_last)


def supervised_loss(z, y, cfg):
    """Eq. (7), z and y (b, h, w)."""
    p = torch.sigmoid(z)
    overlap = (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
    return cfg.lambda_dice * (1 - overlap).mean() + cfg.lambda_bce * F.binary_cross_entropy_with_logits(z, y)


def unsupervised_loss(z, mu, p_w, a, lambda_u, lambda_c):
    """Eq. (8), all (b, h, w)."""
    error = lambda_u * F.binary_cross_entropy_with_logits(z, mu, reduction="none")
    if lambda_c:
        error = error + lambda_c * (torch.sigmoid(z) - p_w).square()
    return (a * error).sum() / a.sum().clamp(min=1.0)


def entropy_loss(z, notcut):
    """Eq. (3), z and notcut (b, h, w)."""
    return ((F.softplus(z) - z * torch.sigmoid(z)) * notcut).sum() / notcut.sum().clamp(min=1.0)
