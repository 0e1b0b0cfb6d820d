"""Random-access sources of records, opened by name: prepared TFDS datasets and folders.

`source[i]` is a record (see `records`), `len(source)` the number of records. Loader workers may
share a source: it can be pickled, and opens its files in the process that uses it.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from oneformer_jax import remote, rules
from oneformer_jax.files import did_you_mean
from oneformer_jax.input_pipeline import datasets, images, prepared
from oneformer_jax.input_pipeline.annotations.faults import check_annotations
from oneformer_jax.input_pipeline.array_records import TfdsSource
from oneformer_jax.input_pipeline.coco_format import CocoFolderSource, coco_folder_info
from oneformer_jax.input_pipeline.datasets import DatasetInfo
from oneformer_jax.input_pipeline.files import exclusive, writing
from oneformer_jax.input_pipeline.records import RecordError
from oneformer_jax.input_pipeline.sides import Side, SideSource

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

    from oneformer_jax.input_pipeline.builders.coco_folder import FolderSplit
    from oneformer_jax.input_pipeline.coco_instances import CocoInstanceSource
    from oneformer_jax.input_pipeline.loader import Source
    from oneformer_jax.input_pipeline.semantic_folder import SemanticFolderSource

SPLITS = ("train", "validation")


def is_prepared(builder_dir: str | os.PathLike) -> bool:
    """Tells whether a prepared dataset has all files; ValueError for a damaged description."""
    try:
        splits = prepared.read(builder_dir).splits.values()
    except FileNotFoundError:
        return False
    return not any(split.missing() for split in splits)


def prepare(builder: tfds.core.DatasetBuilder) -> Path:
    """Writes the records of a builder as ArrayRecord files, unless that is done already.

    Complete files alone get their final name. The remains of an interrupted run, or a folder that
    lacks shards, are written anew. Needs neither TensorFlow nor a network.

    Args:
      builder: a builder of `oneformer_jax.input_pipeline.builders`.

    Returns:
      The folder of the prepared files, for `TfdsSource`.

    Raises:
      OSError: the files cannot be written, e.g. because the disk is full.
    """
    import tensorflow_datasets as tfds

    target = Path(builder.data_dir)
    if is_prepared(target):  # asked without the lock, so a read-only folder suffices
        return target
    with exclusive(target.parent):
        if is_prepared(target):  # by the process that held the lock
            return target
        for leftover in (*target.parent.glob("incomplete.*"), target):
            if leftover.exists():
                logging.warning("removing the incomplete preparation %s", leftover)
                shutil.rmtree(leftover)
        builder = copy.copy(builder)  # the copy has not read the leftovers
        with writing(target.parent, RuntimeError):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                file_format="array_record",
            )
    return target


_SYNTHETIC_OPTIONS = {"size": 128, "train_examples": 4000, "validation_examples": 200, "seed": 0}
# Options of the sources that can make both splits from one folder.
_SIDES_OPTIONS = {"validation_share": 0.0, "split_seed": 0}
# Options that are neither flags nor texts; `builders.synthetic` checks its own.
_RULES = {
    "validation_share": rules.Number(0, 1, below=True, note=" (0 is off)"),
    "split_seed": rules.Integer(0, 2**32 - 1),
    "ignore_label": rules.Tuple(rules.Integer(-1, 65_535), 0, 65_536),
    "name": rules.Matching(
        "the name of a folder",
        empty=True,
        length=200,
        test=lambda name: Path(name).name == name != "..",
    ),
}
_TEXT_RULE = rules.Line("a path or a name", empty=True)
_COCO_FOLDER_OPTIONS = _SIDES_OPTIONS | {
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
_COCO_INSTANCES_OPTIONS = _SIDES_OPTIONS | {
    "root": "",
    "train_images": "images",
    "train_json": "instances_train.json",
    "validation_images": "images",
    "validation_json": "instances_val.json",
    "table": "",
    "crowd_as_instances": False,
    "skip_broken": False,
}
_SEMANTIC_FOLDER_OPTIONS = _SIDES_OPTIONS | {
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
    for_inspection: bool = False,
    max_pixels: int = images.MAX_PIXELS,
) -> tuple[Source, DatasetInfo]:
    """Opens a dataset by name; prepares "synthetic" and "coco_folder" first if necessary.

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
        means no such split.
      table (empty): name of a table of `datasets.dataset_info` to use instead of the JSON's own
        classes and colours, e.g. "coco" for weights trained on COCO.
      name (name of the root folder): keeps prepared datasets apart in `data_dir`.
      prepare (True): write TFDS records into `data_dir` once and read those; False reads the folder
        itself.
      skip_broken (False): leave broken records out of the preparation instead of failing, and treat
        segments with faults in the JSON as void, also without preparation.

    Options of "coco_folder", "coco_instances" and "semantic_folder":
      validation_share (0): share of the training images that are for validation instead, in place
        of validation files; chosen by a hash of each image's file name.
      split_seed (0): another seed chooses other images.

    Options of "coco", "ade20k", "cityscapes" and "mapillary", which `main.py --mode=prepare` writes
    into `data_dir` (see `builders.preparation`):
      skip_broken (False): accept a preparation that left records out.

    Options of "coco_instances" (records: see `coco_instances.CocoInstanceSource`):
      root (data_dir): as above.
      train_images (images), train_json (instances_train.json), validation_images (images),
        validation_json (instances_val.json): as above, with instance JSON files.
      table (empty): as above.
      crowd_as_instances (False): treat annotations with iscrowd 1 as instances; for tools that
        write 1 for every mask.
      skip_broken (False): leave out annotations with faults.

    Options of "semantic_folder" (records: see `semantic_folder.SemanticFolderSource`):
      root (data_dir): as above.
      train_images (images/train), train_labels (labels/train), validation_images
        (images/validation), validation_labels (labels/validation): folders of images and maps; an
        empty validation_images means no such split.
      classes (classes.txt): text file of the classes, VALUE NAME a line.
      ignore_label ((255,)): the values of unlabelled pixels, or one; -1 for none.
      label_suffix (.png): end of a map's name, in place of the image's ".jpg".
      table (empty): name of a table to use instead of `classes`; its own ids are the pixel values.

    Args:
      name: a key of OPTIONS.
      data_dir: folder of the prepared files; gs://BUCKET/FOLDER if they are prepared already.
      split: "train" or "validation".
      options: see above.
      for_inspection: leave out annotations with faults, whatever skip_broken is, and log nothing;
        the `faults` of the source list them.
      max_pixels: limit of the pixels of an image or map; larger ones are broken records.

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
    options = _checked(name, {**OPTIONS[name], **options})
    if for_inspection and (name == "coco_instances" or not options.get("prepare", True)):
        options["skip_broken"] = True
    data_dir = remote.path_of(data_dir).expanduser()
    _check_bucket(name, data_dir, options)
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
    if not for_inspection:
        check_annotations(source, options.get("skip_broken", False))
    source.max_pixels = max_pixels
    return source, source.info


def _checked(name: str, options: Mapping) -> dict:
    """Checks the options; gives paths as texts, and a single ignored label as a tuple."""
    checked = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    ignored = checked.get("ignore_label")
    if isinstance(ignored, int):
        checked["ignore_label"] = (ignored,)
    kinds = {bool: rules.Flag(), str: _TEXT_RULE}
    found = {key: _RULES.get(key, kinds.get(type(value))) for key, value in OPTIONS[name].items()}
    rules.require("dataset.options.", checked, {key: rule for key, rule in found.items() if rule})
    return checked


def _check_bucket(name: str, data_dir: Path, options: Mapping) -> None:
    """Raises ValueError for what cannot be read from a bucket: everything but prepared records."""
    root = options.get("root") or data_dir
    as_it_is = name in ("coco_instances", "semantic_folder") or not options.get("prepare", True)
    if as_it_is and remote.is_remote(root):
        raise ValueError(
            f"{name} reads its own files, which cannot be in a bucket ({root}); give it a folder, "
            "such as a mounted bucket"
        )
    if not as_it_is and os.fspath(data_dir).startswith("s3:"):
        raise ValueError(
            f"dataset.data_dir={data_dir}: ArrayRecord reads gs:// only; use that, or a folder, "
            "such as a mounted bucket"
        )


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{did_you_mean(word, known)}; known are {', '.join(known)}"


def _open_synthetic(data_dir: str | os.PathLike, split: str, options: dict) -> TfdsSource:
    from oneformer_jax.input_pipeline.builders.synthetic import SyntheticConfig, SyntheticPanoptic

    config = SyntheticConfig(**options)
    folder = prepared.folder_of(SyntheticPanoptic, data_dir, config.name)
    if not remote.is_remote(folder) and not is_prepared(folder):
        prepare(SyntheticPanoptic(config=config, data_dir=data_dir))
    return TfdsSource(folder, split)


def _open_official(name: str, data_dir: Path, split: str, options: dict) -> TfdsSource:
    from oneformer_jax.input_pipeline.builders.preparation import builder_class

    builder = builder_class(name)
    command = f"python main.py --mode=prepare --dataset={name} --source=DIR --data_dir="
    command += (
        f"FOLDER\nand copy FOLDER to {data_dir}" if remote.is_remote(data_dir) else str(data_dir)
    )
    remote.check(data_dir)
    folder = prepared.folder_of(builder, data_dir)
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"{name} is not prepared in dataset.data_dir ({folder} has no dataset_info.json). "
            f"Prepare it from the download in DIR with\n  {command}"
        )
    if not is_prepared(folder):
        raise FileNotFoundError(
            f"{folder} has lost some of its files; write them again with the same command as "
            f"before:\n  {command}"
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
) -> TfdsSource | CocoFolderSource | SideSource:
    from oneformer_jax.input_pipeline.builders.coco_folder import (
        CocoFolder,
        CocoFolderConfig,
        FolderSplit,
    )

    root = Path(options["root"] or data_dir).expanduser()
    options, sides = _sides(root, options, _COCO_FOLDER_OPTIONS)
    folders = {
        key: FolderSplit(
            images_dir=str(root / options[f"{key}_images"]),
            panoptic_dir=str(root / options[f"{key}_panoptic"]),
            json_path=str(root / options[f"{key}_json"]),
            side=sides.get(key),
        )
        for key in SPLITS
        if options[f"{key}_json"]
    }
    if split not in folders:
        raise ValueError(f"{root} has no {split} split: the option {split}_json is empty")
    name, table = options["name"] or root.resolve().name, options["table"]
    if options["prepare"]:
        done = prepared.folder_of(CocoFolder, data_dir, name)
        if not remote.is_remote(done) and not is_prepared(done):
            config = CocoFolderConfig(
                name=name,
                splits=folders,
                info=_coco_folder_info(name, table, folders),
                skip_broken=options["skip_broken"],
            )
            prepare(CocoFolder(config=config, data_dir=data_dir))
        _check_fresh(done, folders[split], split, options)
        return TfdsSource(done, split)
    info = _coco_folder_info(name, table, folders)
    return folders[split].open(info, skip_broken=options["skip_broken"])


def _open_coco_instances(
    data_dir: Path, split: str, options: dict
) -> CocoInstanceSource | SideSource:
    from oneformer_jax.input_pipeline.coco_instances import CocoInstanceSource, instance_file_info

    root = Path(options["root"] or data_dir).expanduser()
    options, sides = _sides(root, options, _COCO_INSTANCES_OPTIONS)
    files = {key: root / options[f"{key}_json"] for key in SPLITS if options[f"{key}_json"]}
    if split not in files:
        raise ValueError(f"{root} has no {split} split: the option {split}_json is empty")
    if options["table"]:
        info = datasets.dataset_info(options["table"])
    else:  # those of the training split, if there is one
        info = instance_file_info(root.resolve().name, next(iter(files.values())))
    choices = {key: options[key] for key in ("skip_broken", "crowd_as_instances")}
    source = CocoInstanceSource(root / options[f"{split}_images"], files[split], info, **choices)
    return sides[split].of(source) if sides else source


def _open_semantic_folder(
    data_dir: Path, split: str, options: dict
) -> SemanticFolderSource | SideSource:
    from oneformer_jax.input_pipeline.semantic_folder import SemanticFolderSource, read_classes

    root = Path(options["root"] or data_dir).expanduser()
    options, sides = _sides(root, options, _SEMANTIC_FOLDER_OPTIONS)
    if not options[f"{split}_images"]:
        raise ValueError(f"{root} has no {split} split: the option {split}_images is empty")
    ignored = options["ignore_label"]
    if options["table"]:
        info, ignored = datasets.dataset_info(options["table"]), None
    else:
        info = read_classes(root / options["classes"], ignored)
    source = SemanticFolderSource(
        root / options[f"{split}_images"],
        root / options[f"{split}_labels"],
        info,
        options["label_suffix"],
        ignored,
    )
    return sides[split].of(source) if sides else source


def _sides(root: Path, options: Mapping, defaults: Mapping) -> tuple[dict, dict[str, Side]]:
    """Returns the options of both splits, and the part of the training files that each has.

    Args:
      root: folder of the dataset.
      options: all of them.
      defaults: a default that names nothing that exists is no choice of the user.

    Returns:
      (options, sides); without validation_share the options as they are, and no sides.

    Raises:
      ValueError: options of a validation split beside the share.
    """
    share = options["validation_share"]
    if not share:
        return dict(options), {}
    made = dict(options)
    listing = "json" if "train_json" in options else "images"  # it alone may be a default
    for key in options:
        kind = key.removeprefix("validation_")
        if kind == key or f"train_{kind}" not in options:
            continue
        value, made[key] = options[key], options[f"train_{kind}"]
        if value in ("", made[key]):
            continue
        there = kind == listing and (root / value).exists()
        if there or value != defaults[key]:
            raise ValueError(
                f"dataset.options.validation_share={share:g} takes the validation images from the "
                f"training files, but {key}={value} names others{f' in {root}' if there else ''}; "
                f"set validation_share=0 to use them, or {key}= (empty)"
            )
    return made, {split: Side(split, share, options["split_seed"]) for split in SPLITS}


def _coco_folder_info(name: str, table: str, folders: Mapping[str, FolderSplit]) -> DatasetInfo:
    """The named table, or the categories of the first split's JSON (training, if present)."""
    if table:
        return datasets.dataset_info(table)
    first = next(iter(folders.values()))
    return coco_folder_info(name, first.json_path)


def _check_fresh(done: Path, folder: FolderSplit, split: str, options: Mapping) -> None:
    """Raises ValueError if the prepared dataset is not the one that the options describe."""
    stored = prepared.read(done)
    way_out = f"delete {done} to prepare it again, or choose another option name"
    if split not in stored.fingerprints:
        raise ValueError(f"{done} was prepared without the {split} split; {way_out}")
    fingerprint, _, side = stored.fingerprints[split].partition(" ")
    if side != str(folder.side or ""):
        raise ValueError(
            f"{done} was prepared with {side or 'validation_share=0'}, but the options are "
            f"{folder.side or 'validation_share=0'}; {way_out}"
        )
    # The original files may be gone: training needs the prepared ones alone.
    if Path(folder.json_path).is_file() and fingerprint != folder.fingerprint():
        raise ValueError(
            f"{done} was prepared from other annotations than {folder.json_path} has now; {way_out}"
        )
    if options["table"] and stored.info != datasets.dataset_info(options["table"]):
        raise ValueError(
            f"{done} was not prepared with the class table {options['table']!r}; {way_out}"
        )
    if stored.skipped and not options["skip_broken"]:
        raise ValueError(
            f"{done} was prepared without {len(stored.skipped)} broken record(s), the first: "
            f"{stored.skipped[0]}\nSet skip_broken to use it as it is, or repair them and "
            "delete the folder"
        )
