"""Benchmark: this project beside the other OneFormers, on the device that is there, in one run.

    make bench-peers                                    # all sizes that suit this device
    python -m tests.bench.peers --sizes=tiny --works=forward,train --peers=ours,transformers

Each peer works in a process of its own, one after the other, `--rounds` times in turn; the table
has the medians over the rounds. All have the same weights: a random model of `transformers` is
written as a Hugging Face folder, which ours and zeromodels read. Their outputs are compared before
anything is timed. A peer that is not installed is named and left out:

    pip install transformers torch              # transformers, eager and torch.compile
    pip install zeromodels                      # Keras on the JAX backend; prediction only

"train" is a step with loss, gradients and AdamW, on the same images and targets and with as many
points per mask; each peer draws its own points.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from oneformer_jax.files import read_json

WORKS = ("forward", "three_tasks", "train")
PEERS = ("ours", "transformers", "transformers_compiled", "zeromodels")
PACKAGES = {
    "ours": ("jax",),
    "transformers": ("transformers", "torch"),
    "transformers_compiled": ("transformers", "torch"),
    "zeromodels": ("zeromodels", "keras", "jax"),
}
TOLERANCE = 1e-3  # of the largest mask logit; float32, other orders of summation
BF16_TOLERANCE = 0.1
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


# ------------------------------------------------------------------ what all are given


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
        """Compiles once and keeps the program, whose memory is reported."""
        if name not in self.compiled:
            self.compiled[name] = jitted.lower(*arguments).compile()
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
        mean, std = (
            np.array(x, np.float32) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        )
        image = (given["image"].astype(np.float32) - mean) / std
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
        mean, std = (
            np.array(x, np.float32) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        )
        self.image = (self.given["image"].astype(np.float32) - mean) / std
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
            np.asarray(found[key], np.float32) for key in ("class_logits", "mask_logits")
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


# ------------------------------------------------------------------ one process


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Does one work with one peer in this process: the first result, then `repeats` timed calls."""
    size, name = SIZES[request["size"]], request["work"]
    start = time.perf_counter()
    peer = MAKERS[request["peer"]](size, request["folder"], name == "train")
    if request.get("outputs"):
        np.savez(request["outputs"], **peer.outputs())
        return {}
    call = getattr(peer, name)
    loaded = time.perf_counter()
    call()
    first = time.perf_counter()
    call()  # warm
    walls, processors = [], []
    for _ in range(request["repeats"]):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {
        "wall_seconds": statistics.median(walls),
        "processor_seconds": statistics.median(processors),
        "load_seconds": loaded - start,
        "first_seconds": first - start,
        "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "program_bytes": peer.memory(),
        "images_per_second": size.batch / statistics.median(walls),
    }


def run(request: dict[str, Any]) -> dict[str, Any]:
    """`work` in a process of its own; {"error"} where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "result.json")
        command = [sys.executable, "-m", __spec__.name, "--work", json.dumps(request), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode or not out.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"error": lines[-1][:300]}
        return read_json(out)


# ------------------------------------------------------------------ the run


def missing(peer: str) -> str:
    """The packages of a peer that are not installed, or ""."""
    absent = []
    for package in PACKAGES[peer]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return ", ".join(absent)


def compare(peer: str, size: str, folder: str, scratch: str) -> str:
    """The largest difference of a peer's outputs from ours, in words; "" where it cannot be had.

    Raises:
      RuntimeError: the outputs differ by more than rounding: a benchmark of something else.
    """
    found = {}
    for name in ("ours", peer):
        path = f"{scratch}/{name}-{size}.npz"
        if not os.path.exists(path):
            request = dict(peer=name, size=size, work="forward", folder=folder, outputs=path)
            answer = run(request)
            if "error" in answer:
                return f"not compared: {answer['error']}"
        found[name] = dict(np.load(path))
    errors = {}
    for key, ours in found["ours"].items():
        theirs = found[peer][key]
        if ours.shape != theirs.shape and theirs.ndim == 4:
            theirs = np.moveaxis(theirs, -1, 1)  # channels last
        errors[key] = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    worst = max(errors.values())
    if worst > (BF16_TOLERANCE if SIZES[size].bfloat16 else TOLERANCE):
        raise RuntimeError(f"{peer} gives other outputs than ours at {size}: {errors}")
    return f"outputs equal to {worst:.0e} of the largest"


def table(results: list[dict[str, Any]]) -> str:
    """Formats the medians as Markdown; ratios are ours over the peer's, below 1 where we win."""
    head = ["size", "work", "peer", "wall", "processor", "images/s", "first result", "resident"]
    head += ["program", "ours / peer: wall", "processor", "resident"]
    lines = [head, ["---"] * len(head)]
    ours = {(r["size"], r["work"]): r for r in results if r["peer"] == "ours" and "error" not in r}
    for r in results:
        if "error" in r:
            lines.append([r["size"], r["work"], r["peer"], r["error"], *[""] * (len(head) - 4)])
            continue
        base = ours.get((r["size"], r["work"]))
        names = ("wall_seconds", "processor_seconds", "resident_bytes")
        ratios = [f"{base[n] / r[n]:.2f}" if base and base is not r else "" for n in names]
        lines.append(
            [
                *(r["size"], r["work"], r["peer"]),
                f"{r['wall_seconds']:.3f} s",
                f"{r['processor_seconds']:.3f} s",
                f"{r['images_per_second']:.2f}",
                f"{r['first_seconds']:.1f} s",
                f"{r['resident_bytes'] / 1e9:.2f} GB",
                f"{r['program_bytes'] / 1e9:.2f} GB" if r["program_bytes"] else "",
                *ratios,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Names the processor, its cores, and the versions of what is compared."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    packages = dict.fromkeys(p for names in PACKAGES.values() for p in names)
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, {', '.join(versions)}"


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; the first error, if there is one."""
    for found in rounds:
        if "error" in found:
            return found
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="", help="of " + ", ".join(SIZES))
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # the process of one peer
    options = parser.parse_args()
    if options.work:
        result = work(json.loads(options.work[0]))
        pathlib.Path(options.work[1]).write_text(json.dumps(result))
        return 0
    import jax

    on_accelerator = jax.default_backend() != "cpu"
    sizes = [n for n in options.sizes.split(",") if n] or [
        name for name, size in SIZES.items() if size.accelerator == on_accelerator
    ]
    lists = {"sizes": (sizes, SIZES), "works": (options.works.split(","), WORKS)}
    lists["peers"] = (options.peers.split(","), PEERS)
    for name, (given, known) in lists.items():
        if unknown := [word for word in given if word not in known]:
            parser.error(f"--{name} {','.join(unknown)}: use some of {','.join(known)}")
    if what := missing("transformers"):
        print(f"bench: {what} must be installed: the weights of all peers come from it")
        return 1
    peers = []
    for peer in lists["peers"][0]:
        if what := missing(peer):
            print(f"{peer} is left out: {what} is not installed")
        else:
            peers.append(peer)
    print(machine(), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = f"{scratch}/{size}"
            write_weights(SIZES[size], folder)
            for peer in (p for p in peers if p != "ours"):
                print(f"{size}, {peer}: {compare(peer, size, folder, scratch)}", flush=True)
            for name in lists["works"][0]:
                request = dict(size=size, work=name, folder=folder, repeats=options.repeats)
                found: dict[str, list] = {peer: [] for peer in peers}
                for _ in range(options.rounds):
                    for peer in peers:  # in turn
                        if not any("error" in r for r in found[peer]):
                            found[peer].append(run(request | {"peer": peer}))
                for peer in peers:
                    known = {"size": size, "work": name, "peer": peer}
                    results.append(known | median(found[peer]))
                print("\n" + table([r for r in results if r["size"] == size]), flush=True)
    if options.json:
        record = {"machine": machine(), "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
