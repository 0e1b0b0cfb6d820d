"""Files of DINOv2 and DINOv3, official and of `transformers`, under the names of our backbone.

The official files pack query, key and value, and the first two products of a SwiGLU, into one
tensor; `transformers` packs neither, or only the latter. Here every part is a tensor of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from oneformer_jax.files import FileError
from oneformer_jax.models.backbones import ViTConfig
from oneformer_jax.weights import descriptions
from oneformer_jax.weights.pickle_reader import quoted
from oneformer_jax.weights.tensors import Tensor

_PREFIX = r"^(?:(?:dinov\w+|model)\.)?"
_MARK = re.compile(
    rf"{_PREFIX}(?:blocks|(?:encoder\.)?layer)\.0\.(?:ls1\.gamma|layer_scale1\.lambda1)"
)
# In this order; DINOv3's `up_proj` is the second of three products beside a `gate_proj`.
_RENAMED = (
    (rf"{_PREFIX}(?:encoder\.)?layer\.(\d+)\.", r"blocks.\1."),
    (_PREFIX, ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^storage_tokens$", "register_tokens"),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)
_GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
_PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}
_PACKED = {".attn.qkv.": ("q", "k", "v"), ".mlp.w12.": ("w1", "w2")}


class _Config(msgspec.Struct):
    """Fields of a config.json that tensors do not show."""

    model_type: Annotated[str, Meta(max_length=100)] | None = None
    num_attention_heads: int | None = None
    layer_norm_eps: float | None = None
    rope_theta: float | None = None
    hidden_act: str | None = None
    use_gated_mlp: bool = False


def is_vit(names: Iterable[str]) -> bool:
    """Tells whether tensors of these names are a DINOv2 or DINOv3."""
    return any(_MARK.match(name) for name in names)


def canonical(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Returns the tensors by the names of our backbone's rows in `names.TABLE`, unpacked.

    Raises:
      FileError: a mask of biases that is not that of DINOv3, which leaves out the key's.
    """
    words = _GATED if any(".mlp.gate_proj." in name for name in tensors) else _PLAIN
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.mlp\.(\w+_proj)\.", lambda m: f".mlp.{words.get(m[1], m[1])}.", name)
        found |= _unpacked(name, tensor)
    for name, mask in list(found.items()):
        if name.endswith(".attn.qkv.bias_mask"):
            _require_key_mask(name, mask, path)
            # The original multiplies it by zero.
            found.pop(name.replace("qkv.bias_mask", "k.bias"), None)
    return found


def _unpacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The parts of a packed tensor, each read on demand; or the tensor as it is."""
    for packed, parts in _PACKED.items():
        if packed not in name or name.endswith("_mask") or not tensor.shape:
            continue
        rows, rest = divmod(tensor.shape[0], len(parts))
        if rest:
            continue
        place = packed.rsplit(".", 2)[0]

        def part(index: int, rows: int = rows) -> Tensor:
            cut = slice(index * rows, (index + 1) * rows)
            return Tensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[cut])

        return {
            name.replace(packed, f"{place}.{word}."): part(index)
            for index, word in enumerate(parts)
        }
    return {name: tensor}


def _require_key_mask(name: str, mask: Tensor, path: str) -> None:
    size = mask.shape[0] if len(mask.shape) == 1 and mask.shape[0] % 3 == 0 else 0
    values = mask.read() if size else np.zeros(0)
    if not size or not np.array_equal(values, np.repeat([1, 0, 1], size // 3)):
        raise FileError(
            f"{path}: {quoted(name)} is not DINOv3's mask, which is 1 for the biases of queries "
            "and values and 0 for those of keys; take the released file"
        )


def contradictions(
    config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], backbone: Any, path: str
) -> list[str]:
    """Lists what a file notes beside its tensors, and a config has otherwise.

    Args:
      config: the folder's config.json, if there is one.
      tensors: of `canonical`, with "backbone." before their names.
      backbone: config of the model's backbone; one of another kind contradicts nothing.
      path: of the file.

    Raises:
      FileError: a config.json with an unexpected value.
    """
    if not isinstance(backbone, ViTConfig):
        return []
    noted = descriptions.convert(config or {}, _Config, path, "config.json")
    pairs = [
        ("num_attention_heads", noted.num_attention_heads, "num_heads", backbone.num_heads),
        ("layer_norm_eps", noted.layer_norm_eps, "norm_epsilon", backbone.norm_epsilon),
    ]
    if not backbone.positions:
        pairs.append(("rope_theta", noted.rope_theta, "rope_base", backbone.rope_base))
    found = [
        f"{key} is {value} in config.json, {ours} is {own} here"
        for key, value, ours, own in pairs
        if value is not None and value != own
    ]
    act = "silu" if noted.use_gated_mlp else "gelu"
    if noted.hidden_act not in (None, act):
        found.append(f"hidden_act is {quoted(noted.hidden_act)} in config.json, {act} here")
    periods = tensors.get("backbone.rope_embed.periods")
    if periods is not None and not backbone.positions:
        count = backbone.embed_dim // backbone.num_heads // 4
        expected = backbone.rope_base ** (np.arange(count) / count)
        # They are stored as bfloat16.
        if periods.shape != (count,) or not np.allclose(periods.read(), expected, rtol=0.01):
            found.append(
                f"rope_embed.periods are not those of rope_base {backbone.rope_base} and heads of "
                f"{backbone.embed_dim // backbone.num_heads} channels"
            )
    return found
