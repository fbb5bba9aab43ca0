"""The student: a U-shaped network of convolution and Swin stages with refined skip connections. Section 3.2."""

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from mira_u_jax.layers import Conv, ConvBlock, ConvTranspose, CrossSkip, Dropout, GateSkip, GroupNorm, Linear, SwinPair, fill
from mira_u_jax.teacher import hidden_patches


class Encoder(nnx.Module):
    """3x3 convolution, then one stage a stride (1, 2, 4, ...): `stages[i]` conv | swin at `widths[i]` channels."""

    def __init__(self, *, widths, stages, window, head_width, mlp_ratio, dropout, rngs: nnx.Rngs):
        self.stem = Conv(3, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = GroupNorm(widths[0])
        self.stages = nnx.List()
        for kind, c in zip(stages, widths, strict=True):
            if kind == "swin":
                stage = SwinPair(c, max(c // head_width, 1), window, mlp_ratio=mlp_ratio, dropout=dropout, rngs=rngs)
            else:
                stage = ConvBlock(c, rngs=rngs)
            self.stages.append(stage)
        self.down = nnx.List(
            [Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)]
        )

    def __call__(self, image, *, rngs=None):  # b h w 3 -> one b h' w' c a stage, fine to coarse
        x = nnx.gelu(self.norm(self.stem(2 * image - 1)))
        features = [self.stages[0](x, rngs=rngs)]
        for down, stage in zip(self.down, list(self.stages)[1:], strict=True):
            features.append(stage(down(features[-1]), rngs=rngs))
        return features


class AuxiliaryHead(nnx.Module):
    """A second way from the decoder's stride 2 to logits: its own last stage, without the skip."""

    def __init__(self, c_in: int, c_out: int, *, rngs: nnx.Rngs):
        self.up = ConvTranspose(c_in, c_out, rngs=rngs)
        self.block = ConvBlock(c_out, rngs=rngs)
        self.out = Conv(c_out, 1, (1, 1), rngs=rngs)

    def __call__(self, x):  # b h w c -> b 2h 2w 1
        return self.out(self.block(self.up(x)))


class Student(nnx.Module):
    """RGB image in [0, 1], (b, h, w, 3) -> logits (b, h, w). h and w are multiples of the coarsest stride.

    `widths`, `stages` (conv | swin) and `skips` (gate | cross) name the network from fine to coarse, stride 1, 2, 4, ...;
    the last stage is the bottleneck and has no skip. Dropout sits in the Swin blocks, at the bottleneck and in the two
    deepest decoder stages only: what lies before is the same in every Monte Carlo pass and is computed once.

    outputs=2 adds an auxiliary head; the first output predicts. `perturb` drops that share of the encoder's channels, the
    feature perturbation of UniMatch (Yang et al. 2023); it needs `rngs`.
    """

    def __init__(
        self, *, widths, stages, skips, window: int, head_width: int, mlp_ratio: int, dropout: float, outputs: int = 1,
        rngs: nnx.Rngs,
    ):
        if not len(widths) == len(stages) == len(skips) + 1:
            raise ValueError(f"Student: {len(widths)} widths need as many stages and one skip less")
        self.encoder = Encoder(
            widths=widths, stages=stages, window=window, head_width=head_width, mlp_ratio=mlp_ratio, dropout=dropout,
            rngs=rngs,
        )
        self.bottleneck = Dropout(dropout)
        self.up, self.skip, self.decoder = nnx.List(), nnx.List(), nnx.List()
        for i, (kind, c) in enumerate(zip(skips, widths, strict=False)):
            self.up.append(ConvTranspose(widths[i + 1], c, rngs=rngs))
            if kind == "cross":
                self.skip.append(CrossSkip(c, max(c // head_width, 1), window, rngs=rngs))
            else:
                self.skip.append(GateSkip(c, rngs=rngs))
            self.decoder.append(ConvBlock(c, dropout=dropout if i >= len(skips) - 2 else 0.0, rngs=rngs))
        self.out = Conv(widths[0], 1, (1, 1), rngs=rngs)
        self.auxiliary = AuxiliaryHead(widths[1], widths[0], rngs=rngs) if outputs == 2 else None

    def __call__(self, image, *, rngs=None):  # b h w 3 -> b h w
        return self.outputs(image, rngs=rngs)[0]

    def outputs(self, image, *, perturb: float = 0.0, rngs=None):  # b h w 3 -> k b h w, k outputs
        features = self.encoder(image, rngs=rngs)
        if perturb:
            if rngs is None:
                raise ValueError("Student.outputs: perturb needs rngs")
            channels = Dropout(perturb, whole_maps=True)
            features = [channels(x, rngs=rngs) for x in features]
        *skips, x = features
        x = self.bottleneck(x, rngs=rngs)
        for i in reversed(range(len(skips))):
            below, x = x, self.decoder[i](self.skip[i](self.up[i](x), skips[i]), rngs=rngs)
        logits = [self.out(x)] + ([self.auxiliary(below)] if self.auxiliary else [])
        return jnp.stack(logits)[..., 0].astype(jnp.float32)


class MaskedReconstruction(nnx.Module):
    """Masked image modelling on the student's encoder (SimMIM, Xie et al. 2022), so that Eq. 1 reaches every source.

    A convolutional encoder cannot skip patches: hidden ones are painted in one learned colour. A patch is one cell of the
    bottleneck, and a 1x1 layer on that cell predicts it. Call and result as teacher.MaskedAutoencoder.
    """

    def __init__(self, student: Student, *, ratio: float, rngs: nnx.Rngs):
        self.encoder = student.encoder
        self.hidden_colour = nnx.Param(jnp.full(3, 0.5, jnp.float32))  # typed: a weak type would compile the step twice
        self.patch, self.ratio = 2 ** len(student.encoder.down), ratio
        self.out = Linear(student.encoder.down[-1].out_features, self.patch**2 * 3, rngs=rngs)

    def __call__(self, image, key, *, rngs=None):
        rows, cols = image.shape[1] // self.patch, image.shape[2] // self.patch
        hidden = hidden_patches(key, image.shape[0], rows * cols, self.ratio)  # b n
        where = repeat(hidden, "b (i j) -> b (i p) (j q) 1", i=rows, p=self.patch, q=self.patch)
        painted = jnp.where(where > 0, fill(self.hidden_colour[...], image), image)
        cells = self.encoder(painted, rngs=rngs)[-1]
        return self.out(rearrange(cells, "b i j c -> b (i j) c")).astype(jnp.float32), hidden
