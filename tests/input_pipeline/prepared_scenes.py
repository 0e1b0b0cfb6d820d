"""A small prepared dataset, and ways to change its description and records."""

import json
import pathlib
import shutil

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from oneformer_jax.input_pipeline import sources

COUNT = 6  # training records, in one file
OPTIONS = {"size": 48, "train_examples": COUNT, "validation_examples": 2}


def make(folder) -> pathlib.Path:
    """Prepares the dataset below `folder`; returns the folder of its files."""
    source, _ = sources.open_source("synthetic", data_dir=folder, split="train", options=OPTIONS)
    return pathlib.Path(source._dir)


def copy(original: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copies the dataset so that `open_source` finds it in `target`; returns its folder."""
    folder = target / original.relative_to(original.parents[2])
    shutil.copytree(original, folder)
    return folder


def train_file(folder: pathlib.Path) -> pathlib.Path:
    (path,) = folder.glob("*-train.array_record*")
    return path


def read_records(path) -> list[bytes]:
    reader = ArrayRecordReader(str(path))
    return reader.read(range(reader.num_records()))


def write_records(path, records) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def edit(folder: pathlib.Path, name: str, change) -> None:
    """Lets `change(content)` change the content of a JSON file."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
