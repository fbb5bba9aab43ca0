"""The two networks in PyTorch: an independent reference for the tests and the peer of the speed benchmarks.

Written from the description of the networks with PyTorch's own operators: nn.GroupNorm, nn.ConvTranspose2d, patch embedding
by a strided convolution, scaled_dot_product_attention, Swin's rolled windows and 3 x 3 slices. Attributes bear the names of
the JAX modules, so `load` and `unload` carry a parameter tree over by path. Starting weights come from `load`.

Shapes: b batch, h w pixels or cells, n m tokens, c channels, k heads; maps are b c h w, inside a Swin stage b h w c.
"""

import collections
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 8
gelu = functools.partial(F.gelu, approximate="tanh")  # flax's nnx.gelu is the tanh form too
conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
doubled = functools.partial(nn.ConvTranspose2d, kernel_size=3, stride=2, padding=1, output_padding=1)


# --- blocks -----------------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Residual texture block, (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, *, dropout: float = 0.0):
        super().__init__()
        self.conv1, self.norm1 = conv3x3(channels, channels, bias=False), nn.GroupNorm(GROUPS, channels)
        self.conv2, self.norm2 = conv3x3(channels, channels, bias=False), nn.GroupNorm(GROUPS, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        y = self.norm2(self.conv2(gelu(self.norm1(self.conv1(x)))))
        return gelu(x + self.dropout(y))


def mlp(channels: int, hidden: int):
    """Two linear layers with GELU between, (..., c) -> (..., c)."""
    up, down = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
    return nn.Sequential(collections.OrderedDict(up=up, gelu=nn.GELU(approximate="tanh"), down=down))


class Attention(nn.Module):
    """Multi-head attention: x (b, n, c), context (b, m, c), x itself by default, bias (b or 1, k, n, m) -> (b, n, c)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.heads = heads

    def forward(self, x, context=None, bias=None):
        key, value = self.key_value(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), key, value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm block around any self-attention: ViT tokens (b, n, c) or a Swin map (b, h, w, c), and the same out."""

    def __init__(self, channels: int, attention: nn.Module, hidden: int, *, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(channels), attention
        self.norm2, self.mlp = nn.LayerNorm(channels), mlp(channels, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """Attention inside (shifted) windows with a relative position bias: x and context (b, h, w, c) -> (b, h, w, c)."""

    def __init__(self, channels: int, heads: int, window: int, *, shifted: bool = False):
        super().__init__()
        self.attention = Attention(channels, heads)
        table = torch.empty((2 * window - 1) ** 2, heads)
        self.relative_bias = nn.Parameter(nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04))
        self.register_buffer("index", relative_index(window), persistent=False)
        self.window, self.shifted, self.masks = window, shifted, {}

    def forward(self, x, context=None):
        b, h, w, c = x.shape
        wh, ww = size = min(self.window, h), min(self.window, w)
        shift = tuple(s // 2 if self.shifted and s < length else 0 for s, length in zip(size, (h, w), strict=True))
        index = self.index[:wh, :ww, :wh, :ww].reshape(wh * ww, wh * ww)  # a smaller window is a corner of the full one
        bias = self.relative_bias[index].permute(2, 0, 1)[None]
        if (h, w, x.device) not in self.masks:  # kept here, as torch.compile would trace how it is made
            self.masks[h, w, x.device] = window_mask(h, w, size, shift, x.device)
        mask = self.masks[h, w, x.device]
        if mask is not None:
            bias = (bias + mask).repeat(b, 1, 1, 1)
        x, context = (None if y is None else to_windows(y, size, shift) for y in (x, context))
        y = self.attention(x, context, bias).view(b, -(-h // wh), -(-w // ww), wh, ww, c)
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return (y.roll(shift, (1, 2)) if any(shift) else y)[:, :h, :w]


class SwinPair(nn.Module):
    """W-MSA block, then SW-MSA block, (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, heads: int, window: int, *, mlp_ratio: int, dropout: float = 0.0):
        super().__init__()
        attention = (WindowAttention(channels, heads, window, shifted=shifted) for shifted in (False, True))
        self.regular, self.shifted = (
            TransformerBlock(channels, attend, mlp_ratio * channels, dropout=dropout) for attend in attention
        )

    def forward(self, x):
        return self.shifted(self.regular(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class CrossSkip(nn.Module):
    """Skip connection by windowed cross-attention: decoder and encoder (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        self.norm_decoder, self.norm_encoder = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)

    def forward(self, decoder, encoder):
        query, context = self.norm_decoder(decoder.permute(0, 2, 3, 1)), self.norm_encoder(encoder.permute(0, 2, 3, 1))
        return decoder + encoder + self.attention(query, context).permute(0, 3, 1, 2)


class GateSkip(nn.Module):
    """Skip connection by a sigmoid gate: decoder and encoder (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, decoder, encoder):
        of_decoder, of_encoder = self.gate.weight.chunk(2, 1)  # two products, as ours: nothing is laid side by side
        gate = F.conv2d(decoder, of_decoder, self.gate.bias).add_(F.conv2d(encoder, of_encoder)).sigmoid_()
        return torch.addcmul(decoder, gate, encoder)


# --- windows and positions --------------------------------------------------------------------------------------------


def relative_index(window: int):
    """Row of the bias table for query cell and key cell of a full window, (row, column, row, column) -> int."""
    cells = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    offset = cells[:, :, None] - cells[:, None, :] + window - 1  # 2 n n
    return (offset[0] * (2 * window - 1) + offset[1]).view(window, window, window, window)


def to_windows(x, size: tuple[int, int], shift: tuple[int, int]):
    """Zero-pad (b, h, w, c) to whole windows, shift it cyclically, cut it: (b windows, n, c)."""
    wh, ww = size
    x = F.pad(x, (0, 0, 0, -x.shape[2] % ww, 0, -x.shape[1] % wh))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    return x.unflatten(2, (-1, ww)).unflatten(1, (-1, wh)).transpose(2, 3).reshape(-1, wh * ww, x.shape[-1])


@functools.lru_cache(maxsize=64)
def window_mask(h: int, w: int, size: tuple[int, int], shift: tuple[int, int], device):
    """What to add to the attention logits of each window, (windows, 1, n, n) of 0 and -inf; None when nothing is masked."""
    padded = h + -h % size[0], w + -w % size[1]
    if not any(shift) and padded == (h, w):
        return None
    # Swin's 3 x 3 regions of the shifted map. Along an axis without a shift the last band is the whole axis.
    bands = [(slice(0, -s), slice(-s, -t), slice(-t, None)) for s, t in zip(size, shift, strict=True)]
    region = torch.zeros(1, *padded, 1, dtype=torch.int64)
    for label, (rows, cols) in enumerate(itertools.product(*bands)):
        region[:, rows, cols] = label
    region = to_windows(region, size, (0, 0))[..., 0]  # windows n
    real = to_windows(torch.ones(1, h, w, 1), size, shift)[..., 0] > 0  # windows n
    # A padded query may see anything of its region: its result is cut off, and a row without any key would be NaN.
    meet = (region[:, :, None] == region[:, None, :]) & (real[:, None, :] | ~real[:, :, None])
    return torch.zeros(meet.shape).masked_fill(~meet, -torch.inf)[:, None].to(device)


@functools.lru_cache(maxsize=64)
def sincos_positions(h: int, w: int, channels: int, device):
    """2-D sine-cosine code (1, h w, c): quarters of the channels are sin row, cos row, sin column, cos column."""
    steps = torch.arange(channels // 4, dtype=torch.float64) / (channels // 4)
    angles = [torch.outer(torch.arange(length, dtype=torch.float64), 10000.0**-steps) for length in (h, w)]
    rows, cols = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)
    code = torch.cat([rows[:, None].expand(-1, w, -1), cols[None].expand(h, -1, -1)], 2)
    return code.reshape(1, h * w, channels).float().to(device)


# --- teacher and student ----------------------------------------------------------------------------------------------


class TeacherEncoder(nn.Module):
    """ViT encoder, image (b, 3, h, w) in [0, 1] -> tokens (b, n, c)."""

    def __init__(self, *, patch: int, channels: int, depth: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.embedding = nn.Conv2d(3, channels, patch, stride=patch)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, Attention(channels, heads), hidden, dropout=dropout) for _ in range(depth)
        )
        self.norm, self.places = nn.LayerNorm(channels), {}

    def forward(self, image):
        cells = self.embedding(2 * image - 1)  # b c h' w'
        h, w = cells.shape[2:]
        if (h, w, cells.device) not in self.places:  # as WindowAttention's masks
            self.places[h, w, cells.device] = sincos_positions(h, w, cells.shape[1], cells.device)
        tokens = cells.flatten(2).transpose(1, 2) + self.places[h, w, cells.device].to(cells.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Details(nn.Module):
    """The image's own edges, (b, 3, h, w) in [0, 1] -> list of (b, c, h', w') at strides 1, 2, 4, ..., fine to coarse."""

    def __init__(self, widths):
        super().__init__()
        self.convs = nn.ModuleList(
            conv3x3(a, b, stride=2 if i else 1, bias=False)
            for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, c) for c in widths)

    def forward(self, image):
        x, found = 2 * image - 1, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = gelu(norm(conv(x)))
            found.append(x)
        return found


class Teacher(nn.Module):
    """ViT segmenter, image (b, 3, h, w) in [0, 1] -> logits (b, h, w)."""

    def __init__(self, *, patch: int, channels: int, head_widths, **encoder):
        super().__init__()
        self.encoder = TeacherEncoder(patch=patch, channels=channels, **encoder)
        self.details, below = Details(head_widths), (*head_widths[1:], channels)
        self.up = nn.ModuleList(doubled(a, b) for a, b in zip(below, head_widths, strict=True))
        self.norm = nn.ModuleList(nn.GroupNorm(GROUPS, c) for c in head_widths)
        self.block = nn.ModuleList(ConvBlock(c) for c in head_widths)
        self.out, self.patch = nn.Conv2d(head_widths[0], 1, 1), patch

    def forward(self, image):
        x = self.encoder(image).transpose(1, 2).unflatten(2, (image.shape[2] // self.patch, -1))
        for up, norm, block, detail in reversed(list(zip(self.up, self.norm, self.block, self.details(image), strict=True))):
            x = block(gelu(norm(up(x)) + detail))
        return self.out(x).squeeze(1).float()


class StudentEncoder(nn.Module):
    """Stem and one stage a stride, image (b, 3, h, w) in [0, 1] -> list of (b, c', h', w'), fine to coarse."""

    def __init__(self, *, widths, stages, window: int, head_width: int, mlp_ratio: int, dropout: float):
        super().__init__()
        self.stem, self.norm = conv3x3(3, widths[0], bias=False), nn.GroupNorm(GROUPS, widths[0])
        self.stages = nn.ModuleList(
            SwinPair(c, max(c // head_width, 1), window, mlp_ratio=mlp_ratio, dropout=dropout)
            if kind == "swin" else ConvBlock(c)
            for kind, c in zip(stages, widths, strict=True)
        )
        self.down = nn.ModuleList(conv3x3(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, image):
        features = [self.stages[0](gelu(self.norm(self.stem(2 * image - 1))))]
        for down, stage in zip(self.down, self.stages[1:], strict=True):
            features.append(stage(down(features[-1])))
        return features


class Student(nn.Module):
    """U-shaped network, image (b, 3, h, w) in [0, 1] -> logits (b, h, w); of the JAX student's `outputs` it has one."""

    def __init__(self, *, widths, skips, window: int, head_width: int, dropout: float, outputs: int = 1, **encoder):
        super().__init__()
        if outputs != 1:
            raise ValueError(f"Student: outputs={outputs} is not built in PyTorch")
        self.encoder = StudentEncoder(widths=widths, window=window, head_width=head_width, dropout=dropout, **encoder)
        self.bottleneck = nn.Dropout(dropout)
        self.up = nn.ModuleList(doubled(b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.skip = nn.ModuleList(
            CrossSkip(c, max(c // head_width, 1), window) if kind == "cross" else GateSkip(c)
            for kind, c in zip(skips, widths, strict=False)
        )
        self.decoder = nn.ModuleList(  # dropout in the two deepest stages only
            ConvBlock(c, dropout=dropout if i >= len(skips) - 2 else 0.0) for i, c in enumerate(widths[:-1])
        )
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image):
        *features, x = self.encoder(image)
        x = self.bottleneck(x)
        for up, skip, block, feature in reversed(list(zip(self.up, self.skip, self.decoder, features, strict=True))):
            x = block(skip(up(x), feature))
        return self.out(x).squeeze(1).float()


# --- parameters from and to the JAX tree ------------------------------------------------------------------------------

# Axes of a PyTorch weight in the order of the JAX kernel; it has out in (h w), a transposed convolution in out h w.
KERNEL_AXES = {nn.Linear: (1, 0), nn.Conv2d: (2, 3, 1, 0), nn.ConvTranspose2d: (2, 3, 0, 1)}


def load(module: nn.Module, params: dict) -> nn.Module:
    """Copy a plain JAX parameter tree into `module`, in place, and return it; ValueError unless every leaf has its place."""
    given, places = flat(params), list(leaves(module))
    wanted, found = {(path, shape) for path, _, _, shape in places}, {(path, leaf.shape) for path, leaf in given.items()}
    if wanted != found:
        missing, left = (sorted(map(str, names)) for names in (wanted - found, found - wanted))
        raise ValueError(f"load: missing {missing}, left over {left}")
    for path, parameter, axes, _ in places:
        view = parameter.detach().permute(axes)
        view.copy_(torch.tensor(given[path]).reshape(view.shape))
    return module


def unload(module: nn.Module, what: str = "param") -> dict:
    """The parameters ("param") of `module` or their gradients ("grad") as a JAX tree of NumPy arrays."""
    tree = {}
    for (*parents, last), parameter, axes, shape in leaves(module):
        tensor = {"param": parameter, "grad": parameter.grad}[what]
        if tensor is None:
            raise ValueError(f"unload: {(*parents, last)} has no gradient")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
        node[last] = tensor.detach().permute(axes).reshape(shape).cpu().numpy().copy()
    return tree


def leaves(module: nn.Module):
    """Yield (path in the JAX tree, parameter, order of its axes in the JAX leaf, shape of that leaf)."""
    for prefix, part in module.named_modules():
        parents = [int(key) if key.isdigit() else key for key in prefix.split(".") if key]
        for name, parameter in part.named_parameters(recurse=False):
            axes = KERNEL_AXES.get(type(part)) if name == "weight" else None
            leaf = name if name != "weight" else "kernel" if axes else "scale"
            axes = axes or tuple(range(parameter.ndim))
            shape = tuple(parameter.shape[axis] for axis in axes)
            if leaf == "kernel" and len(shape) == 4 and part.stride == part.kernel_size != (1, 1):
                shape = (math.prod(shape[:3]), shape[3])  # patch embedding: in JAX a linear layer of the flat patch
            yield (*parents, leaf), parameter, axes, shape


def flat(tree: dict, path: tuple = ()) -> dict:
    """{path: NumPy leaf} of a nested dict."""
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {k: v for key, branch in tree.items() for k, v in flat(branch, (*path, key)).items()}
