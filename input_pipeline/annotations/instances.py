"""COCO instance files: read once, checked completely, kept as columns and the masks' text."""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from oneformer_jax.input_pipeline.annotations import run_lengths, schemas
from oneformer_jax.input_pipeline.annotations.faults import Fault, FaultsError, error
from oneformer_jax.input_pipeline.annotations.run_lengths import SegmentationError

LAYOUT = (
    'a COCO instance JSON has the lists "images", "annotations" (each with image_id, category_id '
    'and segmentation) and "categories"'
)
UNLISTED_IMAGE = "annotation of an image that is not listed"
UNLISTED_CATEGORY = "category that is not listed"
NO_FILE_NAME = "image without a file_name"
FRACTIONS = "coordinates that look like fractions of the image"
_FRACTIONS_TEXT = (
    "has no coordinate beyond 0 .. 1, which looks like fractions of the image; multiply x by the "
    "width and y by the height"
)
NO_PIXEL = "annotation that covers no pixel of its image"
DOUBLE = "annotation that repeats another one"
_FEW_CROWDS = 0.2  # COCO has one crowd in a hundred annotations
_CHUNK = 1 << 21  # coordinates that are measured together
_SMALLEST = 16  # pixels: in a smaller image a polygon within 0 .. 1 may be right
_PER_CENT = 200  # pixels: in images of larger sides some object must lie beyond pixel 100


@dataclasses.dataclass(frozen=True, eq=False)
class InstanceFile:
    """The usable content of a file: N images and A annotations.

    Attributes:
      path: the file.
      categories: dicts with id and name.
      image_ids, image_names: N texts each; a name may be empty.
      image_sizes: int64 [N, 2], height and width, 0 where not given.
      offsets: int64 [N + 1]; the annotations of image i are the rows offsets[i] to offsets[i + 1].
      ids: [A], for messages.
      category_ids: int64 [A].
      crowd: bool [A].
      areas: float64 [A], as annotated, NaN where not given.
      empty: bool [A], True where an annotation covers no pixel by itself.
      double: bool [A], True where a later annotation of the image is the same.
      faults: of images and annotations, which are left out of the rows.
      faults_of_image: position of the image -> faults of its annotations.
      remarks: annotations without a pixel, and doubles, which are no faults.
    """

    path: str
    categories: list[dict]
    image_ids: list[str]
    image_names: list[str]
    image_sizes: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    category_ids: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    empty: np.ndarray
    double: np.ndarray
    faults: list[Fault]
    faults_of_image: dict[int, list[Fault]]
    remarks: list[Fault]
    _text: bytearray
    _bounds: np.ndarray  # int64 [A, 2]: where the segmentation of each row lies in `_text`

    def for_reading(self) -> InstanceFile:
        """Returns a copy for loader processes, without the parts that only reports need."""
        return dataclasses.replace(self, faults=[], remarks=[])

    def rows(self, image: int) -> slice:
        """Returns the rows of an image's annotations."""
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    def runs(self, row: int, shape: tuple[int, int]) -> np.ndarray:
        """Reads the run lengths of an annotation in an image of (height, width), or raises."""
        start, stop = self._bounds[row]
        try:
            return run_lengths.runs_of(schemas.segmentation_of(self._text[start:stop]) or [], shape)
        except SegmentationError as cause:
            raise SegmentationError(
                cause.kind, f"{self.path}: annotation {self.ids[row]} {cause}"
            ) from None

    def crowds_note(self, way_out: str) -> tuple[str, ...]:
        """Returns a note if suspiciously many are crowds, else none; FaultsError if all are."""
        crowds, total = int(self.crowd.sum()), len(self.crowd)
        if not total or crowds <= _FEW_CROWDS * total:
            return ()
        note = (
            f"{self.path}: {crowds:,} of {total:,} annotations have iscrowd 1, which marks groups "
            "that training ignores. Some tools (CVAT) write it for every mask drawn with a brush; "
            f"{way_out}"
        )
        if crowds == total:
            raise FaultsError(note, [Fault("annotation that is a crowd, as all others", note)])
        return (note,)


def read_instances(path: str | os.PathLike[str], *, names: bool = True) -> InstanceFile:
    """Reads and checks a COCO instance file.

    Args:
      path: the file.
      names: False skips the names of categories and images.

    Raises:
      ValueError: another kind of file, wrong categories, image ids or file names that occur twice,
        no images.
    """
    path = str(path)
    file = schemas.open_file(path, LAYOUT)
    if "segments_info" in schemas.keys_of(file.annotations):
        raise ValueError(
            f"{path} looks like a panoptic JSON, which has one annotation per image: use "
            'dataset.name="coco_folder"'
        )
    categories = schemas.categories_of(
        path, file.categories, schemas.Category if names else schemas.IdOfCategory
    )
    if not file.images:
        raise ValueError(f"{path} lists no images: the dataset is empty")
    faults: list[Fault] = []
    listed = schemas.decode_list(path, "images", file.images, schemas.Image, faults)
    images = [image for image in listed if image is not None]
    twice = schemas.check_images(path, images)
    if twice:
        raise error(path, twice, "Give every image an id and a file_name of its own.")
    reading = _Reading(path, categories, images, faults)
    if names:
        for i, image in enumerate(images):
            if image.file_name is None:
                text = f"{path}: image {image.id} has no file_name"
                reading.note(Fault(NO_FILE_NAME, text), i)
    reading.add(file.annotations)
    del file  # as large as everything kept from it
    return reading.finish()


class _ImageOf(msgspec.Struct):
    image_id: schemas.Identifier


class _Reading:
    """The columns of a file while they are read, one row per usable annotation."""

    def __init__(
        self, path: str, categories: list[dict], images: list[schemas.Image], faults: list[Fault]
    ):
        self.path, self.categories, self.images, self.faults = path, categories, images, faults
        self.sizes = np.array([(i.height or 0, i.width or 0) for i in images], np.int64).reshape(
            -1, 2
        )
        self.sizes[(self.sizes == 0).any(1)] = 0
        self.positions = {str(image.id): i for i, image in enumerate(images)}
        self.faults_of_image: dict[int, list[Fault]] = {}
        self.ids: list[int | str] = []
        self.image_of, self.category = array.array("q"), array.array("q")
        self.crowd, self.area = array.array("b"), array.array("d")
        self.ends, self.hashes = array.array("q", [0]), array.array("q")
        self.text = bytearray()
        self.no_pixel: set[int] = set()
        self.outlines = _Outlines()

    def note(self, fault: Fault, image: int | None) -> None:
        self.faults.append(fault)
        if image is not None:
            self.faults_of_image.setdefault(image, []).append(fault)

    def add(self, entries: list[msgspec.Raw]) -> None:
        decode = msgspec.json.Decoder(schemas.InstanceAnnotation).decode
        known = {category["id"] for category in self.categories}
        for number, entry in enumerate(entries):
            try:
                annotation = decode(entry)
            except msgspec.DecodeError as cause:
                fault = schemas.wrong_value(self.path, f"$.annotations[{number}]", cause, entry)
                self.note(fault, self._image_of(entry))
                continue
            image = self.positions.get(str(annotation.image_id))
            label = f"#{number}" if annotation.id is None else annotation.id
            if image is None:
                self.note(
                    Fault(
                        UNLISTED_IMAGE,
                        f"{self.path}: annotation {label} is of image_id {annotation.image_id!r}, "
                        'which is not in "images"',
                    ),
                    None,
                )
            elif annotation.category_id not in known:
                self.note(
                    Fault(
                        UNLISTED_CATEGORY,
                        f"{self.path}: annotation {label} has category_id "
                        f'{annotation.category_id}, which is not in "categories"; correct it or '
                        "add the category",
                    ),
                    image,
                )
            else:
                self._add(number, label, image, annotation)

    def _image_of(self, entry: msgspec.Raw) -> int | None:
        """Position of the image of a wrong annotation; None if it is unknown."""
        try:
            return self.positions.get(str(msgspec.json.decode(entry, type=_ImageOf).image_id))
        except msgspec.DecodeError:
            return None

    def _add(
        self,
        number: int,
        label: int | str,
        image: int,
        annotation: schemas.InstanceAnnotation,
    ) -> None:
        row = len(self.ids)
        height, width = self.sizes[image].tolist()
        try:
            found = schemas.segmentation_of(annotation.segmentation)
            if isinstance(found, schemas.RunLengths):
                # Without a size in the file the code is checked when its image is read.
                if height and not run_lengths.area_of(run_lengths.runs_of(found, (height, width))):
                    self.no_pixel.add(row)
            else:
                run_lengths.check_points(found or ())
                self.outlines.add(row, found)
        except msgspec.DecodeError as cause:
            place = f"$.annotations[{number}].segmentation"
            entry = annotation.segmentation
            self.note(schemas.wrong_value(self.path, place, cause, entry), image)
            return
        except SegmentationError as cause:
            self.note(Fault(cause.kind, f"{self.path}: annotation {label} {cause}"), image)
            return
        self.ids.append(label)
        self.image_of.append(image)
        self.category.append(annotation.category_id)
        self.crowd.append(bool(annotation.iscrowd))
        self.area.append(np.nan if annotation.area is None else annotation.area)
        self.text += annotation.segmentation
        self.ends.append(len(self.text))
        self.hashes.append(hash(bytes(annotation.segmentation)))

    def finish(self) -> InstanceFile:
        image_of = np.array(self.image_of, np.int64)
        ends = np.array(self.ends, np.int64)
        bounds = np.stack([ends[:-1], ends[1:]], 1)
        usable = np.ones(len(image_of), bool)
        measures = self.outlines.measures()
        sizes = self.sizes[image_of[measures.rows]]
        for row, fault in measures.faults(sizes, self._label):
            usable[row] = False
            self.note(fault, int(image_of[row]))
        _refuse_per_cent(self.path, measures, sizes, np.array(self.area))
        empty = np.zeros(len(image_of), bool)
        empty[list(self.no_pixel)] = True
        for row in measures.thin(sizes):
            if usable[row]:
                start, stop = bounds[row]
                found = schemas.segmentation_of(self.text[start:stop])
                shape = tuple(self.sizes[image_of[row]].tolist())
                empty[row] = not run_lengths.area_of(run_lengths.runs_of(found, shape))
        keys = np.stack([image_of, np.array(self.category, np.int64), np.array(self.hashes)], 1)
        double = _repeated(keys)
        remarks = [
            *(self._remark(r, image_of, NO_PIXEL) for r in np.flatnonzero(usable & empty)),
            *(self._remark(r, image_of, DOUBLE) for r in np.flatnonzero(usable & double & ~empty)),
        ]
        order = np.flatnonzero(usable)
        order = order[np.argsort(image_of[order], kind="stable")]
        counts = np.bincount(image_of[order], minlength=len(self.images))
        return InstanceFile(
            path=self.path,
            categories=self.categories,
            image_ids=list(self.positions),
            image_names=[image.file_name or "" for image in self.images],
            image_sizes=self.sizes,
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            ids=_id_column(self.ids)[order],
            category_ids=np.array(self.category, np.int64)[order],
            crowd=np.array(self.crowd, bool)[order],
            areas=np.array(self.area, np.float64)[order],
            empty=empty[order],
            double=double[order],
            faults=self.faults,
            faults_of_image=self.faults_of_image,
            remarks=remarks,
            _text=self.text,
            _bounds=bounds[order],
        )

    def _label(self, row: int) -> str:
        return f"{self.path}: annotation {self.ids[row]}"

    def _remark(self, row: int, image_of: np.ndarray, kind: str) -> Fault:
        image = self.images[image_of[row]]
        what = "repeats a later one" if kind == DOUBLE else "covers no pixel and is not used"
        return Fault(kind, f"{self._label(row)} of image {image.id} {what}")


def _id_column(ids: list[int | str]) -> np.ndarray:
    try:
        return np.array(ids, np.int64)
    except (OverflowError, ValueError):
        return np.array(ids, object)


def _repeated(keys: np.ndarray) -> np.ndarray:
    """bool [A]: True if a later row, drawn over this one, has the same key; keys are int [A, 3]."""
    repeated = np.ones(len(keys), bool)
    if len(keys):
        repeated[::-1][np.unique(keys[::-1], axis=0, return_index=True)[1]] = False
    return repeated


def _refuse_per_cent(path: str, measures: _Measures, sizes: np.ndarray, areas: np.ndarray) -> None:
    """Raises FaultsError if all polygons lie within 0 .. 100 and the areas show per cent."""
    inside = (measures.least >= 0) & (measures.most <= 100)
    if not len(inside) or not inside.all() or sizes.min() < _PER_CENT:
        return
    annotated = areas[measures.rows]
    stated = np.isfinite(annotated) & (annotated > 0) & (measures.area > 0)
    ratio = annotated[stated] / measures.area[stated]
    expected = sizes.prod(1)[stated] / 1e4
    if len(ratio) and np.median(ratio / expected) > 0.5:
        text = (
            f"{path}: all polygons lie within 0 .. 100, but the areas are those of larger objects; "
            "the coordinates look like per cent of the image"
        )
        raise FaultsError(
            f"{text}. Multiply them by width / 100 and height / 100",
            [Fault("coordinates that look like per cent of the image", text)],
        )


class _Outlines:
    """Coordinates of polygons, measured in chunks."""

    def __init__(self):
        self._rows, self._lengths = array.array("q"), array.array("q")
        self._values = array.array("d")
        self._measured: list[np.ndarray] = []

    def add(self, row: int, polygons: schemas.Polygons) -> None:
        for polygon in polygons:
            self._rows.append(row)
            self._lengths.append(len(polygon))
            self._values.extend(polygon)
        if len(self._values) > _CHUNK:
            self._measure()

    def _measure(self) -> None:
        if not len(self._rows):
            return
        rows, points = np.array(self._rows), np.array(self._values).reshape(-1, 2)
        lengths = np.array(self._lengths) // 2
        ends = np.cumsum(lengths)
        starts = ends - lengths
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = starts
        after = points[following]
        with np.errstate(over="ignore", invalid="ignore"):  # far points are refused below
            cross = points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]
            area = np.abs(np.add.reduceat(cross, starts)) / 2
            outline = np.add.reduceat(np.abs(after - points).max(1), starts)
        least = np.minimum.reduceat(points, starts)
        most = np.maximum.reduceat(points, starts)
        # The polygons of one annotation are adjacent.
        first = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
        with np.errstate(over="ignore", invalid="ignore"):
            columns = [
                rows[first, None],
                np.minimum.reduceat(least, first),
                np.maximum.reduceat(most, first),
                np.add.reduceat(area, first)[:, None],
                np.add.reduceat(outline, first)[:, None],
            ]
        self._measured.append(np.concatenate(columns, 1))
        for column in (self._rows, self._lengths, self._values):
            del column[:]

    def measures(self) -> _Measures:
        self._measure()
        return _Measures(np.concatenate(self._measured or [np.zeros((0, 7))]))


class _Measures:
    """Extent, area and outline of the polygons of each annotation, in pixels.

    Args:
      table: float64 [P, 7]: row, least x, least y, most x, most y, area, length of the outline.
    """

    def __init__(self, table: np.ndarray):
        self.rows = table[:, 0].astype(np.int64)
        self.corners = table[:, 1:3], table[:, 3:5]
        self.least, self.most = table[:, 1:3].min(1), table[:, 3:5].max(1)
        self.area, self.outline = table[:, 5], table[:, 6]

    def faults(self, sizes: np.ndarray, label: Callable[[int], str]) -> Iterator[tuple[int, Fault]]:
        """Yields row and fault of polygons that do not fit; sizes int [P, 2], 0 is unknown."""
        reach = sizes.max(1)
        known = reach > 0
        far = (self.least < -reach) | (self.most > 2 * reach)
        far = known & (far | ~(self.outline <= run_lengths.MAX_OUTLINE))
        fractions = (self.least >= 0) & (self.most <= 1) & (~known | (reach >= _SMALLEST))
        for i in np.flatnonzero(far | fractions).tolist():
            if fractions[i]:
                kind, text = FRACTIONS, _FRACTIONS_TEXT
            else:
                shape = tuple(sizes[i].tolist())
                kind, text = run_lengths.far_outside(
                    self.least[i], self.most[i], self.outline[i], shape
                )
            row = int(self.rows[i])
            yield row, Fault(kind, f"{label(row)} {text}")

    def thin(self, sizes: np.ndarray) -> list[int]:
        """Rows of polygons so thin that they may miss every pixel: only drawing them tells."""
        least, most = self.corners
        inside = np.minimum(most, sizes[:, ::-1]) - np.maximum(least, 0)
        thick = (self.area >= self.outline) & (inside >= 4).all(1)
        return self.rows[(sizes[:, 0] > 0) & ~thick].tolist()
