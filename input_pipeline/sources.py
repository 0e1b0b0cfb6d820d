"""Random-access sources of records, opened by name: prepared TFDS datasets and folders.

`source[i]` is a record (see `records`), `len(source)` their number. Sources can be pickled and open
their files where they are used, so loader workers may share one.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from input_pipeline import datasets, images
from input_pipeline.coco_format import CocoFolderSource, load_coco_json
from input_pipeline.datasets import DatasetInfo
from input_pipeline.files import exclusive, writing
from input_pipeline.records import (
    RecordError,
    checked_index,
    decode_dense,
    decode_dense_compact,
    decode_image,
    decode_labels,
    decode_panoptic,
    decode_panoptic_compact,
    make_record,
)

__all__ = [
    "CocoFolderSource",
    "RecordError",
    "TfdsSource",
    "is_prepared",
    "open_source",
    "prepare",
]

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from input_pipeline.builders.coco_folder import FolderSplit
    from input_pipeline.coco_instances import CocoInstanceSource
    from input_pipeline.loader import Source
    from input_pipeline.semantic_folder import SemanticFolderSource

SPLITS = ("train", "validation")

# (map stored in the dense form, compact record wanted) -> decoder of the map.
_DECODERS = {
    (False, False): decode_panoptic,
    (False, True): decode_panoptic_compact,
    (True, False): decode_dense,
    (True, True): decode_dense_compact,
}


class TfdsSource:
    """Reads a prepared dataset (`builders.schema`) through `tfds.data_source`.

    Args:
      builder_dir: the folder with dataset_info.json, or a prepared TFDS builder.
      split: name of a split.

    Attributes:
      info: the class table.
      left_out: why records of the download are not there, a line each.
      max_pixels: the most pixels of an image or map.

    Raises:
      FileNotFoundError: nothing is prepared there.
      ValueError: unknown split, an empty split, or another schema.
    """

    max_pixels = images.MAX_PIXELS

    def __init__(self, builder_dir: str | os.PathLike | tfds.core.DatasetBuilder, split: str):
        from input_pipeline.builders import schema

        self._dir = str(getattr(builder_dir, "data_dir", builder_dir))
        self._split = split
        self._data = None
        if not Path(self._dir, "dataset_info.json").is_file():
            raise FileNotFoundError(
                f"no prepared dataset in {self._dir} (a prepared one has dataset_info.json); call "
                "input_pipeline.sources.prepare first"
            )
        info = self._builder().info
        if "panoptic_image" not in info.features:
            raise ValueError(
                f"{self._dir} holds {info.full_name}, which has no panoptic_image; it was not "
                "prepared by a builder of input_pipeline.builders"
            )
        if split not in list(info.splits):
            raise ValueError(
                f"{self._dir} has no split {split!r}; it has {', '.join(sorted(info.splits))}"
            )
        self._length = int(info.splits[split].num_examples)
        if not self._length:
            raise ValueError(f"split {split!r} of {self._dir} is empty")
        self._dense = schema.is_dense(info.features)
        self.info = schema.info_from_metadata(info.metadata)
        self.left_out = tuple(info.metadata.get("left_out", {}).get(split, ()))
        facts = info.metadata["records"][split]
        self._sizes = np.array([facts["height"], facts["width"]], np.int32).T
        self._has_things = np.array(facts["has_things"], bool)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"TfdsSource({self._dir!r}, {self._split!r}, {len(self)} records)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_data": None}  # open files stay in their process

    def _builder(self) -> tfds.core.DatasetBuilder:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self._dir)

    def _open(self):
        if self._data is None:
            from input_pipeline.builders import schema

            builder = self._builder()
            self._data = builder.as_data_source(
                split=self._split, decoders=schema.skip_decoding(builder.info.features)
            )
        return self._data

    def has_things(self, index: int) -> bool:
        """Whether image `index` has a segment of a thing that is no crowd; reads no image."""
        return bool(self._has_things[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`; reads no image."""
        height, width = self._sizes[index].tolist()
        return height, width

    def __getitem__(self, index: int) -> dict:
        """Record `index`, in the order in which it was written.

        Raises:
          RecordError: the record is broken.
          IndexError: no such index.
        """
        return self._record(index, compact=False)

    def compact(self, index: int) -> dict:
        """As `source[index]`, but a compact record (see `records`)."""
        return self._record(index, compact=True)

    def _record(self, index: int, *, compact: bool) -> dict:
        from input_pipeline.builders import schema

        index = checked_index(index, len(self))
        example = self._open()[index]
        image_id, file_name = example["image/id"].decode(), example["image/filename"].decode()
        where = f"{self._dir}, {self._split} record {index} ({file_name})"
        segments = schema.segment_table(example[schema.OBJECTS])
        segments.check(self.info.num_classes, where)
        decode = _DECODERS[self._dense, compact]
        record = make_record(
            decode_image(example["image"], where, self.max_pixels),
            decode(example["panoptic_image"], segments, where, self.max_pixels),
            segments.numbered() if compact else segments,
            image_id=image_id,
            file_name=file_name,
            where=where,
        )
        if schema.SEMANTIC in example and not compact:
            semantic = decode_labels(example[schema.SEMANTIC], where, self.max_pixels)
            record["semantic"] = semantic.astype(np.int32) - 1  # 0 becomes VOID
        return record


def is_prepared(builder_dir: str | os.PathLike) -> bool:
    """Whether a prepared dataset is complete: its description and every shard that it names."""
    import tensorflow_datasets as tfds

    if not Path(builder_dir, "dataset_info.json").is_file():
        return False
    splits = tfds.builder_from_directory(str(builder_dir)).info.splits.values()
    return all(Path(path).is_file() for split in splits for path in split.filepaths)


def prepare(builder: tfds.core.DatasetBuilder) -> Path:
    """Writes the records of a builder as ArrayRecord files unless they are there already.

    The files appear under their final name when they are complete. What an interrupted run left
    behind, or a folder that lacks shards, does not count as prepared and is written anew. Needs
    neither TensorFlow nor a network.

    Args:
      builder: a builder of `input_pipeline.builders`.

    Returns:
      The folder of the prepared files, for `TfdsSource`.

    Raises:
      OSError: the files cannot be written, e.g. because the disk is full.
    """
    import tensorflow_datasets as tfds

    target = Path(builder.data_dir)
    if is_prepared(target):  # needs no lock, so a read-only folder will do
        return target
    with exclusive(target.parent):
        if is_prepared(target):  # by the process that had the lock
            return target
        for leftover in (*target.parent.glob("incomplete.*"), target):
            if leftover.exists():
                logging.warning("removing the incomplete preparation %s", leftover)
                shutil.rmtree(leftover)
        builder = copy.copy(builder)  # built anew, so that it remembers nothing of the leftovers
        with writing(target.parent, RuntimeError):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format="array_record",
            )
    return target


_SYNTHETIC_OPTIONS = {"size": 128, "train_examples": 4000, "validation_examples": 200, "seed": 0}
_COCO_FOLDER_OPTIONS = {
    "root": "",
    "train_images": "images",
    "train_panoptic": "panoptic",
    "train_json": "panoptic_train.json",
    "validation_images": "images",
    "validation_panoptic": "panoptic",
    "validation_json": "panoptic_val.json",
    "table": "",
    "name": "",
    "prepare": True,
    "skip_broken": False,
}
_COCO_INSTANCES_OPTIONS = {
    "root": "",
    "train_images": "images",
    "train_json": "instances_train.json",
    "validation_images": "images",
    "validation_json": "instances_val.json",
    "table": "",
}
_SEMANTIC_FOLDER_OPTIONS = {
    "root": "",
    "train_images": "images/train",
    "train_labels": "labels/train",
    "validation_images": "images/validation",
    "validation_labels": "labels/validation",
    "classes": "classes.txt",
    "ignore_label": (255,),
    "label_suffix": ".png",
    "table": "",
}
# Options of every source with their defaults; see `open_source`.
OPTIONS = {
    "synthetic": _SYNTHETIC_OPTIONS,
    "coco_folder": _COCO_FOLDER_OPTIONS,
    "coco_instances": _COCO_INSTANCES_OPTIONS,
    "semantic_folder": _SEMANTIC_FOLDER_OPTIONS,
    "coco": {"skip_broken": False},
    "ade20k": {"skip_broken": False},
    "cityscapes": {"skip_broken": False},
    "mapillary": {"skip_broken": False},
}


def open_source(
    name: str,
    *,
    data_dir: str | os.PathLike,
    split: str,
    options: Mapping | None = None,
    max_pixels: int = images.MAX_PIXELS,
) -> tuple[Source, DatasetInfo]:
    """Opens a dataset by name; "synthetic" and "coco_folder" are prepared first if need be.

    Options of "synthetic" (defaults in parentheses):
      size (128): height and width of a scene in pixels.
      train_examples (4000), validation_examples (200): number of scenes.
      seed (0): another seed renders other scenes.

    Options of "coco_folder":
      root (data_dir): folder of the dataset; the paths below are relative to it, or absolute.
      train_images (images), train_panoptic (panoptic): folders of the training split.
      train_json (panoptic_train.json): its JSON, which also defines the classes of all splits.
      validation_images (images), validation_panoptic (panoptic),
        validation_json (panoptic_val.json): the same for validation; an empty validation_json
        means that there is no such split.
      table (empty): name of a table of `datasets.dataset_info` whose classes and colours to use
        instead of the JSON's own, e.g. "coco" for weights trained on COCO.
      name (name of the root folder): keeps prepared datasets apart in `data_dir`.
      prepare (True): write TFDS records into `data_dir` once and read those; False reads the folder
        itself.
      skip_broken (False): leave broken records out of the preparation instead of failing. Without
        preparation a broken record raises RecordError when it is read.

    Options of "coco", "ade20k", "cityscapes" and "mapillary", which `main.py --mode=prepare` has
    written into `data_dir` (see `builders.preparation`):
      skip_broken (False): accept a preparation that left records out.

    Options of "coco_instances" (records: see `coco_instances.CocoInstanceSource`):
      root (data_dir): as above.
      train_images (images), train_json (instances_train.json), validation_images (images),
        validation_json (instances_val.json): as above, with instance JSON files.
      table (empty): as above.

    Options of "semantic_folder" (records: see `semantic_folder.SemanticFolderSource`):
      root (data_dir): as above.
      train_images (images/train), train_labels (labels/train), validation_images
        (images/validation), validation_labels (labels/validation): folders of images and maps; with
        empty validation_images there is no such split.
      classes (classes.txt): text file of the classes, VALUE NAME a line.
      ignore_label ((255,)): the values of unlabelled pixels, or one; -1: there are none.
      label_suffix (.png): end of a map's name in the place of the image's ".jpg".
      table (empty): name of a table to use instead of `classes`; its own ids are the pixel values.

    Args:
      name: a key of OPTIONS.
      data_dir: local or mounted folder where prepared files are written and looked for.
      split: "train" or "validation".
      options: see above.
      max_pixels: the most pixels that an image or a map may have; larger ones are broken records.

    Returns:
      The source and the class table of the dataset.

    Raises:
      ValueError: unknown name, split or option, or bad data.
      FileNotFoundError: missing folders or files.
    """
    if name not in OPTIONS:
        raise ValueError(f"unknown dataset source {name!r}{_nearest(name, OPTIONS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}{_nearest(split, SPLITS)}")
    options = dict(options or {})
    for key in options:
        if key not in OPTIONS[name]:
            raise ValueError(f"unknown option {key!r} of {name}{_nearest(key, OPTIONS[name])}")
    options = {**OPTIONS[name], **options}
    data_dir = Path(data_dir).expanduser()
    if name == "synthetic":
        source = _open_synthetic(data_dir, split, options)
    elif name == "coco_folder":
        source = _open_coco_folder(data_dir, split, options)
    elif name == "coco_instances":
        source = _open_coco_instances(data_dir, split, options)
    elif name == "semantic_folder":
        source = _open_semantic_folder(data_dir, split, options)
    else:
        source = _open_official(name, data_dir, split, options)
    source.max_pixels = max_pixels
    return source, source.info


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} known are {', '.join(known)}"


def _open_synthetic(data_dir: str | os.PathLike, split: str, options: dict) -> TfdsSource:
    from input_pipeline.builders.synthetic import SyntheticConfig, SyntheticPanoptic

    builder = SyntheticPanoptic(config=SyntheticConfig(**options), data_dir=data_dir)
    return TfdsSource(prepare(builder), split)


def _open_official(name: str, data_dir: Path, split: str, options: dict) -> TfdsSource:
    from input_pipeline.builders.preparation import builder_class

    builder = builder_class(name)
    command = f"python main.py --mode=prepare --dataset={name} --source=DIR --data_dir={data_dir}"
    folder = data_dir / builder.name / str(builder.VERSION)
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"{name} is not prepared in dataset.data_dir ({folder} has no dataset_info.json). "
            f"Prepare it from the download in DIR with\n  {command}"
        )
    if not is_prepared(folder):
        raise FileNotFoundError(
            f"{folder} has lost some of its files; the same command as before writes them again:"
            f"\n  {command}"
        )
    source = TfdsSource(folder, split)
    if source.left_out and not options["skip_broken"]:
        raise ValueError(
            f"{folder} was prepared without all of its {split} records: {source.left_out[0]}.\nSet "
            "skip_broken to use it as it is, or repair the download and prepare it again:\n  "
            f"{command}"
        )
    return source


def _open_coco_folder(
    data_dir: str | os.PathLike, split: str, options: dict
) -> TfdsSource | CocoFolderSource:
    from input_pipeline.builders.coco_folder import CocoFolder, CocoFolderConfig, FolderSplit

    root = Path(options["root"] or data_dir).expanduser()
    folders = {
        key: FolderSplit(
            images_dir=str(root / options[f"{key}_images"]),
            panoptic_dir=str(root / options[f"{key}_panoptic"]),
            json_path=str(root / options[f"{key}_json"]),
        )
        for key in SPLITS
        if options[f"{key}_json"]
    }
    if split not in folders:
        raise ValueError(f"{root} has no {split} split: the option {split}_json is empty")
    name, table = options["name"] or root.resolve().name, options["table"]
    if options["prepare"]:
        done = Path(data_dir, CocoFolder.name, name, str(CocoFolder.VERSION))
        if not is_prepared(done):
            config = CocoFolderConfig(
                name=name,
                splits=folders,
                info=_coco_folder_info(name, table, folders),
                skip_broken=options["skip_broken"],
            )
            done = prepare(CocoFolder(config=config, data_dir=data_dir))
        _check_fresh(done, folders[split], split, options)
        return TfdsSource(done, split)
    folder = folders[split]
    return CocoFolderSource(
        folder.images_dir,
        folder.panoptic_dir,
        folder.json_path,
        _coco_folder_info(name, table, folders),
    )


def _open_coco_instances(data_dir: Path, split: str, options: dict) -> CocoInstanceSource:
    from input_pipeline.coco_instances import (
        CocoInstanceSource,
        instance_info,
        load_instance_json,
    )

    root = Path(options["root"] or data_dir).expanduser()
    files = {key: root / options[f"{key}_json"] for key in SPLITS if options[f"{key}_json"]}
    if split not in files:
        raise ValueError(f"{root} has no {split} split: the option {split}_json is empty")
    if options["table"]:
        info = datasets.dataset_info(options["table"])
    else:  # those of the training split, if there is one
        content = load_instance_json(next(iter(files.values())))
        info = instance_info(root.resolve().name, content["categories"])
    return CocoInstanceSource(root / options[f"{split}_images"], files[split], info)


def _open_semantic_folder(data_dir: Path, split: str, options: dict) -> SemanticFolderSource:
    from input_pipeline.semantic_folder import SemanticFolderSource, read_classes

    root = Path(options["root"] or data_dir).expanduser()
    if not options[f"{split}_images"]:
        raise ValueError(f"{root} has no {split} split: the option {split}_images is empty")
    ignored = options["ignore_label"]
    ignored = (ignored,) if isinstance(ignored, int) else tuple(ignored)
    if options["table"]:
        info, ignored = datasets.dataset_info(options["table"]), None
    else:
        info = read_classes(root / options["classes"], ignored)
    return SemanticFolderSource(
        root / options[f"{split}_images"],
        root / options[f"{split}_labels"],
        info,
        options["label_suffix"],
        ignored,
    )


def _coco_folder_info(name: str, table: str, folders: Mapping[str, FolderSplit]) -> DatasetInfo:
    """The named table, or the categories of the first split's JSON (training, if there is one)."""
    if table:
        return datasets.dataset_info(table)
    first = next(iter(folders.values()))
    return datasets.from_coco_categories(name, load_coco_json(first.json_path)["categories"])


def _check_fresh(done: Path, folder: FolderSplit, split: str, options: Mapping) -> None:
    """Raises ValueError if what was prepared is not what the options describe."""
    import tensorflow_datasets as tfds

    from input_pipeline.builders import schema

    stored = tfds.builder_from_directory(str(done)).info.metadata
    way_out = f"delete {done} to prepare it again, or choose another option name"
    if split not in stored["fingerprints"]:
        raise ValueError(f"{done} was prepared without the {split} split; {way_out}")
    # The original files may be gone (a copy of the prepared ones is enough to train).
    if Path(folder.json_path).is_file() and stored["fingerprints"][split] != folder.fingerprint():
        raise ValueError(
            f"{done} was prepared from other annotations than {folder.json_path} has now; {way_out}"
        )
    if options["table"] and schema.info_from_metadata(stored) != datasets.dataset_info(
        options["table"]
    ):
        raise ValueError(
            f"{done} was not prepared with the class table {options['table']!r}; {way_out}"
        )
    if stored["skipped"] and not options["skip_broken"]:
        raise ValueError(
            f"{done} was prepared without {len(stored['skipped'])} broken record(s), the first: "
            f"{stored['skipped'][0]}\nSet skip_broken to use it as it is, or repair them and "
            "delete the folder"
        )
