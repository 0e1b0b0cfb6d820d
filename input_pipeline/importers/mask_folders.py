"""Folders of masks: images/NAME.jpg, and masks/CLASS/NAME.png or masks/CLASS/NAME/*.png.

Each PNG is the mask of one object: 0 outside of it and one other value inside.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from oneformer_jax import files
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.importers.export import Export, Picture

_LAYOUT = (
    "images/NAME.jpg with masks/CLASS/NAME.png or, for several objects, masks/CLASS/NAME/*.png"
)


def read(export: Export) -> None:
    """Reads the folders images and masks of the export's folder."""
    image_dir, mask_dir = export.source / "images", export.source / "masks"
    for folder in (image_dir, mask_dir):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing; the layout is {_LAYOUT}")
    pictures: dict[str, Picture] = {}
    for name in images.walk_images(image_dir):
        stem = name.rsplit(".", 1)[0]
        picture = export.picture(image_dir / name, image_dir)
        if stem in pictures:
            export.fault(
                "images that differ only in their ending",
                f"{image_dir}: {name} and {pictures[stem].name} have the same masks; rename one",
            )
        elif picture:
            pictures[stem] = picture
    classes = sorted(entry.name for entry in mask_dir.iterdir() if not entry.name.startswith("."))
    for label in classes:
        if not (mask_dir / label).is_dir():
            export.fault(
                "file among the classes",
                f"{mask_dir / label} is no folder of a class; the layout is {_LAYOUT}",
            )
            continue
        for name in images.walk_images(mask_dir / label):
            path = mask_dir / label / name
            stem = name.rsplit(".", 1)[0]
            picture = pictures.get(stem) or pictures.get(stem.rpartition("/")[0])
            if picture is None:
                export.fault(
                    "mask without its image",
                    f"{path} belongs to no image in {image_dir}; the layout is {_LAYOUT}",
                )
                continue
            mask = _mask(export, picture, path)
            if mask is not None and not mask.any():
                export.drop("empty masks", f"{label}/{name}")
            else:
                export.instance(picture, label, [mask], path)
    export.list_classes([label for label in classes if (mask_dir / label).is_dir()], mask_dir)


def _mask(export: Export, picture: Picture, path: Path) -> np.ndarray | None:
    try:
        samples = images.decode_samples(images.read_file(path), str(path))
    except images.ImageError as error:
        export.fault("mask that cannot be decoded", str(error))
        return None
    if samples.ndim == 3:
        if (samples != samples[..., :1]).any():
            export.fault("mask in colour", f"{path} is in colour; a mask is grey")
            return None
        samples = samples[..., 0]
    if samples.shape != picture.size:
        export.fault(
            "mask of another size",
            f"{path} has the shape {list(samples.shape)}, its image {list(picture.size)}",
        )
        return None
    values = np.unique(samples)
    others = values[values != 0]
    if len(others) > 1:
        export.fault(
            "mask of several values",
            f"{path} has the values {files.first_few(values)}; the mask of one object has 0 and "
            "one other value. Edges that were smoothed or stored as JPEG have more",
        )
        return None
    return samples > 0
