"""The OneFormers that `tests.bench.peers` compares: the same weights, inputs and work for each."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from oneformer_jax.compilation import release_memory

TOKENS = 77


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and a batch.

    Attributes:
      side: of the square images, pixels.
      batch: images.
      backbone: kind and fields of the configuration of `transformers`.
      fields: further fields of its OneFormerConfig.
      segments: of each image.
      slots: for segments in our batches.
      points: per mask in the losses.
      bfloat16: compute in bfloat16.
      accelerator: too large for a processor.
    """

    side: int
    batch: int
    backbone: tuple[str, dict[str, Any]]
    fields: dict[str, Any]
    segments: int = 20
    slots: int = 100
    points: int = 12544
    bfloat16: bool = False
    accelerator: bool = False


SWIN_T = ("swin", dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7))
SWIN_L = (
    "swin",
    dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12),
)
COCO = dict(num_labels=133, num_queries=150, text_encoder_n_ctx=16)
SIZES = {
    # The model of configs/synthetic.py, as far as `transformers` can express it.
    "tiny": Size(
        side=128,
        batch=16,
        backbone=(
            "resnet",
            dict(embedding_size=16, hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1]),
        ),
        fields=dict(
            num_labels=13,
            num_queries=24,
            text_encoder_n_ctx=4,
            hidden_dim=64,
            conv_dim=64,
            mask_dim=64,
            num_attention_heads=2,
            encoder_layers=2,
            encoder_feedforward_dim=128,
            dim_feedforward=128,
            decoder_layers=4,
            text_encoder_width=64,
            text_encoder_num_layers=2,
        ),
        segments=8,
        slots=16,
        points=512,
    ),
    "swin_t_512": Size(side=512, batch=1, backbone=SWIN_T, fields=COCO),
    "swin_t_1024": Size(
        side=1024, batch=4, backbone=SWIN_T, fields=COCO, bfloat16=True, accelerator=True
    ),
    "swin_l_1024": Size(
        side=1024, batch=2, backbone=SWIN_L, fields=COCO, bfloat16=True, accelerator=True
    ),
}


def inputs(size: Size) -> dict[str, np.ndarray]:
    """Images, task tokens, targets and texts, the same in every process.

    Returns:
      `image` uint8 [B, S, S, 3], `image_size` int32 [B, 2], `segment_map` uint8 [B, S, S] (0 is
      void), `classes` int32 [B, M], `valid` bool [B, M], `text_table` int32 [K+3, 77], `text_ids`
      int32 [B, T], `task` int32 [B].
    """
    rng = np.random.default_rng(0)
    batch, side = size.batch, size.side
    classes_count = size.fields["num_labels"]
    texts = size.fields["num_queries"] - size.fields["text_encoder_n_ctx"]
    blocks = rng.integers(0, size.segments + 1, (batch, 8, 8))
    table = np.zeros((classes_count + 3, TOKENS), np.int32)
    for row in table:
        length = rng.integers(8, 12)
        row[0], row[1:length], row[length] = 49406, rng.integers(300, 40000, length - 1), 49407
    return {
        "image": rng.integers(0, 256, (batch, side, side, 3)).astype(np.uint8),
        "image_size": np.full((batch, 2), side, np.int32),
        "segment_map": blocks.repeat(side // 8, 1).repeat(side // 8, 2).astype(np.uint8),
        "classes": np.broadcast_to(
            (np.arange(size.slots) % classes_count).astype(np.int32), (batch, size.slots)
        ).copy(),
        "valid": np.broadcast_to(np.arange(size.slots) < size.segments, (batch, size.slots)).copy(),
        "text_table": table,
        "text_ids": rng.integers(0, classes_count, (batch, texts)).astype(np.int32),
        "task": np.zeros(batch, np.int32),
    }


def normalised(image: np.ndarray) -> np.ndarray:
    """float32 images, normalised as all of the models expect."""
    from oneformer_jax.models.oneformer import PIXEL_MEAN, PIXEL_STD

    return (image.astype(np.float32) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)


def task_tokens(task: int = 0) -> np.ndarray:
    """Token ids of a task, int32 [77]."""
    from oneformer_jax.types import TASK_TOKENS

    return TASK_TOKENS[task]


def write_weights(size: Size, folder: str) -> None:
    """Writes a random model of `transformers`, with its text branch, as a Hugging Face folder."""
    import torch
    import transformers

    kind, fields = size.backbone
    stages = [f"stage{i}" for i in range(1, 5)]
    make = {"swin": transformers.SwinConfig, "resnet": transformers.ResNetConfig}[kind]
    extra = {"layer_type": "bottleneck"} if kind == "resnet" else {"drop_path_rate": 0.0}
    labels = {i: str(i) for i in range(size.fields["num_labels"])}
    own = {name: value for name, value in size.fields.items() if name != "num_labels"}
    config = transformers.OneFormerConfig(
        backbone_config=make(out_features=stages, **extra, **fields),
        id2label=labels,
        train_num_points=size.points,
        is_training=True,
        dropout=0.0,
        **own,
    )
    torch.manual_seed(0)
    model = transformers.OneFormerForUniversalSegmentation(config)
    with torch.no_grad():  # offsets and weights of the sampling start at zero: nothing is silent
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    model.save_pretrained(folder)


# ------------------------------------------------------------------ the peers


class Ours:
    """This project: the programs that prediction and training run."""

    def __init__(self, size: Size, folder: str, training: bool):
        import jax

        from oneformer_jax.models import functional
        from oneformer_jax.models.execution import Execution
        from oneformer_jax.weights import convert

        # Ours are measured without programs of an earlier run, as the others are.
        jax.config.update("jax_enable_compilation_cache", False)
        found = convert.read_model(folder)
        self.config = found.config
        self.execution = Execution(dtype="bfloat16" if size.bfloat16 else "float32")
        self.size, self.given = size, inputs(size)
        self.params = jax.device_put(found.params)
        self.stats = jax.device_put(found.stats)
        graph = functional.abstract(self.config, self.execution, training=False).graph
        self.programs = functional.programs(graph)
        self.compiled: dict[str, Any] = {}
        if training:
            self._make_step()

    def _program(self, name: str, jitted: Callable, *arguments: Any) -> Any:
        """Compiles once, as the product does, and keeps the program, whose memory is reported."""
        if name not in self.compiled:
            self.compiled[name] = jitted.lower(*arguments).compile()
            release_memory()
        return self.compiled[name](*arguments)

    def forward(self, tasks: tuple[int, ...] = (0,)) -> list[tuple[Any, Any]]:
        import jax

        features = self._program(
            "encode",
            self.programs.encode,
            self.params,
            self.stats,
            self.given["image"],
            self.given["image_size"],
        )
        found = [
            self._program(
                "decode", self.programs.decode, self.params, self.stats, features, task_tokens(t)
            )
            for t in tasks
        ]
        return jax.block_until_ready(found)

    def three_tasks(self) -> list[tuple[Any, Any]]:
        return self.forward((0, 1, 2))

    def _make_step(self) -> None:
        import jax

        from oneformer_jax.models import functional
        from oneformer_jax.models.losses import LossConfig
        from oneformer_jax.train import optim, state

        abstract = functional.abstract(self.config, training=True).params
        optimizer = optim.make_optimizer(optim.OptimConfig(steps=1000), abstract)
        text_table = self.given["text_table"]
        step = state.make_train_step(
            self.config,
            LossConfig(num_points=self.size.points),
            optimizer,
            text_table[:, : int(np.argmax(text_table, 1).max()) + 1],
            execution=self.execution,
        )
        self.step = jax.jit(step, donate_argnums=0)
        self.key = jax.random.key(0)
        params = jax.tree.map(lambda x: x.copy(), self.params)
        opt = jax.jit(optimizer.init)(params)
        self.state = {
            "step": np.int32(0),
            "halted": np.bool_(False),
            "params": params,
            "stats": self.stats,
            "opt": opt,
        }
        names = ("image", "image_size", "segment_map", "classes", "valid", "text_ids", "task")
        self.batch = {name: self.given[name] for name in names}

    def train(self) -> float:
        self.state, metrics = self._program("train", self.step, self.state, self.batch, self.key)
        return float(metrics["loss"])

    def outputs(self) -> dict[str, np.ndarray]:
        ((classes, masks),) = self.forward()
        return {"classes": np.asarray(classes, np.float32), "masks": np.asarray(masks, np.float32)}

    def memory(self) -> int:
        """The most bytes of temporary arrays, arguments and results of one of the programs."""
        found = [program.memory_analysis() for program in self.compiled.values()]
        return max(
            m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes for m in found
        )

    def flops(self, work: str) -> float:
        """FLOPs of a call of `work`, as XLA counts those of its programs."""
        calls = {"decode": 3 if work == "three_tasks" else 1}
        found = ((name, program.cost_analysis()) for name, program in self.compiled.items())
        return sum(calls.get(name, 1) * float((cost or {}).get("flops", 0)) for name, cost in found)


class Transformers:
    """transformers' OneFormer in PyTorch."""

    compiled = False

    def __init__(self, size: Size, folder: str, training: bool):
        import torch
        import transformers

        self.torch, self.size = torch, size
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.OneFormerForUniversalSegmentation.from_pretrained(
            folder, is_training=training
        )
        self.model = model.to(self.device)
        given = inputs(size)
        image = normalised(given["image"])
        self.image = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().to(self.device)
        self.given = given
        self.run = torch.compile(self.model) if self.compiled else self.model
        if training:
            self._prepare_training()
        else:
            self.model.eval()

    def _tasks(self, task: int):
        tokens = np.broadcast_to(task_tokens(task), (self.size.batch, TOKENS))
        return self.torch.from_numpy(tokens.astype(np.float32)).to(self.device)

    def _precision(self):
        return self.torch.autocast(
            self.device, dtype=self.torch.bfloat16, enabled=self.size.bfloat16
        )

    def forward(self, tasks: tuple[int, ...] = (0,)) -> list[tuple[Any, Any]]:
        found = []
        with self.torch.no_grad(), self._precision():
            for task in tasks:
                out = self.run(pixel_values=self.image, task_inputs=self._tasks(task))
                found.append((out.class_queries_logits, out.masks_queries_logits))
        self._wait()
        return found

    def three_tasks(self) -> list[tuple[Any, Any]]:
        return self.forward((0, 1, 2))

    def _prepare_training(self) -> None:
        torch, given = self.torch, self.given
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)
        slots = np.arange(1, self.size.segments + 1)
        self.labels = {
            "mask_labels": [
                torch.from_numpy((m[None] == slots[:, None, None]).astype(np.float32)).to(
                    self.device
                )
                for m in given["segment_map"]
            ],
            "class_labels": [
                torch.from_numpy(c[: self.size.segments].astype(np.int64)).to(self.device)
                for c in given["classes"]
            ],
            "text_inputs": torch.from_numpy(
                given["text_table"][given["text_ids"]].astype(np.int64)
            ).to(self.device),
        }

    def train(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            loss = self.run(pixel_values=self.image, task_inputs=self._tasks(0), **self.labels).loss
        loss.backward()
        self.optimizer.step()
        self._wait()
        return float(loss)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def outputs(self) -> dict[str, np.ndarray]:
        ((classes, masks),) = self.forward()
        return {"classes": classes.float().cpu().numpy(), "masks": masks.float().cpu().numpy()}

    def memory(self) -> int:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else 0


class TransformersCompiled(Transformers):
    """The same through torch.compile."""

    compiled = True


class Zeromodels:
    """zeromodels' OneFormer: Keras on the JAX backend, Swin only, prediction only."""

    def __init__(self, size: Size, folder: str, training: bool):
        os.environ["KERAS_BACKEND"] = "jax"
        import jax
        import safetensors.numpy
        from zeromodels.models.oneformer import OneFormerConfig, OneFormerUniversalSegment
        from zeromodels.models.oneformer.convert_oneformer_hf_to_keras import (
            transfer_oneformer_weights,
        )

        kind, fields = size.backbone
        if kind != "swin" or training or size.bfloat16:
            raise NotImplementedError("zeromodels predicts with Swin in float32 only")
        self.size, self.given = size, inputs(size)
        model = OneFormerUniversalSegment(
            OneFormerConfig(
                backbone_embed_dim=fields["embed_dim"],
                backbone_depths=tuple(fields["depths"]),
                backbone_num_heads=tuple(fields["num_heads"]),
                backbone_window_size=fields["window_size"],
                num_queries=size.fields["num_queries"],
                num_classes=size.fields["num_labels"],
                image_size=size.side,
            )
        )
        transfer_oneformer_weights(
            model, safetensors.numpy.load_file(pathlib.Path(folder, "model.safetensors"))
        )
        trained = [v.value for v in model.trainable_variables]
        other = [v.value for v in model.non_trainable_variables]
        self.image = normalised(self.given["image"])
        call = jax.jit(lambda t, o, x: model.stateless_call(t, o, x, training=False)[0])
        self.names = [tensor.name for tensor in model.inputs]
        self.call = lambda x: call(trained, other, x)
        self.wait = jax.block_until_ready

    def forward(self, tasks: tuple[int, ...] = (0,)) -> list[Any]:
        found = []
        for task in tasks:
            tokens = np.broadcast_to(task_tokens(task), (self.size.batch, TOKENS))
            arrays = [self.image, tokens.astype(np.float32)]
            keys = sorted(self.names, key=lambda name: "task" in name)  # the image comes first
            found.append(self.call(dict(zip(keys, arrays, strict=True))))
        return self.wait(found)

    def three_tasks(self) -> list[Any]:
        return self.forward((0, 1, 2))

    def outputs(self) -> dict[str, np.ndarray]:
        (found,) = self.forward()
        classes, masks = (
            np.asarray(found[key], np.float32)
            for key in ("class_queries_logits", "masks_queries_logits")
        )
        return {"classes": classes, "masks": masks}

    def memory(self) -> int:
        return 0


MAKERS = {
    "ours": Ours,
    "transformers": Transformers,
    "transformers_compiled": TransformersCompiled,
    "zeromodels": Zeromodels,
}
