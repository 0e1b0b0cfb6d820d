"""One table of names: ours, the official ones and those of Hugging Face's `transformers`.

A row of the table names a module in the three programs; "#" stands for an index. Where one program
packs several arrays into one, the row lists them in brackets, "[q_proj|k_proj|v_proj]": they are
stacked along the outputs. The kind says which arrays the module has and how they are laid out.

The names of ours are the paths of the parameters, joined by dots. Those of `transformers` are the
names in its files, which releases 4 and 5 share. Source: spec 2 and 11.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

FORMATS = ("official", "hugging_face")

# kind: {our leaf: name in PyTorch}. An "array" is a parameter itself, without a leaf.
_LEAVES = {
    "linear": {"kernel": "weight", "bias": "bias"},
    "conv": {"kernel": "weight", "bias": "bias"},
    "norm": {"scale": "weight", "bias": "bias"},
    "batch_norm": {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    },
    "embed": {"embedding": "weight"},
    "array": {"": ""},
}


class Row(NamedTuple):
    """A module in three programs: names with "#" for an index, and the kind of its arrays.

    `backbone` is set where two backbones have the same name of ours and different official ones.
    """

    kind: str
    ours: str
    official: str
    hugging_face: str | None
    backbone: str | None = None


_QKV = "[q_proj|k_proj|v_proj]"


def _attention(ours: str, official: str, hugging_face: str, *, packed: bool = True) -> list[Row]:
    """PyTorch's multi-head attention: one packed input projection, or three as in parts of HF."""
    inputs = f"{hugging_face}.in_proj_" if packed else f"{hugging_face}.{_QKV}"
    return [
        Row("linear", f"{ours}.{_QKV}", f"{official}.in_proj_", inputs),
        Row("linear", f"{ours}.out_proj", f"{official}.out_proj", f"{hugging_face}.out_proj"),
    ]


def _same(kind: str, ours: str, names: Sequence[str], official: str, hugging_face: str):
    """Modules that have the same names below three prefixes."""
    return [Row(kind, f"{ours}.{n}", f"{official}.{n}", f"{hugging_face}.{n}") for n in names]


def _head() -> list[Row]:
    """Everything but the backbone."""
    pixel, hf_pixel = "sem_seg_head.pixel_decoder", "model.pixel_level_module.decoder"
    encoder = "transformer.encoder.layers.#"
    rows = [
        Row("conv", "pixel_decoder.input_proj.#.conv", f"{pixel}.input_proj.#.0",
            f"{hf_pixel}.input_projections.#.0"),
        Row("norm", "pixel_decoder.input_proj.#.norm", f"{pixel}.input_proj.#.1",
            f"{hf_pixel}.input_projections.#.1"),
        Row("array", "pixel_decoder.transformer.level_embed", f"{pixel}.transformer.level_embed",
            f"{hf_pixel}.level_embed"),
        Row("conv", "pixel_decoder.mask_features", f"{pixel}.mask_features",
            f"{hf_pixel}.mask_projection"),
    ]  # fmt: skip
    for name in ("adapter_1", "layer_1"):
        rows += [
            Row("conv", f"pixel_decoder.{name}.conv", f"{pixel}.{name}", f"{hf_pixel}.{name}.0"),
            Row("norm", f"pixel_decoder.{name}.norm", f"{pixel}.{name}.norm",
                f"{hf_pixel}.{name}.1"),
        ]  # fmt: skip
    rows += _same(
        "linear",
        f"pixel_decoder.{encoder}.self_attn",
        ("sampling_offsets", "attention_weights", "value_proj", "output_proj"),
        f"{pixel}.{encoder}.self_attn",
        f"{hf_pixel}.encoder.layers.#.self_attn",
    )
    for kind, name, hf_name in (
        ("norm", "norm1", "self_attn_layer_norm"),
        ("norm", "norm2", "final_layer_norm"),
        ("linear", "linear1", "fc1"),
        ("linear", "linear2", "fc2"),
    ):
        rows.append(
            Row(kind, f"pixel_decoder.{encoder}.{name}", f"{pixel}.{encoder}.{name}",
                f"{hf_pixel}.encoder.layers.#.{hf_name}")
        )  # fmt: skip

    predictor, hf_module = "sem_seg_head.predictor", "model.transformer_module"
    decoder, hf_decoder = "class_transformer.decoder", f"{hf_module}.decoder.query_transformer"
    places = (
        f"predictor.{decoder}.layers.#",
        f"{predictor}.{decoder}.layers.#",
        f"{hf_decoder}.decoder.layers.#",
    )
    for name in ("self_attn", "multihead_attn"):
        rows += _attention(*(f"{place}.{name}" for place in places))
    rows += _same("linear", places[0], ("linear1", "linear2"), *places[1:])
    rows += _same("norm", places[0], ("norm1", "norm2", "norm3"), *places[1:])
    rows.append(
        Row("norm", f"predictor.{decoder}.norm", f"{predictor}.{decoder}.norm",
            f"{hf_decoder}.decoder.norm")
    )  # fmt: skip
    for ours, hf_name, attention in (
        ("transformer_self_attention_layers.#", "self_attn", "self_attn"),
        ("transformer_cross_attention_layers.#", "cross_attn", "multihead_attn"),
        ("transformer_ffn_layers.#", "ffn", None),
    ):
        places = (
            f"predictor.{ours}",
            f"{predictor}.{ours}",
            f"{hf_module}.decoder.layers.#.{hf_name}",
        )
        if attention:
            paths = (f"{place}.{attention}" for place in places)
            rows += _attention(*paths, packed=attention == "multihead_attn")
        else:
            rows += _same("linear", places[0], ("linear1", "linear2"), *places[1:])
        rows += _same("norm", places[0], ("norm",), *places[1:])
    rows += [
        Row("norm", "predictor.decoder_norm", f"{predictor}.decoder_norm",
            f"{hf_module}.decoder.decoder_norm"),
        Row("embed", "predictor.query_embed", f"{predictor}.query_embed",
            f"{hf_module}.queries_embedder"),
        Row("embed", "predictor.level_embed", f"{predictor}.level_embed",
            f"{hf_module}.level_embed"),
        Row("conv", "predictor.class_input_proj", f"{predictor}.class_input_proj",
            f"{hf_module}.decoder.query_input_projection"),
        Row("linear", "predictor.class_embed", f"{predictor}.class_embed",
            f"{hf_module}.decoder.class_embed"),
        Row("linear", "predictor.mask_embed.layers.#", f"{predictor}.mask_embed.layers.#",
            f"{hf_module}.decoder.mask_embed.layers.#.0"),
        Row("linear", "task_mlp.layers.#", "task_mlp.layers.#",
            "model.task_encoder.task_mlp.layers.#.0"),
    ]  # fmt: skip
    return rows


def _text() -> list[Row]:
    """The text branch and the contrastive scale."""
    hf = "model.text_mapper"
    block, hf_block = "text_encoder.transformer.resblocks.#", f"{hf}.text_encoder.transformer"
    hf_block += ".layers.#"
    rows = _attention(f"{block}.attn", f"{block}.attn", f"{hf_block}.self_attn")
    for kind, ours, hf_name in (
        ("norm", "ln_1", "layer_norm1"),
        ("norm", "ln_2", "layer_norm2"),
        ("linear", "mlp.c_fc", "mlp.fc1"),
        ("linear", "mlp.c_proj", "mlp.fc2"),
    ):
        rows.append(Row(kind, f"{block}.{ours}", f"{block}.{ours}", f"{hf_block}.{hf_name}"))
    names = (
        ("embed", "text_encoder.token_embedding", f"{hf}.text_encoder.token_embedding"),
        ("array", "text_encoder.positional_embedding", f"{hf}.text_encoder.positional_embedding"),
        ("norm", "text_encoder.ln_final", f"{hf}.text_encoder.ln_final"),
        ("linear", "text_projector.layers.#", f"{hf}.text_projector.layers.#.0"),
        ("embed", "prompt_ctx", f"{hf}.prompt_ctx"),
    )
    rows += [Row(kind, ours, ours, hf_name) for kind, ours, hf_name in names]
    return [*rows, Row("array", "logit_scale", "criterion.logit_scale", "criterion.logit_scale")]


def _backbones() -> list[Row]:
    hf = "model.pixel_level_module.encoder"

    def row(kind: str, name: str, hf_name: str | None) -> Row:
        return Row(kind, f"backbone.{name}", f"backbone.{name}", hf_name and f"{hf}.{hf_name}")

    # ---- All with a norm per output, and what Swin and DiNAT share
    rows = [row("norm", f"norm{i}", f"hidden_states_norms.stage{i + 1}") for i in range(4)]
    rows.append(row("norm", "patch_embed.norm", "embeddings.norm"))
    for ours, hf_name, table, only in (
        ("layers.#.blocks.#", "encoder.layers.#.blocks.#", "relative_position_bias_table", None),
        ("levels.#.blocks.#", "encoder.levels.#.layers.#", "rpb", "dinat"),
    ):
        rows += [
            row("norm", f"{ours}.norm1", f"{hf_name}.layernorm_before")._replace(backbone=only),
            row("norm", f"{ours}.norm2", f"{hf_name}.layernorm_after")._replace(backbone=only),
            row("linear", f"{ours}.attn.qkv", f"{hf_name}.attention.self.[query|key|value]"),
            row("linear", f"{ours}.attn.proj", f"{hf_name}.attention.output.dense"),
            row("array", f"{ours}.attn.{table}", f"{hf_name}.attention.self.{table}"),
            row("linear", f"{ours}.mlp.fc1", f"{hf_name}.intermediate.dense"),
            row("linear", f"{ours}.mlp.fc2", f"{hf_name}.output.dense"),
        ]
    # ---- Swin
    rows += [
        row("conv", "patch_embed.proj", "embeddings.patch_embeddings.projection"),
        row("linear", "layers.#.downsample.reduction", "encoder.layers.#.downsample.reduction"),
        row("norm", "layers.#.downsample.norm", "encoder.layers.#.downsample.norm"),
    ]
    # ---- DiNAT
    rows += [
        row("conv", "patch_embed.proj.#", "embeddings.patch_embeddings.projection.#"),
        row("conv", "levels.#.downsample.reduction", "encoder.levels.#.downsample.reduction"),
        row("norm", "levels.#.downsample.norm", "encoder.levels.#.downsample.norm")._replace(
            backbone="dinat"
        ),
    ]
    # ---- InternImage: its norms stand in sequences with permutations of the axes. The rows of its
    # MLP are those of DiNAT; transformers has no such backbone.
    block = "backbone.levels.#.blocks.#"
    for ours, official in (
        ("patch_embed.norm1", "patch_embed.norm1.1"),
        ("patch_embed.norm2", "patch_embed.norm2.1"),
        ("levels.#.norm", "levels.#.norm.0"),
        ("levels.#.post_norms.#", "levels.#.post_norms.#.0"),
        ("levels.#.downsample.norm", "levels.#.downsample.norm.1"),
        *(
            (f"levels.#.blocks.#.{name}", f"levels.#.blocks.#.{name}.0")
            for name in ("norm1", "norm2", "res_post_norm1", "res_post_norm2")
        ),
        ("levels.#.blocks.#.dcn.dw_norm", "levels.#.blocks.#.dcn.dw_conv.1.1"),
    ):
        rows.append(Row("norm", f"backbone.{ours}", f"backbone.{official}", None, "internimage"))
    rows += [
        row("conv", "patch_embed.conv1", None),
        row("conv", "patch_embed.conv2", None),
        row("conv", "levels.#.downsample.conv", None),
        Row("conv", f"{block}.dcn.dw_conv", f"{block}.dcn.dw_conv.0", None),
        *(
            row("linear", f"levels.#.blocks.#.dcn.{name}", None)
            for name in ("offset", "mask", "input_proj", "output_proj")
        ),
        *(
            row("array", f"levels.#.blocks.#.dcn.center_feature_scale_proj_{name}", None)
            for name in ("weight", "bias")
        ),
    ]
    # ---- ConvNeXt: in the stem the norm comes second, in the other down-samplings first
    hf_stage = "encoder.stages.{}.downsampling_layer.{}"
    for i in range(4):
        first, second = ("conv", "norm") if i == 0 else ("norm", "conv")
        stem = ("embeddings.patch_embeddings", "embeddings.layernorm")
        names = stem if i == 0 else tuple(hf_stage.format(i, j) for j in range(2))
        rows += [
            row(first, f"downsample_layers.{i}.0", names[0]),
            row(second, f"downsample_layers.{i}.1", names[1]),
        ]
    stage, hf_layer = "stages.#.#", "encoder.stages.#.layers.#"
    rows += [
        row("array", f"{stage}.gamma", f"{hf_layer}.layer_scale_parameter"),
        row("conv", f"{stage}.dwconv", f"{hf_layer}.dwconv"),
        row("norm", f"{stage}.norm", f"{hf_layer}.layernorm"),
        row("linear", f"{stage}.pwconv1", f"{hf_layer}.pwconv1"),
        row("linear", f"{stage}.pwconv2", f"{hf_layer}.pwconv2"),
    ]
    # ---- ResNet
    convolutions = [("stem.conv1", "embedder.embedder")]
    for i in range(4):
        place, hf_place = f"res{i + 2}.#", f"encoder.stages.{i}.layers.#"
        convolutions += [(f"{place}.conv{j + 1}", f"{hf_place}.layer.{j}") for j in range(3)]
        convolutions.append((f"{place}.shortcut", f"{hf_place}.shortcut"))
    for name, hf_name in convolutions:
        rows += [
            row("conv", name, f"{hf_name}.convolution"),
            row("batch_norm", f"{name}.norm", f"{hf_name}.normalization"),
        ]
    return rows


def _vit() -> list[Row]:
    """DINOv2 and DINOv3, as `weights.vit` brings their files under these names; and the pyramid."""
    block = "blocks.#"
    kinds = {
        "array": (
            *("cls_token", "pos_embed", "register_tokens"),
            *(f"{block}.{name}.gamma" for name in ("ls1", "ls2")),
        ),
        "norm": ("norm", f"{block}.norm1", f"{block}.norm2", "pyramid.norm"),
        "linear": (
            *(f"{block}.attn.{name}" for name in ("q", "k", "v", "proj")),
            *(f"{block}.mlp.{name}" for name in ("fc1", "fc2", "w1", "w2", "w3")),
            *(f"pyramid.{name}.proj" for name in ("quarter1", "quarter2", "eighth")),
        ),
    }
    places = ((kind, f"backbone.{name}") for kind, found in kinds.items() for name in found)
    return [Row(kind, name, name, None) for kind, name in places]


TABLE: tuple[Row, ...] = (*_head(), *_text(), *_backbones(), *_vit())

# Tensors that hold nothing of their own: computed from the settings, or counters.
DERIVED = {
    "official": (
        r"backbone\.layers\.\d+\.blocks\.\d+\.attn\.(relative_position_index|attn_mask)",
        r"backbone\.layers\.\d+\.blocks\.\d+\.attn_mask",
        r"backbone\.(rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask)",
        r"criterion\.empty_weight",
        r".*\.num_batches_tracked",
    ),
    "hugging_face": (
        r".*\.attention\.self\.relative_position_index",
        r"criterion\.empty_weight",
        r".*\.num_batches_tracked",
        # Release 5 gives its Swin a final norm that OneFormer does not use.
        r"model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)",
    ),
}


class Group(NamedTuple):
    """Arrays that correspond: one of ours to one or several of a file, or several to one.

    Attributes:
      kind: see `Row`.
      ours: names of our arrays.
      theirs: names of the file's tensors.
    """

    kind: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    def to_ours(self, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns our arrays from the file's tensors, as views where that is possible."""
        tensor = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, 0)
        if self._transposed:
            tensor = tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)
        return np.split(tensor, len(self.ours), -1) if len(self.ours) > 1 else [tensor]

    def to_theirs(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the inverse of `to_ours`."""
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)
        if self._transposed:
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        return np.split(array, len(self.theirs), 0) if len(self.theirs) > 1 else [array]

    def our_shapes(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
        """Shapes of our arrays for tensors of these shapes; None if they make no such arrays."""
        first = shapes[0]
        rank = {"linear": (2,), "conv": (4,)}.get(self.kind) if self._transposed else None
        if rank and len(first) not in rank:
            return None
        if any(shape != first for shape in shapes):
            return None
        if len(shapes) > 1:
            first = (first[0] * len(shapes), *first[1:])
        if self._transposed:
            first = first[::-1] if len(first) == 2 else (*first[2:], first[1], first[0])
        count = len(self.ours)
        if count == 1:
            return [first]
        if not first or first[-1] % count:
            return None
        return [(*first[:-1], first[-1] // count)] * count

    @property
    def _transposed(self) -> bool:
        """Linear and convolution weights; their biases are the same everywhere."""
        return self.kind in ("linear", "conv") and self.ours[0].endswith(".kernel")


def _expand(pattern: str) -> list[str]:
    """The names that brackets list, or the pattern itself."""
    if "[" not in pattern:
        return [pattern]
    before, inner, after = re.split(r"[\[\]]", pattern)
    return [before + one + after for one in inner.split("|")]


def _join(module: str, leaf: str) -> str:
    return module + leaf if not leaf or module.endswith("_") else f"{module}.{leaf}"


class _Pattern(NamedTuple):
    """A row and a leaf, seen from the side of `regex`."""

    regex: re.Pattern
    group: Group  # with "#" for the indices


def _key(name: str) -> str:
    """The name with "#" for every index, whether the table spells it out or not."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


@functools.cache
def _patterns(side: str, target: str, backbone: str | None) -> dict[str, list[_Pattern]]:
    """Patterns of names on `side` ("ours" or a format) for conversions with `target`, by key."""
    found: dict[str, list[_Pattern]] = {}
    for row in TABLE:
        theirs = getattr(row, target)
        other = side == "ours" and row.backbone not in (None, backbone)
        if theirs is None or other:
            continue
        for our_leaf, their_leaf in _LEAVES[row.kind].items():
            group = Group(
                row.kind,
                tuple(_join(name, our_leaf) for name in _expand(row.ours)),
                tuple(_join(name, their_leaf) for name in _expand(theirs)),
            )
            for name in group.ours if side == "ours" else group.theirs:
                regex = re.compile(re.escape(name).replace(r"\#", r"(\d+)"))
                found.setdefault(_key(name), []).append(_Pattern(regex, group))
    return found


def group_of(name: str, side: str, target: str, backbone: str | None = None) -> Group | None:
    """Returns the correspondence that `name` belongs to.

    Args:
      name: of an array.
      side: whose name it is: "ours", or `target`.
      target: one of `FORMATS`.
      backbone: kind of the model's backbone, needed for names of ours.

    Returns:
      None if the table does not know the name.

    Raises:
      LookupError: several rows claim it: the table is at fault.
    """
    found: dict[Group, None] = {}
    for regex, group in _patterns(side, target, backbone).get(_key(name), ()):
        if match := regex.fullmatch(name):
            filled = (
                tuple(one.replace("#", "{}").format(*match.groups()) for one in names)
                for names in (group.ours, group.theirs)
            )
            found[Group(group.kind, *filled)] = None
    if len(found) > 1:
        raise LookupError(f"{name} is in {len(found)} rows of the table: {list(found)}")
    return next(iter(found), None)


def is_derived(name: str, target: str) -> bool:
    """Tells whether a file's tensor holds nothing of its own and may be left out."""
    return any(re.fullmatch(pattern, name) for pattern in DERIVED[target])


def flatten(tree, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Returns (name, leaf) of a nested dict, the keys joined by dots."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict):
            yield from flatten(value, name)
        else:
            yield name, value
