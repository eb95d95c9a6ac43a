"""Scenes of the bundled world: known factors in, 64x64 pictures out.

A scene has one or two objects (shape, colour, size, place), a background colour and one style for the whole picture.
Scenes are sampled and rendered in batches of tensors, on any device; the same seed gives the same picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (1.00, 0.92, 0.15),
    "green": (0.10, 0.65, 0.15),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.10, 0.25, 0.95),
    "purple": (0.55, 0.12, 0.75),
    "pink": (1.00, 0.50, 0.75),
}
SIZES = {"small": 9.0, "large": 13.5}  # radius in pixels
PLACES = {"left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48), "centre": (32, 32)}
OPPOSITE_PLACES = ((0, 1), (1, 0), (2, 3), (3, 2))  # where the two objects of a pair stand
BACKGROUNDS = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
    "gray": (0.50, 0.50, 0.50),
    "brown": (0.38, 0.24, 0.11),
    "navy": (0.06, 0.08, 0.32),
}
STYLES = ("flat", "outline", "striped", "dotted", "gradient")
IMAGE_SIZE = 64

#: every factor of an object and of the picture with its values, in the order of the integer codes
OBJECT_FACTORS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}
GLOBAL_FACTORS = {"background": tuple(BACKGROUNDS), "style": STYLES}
FACTORS = OBJECT_FACTORS | GLOBAL_FACTORS


@dataclass
class Scenes:
    """A batch of scenes. Object fields are `(batch, 2)`, the others `(batch,)`; the second object counts if `count`
    is 2."""

    count: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    place: torch.Tensor
    background: torch.Tensor
    style: torch.Tensor
    jitter: torch.Tensor  # (batch, 2, 7): x, y, radius, angle and RGB of each object, each uniform in [-1, 1]
    global_jitter: torch.Tensor  # (batch, 6): RGB of the background, phase x, phase y and angle of the texture

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def is_held_out(scenes: Scenes) -> torch.Tensor:
    """`(batch,)` bool: scenes with an object whose shape x colour x background x style is never trained on (1 in
    11)."""
    code = scenes.shape + 2 * scenes.colour + 3 * scenes.background[:, None] + 5 * scenes.style[:, None]
    held_out = code % 11 == 0
    held_out[:, 1] &= scenes.count == 2
    return held_out.any(1)


def sample_scenes(count: int, seed: int, held_out: bool | None = None, objects: int | None = None) -> Scenes:
    """Draw `count` scenes with independent uniform factors.

    Args:
        held_out (`bool`, *optional*): keep only combinations that are (`True`) or are not (`False`) held out.
        objects (`int`, *optional*): 1 or 2 objects in every scene; by default two scenes in three have one.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Scenes] = []
    while sum(map(len, kept)) < count:
        n = max(2 * count, 64)

        def integers(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator)

        pair = torch.tensor(OPPOSITE_PLACES)[integers(4, n)]
        number = torch.full((n,), objects) if objects else 1 + (torch.rand(n, generator=generator) < 1 / 3).long()
        single = torch.stack([integers(5, n)] * 2, 1)
        scenes = Scenes(
            count=number,
            shape=integers(len(SHAPES), n, 2),
            colour=integers(len(COLOURS), n, 2),
            size=integers(2, n, 2),
            place=torch.where(number[:, None] == 2, pair, single),
            background=integers(len(BACKGROUNDS), n),
            style=integers(len(STYLES), n),
            jitter=torch.rand(n, 2, 7, generator=generator) * 2 - 1,
            global_jitter=torch.rand(n, 6, generator=generator) * 2 - 1,
        )
        kept.append(scenes if held_out is None else scenes[is_held_out(scenes) == held_out])
    joined = {f.name: torch.cat([getattr(part, f.name) for part in kept])[:count] for f in fields(Scenes)}
    return Scenes(**joined)


def _outlines(points: int = 16) -> torch.Tensor:
    """`(shapes, points, 2)` vertices of every shape in a unit circle, y down; short polygons repeat their last
    vertex."""

    def polygon(vertices: list[tuple[float, float]]) -> torch.Tensor:
        return torch.tensor(vertices + vertices[-1:] * (points - len(vertices)))

    def radial(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        angles = [2 * math.pi * i / count for i in range(count)]
        return [
            (radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)
        ]

    heart = []
    for i in range(points):
        a = 2 * math.pi * i / points
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        heart.append((16 * math.sin(a) ** 3 / 15, -y / 15))
    w = 0.36
    cross = [
        (-w, -1),
        (w, -1),
        (w, -w),
        (1, -w),
        (1, w),
        (w, w),
        (w, 1),
        (-w, 1),
        (-w, w),
        (-1, w),
        (-1, -w),
        (-w, -w),
    ]
    s = 0.85
    shapes = {
        "circle": radial(points, (1.0,)),
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": radial(3, (1.15,)),
        "star": radial(10, (1.15, 0.48)),
        "cross": cross,
        "heart": heart,
    }
    return torch.stack([polygon(shapes[name]) for name in SHAPES])


def _signed_distance(points: torch.Tensor, polygons: torch.Tensor) -> torch.Tensor:
    """Distance of `points (n, p, 2)` to `polygons (n, v, 2)`, negative inside (even-odd rule)."""
    start, end = polygons, polygons.roll(-1, 1)
    distance = torch.full(points.shape[:2], 1e9, device=points.device)
    inside = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    for i in range(polygons.shape[1]):
        a, edge = start[:, None, i], (end - start)[:, None, i]
        relative = points - a
        along = ((relative * edge).sum(-1) / (edge * edge).sum(-1).clamp(min=1e-9)).clamp(0, 1)
        distance = torch.minimum(distance, ((relative - along[..., None] * edge) ** 2).sum(-1))
        crosses = (start[:, None, i, 1] > points[..., 1]) != (end[:, None, i, 1] > points[..., 1])
        at = relative[..., 1] * edge[..., 0] - relative[..., 0] * edge[..., 1]
        inside ^= crosses & ((at > 0) == (edge[..., 1] > 0))
    return torch.where(inside, -1.0, 1.0) * distance.sqrt()


def _towards_contrast(colour: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Mix `colour (n, 3, 1)` with black where it is bright and with white where it is dark, by `amount (n, 1, p)`."""
    luminance = (colour * colour.new_tensor([0.3, 0.59, 0.11])[:, None]).sum(1, keepdim=True)
    target = (luminance < 0.45).to(colour.dtype)
    return colour + (target - colour) * amount


def render(scenes: Scenes) -> torch.Tensor:
    """Render scenes to `(batch, 3, 64, 64)` float images in [0, 1], anti-aliased, on the scenes' device."""
    return render_layers(scenes)[0]


def render_layers(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The picture `(batch, 3, 64, 64)`, how much of each pixel its objects paint `(batch, 1, 64, 64)` and the filled
    silhouette of each object `(batch, 2, 64, 64)`, both in [0, 1]."""
    device, n = scenes.count.device, len(scenes)
    axis = torch.arange(IMAGE_SIZE, device=device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1).reshape(1, -1, 2)

    phase, angle = 0.5 * scenes.global_jitter[:, 3:5, None], math.pi / 4 + 0.05 * scenes.global_jitter[:, 5, None]
    along = grid[..., 0] * angle.cos() + grid[..., 1] * angle.sin() + phase[:, 0]
    stripes = (2.0 * torch.sin(along * 2 * math.pi / 8) + 0.5).clamp(0, 1)
    cell = (grid.transpose(1, 2) + phase) % 8 - 4
    dots = (2.8 - cell.square().sum(1).sqrt()).clamp(0, 1)
    gradient = (grid[..., 1] / IMAGE_SIZE).expand(n, -1)
    texture = torch.zeros_like(stripes)
    for name, pattern in (("striped", stripes), ("dotted", dots), ("gradient", gradient)):
        texture = torch.where((scenes.style == STYLES.index(name))[:, None], pattern, texture)
    texture = 0.45 * texture[:, None]

    palette = torch.tensor(list(BACKGROUNDS.values()), device=device)[scenes.background]
    image = _towards_contrast((palette + 0.025 * scenes.global_jitter[:, :3])[..., None], 0.6 * texture)
    covered = torch.zeros(n, 1, grid.shape[1], device=device)
    silhouettes = torch.zeros(n, 2, grid.shape[1], device=device)
    outlines = _outlines().to(device)
    centres = torch.tensor(list(PLACES.values()), dtype=torch.float32, device=device)
    radii = torch.tensor(list(SIZES.values()), device=device)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    for i in range(2):
        index = (scenes.count > i).nonzero()[:, 0]
        jitter = scenes.jitter[index, i]
        centre = centres[scenes.place[index, i]] + 2.0 * jitter[:, :2]
        radius = radii[scenes.size[index, i]] * (1 + 0.08 * jitter[:, 2])
        turn = 0.1 * jitter[:, 3]
        rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(-1, 2, 2)
        polygon = outlines[scenes.shape[index, i]] @ rotation.transpose(1, 2) * radius[:, None, None] + centre[:, None]
        distance = _signed_distance(grid.expand(len(index), -1, 2), polygon)
        outlined = (scenes.style[index] == STYLES.index("outline"))[:, None]
        silhouettes[index, i] = (0.5 - distance).clamp(0, 1)
        cover = (silhouettes[index, i] - (-2.1 - distance).clamp(0, 1) * outlined)[:, None]
        colour = _towards_contrast(
            (palette[scenes.colour[index, i]] + 0.03 * jitter[:, 4:]).clamp(0, 1)[..., None], texture[index]
        )
        image[index] = image[index] + (colour - image[index]) * cover
        covered[index] = torch.maximum(covered[index], cover)
    shape = (n, -1, IMAGE_SIZE, IMAGE_SIZE)
    return image.clamp(0, 1).reshape(shape), covered.reshape(shape), silhouettes.reshape(shape)


def render_pictures(count: int, seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, Scenes]:
    """`count` training pictures uint8 `(count, 3, 64, 64)`, where their objects are, bool `(count, 1, 64, 64)`, the
    scenes."""
    scenes = sample_scenes(count, seed, held_out=False).to(device)
    pictures, objects = [], []
    for start in tqdm(range(0, count, 250), desc="rendering", unit="chunk", mininterval=5):
        images, cover, _ = render_layers(scenes[slice(start, start + 250)])
        pictures.append((images * 255).round().to(torch.uint8))
        objects.append(cover > 0.1)
    return torch.cat(pictures), torch.cat(objects), scenes
