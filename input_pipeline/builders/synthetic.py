"""TFDS builder of the embedded default dataset: scenes rendered by `scenes.render_scene`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import cv2
import tensorflow_datasets as tfds

from oneformer_jax.input_pipeline.builders import scenes, schema
from oneformer_jax.input_pipeline.builders.local import LocalBuilder
from oneformer_jax.input_pipeline.records import SegmentTable, encode_panoptic

_JPEG = [
    cv2.IMWRITE_JPEG_QUALITY, 95,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]  # fmt: skip


@dataclasses.dataclass(eq=False)
class SyntheticConfig(tfds.core.BuilderConfig):
    """Settings of the scenes; the name is made from the values, so different data never mix.

    Attributes:
      size: height and width of the scenes in pixels, at least 32.
      train_examples: number of training scenes.
      validation_examples: number of validation scenes.
      seed: non-negative; another seed gives other scenes.
    """

    name: str = ""
    size: int = 128
    train_examples: int = 4000
    validation_examples: int = 200
    seed: int = 0

    def __post_init__(self):
        limits = {"size": 32, "train_examples": 1, "validation_examples": 1, "seed": 0}
        for field, low in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(
                    f"synthetic dataset: {field} must be an integer of at least {low}, "
                    f"not {value!r}"
                )
        self.name = (
            f"{self.size}px_{self.train_examples}_{self.validation_examples}_seed{self.seed}"
        )
        self.description = f"Rendered panoptic scenes of {self.size} x {self.size} pixels."


class SyntheticPanoptic(LocalBuilder):
    """Rendered panoptic scenes: 7 thing and 6 stuff classes, occlusion, crowds, void pixels.

    Needs `config=SyntheticConfig(...)`; prepare it with `input_pipeline.sources.prepare`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=schema.features(dense=False),
            metadata=schema.metadata(scenes.INFO),
            disable_shuffling=True,  # record i is scene i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        self.info.metadata.update(records={})
        return {
            "train": self._generate_examples("train", config.train_examples),
            "validation": self._generate_examples("validation", config.validation_examples),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in range(count):
            scene = scenes.render_scene(config.seed, split, index, config.size)
            name = f"{split}_{index:06d}"
            segments = SegmentTable.from_lists(
                *zip(
                    *((s["id"], s["category"], s["iscrowd"], s["area"]) for s in scene.segments),
                    strict=True,
                )
            )
            schema.note_record(self.info.metadata, split, scene.image.shape, segments, scenes.INFO)
            jpeg = cv2.imencode(".jpg", scene.image[..., ::-1], _JPEG)[1].tobytes()
            yield (
                index,
                schema.example(
                    jpeg,
                    encode_panoptic(scene.panoptic),
                    segments,
                    image_id=name,
                    file_name=f"{name}.jpg",
                ),
            )
