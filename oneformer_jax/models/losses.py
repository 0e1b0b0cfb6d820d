"""The losses of OneFormer (arXiv 2211.06220): classification, mask, dice, query-text contrast.

Every prediction (the decoder's layers and its input) is matched to the targets and compared with
them on its own. Masks are compared at random points, most of them where the prediction is
uncertain, as in PointRend (arXiv 1912.08193). Two facts keep this small: the targets of an image
never overlap, so they stay one id map; and mask logits are linear in the mask features, so they
are formed only for matched queries, at points ("shared") or for a few slots at a time
("per_mask"). Neither the targets' masks nor the logits of all queries ever exist as maps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from oneformer_jax import config_rules, rules
from oneformer_jax.kernels import dispatch
from oneformer_jax.kernels.point_sampling import sample_features
from oneformer_jax.models import matcher, points
from oneformer_jax.models.execution import Kernels
from oneformer_jax.models.matcher import MatcherConfig
from oneformer_jax.models.points import Purpose
from oneformer_jax.models.slots import sum_over_slots
from oneformer_jax.types import TASKS, Predictions

# "per_mask" forms the logit maps of this many slots at a time.
SLOTS_AT_A_TIME = 8
# "shared" forms the logits at the points of so many, on a processor: few, so that empty slots cost
# nothing; enough that reading the features takes less time than their products.
SHARED_SLOTS_AT_A_TIME = 16


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and sampling of the losses; the defaults are those of `configs/common.py`.

    Attributes:
      class_weight: weight of the cross entropy over classes.
      mask_weight: weight of the binary cross entropy at points.
      dice_weight: weight of the dice loss at points.
      contrastive_weight: weight of the loss on the queries that enter the decoder: the query-text
        contrast, or what the model has in its place.
      no_object_weight: weight of "no object" within the cross entropy.
      num_points: points per mask, P.
      oversample_ratio: candidates per mask, in units of `num_points`.
      importance_ratio: share of the points taken from the most uncertain candidates; the rest is
        drawn afresh.
      point_sampling: "per_mask" draws the candidates of every mask on their own, as the official
        code does; "shared" lets all masks and predictions of an image choose among the same
        candidates, which is faster and gives every mask an estimate of the same distribution.
      max_logit_scale: upper limit of the contrastive scale.
      replica_groups: the class loss is averaged within this many equal, contiguous parts of the
        batch and then over them, as data parallel training with that many workers does.
      matcher: weights of the matching cost.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    contrastive_weight: float = 0.5
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75
    point_sampling: str = "shared"
    max_logit_scale: float = 100.0
    replica_groups: int = 1
    matcher: MatcherConfig = dataclasses.field(default_factory=MatcherConfig)

    def __post_init__(self):
        config_rules.require_fields("loss", self, but=("max_logit_scale", "matcher"))
        scale = {"max_logit_scale": self.max_logit_scale}
        rules.require("loss.", scale, {"max_logit_scale": rules.Number(0, 10_000, above=True)})

    @property
    def num_candidates(self) -> int:
        return int(self.num_points * self.oversample_ratio)

    @property
    def num_uncertain(self) -> int:
        return int(self.num_points * self.importance_ratio)

    @property
    def num_fresh(self) -> int:
        return self.num_points - self.num_uncertain


def compute_losses(
    predictions: Predictions,
    targets: Mapping[str, jax.Array],
    key: jax.Array,
    config: LossConfig,
    *,
    kernels: Kernels = Kernels(),
    mesh: Mesh | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the training loss of a batch.

    Args:
      predictions: what the model computed; its last prediction is the final one.
      targets: segment_map uint8 [B, H, W] (0 = no segment, i + 1 = slot i), classes int32 [B, M],
        valid bool [B, M]; text_ids int32 [B, num_texts] if the predictions hold query classes.
      key: PRNG key of the step; all points are drawn from it.
      config: weights and sampling.
      kernels: the implementations of `points` and `assignment`.
      mesh: the mesh the batch is sharded over, if any (see `matcher.match`).

    Returns:
      The loss, a float32 scalar, and its terms, each already weighted, so that they add up to it:
      loss_ce, loss_mask, loss_dice of the final prediction, the same with _0 .. _{N-2} of the
      earlier ones, and loss_contrastive if the predictions hold text queries, or loss_query_class
      if they hold query classes. One more entry is no loss: matcher_nonfinite, the number of
      matching costs that were not finite.

    Raises:
      ValueError: shapes that do not fit each other or the configuration.
    """
    segment_map, classes, valid = targets["segment_map"], targets["classes"], targets["valid"]
    _check(predictions, segment_map, classes, valid, config)
    num_predictions = predictions.class_logits.shape[0]

    packed = points.pack_targets(segment_map)
    costs = _matching_costs(predictions, packed, classes, key, config, kernels, mesh)
    indices, matched, nonfinite = matcher.match(
        costs, valid, assignment=kernels.assignment, mesh=mesh
    )
    class_losses = _class_losses(predictions.class_logits, classes, indices, matched, config)
    mask_sums = _mask_sums_per_mask if config.point_sampling == "per_mask" else _mask_sums_shared
    mask_losses, dice_losses = mask_sums(
        predictions, packed, indices, matched, key, config, kernels, mesh
    )
    # Workers divide their sums by max(masks / workers, 1) and average over the workers.
    num_masks = jnp.maximum(jnp.sum(valid), config.replica_groups).astype(jnp.float32)

    terms = {}
    for n in range(num_predictions):
        suffix = "" if n == num_predictions - 1 else f"_{n}"
        terms[f"loss_ce{suffix}"] = config.class_weight * class_losses[n]
        terms[f"loss_mask{suffix}"] = config.mask_weight * mask_losses[n] / num_masks
        terms[f"loss_dice{suffix}"] = config.dice_weight * dice_losses[n] / num_masks
    if predictions.text_queries is not None:
        contrast = contrastive_loss(
            predictions.queries,
            predictions.text_queries,
            predictions.logit_scale,
            config.max_logit_scale,
        )
        terms["loss_contrastive"] = config.contrastive_weight * contrast
    if predictions.query_class_logits is not None:
        labels = text_classes(targets["text_ids"], predictions.class_logits.shape[-1] - 1)
        (entropy,) = _cross_entropy(predictions.query_class_logits[None], labels[None], config)
        terms["loss_query_class"] = config.contrastive_weight * entropy
    total = sum(terms.values())
    return total, {**terms, "matcher_nonfinite": nonfinite.astype(jnp.float32)}


def _check(predictions, segment_map, classes, valid, config: LossConfig) -> None:
    batch = predictions.class_logits.shape[1]
    for name, array in (("segment_map", segment_map), ("classes", classes), ("valid", valid)):
        if array.shape[0] != batch:
            raise ValueError(f"{name} holds {array.shape[0]} images, the predictions {batch}")
    if classes.shape != valid.shape:
        raise ValueError(f"classes {classes.shape} and valid {valid.shape} differ in shape")
    if segment_map.dtype != jnp.uint8:
        raise ValueError(f"segment_map has dtype {segment_map.dtype}; it must be uint8")
    if classes.shape[1] > 255:
        raise ValueError(f"{classes.shape[1]} target slots; a uint8 segment_map names at most 255")
    if batch % config.replica_groups:
        raise ValueError(
            f"loss.replica_groups is {config.replica_groups}, which does not divide the batch of "
            f"{batch} images; use a divisor of the batch size"
        )
    if (predictions.text_queries is None) != (predictions.logit_scale is None):
        raise ValueError("text_queries and logit_scale come together: give both or neither")


def _product(queries: jax.Array, rows: jax.Array) -> jax.Array:
    """Mask logits float32 [B, C, P] of queries [B, C, D] at feature rows [B, P, D]."""
    return jnp.einsum("bcd,bpd->bcp", queries, rows, preferred_element_type=jnp.float32)


def _matching_costs(
    predictions, packed, classes, key, config: LossConfig, kernels: Kernels, mesh: Mesh | None
) -> jax.Array:
    """Costs float32 [N, B, Q, M] of all predictions, from uniform points, without gradient."""
    class_logits, mask_embed, features = map(
        lax.stop_gradient,
        (predictions.class_logits, predictions.mask_embed, predictions.mask_features),
    )
    num_predictions, batch = class_logits.shape[:2]
    slots = jnp.arange(classes.shape[1])

    def read(n):
        drawn = points.draw_points(key, Purpose.MATCHING, n, 0, batch, config.num_points)
        rows = sample_features(features, drawn, implementation=kernels.points, mesh=mesh)
        return rows, points.read_targets(packed, drawn[:, None], slots)

    shared = read(0) if config.point_sampling == "shared" else None

    def cost(xs):
        n, class_logits, mask_embed = xs
        rows, masks = shared or read(n)
        logits = _product(mask_embed.astype(jnp.float32), rows)
        return matcher.matching_cost(class_logits, logits, classes, masks, config.matcher)

    return lax.map(cost, (jnp.arange(num_predictions), class_logits, mask_embed))


def _class_losses(class_logits, classes, indices, matched, config: LossConfig) -> jax.Array:
    """Weighted cross entropy of each prediction, float32 [N]; unmatched queries are "no object"."""
    num_queries, num_labels = class_logits.shape[2:]
    no_object = num_labels - 1
    # [N, B, M, Q]: at most one slot points to a query.
    assigned = (indices[..., None] == jnp.arange(num_queries)) & matched[..., None]
    labels = no_object + jnp.sum(
        jnp.where(assigned, classes[None, :, :, None] - no_object, 0), axis=2
    )
    return _cross_entropy(class_logits, labels, config)


def _cross_entropy(logits, labels, config: LossConfig) -> jax.Array:
    """Weighted mean [N] over images and queries of logits [N, B, Q, K+1], labels int32 [N, B, Q].

    The mean is taken within each of the replica groups, and then over them.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    no_object = logits.shape[-1] - 1
    weight = jnp.where(labels == no_object, config.no_object_weight, 1.0)

    def group_sums(x):
        return jnp.sum(x.reshape(len(x), config.replica_groups, -1), axis=-1)

    return jnp.mean(group_sums(weight * entropy) / group_sums(weight), axis=-1)


def text_classes(text_ids: jax.Array, num_classes: int) -> jax.Array:
    """Returns classes int32 of the rows `text_ids` of the table of texts; the padding texts are K.

    The table holds K texts, one per class, then the 3 padding texts, then, if texts name the type
    of a segment, the K texts of the second type.
    """
    last = num_classes + len(TASKS)
    classes = jnp.where(text_ids < last, text_ids, text_ids - last)
    return jnp.where((num_classes <= text_ids) & (text_ids < last), num_classes, classes)


def _point_losses(logits, targets, weight, num_points: int) -> tuple[jax.Array, jax.Array]:
    """Cross entropy and dice loss of each mask, float32 [B, C], from weighted points [B, C, P]."""
    entropy = jnp.sum(weight * (jax.nn.softplus(logits) - logits * targets), axis=-1) / num_points
    probabilities = weight * jax.nn.sigmoid(logits)
    overlap = jnp.sum(probabilities * targets, axis=-1)
    area = jnp.sum(probabilities, axis=-1) + jnp.sum(weight * targets, axis=-1)
    return entropy, 1 - (2 * overlap + 1) / (area + 1)


def _matched_queries(mask_embed: jax.Array, indices: jax.Array) -> jax.Array:
    """Mask embeddings float32 [N, B, M, D] of the matched queries."""
    return jnp.take_along_axis(mask_embed.astype(jnp.float32), indices[..., None], axis=2)


def _mask_sums_shared(
    predictions,
    packed,
    indices,
    matched,
    key,
    config: LossConfig,
    kernels: Kernels,
    mesh: Mesh | None,
):
    """Sums over the matched masks of both mask losses, float32 [N] each, with shared candidates."""
    batch, num_slots = indices.shape[1:]
    drawn = jnp.concatenate(
        [
            points.draw_points(key, purpose, 0, 0, batch, count)
            for purpose, count in (
                (Purpose.CANDIDATES, config.num_candidates),
                (Purpose.FRESH, config.num_fresh),
            )
        ],
        axis=1,
    )
    rows = sample_features(
        predictions.mask_features, drawn, implementation=kernels.points, mesh=mesh
    )
    targets = points.read_targets(packed, drawn[:, None], jnp.arange(num_slots))

    def choose(rows, queries, n, targets):
        logits = _product(queries, rows)[..., : config.num_candidates]
        return points.keep_uncertain(logits, config.num_uncertain)

    def losses(rows, queries, choice, n, targets):
        kept, scale = choice
        fresh = jnp.ones((*scale.shape, config.num_fresh), jnp.float32)
        weight = jnp.concatenate([kept * scale[..., None], fresh], axis=-1)
        return _point_losses(_product(queries, rows), targets, weight, config.num_points)

    # Whether leaving out slots pays on an accelerator is not measured: there it is one product.
    chunk = SHARED_SLOTS_AT_A_TIME if dispatch.platform() == "cpu" else num_slots
    queries = _matched_queries(predictions.mask_embed, indices)
    return sum_over_slots(choose, losses, chunk, matched, rows, queries, targets)


def _mask_sums_per_mask(
    predictions,
    packed,
    indices,
    matched,
    key,
    config: LossConfig,
    kernels: Kernels,
    mesh: Mesh | None,
):
    """Sums over the matched masks of both mask losses, float32 [N] each, each with own points."""
    del kernels  # the maps are read, not the features
    batch, num_slots = indices.shape[1:]
    # float32 here so that the gradients of all chunks add up in float32.
    features = predictions.mask_features.astype(jnp.float32)
    choose_points = functools.partial(points.choose_uncertain, count=config.num_uncertain)
    if mesh is not None:
        # Left to itself, XLA gathers the whole batch on every device to take the top k.
        spec = PartitionSpec(matcher.batch_axes(mesh))
        choose_points = jax.shard_map(
            choose_points, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
        )

    def draw(purpose, n, slots, count):
        def one(slot):
            return points.draw_points(key, purpose, n, slot, batch, count)

        return jax.vmap(one, out_axes=1)(slots)

    def maps_of(features, queries):
        return jnp.einsum("bcd,bhwd->bchw", queries, features)

    def choose(features, queries, n, slots):
        maps = maps_of(features, queries)
        candidates = draw(Purpose.CANDIDATES, n, slots[0], config.num_candidates)
        uncertain = choose_points(points.read_maps(maps, candidates), candidates)
        fresh = draw(Purpose.FRESH, n, slots[0], config.num_fresh)
        return jnp.concatenate([uncertain, fresh], axis=2)

    def losses(features, queries, chosen, n, slots):
        logits = points.read_maps(maps_of(features, queries), chosen)
        targets = points.read_targets(packed, chosen, slots[0])
        return _point_losses(logits, targets, jnp.float32(1), config.num_points)

    queries = _matched_queries(predictions.mask_embed, indices)
    slots = jnp.arange(num_slots)[None]
    chunk = min(SLOTS_AT_A_TIME, num_slots)
    return sum_over_slots(choose, losses, chunk, matched, features, queries, slots)


def contrastive_loss(
    queries: jax.Array, text_queries: jax.Array, logit_scale: jax.Array, max_scale: float = 100.0
) -> jax.Array:
    """Contrasts the images and the texts of the whole batch, in both directions.

    All queries of an image together are one vector, as in the official code; the paper's formula
    reads as one vector per query.

    Args:
      queries: [B, Q, D], the object queries that enter the decoder.
      text_queries: [B, Q, D]; row j belongs to query j.
      logit_scale: scalar, logarithm of the scale of the cosines.
      max_scale: upper limit of the scale.

    Returns:
      float32 scalar; 0 for a batch of one image.
    """

    def unit(x):
        x = x.astype(jnp.float32).reshape(x.shape[0], -1)
        # The floor of PyTorch's normalize, squared.
        return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))

    # Limiting before exp keeps the gradient finite where exp would overflow.
    scale = jnp.exp(jnp.minimum(logit_scale.astype(jnp.float32), math.log(max_scale)))
    # The scale of up to 100 magnifies rounding, and the product is small.
    logits = scale * jnp.matmul(
        unit(queries), unit(text_queries).T, precision=lax.Precision.HIGHEST
    )

    def cross_entropy(logits):
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)))

    return cross_entropy(logits) + cross_entropy(logits.T)
