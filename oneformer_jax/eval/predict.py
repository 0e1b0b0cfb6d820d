"""Segments single images: arrays through `Segmenter`, files through `predict_files`.

As in the official evaluation, PIL's antialiased bilinear filter resizes the shorter side to the
test size on uint8; then the image is normalised, and padded with zeros on the right and below to a
multiple of 32. There are no sliding windows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax import files
from oneformer_jax.eval.postprocess import PostprocessConfig, segment_batch
from oneformer_jax.eval.predictor import Predictor
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.tta import SemanticScores, TtaConfig, with_mirrored
from oneformer_jax.eval.write import source_of, write_prediction
from oneformer_jax.input_pipeline import images
from oneformer_jax.input_pipeline.images import ImageError
from oneformer_jax.input_pipeline.resize import resize_for_test
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.types import TASK_TOKENS, TASKS, Features, Metadata, task_id

# Deepest stride of the model: inputs are padded to multiples of it.
STRIDE = 32
# Of a folder: images that are read ahead, and results that wait to be written.
AHEAD = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """All predictions of the model for a batch, in float32.

    Attributes:
      class_logits: [B, Q, K+1], the last class is "no object".
      mask_logits: [B, Q, h, w] with h = H/4, w = W/4.
      aux_class_logits: [N-1, B, Q, K+1], the predictions before the final one, first to last.
      aux_mask_logits: [N-1, B, Q, h, w].
    """

    class_logits: jax.Array
    mask_logits: jax.Array
    aux_class_logits: jax.Array
    aux_mask_logits: jax.Array


class Segmenter:
    """A trained model, ready for images.

        segmentation = segmenter(image, task="panoptic")
        by_task = segmenter(image, task="all")  # the image is encoded once

    The first image of a new padded size takes longer: it compiles two programs, and a few per task
    for the results.
    """

    def __init__(
        self,
        config: OneFormerConfig,
        params: Mapping[str, Any],
        stats: Mapping[str, Any],
        metadata: Metadata,
        *,
        postprocess: PostprocessConfig | None = None,
        test_size: tuple[int, int] = (800, 1333),
        tta: TtaConfig | None = None,
        execution: Execution = Execution(),
        mesh: Mesh | None = None,
    ):
        """Copies the parameters to the devices.

        Args:
          config: the architecture.
          params: nested dict of parameters; those of the text branch are ignored.
          stats: nested dict of the modules' other values (batch norm statistics).
          metadata: the K classes.
          postprocess: thresholds; None takes the defaults.
          test_size: shorter side of resized images, and the limit of the longer side, in pixels.
          tta: views of the test-time augmentation; None takes the official ones of `test_size`.
          execution: how the model is run.
          mesh: devices that hold the parameters. Arrays not yet on devices are copied to each.
            `raw` shares a batch among the devices; all compute the same single image. None is the
            default device.

        Raises:
          ValueError: parameters of another model, metadata of other classes, a bad test size.
        """
        short, long = test_size
        if not 0 < short <= long:
            raise ValueError(f"test_size is {test_size}; expected 0 < shorter side <= longer side")
        if metadata.num_classes != config.num_classes:
            raise ValueError(
                f"the model has {config.num_classes} classes, but {metadata.dataset} has "
                f"{metadata.num_classes}: model and metadata do not belong together"
            )
        self.config = config
        self.metadata = metadata
        self.postprocess = postprocess or PostprocessConfig()
        self.test_size = (int(short), int(long))
        self.execution = execution
        self.tta = tta or TtaConfig.from_settings({}, self.test_size[0])
        # The compiler partitions the programs, so axes are in Auto mode, whatever the caller's.
        self.mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)

        graph, *expected = functional.abstract(config, execution, training=False)
        self._params, self._stats = (
            self._on_devices(_matching(values, shapes))
            for values, shapes in zip((params, stats), expected, strict=True)
        )
        programs = functional.programs(graph, self.mesh)
        self._predictor = Predictor(programs, self._params, self._stats, self.mesh)

        # Parameters are arguments, as constants would be compiled into the program.
        @functools.partial(jax.jit, static_argnames="size")
        def outputs(
            params: dict, stats: dict, images: jax.Array, task_tokens: jax.Array, *, size: int
        ) -> Outputs:
            model = (graph, params, stats)
            features = functional.encode(*model, images, mesh=self.mesh)
            predictions = functional.decode(*model, features, task_tokens, mesh=self.mesh)
            classes = predictions.class_logits[:, :size]
            masks = [predictions.mask_logits(n)[:size] for n in range(len(classes))]
            return Outputs(
                class_logits=classes[-1],
                mask_logits=masks[-1],
                aux_class_logits=classes[:-1],
                aux_mask_logits=jnp.stack(masks[:-1]),
            )

        self._outputs = outputs

    @property
    def variables(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The parameters and statistics: nested dicts of arrays on the devices."""
        return self._params, self._stats

    @classmethod
    def from_settings(
        cls,
        config: OneFormerConfig,
        params: Mapping[str, Any],
        stats: Mapping[str, Any],
        metadata: Metadata,
        settings: Mapping[str, Any],
        *,
        execution: Execution = Execution(),
        mesh: Mesh | None = None,
        **overrides: Any,
    ) -> Segmenter:
        """Makes a Segmenter from the `eval` settings of a run; `overrides` replace some of them.

        Args:
          config, params, stats, metadata, execution, mesh: see `Segmenter`.
          settings: `short_edge`, `max_size`, `tta` and fields of `PostprocessConfig`; others are
            ignored.
          **overrides: settings by the same names.

        Raises:
          ValueError: an override with another name.
        """
        fields = [f.name for f in dataclasses.fields(PostprocessConfig)]
        known = ["short_edge", "max_size", "tta", *fields]
        for name in overrides:
            if name in (f.name for f in dataclasses.fields(Execution)):
                raise ValueError(
                    f"{name} is how a model is run: give execution=Execution({name}=...)"
                )
            if name not in known:
                raise ValueError(f"unknown setting {name!r}; use some of {', '.join(known)}")
        settings = {name: settings[name] for name in known if name in settings} | overrides
        short_edge = settings.get("short_edge", 800)
        return cls(
            config,
            params,
            stats,
            metadata,
            postprocess=PostprocessConfig(**{n: settings[n] for n in fields if n in settings}),
            test_size=(short_edge, settings.get("max_size", 1333)),
            tta=TtaConfig.from_settings(settings.get("tta", {}), short_edge),
            execution=execution,
            mesh=mesh,
        )

    def __call__(
        self, image: np.ndarray, task: str | Sequence[str] = "panoptic", *, tta: bool = False
    ) -> Segmentation | dict[str, Segmentation]:
        """Segments one image.

        Args:
          image: uint8 [H, W, 3], RGB.
          task: one of `TASKS`, several of them, or "all". The image is encoded once, and the
            results equal those of single calls.
          tta: semantic task only: average over the views of the test-time augmentation; the
            official ones have 17 times the pixels.

        Returns:
          The segmentation at the size of `image`, which it keeps; for several tasks, or "all", a
          dict of them by task.

        Raises:
          ValueError: unknown task, none, `tta` for another task than semantic, or another kind of
            array.
        """
        tasks = tasks_of(task)
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"image is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] in RGB"
            )
        if tta and tasks != ("semantic",):
            raise ValueError(f"tta is for the semantic task only, not for {task!r}")
        resized = resize_for_test(image, *self.test_size)
        if tta:
            found = {"semantic": self._averaged(image, resized)}
        else:
            view = _padded(resized)
            features = self._encode(view)
            found = {one: self._segment(image, view, features, one) for one in tasks}
        return found[task] if isinstance(task, str) and task != "all" else found

    def _segment(
        self, image: np.ndarray, view: Mapping[str, Any], features: Features, task: str
    ) -> Segmentation:
        (segmentation,) = segment_batch(
            *self._decode(features, task),
            view["image_size"],
            np.array([image.shape[:2]]),
            view["image"].shape[1:3],
            task=task,
            config=self.postprocess,
            metadata=self.metadata,
            images=[image],
        )
        return segmentation

    def _averaged(self, image: np.ndarray, resized: np.ndarray) -> Segmentation:
        """Segments `image` semantically from the views of `resized`."""
        views = (
            _padded(resize_for_test(resized, edge, self.tta.max_size))
            for edge in self.tta.short_edges
        )
        scores = SemanticScores(np.array([image.shape[:2]]), self.metadata)
        for view, flip in with_mirrored(views, self.tta.flip):
            logits = self._decode(self._encode(view), "semantic")
            scores.add(*logits, view["image_size"], view["image"].shape[1:3], flip=flip)
        (segmentation,) = scores.result([image])
        return segmentation

    def _encode(self, view: Mapping[str, Any]) -> Features:
        """Encodes a batch of one image, with a copy of the features on each device."""
        copies = 1 if self.mesh is None else len(self.mesh.local_devices)
        return self._predictor.encode(
            {name: np.repeat(array, copies, axis=0) for name, array in view.items()}
        )

    def _decode(self, features: Features, task: str) -> tuple[jax.Array, jax.Array]:
        """Class and mask logits of one image, on the first device of this process."""
        logits = self._predictor.decode(features, task)
        return tuple(x.addressable_shards[0].data for x in logits)

    def raw(self, images: jax.Array, task_tokens: jax.Array) -> Outputs:
        """Runs the model without post-processing; returns all predictions.

        Args:
          images: float32 [B, H, W, 3], normalised (`models.oneformer.normalize_images`), H and W
            multiples of 32.
          task_tokens: int32 [B, 77], see `task_tokens`.

        Raises:
          ValueError: other shapes or dtypes.
        """
        shape = images.shape
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; expected normalised float32 [B, H, W, 3]")
        if len(shape) != 4 or shape[3] != 3 or shape[1] % STRIDE or shape[2] % STRIDE:
            raise ValueError(
                f"images have shape {list(shape)}; expected [B, H, W, 3] with H and W multiples of "
                f"{STRIDE}"
            )
        expected = (shape[0], TASK_TOKENS.shape[1])
        if task_tokens.shape != expected:
            raise ValueError(f"task_tokens have shape {task_tokens.shape}; expected {expected}")
        arrays = (self._shared(array) for array in (images, task_tokens))
        return self._outputs(self._params, self._stats, *arrays, size=shape[0])

    def task_tokens(self, task: str) -> np.ndarray:
        """Returns token ids of a task, int32 [77]; ValueError for an unknown task."""
        return TASK_TOKENS[task_id(task)]

    def _shared(self, array: Any) -> Any:
        """Shares the rows of an array among the devices; its last row fills them up."""
        if self.mesh is None:
            return array
        fillers = -len(array) % self.mesh.size
        if fillers:
            array = jnp.pad(array, [(0, fillers), *[(0, 0)] * (array.ndim - 1)], mode="edge")
        return jax.device_put(array, NamedSharding(self.mesh, P(self.mesh.axis_names)))

    def _on_devices(self, tree: Any) -> Any:
        """Copies NumPy leaves to the devices; keeps JAX arrays."""
        target = None if self.mesh is None else NamedSharding(self.mesh, P())
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jax.device_put(np.asarray(x), target), tree
        )


def tasks_of(task: str | Sequence[str]) -> tuple[str, ...]:
    """Lists the tasks of "all", one name, or several, each once; ValueError for an unknown one."""
    if task == "all":
        return TASKS
    tasks = tuple(task) if isinstance(task, Sequence) and not isinstance(task, str) else (task,)
    for one in tasks:
        task_id(one)
    if not tasks:
        raise ValueError(f"no task is given; use some of {', '.join(TASKS)}, or 'all'")
    return tuple(dict.fromkeys(tasks))


def _padded(image: np.ndarray) -> dict[str, np.ndarray]:
    """Makes a batch of one image, padded with zeros: `image` uint8 [1, H, W, 3], `image_size`."""
    size = image.shape[:2]
    padded = np.zeros((1, *(-(-side // STRIDE) * STRIDE for side in size), 3), np.uint8)
    padded[0, : size[0], : size[1]] = image
    return {"image": padded, "image_size": np.array([size], np.int32)}


def _matching(values: Any, expected: Any, path: str = "") -> Any:
    """Takes the part of the nested dict `values` that `expected` has, and checks its shapes."""
    if not isinstance(expected, Mapping):
        if np.shape(values) != expected.shape:
            raise ValueError(
                f"parameter {path} has shape {np.shape(values)}, but the model expects "
                f"{expected.shape}: these are parameters of another model"
            )
        return values
    missing = set(expected) - set(values if isinstance(values, Mapping) else ())
    if missing:
        listed = (f"{path}/{name}".lstrip("/") for name in sorted(missing, key=str))
        names = files.first_few(listed, 3)
        raise ValueError(f"the model expects parameters {names}: these are of another model")
    return {
        name: _matching(values[name], inner, f"{path}/{name}".lstrip("/"))
        for name, inner in expected.items()
    }


def read_image(path: str | os.PathLike[str], max_pixels: int = images.MAX_PIXELS) -> np.ndarray:
    """Reads an image file as uint8 [H, W, 3], RGB, upright, as in training (see `images`).

    Raises:
      ImageError: no such file, another format, damaged, or more than `max_pixels`.
    """
    if not os.path.exists(path):
        raise ImageError(f"{path}: there is no such image file")
    return images.decode_image(images.read_file(path), str(path), max_pixels=max_pixels)


def predict_files(
    segmenter: Callable[[np.ndarray, Sequence[str]], dict[str, Segmentation]],
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    task: str = "all",
    max_pixels: int = images.MAX_PIXELS,
) -> list[pathlib.Path]:
    """Segments an image file, or those directly in a folder, and writes the results.

    Reading the next images and writing the last results go on beside the model.

    Args:
      segmenter: a `Segmenter`.
      path: an image file, or a folder for its visible files with `images.ENDINGS`.
      out_dir: folder of the results, made as needed; see `write_prediction`.
      task: one of `TASKS`, or "all".
      max_pixels: limit of the pixels of an image.

    Returns:
      The files written.

    Raises:
      ImageError: images that cannot be read, each named, after all others are done.
      ValueError: unknown task, a folder without images, or results that would land among them.
    """
    tasks = tasks_of(task)
    path, out_dir = pathlib.Path(path), pathlib.Path(out_dir)
    if not path.exists():
        raise ImageError(f"{path}: there is no such image file or folder")
    found = [path]
    if path.is_dir():
        if out_dir.resolve() == path.resolve():
            raise ValueError(f"the results would mix with the images in {path}; use another folder")
        found = [path / name for name in images.list_images(path)]
        if not found:
            raise ValueError(f"{path} has no images (files with {', '.join(images.ENDINGS)})")
    files.remove_leftovers(out_dir)
    names = _result_names(found, out_dir)
    broken: list[str] = []
    writing: collections.deque[futures.Future] = collections.deque()

    def write(
        name: str, file: pathlib.Path, results: dict[str, Segmentation]
    ) -> list[pathlib.Path]:
        return [
            path
            for segmentation in results.values()
            for path in write_prediction(out_dir, name, segmentation, source=file.name)
        ]

    written: list[pathlib.Path] = []
    with (
        futures.ThreadPoolExecutor(1, "reader") as reader,
        futures.ThreadPoolExecutor(1, "writer") as writer,
    ):
        reading = _started_ahead(reader, lambda file: read_image(file, max_pixels), found)
        for number, (file, name, image) in enumerate(zip(found, names, reading, strict=True), 1):
            try:
                results = segmenter(image.result(), tasks)
            except ImageError as error:
                logging.error("%s", error)
                broken.append(str(error))
                continue
            writing.append(writer.submit(write, name, file, results))
            while len(writing) > AHEAD:
                written += writing.popleft().result()
            logging.info("[%d/%d] %s: %s", number, len(found), file, ", ".join(tasks))
        for files_of_image in writing:
            written += files_of_image.result()
    if len(broken) == len(found) == 1:
        raise ImageError(broken[0])
    if broken:
        listing = "\n  ".join(broken)
        raise ImageError(
            f"{len(broken)} of {len(found)} images could not be read, the others are done and in "
            f"{out_dir}:\n  {listing}"
        )
    return written


def _started_ahead(
    pool: futures.Executor, function: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[futures.Future]:
    """Yields the future of each item, in order; those of the next `AHEAD` are started by then."""
    started: collections.deque[futures.Future] = collections.deque()
    for item in items:
        started.append(pool.submit(function, item))
        if len(started) > AHEAD:
            yield started.popleft()
    yield from started


def _result_names(found: Sequence[pathlib.Path], out_dir: pathlib.Path) -> list[str]:
    """Names the results of files, distinctly even if case does not count.

    A name is the file's stem. If another file's results in the folder have it, of this run or an
    earlier one, it is the file's name with "_" for ".", then with a digest.
    """
    stems = collections.Counter(file.stem.casefold() for file in found)
    names: list[str] = []
    taken: set[str] = set()
    for file in found:
        whole = file.name.replace(".", "_")
        name = next(
            (
                name
                for name in (file.stem, whole)
                if stems[name.casefold()] == (name == file.stem)
                and name.casefold() not in taken
                and source_of(out_dir, name) in (file.name, None)
            ),
            f"{whole}_{hashlib.sha256(file.name.encode()).hexdigest()[:8]}",
        )
        names.append(name)
        taken.add(name.casefold())
    return names
