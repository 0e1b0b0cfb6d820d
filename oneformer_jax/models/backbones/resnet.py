"""ResNet (arXiv 1512.03385) with bottleneck blocks, as Detectron2 builds it.

The stride of a stage is in the 3 x 3 convolution of its first block. Attribute paths are the
official parameter names, with Flax's names for the tensors of a norm: scale, bias, mean, var.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from oneformer_jax.models import initial
from oneformer_jax.models.backbones.common import DEPTHS, StagedConfig, check_image
from oneformer_jax.models.execution import Execution
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.layers import Key, convolve
from oneformer_jax.models.stack import Stack, run
from oneformer_jax.rules import Integer, Rule, Word

EPSILON = 1e-5
MOMENTUM = 0.1  # share of a batch in the running statistics


@dataclasses.dataclass(frozen=True)
class ResNetConfig(StagedConfig):
    """Size of a ResNet.

    Attributes:
      depths: number of blocks in each of the four stages.
      norm: "frozen": the norm's four tensors are constants, for pre-trained weights (the published
        ADE20K and COCO models); "batch": batch norm over the whole batch of all devices, needed
        when training from scratch (the published Cityscapes and Mapillary models).
      stem_width: channels of the stem; res2 to res5 have 4, 8, 16 and 32 times as many.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "depths": DEPTHS,
        "norm": Word(("frozen", "batch")),
        "stem_width": Integer(1, 1024),
    }

    norm: str = "frozen"
    stem_width: int = 64

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of res2 to res5."""
        return tuple(4 * self.stem_width * 2**stage for stage in range(4))


PUBLISHED = {
    "resnet50": ResNetConfig(depths=(3, 4, 6, 3)),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3)),
}


class ResNet(nnx.Module):
    """The backbone: an image to the outputs of the four stages."""

    def __init__(
        self,
        config: ResNetConfig,
        *,
        rngs: ParamKeys,
        execution: Execution = Execution(),
    ):
        self.dtype = dtype = execution.compute_dtype
        self.norm = config.norm
        self.stem = Stem(config, rngs=rngs, dtype=dtype)
        inputs = config.stem_width
        for stage, outputs in enumerate(config.channels):
            blocks = []
            for i in range(config.depths[stage]):
                stride = 2 if stage and not i else 1
                blocks.append(
                    Bottleneck(config.norm, inputs, outputs, stride, rngs=rngs, dtype=dtype)
                )
                inputs = outputs
            stack = Stack(blocks, remat=execution.remat, scan=execution.scan_layers)
            setattr(self, f"res{stage + 2}", stack)

    def __call__(
        self, image: jax.Array, key: Key = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Extracts features, see `oneformer_jax.models.backbones`, of an image of any size.

        The maps of the stride s are [B, ceil(H / s), ceil(W / s), C]. Nothing here is random.

        Args:
          image: float [B, H, W, 3], normalised.
          key: not used.
          train: with norm "batch", normalise by the statistics of this batch and update the
            running ones; without it, and with norm "frozen", the stored ones are used.

        Raises:
          ValueError: not an image, or batch statistics of a single value.
        """
        check_image(image)

        def step(x, _, block):
            return block(x, train), None

        x = self.stem(image.astype(self.dtype), train)
        updates = train and self.norm == "batch"
        outputs = []
        for stage in range(2, 6):
            x, _ = run(step, x, getattr(self, f"res{stage}"), updates=updates)
            outputs.append(x)
        return tuple(outputs)


class Stem(nnx.Module):
    """7 x 7 convolution and 3 x 3 maximum, each of stride 2."""

    def __init__(self, config: ResNetConfig, *, rngs: ParamKeys, dtype):
        self.conv1 = ConvNorm(config.norm, 3, config.stem_width, 7, 2, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = jax.nn.relu(self.conv1(x, train))
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution around a shortcut."""

    def __init__(
        self, norm: str, inputs: int, outputs: int, stride: int, *, rngs: ParamKeys, dtype
    ):
        width = outputs // 4
        self.conv1 = ConvNorm(norm, inputs, width, 1, 1, rngs=rngs, dtype=dtype)
        self.conv2 = ConvNorm(norm, width, width, 3, stride, rngs=rngs, dtype=dtype)
        self.conv3 = ConvNorm(norm, width, outputs, 1, 1, rngs=rngs, dtype=dtype)
        self.shortcut = (
            None
            if inputs == outputs
            else ConvNorm(norm, inputs, outputs, 1, stride, rngs=rngs, dtype=dtype)
        )

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, inputs] -> [B, ceil(H / stride), ceil(W / stride), outputs]."""
        y = jax.nn.relu(self.conv1(x, train))
        y = jax.nn.relu(self.conv2(y, train))
        y = self.conv3(y, train)
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x, train)))


class ConvNorm(nnx.Conv):
    """A square convolution without bias, padded by half of its size, and the norm after it."""

    def __init__(
        self, norm: str, inputs: int, outputs: int, size: int, stride: int, *, rngs, dtype
    ):
        super().__init__(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=((size // 2, size // 2),) * 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=initial.variance_scaling(2.0, "fan_out", "normal"),
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.norm = FrozenNorm(outputs, dtype) if norm == "frozen" else BatchNorm(outputs, dtype)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.norm(super().__call__(x), train)


class FrozenNorm(nnx.Module):
    """Batch norm whose four tensors are constants: none of them is trained or updated."""

    def __init__(self, width: int, dtype):
        self.dtype = dtype
        self.scale = nnx.BatchStat(jnp.ones(width))
        self.bias = nnx.BatchStat(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C]; `train` makes no difference."""
        return _normalize(self, x, self.mean[...], self.var[...])


class BatchNorm(nnx.Module):
    """Batch norm with PyTorch's running statistics.

    In a jitted program whose batch is sharded, the means run over the batch of all devices.
    """

    def __init__(self, width: int, dtype):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C]; `train` takes the statistics of the batch, which update the running ones."""
        if not train:
            return _normalize(self, x, self.mean[...], self.var[...])
        count = x.size // x.shape[-1]
        if count < 2:
            raise ValueError(
                f"batch norm needs more than one value per channel in training, got {x.shape}; "
                'use larger images or batches, or norm "frozen"'
            )
        axes = tuple(range(x.ndim - 1))
        values = x.astype(jnp.float32)
        mean = jnp.mean(values, axes)
        var = jnp.mean(jnp.square(values - mean), axes)
        unbiased = var * (count / (count - 1))
        for running, batch in ((self.mean, mean), (self.var, unbiased)):
            new = (1 - MOMENTUM) * running[...] + MOMENTUM * jax.lax.stop_gradient(batch)
            running[...] = new
        return _normalize(self, x, mean, var)


def _normalize(norm, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias in float32, cast to the norm's dtype."""
    factor = jax.lax.rsqrt(var + EPSILON) * norm.scale[...]
    return ((x.astype(jnp.float32) - mean) * factor + norm.bias[...]).astype(norm.dtype)
