"""The seam between plain parameters and the model: apart, together, and in two halves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.models import functional
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.initial import ParamKeys
from oneformer_jax.models.oneformer import OneFormer, normalize_images
from oneformer_jax.types import TASK_TOKENS, Features
from tests import tiny


@functools.cache
def model(training=False, dtype="float32", **fields):
    config, how = tiny.model_config(**fields), Execution(dtype=dtype)
    return tiny.random_model(config, how, training=training)


def images(size=2):
    batch = tiny.batch(size=size)
    return batch["image"], batch["image_size"]


def test_an_abstract_model_has_the_shapes_of_a_real_one():
    config = tiny.model_config()
    found = functional.abstract(config, training=True)
    real = jax.eval_shape(
        lambda: functional.split(OneFormer(config, rngs=ParamKeys(), training=True))[1:]
    )
    assert jax.tree.structure(found[1:]) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(found[1:]), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found[1:]))
    hash(found.graph)


def test_a_merged_model_splits_into_its_parts():
    graph, params, stats = model(training=True)
    found = functional.split(functional.merge(graph, params, stats))
    assert found.graph == graph
    assert found.params.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, found[1:], (params, stats))


@pytest.mark.parametrize("query_loss", ["contrastive", "classification", "none"])
@pytest.mark.parametrize("queries", ["task", "learned"])
def test_inference_params_are_those_of_a_model_for_inference(queries, query_loss):
    config = tiny.model_config(queries=queries, query_loss=query_loss)
    training = functional.abstract(config, training=True)
    inference = functional.abstract(config, training=False)
    found = functional.inference_params(training.params)
    assert jax.tree.structure(found) == jax.tree.structure(inference.params)
    assert set(functional.ENCODER_PARTS) < set(found)
    expected = {
        "contrastive": set(functional.TEXT_PARTS),
        "classification": {"query_class"},
        "none": set(),
    }[query_loss]
    missing = set(training.params) - set(found)
    assert missing == (set() if queries == "learned" else expected)


@pytest.mark.parametrize("fields", [{}, {"queries": "learned"}, {"dtype": "bfloat16"}])
def test_encoding_and_decoding_are_the_model(fields):
    graph, params, stats = model(**fields)
    image = normalize_images(*map(jnp.asarray, images()))
    tokens = jnp.asarray(TASK_TOKENS[:2])

    @jax.jit
    def both(params, stats):
        whole = functional.merge(graph, params, stats)(image, tokens)
        features = functional.encode(graph, params, stats, image)
        return features, functional.decode(graph, params, stats, features, tokens), whole

    features, predictions, whole = both(params, stats)
    assert isinstance(features, Features)
    assert features.mask_features.shape == (2, 16, 16, 32)
    assert [x.shape for x in features.maps] == [(2, 2, 2, 32), (2, 4, 4, 32), (2, 8, 8, 32)]
    dtype = jnp.dtype(fields.get("dtype", "float32"))
    assert {x.dtype for x in jax.tree.leaves(features)} == {dtype}
    jax.tree.map(np.testing.assert_array_equal, predictions, whole)


def test_parameters_of_the_text_branch_are_not_read():
    graph = model()[0]
    image = normalize_images(*map(jnp.asarray, images()))

    def run(params, stats):
        features = functional.encode(graph, params, stats, image)
        return functional.decode(graph, params, stats, features, jnp.asarray(TASK_TOKENS[:2]))

    for training in (False, True):
        predictions = jax.eval_shape(run, *model(training=training)[1:])
        assert predictions.class_logits.shape == (4, 2, 7, 6)
        assert predictions.text_queries is None


def test_each_program_reads_its_own_parts_of_the_parameters():
    graph, params, stats = model()
    programs = functional.programs(graph)
    features = jax.eval_shape(programs.encode.jitted, params, stats, *images())
    for program, arguments, own in (
        (programs.encode.jitted, images(), set(functional.ENCODER_PARTS)),
        (programs.decode.jitted, (features, TASK_TOKENS[0]), {"predictor", "task_mlp"}),
    ):
        lowered = program.lower(params, stats, *arguments)
        kept = lowered._lowering.compile_args["kept_var_idx"]
        paths = jax.tree_util.tree_leaves_with_path((params, stats, *arguments))
        read = {path[1].key for i, (path, _) in enumerate(paths) if i in kept and path[0].idx == 0}
        assert read == own


def test_the_task_is_the_only_thing_that_a_program_is_told(mesh8):
    """One program for all tasks; parameters are arguments, and sharded ones are gathered."""
    graph, params, stats = model()
    programs = functional.programs(graph, mesh8)
    split = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(("data", "fsdp")))
    arrays = jax.device_put(images(size=8), split)
    spread = jax.tree.map(
        lambda x: jax.device_put(
            x,
            split
            if x.ndim and x.shape[0] % 8 == 0
            else jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec()),
        ),
        params,
    )
    features = programs.encode(spread, stats, *arrays)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(features))
    assert all(x.sharding.shard_shape(x.shape)[0] == 1 for x in jax.tree.leaves(features))
    found = [programs.decode(spread, stats, features, tokens) for tokens in TASK_TOKENS]
    assert (len(programs.encode), len(programs.decode)) == (1, 1)
    assert not np.allclose(found[0][0], found[1][0], atol=1e-3)
    alone = functional.programs(graph)
    expected = alone.decode(
        params, stats, alone.encode(params, stats, *images(size=8)), TASK_TOKENS[0]
    )
    for a, b in zip(found[0], expected, strict=True):
        assert a.sharding.shard_shape(a.shape)[0] == 1
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_kernel_of_the_model_works_on_each_devices_images(mesh8, monkeypatch):
    """The batch reaches it split by a shard_map, which no kernel can do without."""
    from oneformer_jax.kernels.ms_deform_attn import api

    batches = []
    load = api.load

    def recording(implementation):
        assert implementation == "pallas_tpu"

        def run(value, *rest):
            batches.append(value.shape[0])
            return load("xla")(value, *rest)

        return run

    monkeypatch.setattr(api, "load", recording)
    how = Execution(kernels=Kernels(deform_attn="pallas_tpu"))
    graph, params, stats = functional.abstract(tiny.model_config(), how, training=False)
    encode, _ = functional.programs(graph, mesh8)
    split = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(("data", "fsdp")))
    shapes = (((16, 64, 64, 3), jnp.uint8), ((16, 2), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=split) for shape, dtype in shapes]
    encode.lower(params, stats, *arrays)
    assert batches == [2]  # 16 images on 8 devices, one encoder layer
    with pytest.raises(ValueError, match="batch of 12"):
        arrays = [jax.ShapeDtypeStruct((12, *a.shape[1:]), a.dtype) for a in arrays]
        encode.lower(params, stats, *arrays)
