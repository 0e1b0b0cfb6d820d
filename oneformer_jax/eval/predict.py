"""Segments images with a trained model: `Segmenter`.

As in the official evaluation, PIL's antialiased bilinear filter resizes the shorter side to the
test size on uint8; then the image is normalised, and padded with zeros on the right and below to a
multiple of 32. There are no sliding windows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax import config_rules
from oneformer_jax.eval.inputs import as_image
from oneformer_jax.eval.postprocess import PostprocessConfig, segment_images
from oneformer_jax.eval.prediction import Prediction, ranked, with_threshold
from oneformer_jax.eval.predictor import Predictor, matching, real_sizes
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.eval.tta import SemanticScores, TtaConfig, with_mirrored
from oneformer_jax.input_pipeline.resize import resize_for_test
from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution, Kernels, chooser
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.rules import Fields, require, require_names
from oneformer_jax.types import TASK_TOKENS, TASKS, Features, Metadata, task_id

if TYPE_CHECKING:
    from oneformer_jax.input_pipeline.eval_loader import Source

# Deepest stride of the model: inputs are padded to multiples of it.
STRIDE = 32
# Fields of an `Execution` that act in prediction.
_HOW = ("dtype", "scan_layers", "kernels")
# Settings that have fields of their own.
_GROUPS = {
    "tta": Fields("oneformer_jax.eval.tta.TtaConfig.from_settings"),
    "kernels": Fields("oneformer_jax.models.execution.Kernels"),
}


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
        several = segmenter(["a.jpg", "b.png"], threshold=0.5)

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
        bucket_multiple: int = STRIDE,
        max_buckets: int = 0,
        batch_size: int = 1,
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
          bucket_multiple: images are padded to multiples of this multiple of 32, the official one.
            Larger ones need fewer programs, but the model sees the padding.
          max_buckets: of several images, the most padded sizes; 0 is no limit. Rare sizes join
            larger ones.
          batch_size: of several images, the most that run together, each then up to rounding as it
            does alone; rounded up to a multiple of the mesh's devices.
          execution: how the model is run.
          mesh: devices that hold the parameters. Arrays not yet on devices are copied to each.
            `raw` shares a batch among the devices; all compute the same single image. None is the
            default device.

        Raises:
          ValueError: parameters of another model, metadata of other classes, a bad setting.
        """
        short, long = test_size
        if not 0 < short <= long:
            raise ValueError(f"test_size is {test_size}; expected 0 < shorter side <= longer side")
        if metadata.num_classes != config.num_classes:
            raise ValueError(
                f"the model has {config.num_classes} classes, but {metadata.dataset} has "
                f"{metadata.num_classes}: model and metadata do not belong together"
            )
        self.test_size = (int(short), int(long))
        config_rules.require(
            {
                "eval.short_edge": self.test_size[0],
                "eval.max_size": self.test_size[1],
                "eval.bucket_multiple": bucket_multiple,
                "eval.max_buckets": max_buckets,
                "eval.batch_size": batch_size,
            }
        )
        self.bucket_multiple, self.max_buckets = bucket_multiple, max_buckets
        self.batch_size = batch_size
        self.config = config
        self.metadata = metadata
        self.postprocess = postprocess or PostprocessConfig()
        self.execution = execution
        self.tta = tta or TtaConfig.from_settings({}, self.test_size[0])
        # The compiler partitions the programs, so axes are in Auto mode, whatever the caller's.
        self.mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)

        graph, *expected = functional.abstract(config, execution, training=False)
        self._params, self._stats = (
            self._on_devices(matching(values, shapes))
            for values, shapes in zip((params, stats), expected, strict=True)
        )
        choose_kernels = chooser(execution.kernels, self.mesh, log=logging.info)
        programs = functional.programs(graph, self.mesh, prepare=choose_kernels)
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
          settings: `short_edge`, `max_size`, `tta`, `bucket_multiple`, `max_buckets`,
            `batch_size` (on a CPU only as an override) and fields of `PostprocessConfig`; others
            are ignored.
          **overrides: settings by the same names, and `dtype`, `scan_layers` and `kernels` in place
            of those of `execution`. Of `tta` and `kernels` a dict of the fields that change.

        Raises:
          ValueError: an override with another name.
        """
        fields = [f.name for f in dataclasses.fields(PostprocessConfig)]
        plain = ["bucket_multiple", "max_buckets", "batch_size"]
        known = ["short_edge", "max_size", "tta", *plain, *fields]
        for name in overrides:
            if name not in (*known, *_HOW):
                listed = ", ".join((*known, *_HOW))
                raise ValueError(f"unknown setting {name!r}; use some of {listed}")
        require("", overrides, {n: rule for n, rule in _GROUPS.items() if n in overrides})
        if "kernels" in overrides:
            require_names("kernels", overrides["kernels"], tuple(vars(Kernels())), ())
            overrides["kernels"] = dataclasses.replace(execution.kernels, **overrides["kernels"])
        how = {name: overrides.pop(name) for name in _HOW if name in overrides}
        settings = {name: settings[name] for name in known if name in settings}
        if jax.default_backend() == "cpu":  # batches take memory there, and save no time
            settings.pop("batch_size", None)
        views = {**settings.get("tta", {}), **overrides.get("tta", {})}
        settings |= overrides
        short_edge = settings.get("short_edge", 800)
        return cls(
            config,
            params,
            stats,
            metadata,
            postprocess=PostprocessConfig(**{n: settings[n] for n in fields if n in settings}),
            test_size=(short_edge, settings.get("max_size", 1333)),
            tta=TtaConfig.from_settings(views, short_edge),
            **{name: settings[name] for name in plain if name in settings},
            execution=dataclasses.replace(execution, **how),
            mesh=mesh,
        )

    def __call__(
        self,
        image: Any,
        task: str | Sequence[str] = "panoptic",
        *,
        threshold: float | None = None,
        tta: bool = False,
    ) -> Segmentation | dict[str, Segmentation] | list[Any]:
        """Segments one image, or a list of images.

        Args:
          image: a path, a PIL image of any mode, an array (uint8 or uint16, bool, floats from 0 to
            1; grey, RGB or RGBA), see `inputs.as_image`; or a list or tuple of these, of any sizes.
          task: one of `TASKS`, several of them, or "all". The image is encoded once, and the
            results equal those of single calls.
          threshold: keep segments whose score is above this; for the panoptic task it replaces
            `object_mask_threshold`. The semantic task has no scores. None leaves the settings.
          tta: semantic task only: average over the views of the test-time augmentation; the
            official ones have 17 times the pixels.

        Returns:
          The segmentation at the size of the image; for several tasks, or "all", a dict of them by
          task; for a list of images, a list of these. Instances are in order of falling score.

        Raises:
          ImageError: a file that cannot be read.
          ValueError: unknown task, none, `tta` for another task than semantic, a threshold for the
            semantic task alone, or another kind of image.
        """
        tasks = tasks_of(task)
        self._with_threshold(threshold, tasks)  # a wrong one is refused before the model runs
        if tta and tasks != ("semantic",):
            raise ValueError(f"tta is for the semantic task only, not for {task!r}")
        several = isinstance(image, (list, tuple))
        if several and not tta:
            source = [
                {"image": as_image(one), "file_name": f"image {i}"} for i, one in enumerate(image)
            ]
            by_position = dict(self.segment_source(source, tasks, threshold=threshold))
            found: list[Any] = [by_position[i] for i in range(len(source))]
        else:
            images = image if several else [image]
            found = [self._segment_one(as_image(one), tasks, threshold, tta) for one in images]
        if isinstance(task, str) and task != "all":
            found = [by_task[task] for by_task in found]
        return found if several else found[0]

    def predict(self, image: Any, task: str | Sequence[str] = "all") -> Prediction:
        """Runs the model on one image; the Prediction gives results for any threshold.

        Args:
          image, task: as for a call. The image is encoded once.

        Raises:
          ImageError, ValueError: as for a call.
        """
        tasks = tasks_of(task)
        image = as_image(image)
        view = self._padded(resize_for_test(image, *self.test_size))
        features = self._encode(view)
        return Prediction(
            image=image,
            logits={one: self._decode(features, one) for one in tasks},
            image_size=view["image_size"],
            padded_size=view["image"].shape[1:3],
            postprocess=self.postprocess,
            metadata=self.metadata,
        )

    def segment_source(
        self,
        source: Source,
        tasks: Sequence[str],
        *,
        threshold: float | None = None,
        broken: dict[int, str] | None = None,
    ) -> Iterator[tuple[int, dict[str, Segmentation]]]:
        """Segments records in batches of one padded size, as the evaluation does.

        The next images are read, and the programs of the next padded size are compiled, beside the
        model.

        Args:
          source: records with `image` uint8 [H, W, 3] and `file_name`, and perhaps a method
            `image_size(i)`, else each is read once beforehand: see `input_pipeline.eval_loader`.
          tasks: some of `TASKS`.
          threshold: see `__call__`.
          broken: receives position -> error of the records that raise RecordError; None raises it.

        Yields:
          Position in `source`, and the results by task.
        """
        from oneformer_jax.input_pipeline import eval_loader

        if not len(source):
            return
        postprocess = self._with_threshold(threshold, tasks)
        devices = 1 if self.mesh is None else self.mesh.size
        batch_size = -(-min(self.batch_size, len(source)) // devices) * devices
        settings = eval_loader.EvalLoaderConfig(
            batch_size=batch_size,
            short_edge=self.test_size[0],
            max_size=self.test_size[1],
            bucket_multiple=self.bucket_multiple,
            max_buckets=self.max_buckets,
            skip_broken=broken is not None,
        )
        batches = eval_loader.eval_loader(source, settings)
        broken = {} if broken is None else broken
        broken |= batches.broken
        upcoming = iter(batches.buckets)
        with futures.ThreadPoolExecutor(1, "compiler") as compiler:
            next(upcoming, None)
            size = None
            for batch in batches:
                shape = batch["image"].shape
                if shape != size:
                    size = shape
                    following = next(upcoming, None)
                    if following is not None:
                        compiler.submit(self._predictor.compile, (len(batch["image"]), *following))
                yield from self._segment_batch(batch, tasks, postprocess, threshold)
                broken |= batches.broken

    def _segment_batch(
        self,
        batch: Mapping[str, Any],
        tasks: Sequence[str],
        postprocess: PostprocessConfig,
        threshold: float | None,
    ) -> Iterator[tuple[int, dict[str, Segmentation]]]:
        features = self._predictor.encode(batch)
        sizes = real_sizes(batch, batch)
        images = [None if record is None else record["image"] for record in batch["records"]]
        streams = [
            segment_images(
                *self._predictor.decode(features, task),
                *sizes,
                batch["image"].shape[1:3],
                task=task,
                config=postprocess,
                metadata=self.metadata,
                images=images,
            )
            for task in tasks
        ]
        for index, valid, *found in zip(batch["index"], batch["valid"], *streams, strict=True):
            if valid:
                results = (ranked(one, threshold) for one in found)
                yield int(index), dict(zip(tasks, results, strict=True))

    def _with_threshold(self, threshold: float | None, tasks: Sequence[str]) -> PostprocessConfig:
        if threshold is not None and tuple(tasks) == ("semantic",):
            raise ValueError(
                "threshold: the semantic task gives each pixel its best class, without scores"
            )
        return with_threshold(self.postprocess, threshold)

    def _segment_one(
        self, image: np.ndarray, tasks: Sequence[str], threshold: float | None, tta: bool
    ) -> dict[str, Segmentation]:
        if tta:
            return {"semantic": self._averaged(image)}
        prediction = self.predict(image, tasks)
        return {task: prediction.segmentation(task, threshold) for task in tasks}

    def _averaged(self, image: np.ndarray) -> Segmentation:
        """Segments `image` semantically from the views of the augmentation."""
        resized = resize_for_test(image, *self.test_size)
        views = (
            self._padded(resize_for_test(resized, edge, self.tta.max_size))
            for edge in self.tta.short_edges
        )
        scores = SemanticScores(np.array([image.shape[:2]]), self.metadata)
        for view, flip in with_mirrored(views, self.tta.flip):
            logits = self._decode(self._encode(view), "semantic")
            scores.add(*logits, view["image_size"], view["image"].shape[1:3], flip=flip)
        (segmentation,) = scores.result([image])
        return segmentation

    def _padded(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Makes a batch of one image, padded with zeros: `image` and `image_size`."""
        size, multiple = image.shape[:2], self.bucket_multiple
        padded = np.zeros((1, *(-(-side // multiple) * multiple for side in size), 3), np.uint8)
        padded[0, : size[0], : size[1]] = image
        return {"image": padded, "image_size": np.array([size], np.int32)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a result depends on but the image: parameters, classes, settings."""
        digest = hashlib.sha256()
        settings = (
            self.config, self.metadata, self.postprocess, self.test_size, self.tta,
            self.bucket_multiple, self.max_buckets, self.execution.dtype,
        )  # fmt: skip
        digest.update(repr(settings).encode())
        for leaf in jax.tree.leaves((self._params, self._stats)):
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

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
