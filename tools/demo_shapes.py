"""Coloured shapes for the demo: drawing them, describing them, and judging pixels.

A scene holds one shape of one colour on a plain background, either still at one of five positions or moving in one of
four directions.  `draw` makes its pixels; `judge` tells colour, shape and position or direction from pixels alone, also
from blurred ones, and so measures what a model has learnt.  Lengths are fractions of the frame's side, x to the right
and y down; times run from 0 to 1 over a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
UInt8Array = npt.NDArray[np.uint8]

COLOURS = {
    "red": (225, 35, 35),
    "yellow": (240, 205, 20),
    "green": (35, 165, 60),
    "cyan": (20, 190, 205),
    "blue": (45, 75, 225),
    "magenta": (205, 45, 190),
}
"""R, G, B; at least 40 degrees of hue apart."""
SHAPES = ("circle", "square", "triangle")
TRAVEL = 0.22
"""Distance of the outer positions from the centre; a moving shape crosses twice as much."""
POSITIONS = {
    "left": (-TRAVEL, 0.0),
    "right": (TRAVEL, 0.0),
    "top": (0.0, -TRAVEL),
    "bottom": (0.0, TRAVEL),
    "centre": (0.0, 0.0),
}
"""Where the shape of a picture lies, from the middle of the frame."""
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Which way the shape of a clip moves."""
CLIP_FRAMES, CLIP_FPS = 9, 12
NONE = "none"
"""What the judge says when it cannot tell."""

PICTURE_TEMPLATES = (
    "A {thing} {where}.",
    "There is a {thing} {where}.",
    "A picture of a {thing} {where}.",
    "{Where} is a {thing}.",
)
CLIP_TEMPLATES = (
    "A {thing} moves {where}.",
    "A {thing} is moving {where}.",
    "There is a {thing} moving {where}.",
    "A clip of a {thing} that moves {where}.",
)
POSITION_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}

_MEAN_RADIUS, _MEAN_GREY = 0.2, 224  # of random scenes
_SQUARE, _TRIANGLE = 0.85, 0.62  # half side and inradius for radius 1; all shapes look about equally large
_AREA = {"circle": np.pi, "square": 4 * _SQUARE**2, "triangle": 3 * 3**0.5 * _TRIANGLE**2}  # for radius 1
_MIN_CONTRAST = 0.12  # of the object against the background, distance in RGB of 0..1
_MIN_SATURATION = 0.08  # of the object's mean colour
_MAX_SHARE = 0.35  # of the frame that an object may cover
_MIN_MATCH = 0.7  # cosine with the template of the best shape
_MAX_DISTANCE = 0.2  # from the nearest position
_MIN_MOVE = 0.15  # of a clip's object over the clip
_WINDOW = 0.28  # half side of the window that follows the object


@dataclass(frozen=True)
class Scene:
    """One coloured shape.

    Attributes:
        colour: of COLOURS.
        shape: of SHAPES.
        place: of POSITIONS for a picture, of DIRECTIONS for a clip.
        moves: whether this is a clip.
        radius: size of the shape.
        offset: (x, y) added to where the place says it is.
        background: R, G, B.
    """

    colour: str
    shape: str
    place: str
    moves: bool
    radius: float
    offset: tuple[float, float]
    background: tuple[int, int, int]

    @property
    def attributes(self) -> dict[str, str]:
        """What a judge should find: colour, shape, and position or direction."""
        return {"colour": self.colour, "shape": self.shape, "direction" if self.moves else "position": self.place}

    @property
    def held_out(self) -> bool:
        """Whether no training row shows or names this combination: one place of each colour and shape, in turn."""
        places = list(DIRECTIONS if self.moves else POSITIONS)
        number = list(COLOURS).index(self.colour) + 2 * SHAPES.index(self.shape)
        return places[number % len(places)] == self.place

    def calmed(self, variety: float) -> Scene:
        """With less of what no caption names: size, offset and background come closer to their means.

        Args:
            variety: 1: as it is; 0: the means themselves.
        """
        red, green, blue = (round(_MEAN_GREY + variety * (value - _MEAN_GREY)) for value in self.background)
        return replace(
            self,
            radius=_MEAN_RADIUS + variety * (self.radius - _MEAN_RADIUS),
            offset=(variety * self.offset[0], variety * self.offset[1]),
            background=(red, green, blue),
        )

    def mirrored(self) -> Scene:
        """Left and right exchanged."""
        place = {"left": "right", "right": "left"}.get(self.place, self.place)
        return replace(self, place=place, offset=(-self.offset[0], self.offset[1]))


def random_scene(rng: np.random.Generator, moves: bool) -> Scene:
    """A scene with everything drawn from `rng`."""
    grey = int(rng.integers(200, 248))
    return Scene(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
        place=str(rng.choice(list(DIRECTIONS if moves else POSITIONS))),
        moves=moves,
        radius=float(rng.uniform(0.19, 0.21)),
        offset=(float(rng.uniform(-0.02, 0.02)), float(rng.uniform(-0.02, 0.02))),
        background=(grey, min(255, grey + int(rng.integers(-4, 5))), min(255, grey + int(rng.integers(-4, 5)))),
    )


def caption(scene: Scene, template: int) -> str:
    """The scene in words by template number `template` (modulo their count)."""
    templates = CLIP_TEMPLATES if scene.moves else PICTURE_TEMPLATES
    where = scene.place if scene.moves else POSITION_PHRASES[scene.place]
    thing = f"{scene.colour} {scene.shape}"
    return templates[template % len(templates)].format(thing=thing, where=where, Where=where.capitalize())


def draw(scene: Scene, size: int, frames: int = CLIP_FRAMES) -> UInt8Array:
    """Anti-aliased pixels.

    Args:
        scene: what to draw.
        size: side of the square frame, pixels.
        frames: of a clip; a picture has 1.

    Returns:
        [T, size, size, 3] RGB.
    """
    offset = np.array(scene.offset)
    if scene.moves:
        way = np.linspace(-TRAVEL, TRAVEL, frames)[:, None] * np.array(DIRECTIONS[scene.place])  # [T, 2]
    else:
        way = np.array([POSITIONS[scene.place]])
    cover = coverage(scene.shape, 0.5 + way + offset, np.array(scene.radius), size)[..., None]
    background, colour = np.array(scene.background), np.array(COLOURS[scene.colour])
    return np.asarray(np.rint(background + cover * (colour - background)), np.uint8)


def coverage(shape: str, centre: FloatArray, radius: FloatArray, size: int) -> FloatArray:
    """How much of each pixel a shape covers, 0..1.

    Args:
        shape: of SHAPES.
        centre: [..., 2] (x, y) of its centroid.
        radius: [...], broadcast against centre's.
        size: side of the frame, pixels.

    Returns:
        [..., size, size].
    """
    at = (np.arange(size) + 0.5) / size
    x = at[None, :] - centre[..., 0, None, None]
    y = at[:, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    outside: dict[str, Callable[[], FloatArray]] = {  # signed distance to the edge
        "circle": lambda: np.hypot(x, y) - r,
        "square": lambda: np.maximum(np.abs(x), np.abs(y)) - _SQUARE * r,
        "triangle": lambda: np.maximum(y, 0.75**0.5 * np.abs(x) - 0.5 * y) - _TRIANGLE * r,
    }
    return np.clip(0.5 - outside[shape]() * size, 0.0, 1.0)


@dataclass(frozen=True)
class Guess:
    """A name, or NONE, and how far ahead of the second best it is: 0 (a tie, or NONE) to 1."""

    name: str
    confidence: float


Verdict = dict[str, Guess]
"""By attribute: colour, shape, and position (one frame) or direction (several)."""


def judge(frames: npt.NDArray[Any]) -> Verdict:
    """What pixels show.

    Args:
        frames: [T, H, W, 3], uint8 or floating in 0..1; T = 1 is a picture.

    Raises:
        ValueError: if the shape is another, or a value is not finite.
    """
    pixels = _unit_range(frames)
    where = "position" if len(pixels) == 1 else "direction"
    nothing = Guess(NONE, 0.0)
    border = max(1, pixels.shape[1] // 16)
    ring = np.ones(pixels.shape[1:3], dtype=bool)
    ring[border:-border, border:-border] = False
    background = np.median(pixels[:, ring].reshape(-1, 3), axis=0)
    distance = _box_blur(np.linalg.norm(pixels - background, axis=-1), 1)  # [T, H, W]
    peak = float(np.quantile(distance, 0.98, axis=(1, 2)).mean())
    if peak < _MIN_CONTRAST or float((distance > 0.5 * peak).mean()) > _MAX_SHARE:
        return {"colour": nothing, "shape": nothing, where: nothing}
    evidence = np.clip(distance / peak - 0.35, 0.0, None)
    centroids, window = _follow(evidence)
    core = window * np.clip(distance / peak - 0.7, 0.0, None)
    colour = (core[..., None] * pixels).sum(axis=(0, 1, 2)) / max(float(core.sum()), 1e-9)
    axis = colour - background
    mask = np.clip((pixels - background) @ axis / max(float(axis @ axis), 1e-9), -0.5, 1.5) * window
    place = _position(centroids[0]) if where == "position" else _direction(centroids)
    return {"colour": _colour(colour), "shape": _shape(mask), where: place}


def correct(verdict: Verdict, expected: Mapping[str, str]) -> dict[str, bool]:
    """Whether each expected attribute was found, and under "all" whether all were.

    Raises:
        KeyError: if the verdict lacks an expected attribute (a picture has no direction, a clip no position).
    """
    found = {name: verdict[name].name == value for name, value in expected.items()}
    return {**found, "all": all(found.values())}


def chance(moves: bool) -> dict[str, float]:
    """Probability that a guess without looking is right, by attribute and for all together."""
    where, places = ("direction", DIRECTIONS) if moves else ("position", POSITIONS)
    each = {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), where: 1 / len(places)}
    return {**each, "all": float(np.prod(list(each.values())))}


def _unit_range(frames: npt.NDArray[Any]) -> FloatArray:
    """float64 in 0..1."""
    if frames.ndim != 4 or frames.shape[3] != 3 or min(frames.shape) < 1 or min(frames.shape[1:3]) < 16:
        raise ValueError(f"frames of shape {frames.shape}: must be [T, H, W, 3] with sides of at least 16 pixels")
    pixels = np.asarray(frames, np.float64) / (255.0 if frames.dtype == np.uint8 else 1.0)
    if not np.isfinite(pixels).all():
        raise ValueError("frames hold values that are not finite: check what made them")
    return np.clip(pixels, 0.0, 1.0)


def _box_blur(values: FloatArray, reach: int) -> FloatArray:
    """Mean over (2 reach + 1)^2 pixels of [..., H, W]; edge pixels repeat."""
    for axis in (-2, -1):
        pad = [(0, 0)] * values.ndim
        pad[axis] = (reach, reach)
        padded = np.pad(values, pad, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis)
        values = windows.mean(axis=-1)
    return values


def _follow(evidence: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Where the object is in each frame: centroids [T, 2] (x, y), and 0/1 windows [T, H, W] around them."""
    _, height, width = evidence.shape
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    strongest = _box_blur(evidence, height // 10).reshape(len(evidence), -1).argmax(axis=1)
    centroids = np.stack([x[strongest % width], y[strongest // width]], axis=-1)
    for _ in range(4):
        inside_x = np.abs(x - centroids[:, :1]) <= _WINDOW  # [T, W]
        inside_y = np.abs(y - centroids[:, 1:]) <= _WINDOW  # [T, H]
        window = (inside_y[:, :, None] & inside_x[:, None, :]).astype(np.float64)
        weights = evidence * window
        total = np.maximum(weights.sum(axis=(1, 2)), 1e-9)
        centroids = np.stack([(weights.sum(axis=1) @ x) / total, (weights.sum(axis=2) @ y) / total], axis=-1)
    return centroids, window


def _best(names: list[str], losses: FloatArray) -> Guess:
    """The name of least loss (not negative)."""
    order = np.argsort(losses)
    first, second = losses[order[:2]]
    return Guess(names[order[0]], float(1.0 - first / max(second, 1e-9)))


def _hue(colour: FloatArray) -> complex:
    """Hue as the angle and saturation as the length of a number in the plane at right angles to grey."""
    red, green, blue = (float(value) for value in colour)
    return complex(red - 0.5 * (green + blue), 0.75**0.5 * (green - blue))


def _colour(colour: FloatArray) -> Guess:
    hue = _hue(colour)
    if abs(hue) < _MIN_SATURATION:
        return Guess(NONE, 0.0)
    known = np.array([_hue(np.array(value)) for value in COLOURS.values()])
    return _best(list(COLOURS), np.abs(np.angle(known / hue)))


def _shape(mask: FloatArray) -> Guess:
    """The shape whose template matches best over at most three frames of mask [T, H, W].

    A match is the cosine between mask and template; templates are tried at several sizes, sharp and blurred.
    """
    some = mask[np.unique(np.linspace(0, len(mask) - 1, 3).astype(int))]
    size = some.shape[1]
    at = (np.arange(size) + 0.5) / size
    solid = np.clip(some, 0.0, 1.0)
    area = np.maximum(solid.sum(axis=(1, 2)), 1e-9)  # pixels
    centre = np.stack([solid.sum(axis=1) @ at, solid.sum(axis=2) @ at], axis=-1) / area[:, None]
    matches = []
    for shape in SHAPES:
        radius = np.sqrt(area / _AREA[shape]) / size * np.array([[0.8], [0.87], [0.94], [1.0], [1.06]])
        template = coverage(shape, np.broadcast_to(centre, (*radius.shape, 2)), radius, size)
        template = np.concatenate([template, _box_blur(template, 1)])  # [10, frames, H, W]
        norms = np.sqrt((template**2).sum(axis=(2, 3)) * (some**2).sum(axis=(1, 2)))
        match = (template * some).sum(axis=(2, 3)) / np.maximum(norms, 1e-9)
        matches.append(match.max(axis=0).mean())
    if max(matches) < _MIN_MATCH:
        return Guess(NONE, 0.0)
    return _best(list(SHAPES), 1.0 - np.array(matches))


def _position(centroid: FloatArray) -> Guess:
    distances = np.linalg.norm(centroid - 0.5 - np.array(list(POSITIONS.values())), axis=1)
    return _best(list(POSITIONS), distances) if distances.min() <= _MAX_DISTANCE else Guess(NONE, 0.0)


def _direction(centroids: FloatArray) -> Guess:
    """By the straight line through the centroids [T, 2] over time."""
    time = np.linspace(-0.5, 0.5, len(centroids))
    move = time @ centroids / (time @ time)  # [2], over the whole clip
    if float(np.abs(move).max()) < _MIN_MOVE:
        return Guess(NONE, 0.0)
    return _best(list(DIRECTIONS), np.linalg.norm(move - 2 * TRAVEL * np.array(list(DIRECTIONS.values())), axis=1))
