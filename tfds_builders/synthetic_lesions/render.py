"""Procedural dermoscopy: one seed, one picture of a skin lesion and its outline, with nothing to download.

Hard with few labels and easy with many: the rules never change - one lesion, with a border and an inside of its own;
ink (flat, sharp), bruises and flushes (diffuse), scars (pale, striped), stickers (from the frame), shadows (lightness
only) and freckles (tiny) are none - but show in combinations of which a small labelled set holds only a few.
Colours are mixed in CIE Lab (L 0..100, a and b about -60..60), "contrast" is a distance there; lengths are fractions of
the frame. A scene is drawn on a fixed canvas and then resampled: one seed is the same scene at every size.
"""

import math

import cv2
import numpy as np

CANVAS, FINE = 256, 512  # side of the canvas a scene is drawn on, and of that of thin lines, px
# Skin. ITA (individual typology angle): above 55 degrees very light, below -30 very dark.
ITA_DEGREES = (-52.0, 67.0)
SKIN_A, SKIN_B, P_VESSELS = (5.0, 15.0), (11.0, 20.0), 0.2  # redness, yellowness in Lab; a net of fine red vessels
SKIN_MOTTLE, SKIN_GRAIN = (0.3, 1.6), (0.4, 1.3)  # slow and fine variation of tone, Lab units (s.d.)
# Shape of the lesion.
AREA = (0.045, 0.48)  # fraction of the frame, drawn log-uniformly
CENTRE, CENTRE_CUT, P_CUT = (0.32, 0.68), (0.08, 0.22), 0.10  # ordinary centres; centres that the frame cuts; how often
ELONGATION, P_LOBES = (1.0, 2.0), 0.30  # long over short axis; outline of two or three merged lobes
WOBBLE, WARP = (0.0, 0.12), (0.0, 0.13)  # radial Fourier series and noise displacement, relative to the radius
SOFTNESS, SOFTNESS_MAX = (0.008, 0.055), 0.40  # half-width of the border; its cap, relative to the inner radius
# Pigments: Lab colour and how often it makes the lesion's rim; any of them may then appear inside.
PIGMENTS = {
    "tan": ((54, 15, 31), 0.18), "brown": ((36, 18, 26), 0.24), "dark": ((20, 11, 13), 0.12),
    "black": ((9, 2, 1), 0.05), "blue": ((38, 0, -9), 0.09), "red": ((44, 36, 18), 0.09),
    "pink": ((64, 28, 10), 0.09), "white": ((80, 5, 8), 0.08), "yellow": ((70, 9, 38), 0.06),
}  # fmt: skip
CONTRAST, CONTRAST_LOW, P_LOW_CONTRAST = (20.0, 55.0), (14.0, 18.0), 0.20  # of the rim against the skin, Lab units
UNEVENNESS = (0.05, 0.3)  # how much the amount of rim pigment varies over the lesion, relative
INNER_PIGMENTS, INNER_CONTRAST = (0, 3), (8.0, 34.0)  # number of further colours inside; against the rim, Lab units
P_STRUCTURE, STRUCTURE_DEPTH = 0.75, (3.0, 13.0)  # network, globules, cobblestone or streaks, Lab units
P_HALO, HALO = 0.12, (0.15, 0.35)  # a pale or flushed ring outside the outline, how strong
# Things that are not the lesion.
MAX_DECOYS, P_DECOY = 2, 0.40  # lesion-like patches, and the probability of each
DECOY_AREA, DECOY_GAP = (0.012, 0.07), 0.03  # fraction of the frame; least distance from the lesion's outline
P_SHADOW, P_STICKER, P_PEN, P_HAIRS, P_RULER, P_BUBBLES = 0.20, 0.15, 0.18, 0.45, 0.20, 0.25
P_FRECKLES, FRECKLES, FRECKLE_RARITY = 0.35, (14, 32), (1.9, 2.8)  # grain of a noise; its level, s.d.
HAIRS, P_LIGHT_HAIRS = (2, 28), 0.25
INKS = [(28, 30, -42), (34, 6, -31), (14, 2, -4), (42, -27, 9), (24, 14, 14)]
STICKERS = [(55, -10, -42), (68, 28, 62), (60, -34, 6), (52, 64, -18), (78, 2, 74)]
LIGHT_TILT = (0.0, 0.22)  # relative fall of lightness from one side of the frame to the other
P_VIGNETTE, VIGNETTE_RADIUS = 0.30, (0.47, 0.66)  # the round black edge of the dermoscope
COLOUR_CAST, EXPOSURE = 0.09, (0.92, 1.18)  # largest error of red and blue against green (relative); gain of all three
SENSOR_NOISE, BLUR = (0.3, 3.0), (0.2, 1.0)  # grey levels (s.d.); px
_X, _Y = np.meshgrid(*[(np.arange(CANVAS, dtype=np.float32) + 0.5) / CANVAS] * 2)  # pixel centres in 0..1


def render(seed: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The scene of `seed`: image uint8 (size, size, 3) RGB and mask uint8 (size, size), 0 skin and 255 lesion."""
    rng = np.random.Generator(np.random.Philox(seed))
    mask = _lesion_mask(rng)
    depth = _signed_distance(mask)
    skin, lab = _skin(rng)
    beneath = [(P_FRECKLES, _freckles), (P_SHADOW, _shadow)] + [(P_DECOY, _decoy)] * MAX_DECOYS
    above = [(P_PEN, _pen), (P_STICKER, _sticker), (P_BUBBLES, _bubbles), (P_HAIRS, _hairs), (P_RULER, _ruler)]
    for probability, paint in [*beneath, (1, _lesion), *above]:
        if rng.random() < probability:
            paint(rng, lab, skin, depth)
    return _resample(_photograph(rng, lab, depth), mask, size)


def _between(rng, bounds, log=False):
    """A number within `bounds`, uniform or log-uniform; a Python float, as a NumPy one makes whole planes float64."""
    return math.exp(rng.uniform(*np.log(bounds))) if log else float(rng.uniform(*bounds))


def _step(x):
    """Smooth step of an array: 0 below -1, 1/2 at 0, 1 above 1."""
    t = np.clip(0.5 * x + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _noise(rng, cells, octaves=1):
    """Smooth noise (CANVAS, CANVAS), mean 0 and s.d. about 1, with `cells` bumps across, twice as many per octave."""
    total = np.zeros((CANVAS, CANVAS), np.float32)
    for i in range(octaves):
        grid = rng.standard_normal((cells * 2**i + 2,) * 2, dtype=np.float32)
        total += cv2.resize(grid, (CANVAS, CANVAS), interpolation=cv2.INTER_CUBIC) * (1.25 * 0.6**i)
    return total


def _blend(lab, alpha, colour):
    """Covers the planes lab (3, CANVAS, CANVAS) in place with `colour`, as far as alpha (CANVAS, CANVAS) says, 0..1."""
    for plane, value in zip(lab, colour, strict=True):
        plane += alpha * (value - plane)


def _across(rng):
    """Coordinate (CANVAS, CANVAS) along a random direction, 0 in the middle of the frame."""
    angle = rng.uniform(0, 2 * math.pi)
    return (_X - 0.5) * math.cos(angle) + (_Y - 0.5) * math.sin(angle)


def _curves(rng, number, angle, spread, length, bend, width):
    """Coverage of `number` bent lines around one direction; `bend` is the s.d. of the middle's way off the chord."""
    fine, t = np.zeros((FINE, FINE), np.uint8), np.linspace(0, 1, 17)[:, None]
    for _ in range(number):
        a = rng.normal(angle, spread)
        off = rng.normal(0, bend) * 4 * t * (1 - t) + 0.01 * np.sin(7 * t + a)
        line = FINE * _between(rng, length) * (t * [math.cos(a), math.sin(a)] + off * [-math.sin(a), math.cos(a)])
        points = FINE * rng.uniform(-0.1, 1.0, 2) + line
        cv2.polylines(fine, [points.round().astype(np.int32)], False, 255, int(rng.integers(*width)), cv2.LINE_AA)
    return cv2.resize(fine, (CANVAS, CANVAS), interpolation=cv2.INTER_AREA) / np.float32(255)


def _blob(rng, centre, area, lobes=1):
    """Boolean (CANVAS, CANVAS): one irregular patch without holes that covers about `area` of the frame."""
    radius = math.sqrt(area / math.pi)
    warp = radius * _between(rng, WARP)
    x, y = _X - centre[0] + warp * _noise(rng, 5, 3), _Y - centre[1] + warp * _noise(rng, 5, 3)
    around = np.linspace(0, 2 * np.pi, 1024, dtype=np.float32)
    field = np.full((CANVAS, CANVAS), -np.inf, np.float32)
    for i in range(lobes):
        x, y = (plane - rng.normal(0, 0.4) * radius if i else plane for plane in (x, y))
        angle, stretch = rng.uniform(0, math.pi), math.sqrt(_between(rng, ELONGATION))
        u = (math.cos(angle) * x + math.sin(angle) * y) / stretch
        v = (math.cos(angle) * y - math.sin(angle) * x) * stretch
        r, theta = cv2.cartToPolar(u, v)
        reach = np.full_like(around, _between(rng, (0.6, 1.0)) if i else 1.0)
        for k in range(2, 7):
            reach *= 1 + _between(rng, WOBBLE) / math.sqrt(k - 1) * np.cos(k * around + rng.uniform(0, 2 * math.pi))
        field = np.maximum(field, -r / reach[(theta * (1023 / (2 * math.pi))).astype(np.int32)])
    # The level that covers `area` of the frame, whatever the shape and however much of it the frame cuts.
    inside = (field > np.quantile(field[::4, ::4], 1 - area)).astype(np.uint8)
    outlines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(inside * 0, [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED) > 0


def _lesion_mask(rng):
    """The clean outline of the lesion, boolean (CANVAS, CANVAS)."""
    centre = rng.uniform(*CENTRE, 2).tolist()
    if rng.random() < P_CUT:
        centre[rng.integers(2)] = abs(int(rng.integers(2)) - _between(rng, CENTRE_CUT))
    return _blob(rng, centre, _between(rng, AREA, log=True), int(rng.integers(2, 4)) if rng.random() < P_LOBES else 1)


def _signed_distance(mask):
    """Distance to the outline in frame units (CANVAS, CANVAS), positive inside."""
    inside, outside = (cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5) for m in (mask, ~mask))
    return (np.maximum(inside - 0.5, 0) - np.maximum(outside - 0.5, 0)) / CANVAS


def _skin(rng):
    """Lab colour (3,) of the skin and the bare skin itself, float32 (3, CANVAS, CANVAS)."""
    a, b, mottle = _between(rng, SKIN_A), _between(rng, SKIN_B), _between(rng, SKIN_MOTTLE)
    lightness = 50 + b * math.tan(math.radians(_between(rng, ITA_DEGREES)))  # the definition of the typology angle
    skin = np.array([np.clip(lightness, 24, 84), a, b], np.float32)
    tone = mottle * _noise(rng, 4, 3) + _between(rng, SKIN_GRAIN) * _noise(rng, 60, 2)
    lab = np.stack([tone, 0.5 * mottle * _noise(rng, 6, 2), 0.4 * mottle * _noise(rng, 5)]) + skin[:, None, None]
    if rng.random() < P_VESSELS:  # the zero lines of a noise make a net
        net = _step(1 - np.abs(_noise(rng, int(rng.integers(7, 16)), 2)) / 0.12)
        _blend(lab, _between(rng, (0.2, 0.8)) * net, skin + np.float32([-7, 10, 2]))
    return skin, lab


def _mix(skin, pigment, contrast):
    """Skin tinted towards `pigment` until it is `contrast` away in Lab, or as far as the pigment goes."""
    way = np.asarray(pigment, np.float32) - skin
    return skin + way * min(contrast / float(np.linalg.norm(way)), 0.95)


def _rim_pigment(rng, skin):
    """Lab colour of a pigment that can be told from this skin."""
    usable = [p for p in PIGMENTS.values() if np.linalg.norm(skin - p[0]) > CONTRAST_LOW[1]]
    colours, weights = zip(*usable, strict=True)
    return colours[rng.choice(len(colours), p=np.array(weights) / sum(weights))]


def _structure(rng, depth):
    """Dermoscopic structure (CANVAS, CANVAS), -0.5..1, to be subtracted from lightness."""
    kind = rng.choice(["network", "globules", "cobbles", "streaks"])
    if kind == "streaks":  # ripples along the border, broken by noise
        return np.sin(depth * _between(rng, (120, 260)) + 2.5 * _noise(rng, 10, 2)) * 0.5 * _step(_noise(rng, 8))
    pitch, turn = _between(rng, (0.06, 0.10) if kind == "cobbles" else (0.028, 0.05)), rng.uniform(0, math.pi)
    x, y = (2 * math.pi * (plane / pitch + 0.25 * _noise(rng, 10, 2)) for plane in (_X, _Y))
    # Three plane waves: peaks (3) on a hexagonal grid, a connected floor (-1.5) between them.
    hexagons = sum(np.cos(math.cos(turn + k) * x + math.sin(turn + k) * y) for k in (0, math.pi / 3, 2 * math.pi / 3))
    return _step(hexagons - 1 if kind == "globules" else -0.3 - hexagons) * _step(_noise(rng, 4) + 0.4)


def _lesion(rng, lab, skin, depth):
    """Paints the lesion: halo, rim colour, inner colours, structure. The outline is the middle of its fuzzy border."""
    contrast = _between(rng, CONTRAST_LOW if rng.random() < P_LOW_CONTRAST else CONTRAST)
    inner_radius = float(depth.max())
    soft = min(_between(rng, SOFTNESS, log=True), SOFTNESS_MAX * inner_radius)
    if rng.random() < P_HALO:
        ring = PIGMENTS["white" if rng.random() < 0.5 else "pink"][0]
        _blend(lab, _between(rng, HALO) * _step(depth / _between(rng, (0.03, 0.08)) + 1), ring)
    rim = _mix(skin, _rim_pigment(rng, skin), contrast)
    amount = 1 + _between(rng, UNEVENNESS) * np.clip(_noise(rng, 5, 4), -1.5, 2)
    body = skin[:, None, None] + (rim - skin)[:, None, None] * amount
    for _ in range(int(rng.integers(INNER_PIGMENTS[0], INNER_PIGMENTS[1] + 1))):
        pigment = PIGMENTS[list(PIGMENTS)[rng.integers(len(PIGMENTS))]][0]
        where = _noise(rng, int(rng.integers(3, 9)), 3) + _between(rng, (0, 2.5)) * (depth / inner_radius - 0.5)
        patch = _step((where - _between(rng, (-0.2, 0.9))) / _between(rng, (0.4, 1.4)))
        # Inner colours stay off the border, which keeps the rim's colour and so its contrast.
        _blend(body, patch * _step(depth / 0.03 - 1), _mix(rim, pigment, _between(rng, INNER_CONTRAST)))
    if rng.random() < P_STRUCTURE:
        body[0] -= min(_between(rng, STRUCTURE_DEPTH), 0.4 * float(rim[0])) * _structure(rng, depth)
    body += (lab - skin[:, None, None]) * 0.7  # the skin's own texture shows through
    _blend(lab, _step(depth / soft + 0.25 * _noise(rng, 24, 2)), body)


def _freckles(rng, lab, skin, depth):
    """Small brown spots on the skin, the peaks of a noise, each far below the smallest lesion."""
    spots = _step((_noise(rng, int(rng.integers(*FRECKLES))) - _between(rng, FRECKLE_RARITY)) / 0.3)
    pigment = PIGMENTS["brown" if skin[0] > 45 else "dark"][0]
    _blend(lab, _between(rng, (0.25, 0.8)) * spots * (depth < -DECOY_GAP), pigment)


def _shadow(rng, lab, skin, depth):
    """A wide soft darkening from one side of the frame: lightness only."""
    side = _across(rng) + 0.05 * _noise(rng, 3)
    lab[0] *= 1 - _between(rng, (0.2, 0.6)) * _step((side - _between(rng, (0.25, 0.45))) / 0.15)


def _decoy(rng, lab, skin, depth):
    """A patch of a lesion's size and colours that gives itself away: too diffuse, or too flat and sharp, or striped."""
    area = _between(rng, DECOY_AREA, log=True)
    # The place farther from the lesion of two; what would still reach the lesion is left out below.
    spot = max(rng.random((2, 2)).tolist(), key=lambda xy: -depth[int(xy[1] * CANVAS), int(xy[0] * CANVAS)])
    own = _signed_distance(_blob(rng, spot, area))
    diffuse = _between(rng, (0.4, 0.8)) * _step(own / (math.sqrt(area) * _between(rng, (0.35, 0.5))))
    stripes = 0.6 + 0.2 * np.sin(70 * _across(rng) + 2 * _noise(rng, 6))
    alpha, colour = [  # a bruise, a flush, a blot of ink, a scar
        (diffuse, (0.45 * skin[0], 14, -8)),
        (diffuse, (0.85 * skin[0], 34, 14)),
        (0.85 * _step(own / 0.004), INKS[rng.integers(len(INKS))]),
        (_step(own / 0.012) * stripes, (min(skin[0] + 24, 90), 5, 6)),
    ][rng.integers(4)]
    _blend(lab, alpha * _step(-4 * depth / DECOY_GAP - 3), colour)  # never under the lesion's border


def _pen(rng, lab, skin, depth):
    """Surgical marker: thick strokes of ink in any direction that never touch the lesion."""
    cover = _curves(rng, int(rng.integers(1, 5)), 0, 9, (0.1, 0.5), 0.2, (6, 20))
    _blend(lab, _between(rng, (0.5, 0.9)) * cover * (depth < -DECOY_GAP), INKS[rng.integers(len(INKS) - 1)])


def _sticker(rng, lab, skin, depth):
    """A calibration disc of saturated colour that reaches in from the frame."""
    radius, along, far = _between(rng, (0.15, 0.32)), rng.random(), _between(rng, (-0.12, 0.08))
    x, y = [(far, along), (1 - far, along), (along, far), (along, 1 - far)][rng.integers(4)]
    disc = _step((radius - np.hypot(_X - x, _Y - y)) / 0.006) * (depth < -0.5 * DECOY_GAP)
    _blend(lab, disc, STICKERS[rng.integers(len(STICKERS))])


def _bubbles(rng, lab, skin, depth):
    """Gel bubbles: a bright rim that is brightest towards the lamp, and one glint."""
    fine = np.zeros((FINE, FINE), np.uint8)
    for _ in range(int(rng.integers(1, 14))):
        (x, y), r = rng.integers(FINE, size=2).tolist(), int(_between(rng, (0.01, 0.07), log=True) * FINE)
        cv2.circle(fine, (x, y), r, 110, 2, cv2.LINE_AA)
        cv2.ellipse(fine, (x, y), (r, r), 0, 200, 290, 255, 3, cv2.LINE_AA)
        cv2.circle(fine, (x + 2 * r // 5, y + 2 * r // 5), 2, 255, -1, cv2.LINE_AA)
    _blend(lab, cv2.resize(fine, (CANVAS, CANVAS), interpolation=cv2.INTER_AREA) / np.float32(360), (94, 0, 2))


def _hairs(rng, lab, skin, depth):
    """Dark or light hairs, most of them pointing one way, across the lesion as well."""
    number, spread = int(_between(rng, HAIRS, log=True)), _between(rng, (0.15, 1.2))
    cover = _curves(rng, number, rng.uniform(0, 2 * math.pi), spread, (0.15, 1.1), 0.09, (1, 5))
    colour = (_between(rng, (72, 88)), 3, 12) if rng.random() < P_LIGHT_HAIRS else (_between(rng, (8, 30)), 5, 8)
    _blend(lab, _between(rng, (0.5, 0.95)) * cover, colour)


def _ruler(rng, lab, skin, depth):
    """Tick marks along one side of the frame, every fifth of them longer."""
    pitch, start = _between(rng, (0.03, 0.08)), _between(rng, (0.0, 0.06))
    end = start + np.where(_X // pitch % 5 == 0, 0.06, 0.03)
    ticks = _step((0.003 - np.abs(_X % pitch - pitch / 2)) / 0.003) * (start < _Y) * (end > _Y)
    _blend(lab, 0.85 * np.rot90(ticks, rng.integers(4)), (12, 0, 0))


def _photograph(rng, lab, depth):
    """Light, lens and sensor: lab (3, CANVAS, CANVAS) to RGB float32 (CANVAS, CANVAS, 3), 0..255."""
    lab[0] = np.clip(lab[0] * (1 + _between(rng, LIGHT_TILT) * _across(rng)), 1, 98)
    if rng.random() < P_VIGNETTE:
        r = np.hypot(_X - 0.5, _Y - 0.5)
        reach = max(_between(rng, VIGNETTE_RADIUS), float(r[depth > 0].max()) + 0.01)  # never hides the lesion
        dark = _step((r - reach - 0.05) / _between(rng, (0.008, 0.05), log=True))
        lab *= 1 - _between(rng, (0.85, 1.0)) * dark
    cast = 1 + COLOUR_CAST * np.array([rng.uniform(-0.3, 1), 0, rng.uniform(-1, 1)], np.float32)
    rgb = cv2.cvtColor(cv2.merge(list(lab)), cv2.COLOR_Lab2RGB) * (255 * _between(rng, EXPOSURE) * cast)
    rgb += _between(rng, SENSOR_NOISE) * rng.standard_normal(rgb.shape, dtype=np.float32)
    return cv2.GaussianBlur(rgb, (5, 5), _between(rng, BLUR))


def _resample(rgb, mask, size):
    """Image uint8 (size, size, 3) and mask (size, size): where at least half inside, in one part."""
    how = cv2.INTER_AREA if size < CANVAS else cv2.INTER_LINEAR
    rgb, inside = (cv2.resize(a, (size, size), interpolation=how) for a in (rgb, mask.astype(np.float32)))
    _, parts, stats, _ = cv2.connectedComponentsWithStats((inside >= 0.5).astype(np.uint8), connectivity=4)
    mask = np.uint8(255) * (parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8), mask
