"""YOLO: data.yaml, folders of images, and beside each a folder of labels, a text file per image.

A line is a class and a polygon in shares of the image's sides. An image without a text has no
instance.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np

from oneformer_jax import files
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.files import read_text
from oneformer_jax.input_pipeline.importers.export import Export, Picture, read_lines, split_of

_YAMLS = ("data.yaml", "dataset.yaml", "data.yml")
_YAML_LIMIT = 1 << 20


class _Data(msgspec.Struct):
    names: list[str] | dict[int, str]
    train: str | list[str] = ""
    val: str | list[str] = ""
    test: str | list[str] | None = None
    path: str | None = ""
    nc: int | None = None


def read(export: Export) -> None:
    """Reads the data.yaml of the export's folder, and its training and validation images."""
    path = next((p for name in _YAMLS if (p := export.source / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{export.source / _YAMLS[0]} is missing: it names the classes")
    data = _read_yaml(path)
    names = data.names
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise files.FileError(f"{path}: the numbers of names are not 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if data.nc not in (None, len(names)):
        raise files.FileError(f"{path}: nc is {data.nc}, but there are {len(names)} names")
    export.list_classes(names, path)
    listed = export.source / "classes.txt"
    if listed.is_file():
        export.list_classes(read_lines(listed), listed)
    used: set[Path] = set()  # texts
    folders: set[Path] = set()  # of images
    for name, given in (("train", data.train), ("val", data.val), ("test", data.test or "")):
        if given and (split := split_of(export, name, path)):
            for place in [given] if isinstance(given, str) else given:
                there, found = _images_of(export, path, data.path or "", place)
                folders |= there | {image.parent for image in found}
                used |= {_read_image(export, path, split, image) for image in found} - {None}
    _check_texts(export, folders, used)


def _check_texts(export: Export, folders: set[Path], used: set[Path]) -> None:
    """Finds the texts beside folders of images that no image uses."""
    known = {export.source / name.rsplit(".", 1)[0] for name in images.walk_images(export.source)}
    beside = [_exchange(export, folder, "images", "labels") for folder in folders]
    there = [folder for folder in beside if folder is not None and folder.is_dir()]
    texts = {folder / name for folder in there for name in images.walk_images(folder, (".txt",))}
    for text in sorted(texts - used):
        folder = _exchange(export, text.parent, "labels", "images")
        if folder is not None and folder / text.stem in known:
            export.drop("texts of images in no split", text.name)
        else:
            export.fault(
                "text without its image",
                f"{text} belongs to no image; restore the image or remove the text",
            )


def _read_yaml(path: Path) -> _Data:
    import yaml

    try:
        content = yaml.safe_load(files.read_bytes(path, limit=_YAML_LIMIT))
        return msgspec.convert(content, _Data, strict=False)
    except files.FileError:
        raise
    except Exception as error:  # PyYAML raises many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise files.FileError(f"{path} is no data.yaml of YOLO: {reason}") from None


def _read_image(export: Export, path: Path, split: str, image: Path) -> Path | None:
    """Reads an image with its text; returns the path of the text, or None after a fault."""
    folder = _exchange(export, image.parent, "images", "labels")
    if folder is None:
        export.fault(
            "image in no folder images",
            f"{image}: the texts lie in a folder labels beside the folder images, which its "
            "path lacks",
        )
        return None
    text = folder / f"{image.stem}.txt"
    picture = export.picture(image, path, split=split)
    if picture is not None and text.is_file():
        _read_text(export, picture, text)
    return text


def _exchange(export: Export, folder: Path, name: str, other: str) -> Path | None:
    """Replaces the last `name` in a folder of the export by `other`; None if it has none."""
    parts = list(folder.relative_to(export.source).parts)
    if name not in parts:
        return None
    parts[-1 - parts[::-1].index(name)] = other
    return export.source.joinpath(*parts)


def _images_of(export: Export, path: Path, root: str, place: str) -> tuple[set[Path], list[Path]]:
    """Lists the images of a split; also gives its folder, if it is no list of files."""
    # Some tools write "../train/images" for a folder beside data.yaml.
    plain = place.replace("\\", "/")
    while plain.startswith("../"):
        plain = plain[3:]
    candidates = (f"{root}/{place}" if root else place, place, plain)
    paths = (export.inside(export.source, candidate) for candidate in candidates)
    inside = [path for path in paths if path is not None and os.path.exists(path)]
    if not inside:
        export.fault(
            "split that is missing",
            f"{path}: there is no folder or list {place!r} in {export.source}; correct the path",
        )
        return set(), []
    chosen = inside[0]
    if chosen.is_dir():
        return {chosen}, [chosen / name for name in images.walk_images(chosen)]
    listed = []
    for line in read_lines(chosen):
        image = export.find(chosen.parent, line, chosen)
        if image is not None and not os.path.isfile(image):
            # Lists may begin with the name of the folder that held the export.
            image = export.find(export.source, line.split("/", 1)[-1], chosen)
        if image is not None:
            listed.append(image)
    return set(), listed


def _read_text(export: Export, picture: Picture, text: Path) -> None:
    for number, line in enumerate(read_text(text).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{text}, line {number}"
        try:
            values = [float(value) for value in line.split()]
        except ValueError:
            export.fault("line that is not of numbers", f"{where}: {line[:60]!r} is not of numbers")
            continue
        if len(values) == 5:
            export.fault(
                "line of a box",
                f"{where} is a box; a box is no mask: export for segmentation",
            )
            continue
        if len(values) < 7 or len(values) % 2 == 0:
            export.fault(
                "line that is no polygon",
                f"{where} has {len(values)} numbers; a class and at least three points are needed",
            )
            continue
        names = export.classes or []
        if not (values[0].is_integer() and 0 <= values[0] < len(names)):
            export.fault(
                "class that the list lacks",
                f"{where}: the class {values[0]:g} is none of the {len(names)} in data.yaml",
            )
            continue
        points = np.array(values[1:]).reshape(-1, 2) * picture.size[::-1]
        part = export.polygon(picture, points, where)
        export.instance(picture, names[int(values[0])], [part], where)
