"""A small folder laid out like ImageNet: JPEG pictures of different sizes, a class a colour, some grey, one in CMYK."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"n01": (200, 60, 60), "n02": (60, 200, 60), "n03": (60, 60, 200), "n04": (200, 200, 60)}


def write(place: Path, train: int = 10, test: int = 4) -> Path:
    """Write so many pictures of each class; the same bytes' worth of pixels every time."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for name, colour in COLOURS.items():
            folder = place / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(24, 96, 2)
                pixels = generator.normal(colour, 40, (height, width, 3)).clip(0, 255).astype(np.uint8)
                mode = "L" if i == 1 else "CMYK" if i == 2 else "RGB"
                Image.fromarray(pixels).convert(mode).save(folder / f"{part}_{i}.JPEG", quality=95)
    return place
