"""COCO-panoptic JSON: read once, checked completely, kept as flat arrays."""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Sequence

import msgspec
import numpy as np

from oneformer_jax.input_pipeline.annotations import schemas
from oneformer_jax.input_pipeline.annotations.faults import Fault, error

LAYOUT = (
    "a COCO-panoptic dataset is a folder of images, a folder of panoptic PNGs and a JSON with the "
    'lists "images", "annotations" (each with image_id, file_name and segments_info) and '
    '"categories"'
)
UNLISTED_IMAGE = "annotation of an image that is not listed"
UNLISTED_CATEGORY = "category that is not listed"
REPEATED_ID = "segment id that is listed twice"
NO_AREA = -1

_ID, _CATEGORY, _CROWD, _AREA = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class PanopticFile:
    """The content of a file: N annotations with S usable segments.

    Attributes:
      path: the file.
      categories: dicts with id, name, isthing and perhaps color.
      image_ids, image_names, panoptic_names: N texts each; "" where the entry is broken.
      offsets: int64 [N + 1]; the segments of annotation i are the rows offsets[i] to offsets[i+1].
      segments: int64 [S, 4]: id, category id, iscrowd, area (NO_AREA where not given).
      faults: all of them.
      broken: annotation -> the fault that makes its whole image unusable.
      left_out: annotation -> faults of segments, which are left out of the rows.
      unannotated: number of listed images without an annotation.
    """

    path: str
    categories: list[dict]
    image_ids: list[str]
    image_names: list[str]
    panoptic_names: list[str]
    offsets: np.ndarray
    segments: np.ndarray
    faults: list[Fault]
    broken: dict[int, Fault]
    left_out: dict[int, list[Fault]]
    unannotated: int

    def rows(self, index: int) -> np.ndarray:
        """Returns the segments of annotation `index`, int64 [s, 4]."""
        return self.segments[self.offsets[index] : self.offsets[index + 1]]

    def for_reading(self) -> PanopticFile:
        """Returns a copy for loader processes, without the parts that only reports need."""
        return dataclasses.replace(self, faults=[])

    def without_categories(self, known: Sequence[int]) -> PanopticFile:
        """Returns a copy in which segments of categories that are not `known` are faults."""
        strange = ~np.isin(self.segments[:, _CATEGORY], known)
        return self._without(
            strange,
            UNLISTED_CATEGORY,
            lambda row: (
                f"segment {row[_ID]} has category_id {row[_CATEGORY]}, which is not in "
                '"categories"; correct it or add the category'
            ),
        )

    def without_repeated_ids(self) -> PanopticFile:
        """Returns a copy in which segments that share an id within their image are faults."""
        keys = np.stack([self._annotation_of(), self.segments[:, _ID]], 1)
        _, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        return self._without(
            counts[inverse.reshape(-1)] > 1,
            REPEATED_ID,
            lambda row: (
                f"segment id {row[_ID]} is listed twice; every segment of an image needs an id of "
                "its own"
            ),
        )

    def _annotation_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.offsets))

    def _without(self, wrong: np.ndarray, kind: str, text) -> PanopticFile:
        if not wrong.any():
            return self
        owners = self._annotation_of()
        faults = list(self.faults)
        left_out = {index: list(found) for index, found in self.left_out.items()}
        for row in np.flatnonzero(wrong).tolist():
            index = int(owners[row])
            where = f"{self.path}, annotation of {self.panoptic_names[index]}"
            fault = Fault(kind, f"{where}: {text(self.segments[row].tolist())}")
            faults.append(fault)
            left_out.setdefault(index, []).append(fault)
        counts = np.bincount(owners[~wrong], minlength=len(self.image_ids))
        return dataclasses.replace(
            self,
            segments=self.segments[~wrong],
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            faults=faults,
            left_out=left_out,
        )


def read_panoptic(path: str | os.PathLike[str], *, image_names: bool = True) -> PanopticFile:
    """Reads and checks a COCO-panoptic file.

    Args:
      path: the file.
      image_names: False makes an image's name from the PNG's, with ".jpg" as its ending, and skips
        the list of images (Mapillary Vistas).

    Raises:
      ValueError: another kind of file, wrong categories, image ids or file names that occur twice,
        no annotations.
    """
    path = str(path)
    file = schemas.open_file(path, LAYOUT)
    first = schemas.keys_of(file.annotations)
    if "segmentation" in first and "segments_info" not in first:
        raise ValueError(
            f"{path} looks like an instance JSON, which has one annotation per object: use "
            'dataset.name="coco_instances"'
        )
    categories = schemas.categories_of(path, file.categories, schemas.PanopticCategory)
    if not file.annotations:
        raise ValueError(f"{path} has no annotations: the dataset is empty")
    faults: list[Fault] = []
    names: dict[str, str | None] = {}
    if image_names:
        listed = schemas.decode_list(path, "images", file.images, schemas.Image, faults)
        images = [image for image in listed if image is not None]
        names = {str(image.id): image.file_name for image in images}
        twice = schemas.check_images(path, images)
        if twice:
            raise error(path, twice, "Give every image an id and a file_name of its own.")
    decode = msgspec.json.Decoder(schemas.PanopticAnnotation).decode
    values, counts = array.array("q"), array.array("q")
    broken: dict[int, Fault] = {}
    left_out: dict[int, list[Fault]] = {}
    image_ids, image_files, panoptic_files = [], [], []
    for number, entry in enumerate(file.annotations):
        try:
            annotation = decode(entry)
        except msgspec.DecodeError as cause:
            found = _part_by_part(path, number, entry)
            if isinstance(found, msgspec.DecodeError):
                place = f"$.annotations[{number}]"
                broken[number] = schemas.wrong_value(path, place, cause, entry)
                for column in (image_ids, image_files, panoptic_files):
                    column.append("")
                counts.append(0)
                continue
            annotation, left_out[number] = found
        image_id = str(annotation.image_id)
        if image_names:
            name = names.get(image_id)
        else:
            name = f"{os.path.splitext(os.path.basename(annotation.file_name))[0]}.jpg"
        if name is None:
            broken[number] = Fault(
                UNLISTED_IMAGE,
                f'{path}: the "images" list has no file_name for image_id {image_id}, which '
                f"annotation {number} refers to",
            )
        image_ids.append(image_id)
        image_files.append(name or "")
        panoptic_files.append(annotation.file_name)
        counts.append(len(annotation.segments_info))
        for s in annotation.segments_info:
            area = NO_AREA if s.area is None else int(s.area)
            values.extend((s.id, s.category_id, s.iscrowd or 0, area))
    if len(broken) == len(file.annotations):
        raise error(path, list(broken.values()), f"No annotation can be used; {LAYOUT}.")
    faults += [*broken.values(), *(fault for found in left_out.values() for fault in found)]
    _refuse_doubled(path, image_ids, panoptic_files)
    return PanopticFile(
        path=path,
        categories=categories,
        image_ids=image_ids,
        image_names=image_files,
        panoptic_names=panoptic_files,
        offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        segments=np.array(values, np.int64).reshape(-1, 4),
        faults=faults,
        broken=broken,
        left_out=left_out,
        unannotated=len(names.keys() - set(image_ids)),
    ).without_repeated_ids()


def _refuse_doubled(path: str, image_ids: list[str], panoptic_files: list[str]) -> None:
    twice = [
        Fault(
            f"{what} of two annotations",
            f"{path}: the {what} {value} occurs in more than one annotation; an image has one "
            "annotation, with a PNG of its own",
        )
        for what, values in (("image_id", image_ids), ("file_name", panoptic_files))
        for value in schemas.doubled(filter(None, values))
    ]
    if twice:
        raise error(
            path, twice, "Data sets were joined without new ids, or annotations were written twice."
        )


def _part_by_part(
    path: str, number: int, entry: msgspec.Raw
) -> tuple[schemas.PanopticAnnotation, list[Fault]] | msgspec.DecodeError:
    """Decodes an annotation without its wrong segments; returns their faults too, or the error."""
    try:
        outer = msgspec.json.decode(entry, type=schemas.OpenPanopticAnnotation)
    except msgspec.DecodeError as cause:
        return cause
    faults: list[Fault] = []
    segments = schemas.decode_list(
        path, f"annotations[{number}].segments_info", outer.segments_info, schemas.Segment, faults
    )
    good = [segment for segment in segments if segment is not None]
    return schemas.PanopticAnnotation(outer.image_id, outer.file_name, good), faults
