"""The recipes: every variant builds, has the published values and the published parameters."""

import dataclasses
import functools
import importlib
import inspect
import pathlib
import re

import jax
import pytest

from oneformer_jax import catalogue, config_rules
from oneformer_jax.configs import common
from oneformer_jax.eval import predict
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.eval.tta import TtaConfig
from oneformer_jax.input_pipeline import datasets, eval_loader, loader, transforms
from oneformer_jax.models import backbones, functional
from oneformer_jax.models.execution import Execution, Kernels
from oneformer_jax.models.losses import LossConfig
from oneformer_jax.models.matcher import MatcherConfig
from oneformer_jax.models.oneformer import OneFormerConfig
from oneformer_jax.train import settings
from oneformer_jax.train.optim import OptimConfig
from oneformer_jax.weights import architecture

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "weights.md"
DATASETS = ("coco", "ade20k", "cityscapes", "mapillary")
RECIPES = {name: importlib.import_module(f"oneformer_jax.configs.{name}") for name in DATASETS}
VARIANTS = [(model.dataset, model.variant) for model in catalogue.MODELS]
OTHERS = [(model.dataset, model.variant) for model in catalogue.UNPUBLISHED]

every_variant = pytest.mark.parametrize(
    ("dataset", "variant"), VARIANTS, ids=[":".join(names) for names in VARIANTS]
)


def recipe(dataset, variant):
    return RECIPES[dataset].get_config(variant).lock()


@functools.cache
def model(dataset, variant):
    return settings.model_config(recipe(dataset, variant), catalogue.NUM_CLASSES[dataset])


def test_every_model_of_the_catalogue_has_a_recipe_and_the_other_way_round():
    recipes = [(name, variant) for name, recipe in RECIPES.items() for variant in recipe.VARIANTS]
    assert sorted(VARIANTS + OTHERS) == sorted(recipes)
    assert len(set(recipes)) == len(recipes)


@pytest.mark.parametrize(("dataset", "variant"), OTHERS)
def test_a_recipe_of_a_vision_transformer_fine_tunes_it(dataset, variant):
    config = recipe(dataset, variant)
    assert model(dataset, variant).backbone == backbones.backbone_config(variant)
    assert config_rules.find_faults(config) == []
    rates = settings.optim_config(config)
    assert rates.backbone_multiplier == 1
    assert 0.6 < rates.layer_decay < 0.8
    assert all(0 < step < rates.steps for step in rates.boundary_steps)
    assert config.model.dtype == "bfloat16"
    assert config.model.remat == variant.endswith("large")


@every_variant
def test_a_recipe_trains_and_tests_the_model_of_its_name(dataset, variant):
    row = catalogue.named(f"{dataset}:{variant}")
    assert model(dataset, variant) == OneFormerConfig.published(row.name)
    settings = recipe(dataset, variant).eval
    for name in ("short_edge", "max_size", "object_mask_threshold", "overlap_threshold", "topk"):
        assert settings[name] == getattr(row, name), name


@pytest.mark.parametrize(
    ("name", "kernel", "first", "last"),
    [
        ("coco:dinat_large", 11, (1, 20, 1), (1, 2, 1, 2, 1)),
        ("mapillary:dinat_large", 11, (1, 20, 1), (1, 2, 1, 2, 1)),
        ("ade20k:dinat_large,res=640", 11, (1, 20, 1), (1, 2, 1, 2, 1)),
        ("ade20k:dinat_large,res=896", 11, (1, 20, 1), (1, 2, 1, 2, 1)),
        ("ade20k:dinat_large,res=1280", 11, (1, 28, 1), (1, 3, 1, 3, 1)),
        ("ade20k:dinat_large,res=1280,pretrain=coco", 11, (1, 28, 1), (1, 3, 1, 3, 1)),
        ("cityscapes:dinat_large", 7, (1, 18, 1), (1, 2, 1, 2, 1)),
    ],
)
def test_kernels_and_dilations(name, kernel, first, last):
    backbone = model(*name.split(":")).backbone
    assert backbone.kernel_size == kernel
    assert (backbone.dilations[0], backbone.dilations[-1]) == (first, last)


# Dataclasses below the config, the group of their fields, and fields of another key ("" is none).
BELOW = (
    (OneFormerConfig, "model", {}),
    (Execution, "model", {"kernels": ""}),
    (Kernels, "kernels", {}),
    (LossConfig, "loss", {"matcher": "", "max_logit_scale": ""}),
    (MatcherConfig, "matcher", {}),
    (OptimConfig, "optim", {}),
    (
        PostprocessConfig,
        "eval",
        dict.fromkeys(
            ("things_only_instances", "instance_score_threshold", "ade_instance_remap"), ""
        ),
    ),
    (TtaConfig, "eval.tta", {}),
    (transforms.AugmentConfig, "data.augment", {"crop_size": "data.crop_size"}),
    (loader.LoaderConfig, "data", {"seed": "seed", "text_types": ""}),
    (
        eval_loader.EvalLoaderConfig,
        "eval",
        {
            "skip_broken": "data.skip_broken",
            **dict.fromkeys(("tta_short_edges", "tta_max_size", "num_threads", "prefetch"), ""),
        },
    ),
)


@pytest.mark.parametrize(("below", "group", "others"), BELOW, ids=[b[0].__name__ for b in BELOW])
def test_no_default_differs_from_the_one_of_the_config(below, group, others):
    base = dict(config_rules.flat(common.get_base()))
    fields = {f.name: f.default for f in dataclasses.fields(below)}
    assert others.keys() <= fields.keys()
    for name, default in fields.items():
        key = others.get(name, f"{group}.{name}")
        if key and default is not dataclasses.MISSING:
            assert default == base[key], key


def test_a_segmenter_is_used_at_the_test_size_of_the_config():
    size = inspect.signature(predict.Segmenter).parameters["test_size"].default
    settings = common.get_base().eval
    assert size == (settings.short_edge, settings.max_size)


@every_variant
def test_every_recipe_is_accepted_by_what_reads_it(dataset, variant):
    config = recipe(dataset, variant)
    assert set(config) == set(common.get_base())
    assert datasets.dataset_info(dataset).num_classes == catalogue.NUM_CLASSES[dataset]
    assert config.dataset.name == dataset
    assert config.data.batch_size == 16
    settings.loss_config(config)
    settings.optim_config(config)
    augment = transforms.AugmentConfig(crop_size=config.data.crop_size, **config.data.augment)
    loader.LoaderConfig(
        batch_size=16,
        num_slots=config.data.num_slots,
        num_texts=model(dataset, variant).num_texts,
        augment=augment,
        semantic_prob=config.data.semantic_prob,
        instance_prob=config.data.instance_prob,
        num_workers=config.data.workers,
        num_threads=config.data.threads,
        prefetch=config.data.prefetch,
    )


SMALL = {"resnet50", "swin_tiny"}


@every_variant
def test_published_values(dataset, variant):
    """Spec of the official configs: what differs from row to row."""
    config, backbone = recipe(dataset, variant), variant.split(",")[0]
    pretrained = dataset == "ade20k" and "pretrain=coco" in variant
    internimage = backbone == "internimage_huge"
    small_queries = (dataset == "coco" or backbone in SMALL or pretrained) and not internimage
    assert config.model.num_queries == (150 if small_queries else 250)
    exact = backbone == "dinat_large" or (dataset, backbone) == ("coco", "swin_large")
    exact |= internimage and (dataset == "coco" or pretrained)
    assert config.model.hidden_dim == (1024 if "head=1024" in variant else 256)
    assert config.model.remat == internimage
    assert config.model.dtype == ("float32" if exact else "bfloat16")
    assert config.model.num_context == 16
    optim = config.optim
    lr = 1e-4
    if "head=1024" in variant:
        lr = 2e-5 if dataset == "mapillary" else 4e-5
    assert (optim.lr, optim.backbone_multiplier, optim.weight_decay) == (lr, 0.1, 0.05)
    assert (optim.clip_norm, optim.warmup_steps, optim.ema_decay) == (0, 0, 0)
    assert optim.schedule == ("step" if dataset == "coco" else "poly")
    assert config.data.augment.kind == ("lsj" if dataset == "coco" else "unified")
    probabilities = (config.data.semantic_prob, config.data.instance_prob)
    never_instance = dataset == "mapillary" and "for=cityscapes" not in variant
    assert probabilities == ((0.5, 0.0) if never_instance else (0.33, 0.33))
    if backbone == "resnet50":
        trained = dataset in ("cityscapes", "mapillary")
        assert model(dataset, variant).backbone.norm == ("batch" if trained else "frozen")
    else:
        rates = {"swin": 0.3, "convnext": 0.4, "dinat": 0.3, "internimage": 0.5}
        assert model(dataset, variant).backbone.drop_path_rate == rates[backbone.split("_")[0]]


@pytest.mark.parametrize(
    ("dataset", "variant", "steps", "boundaries"),
    [
        ("coco", "resnet50", 368_750, (327_778, 355_092)),
        ("coco", "swin_tiny", 368_750, (327_778, 355_092)),
        ("coco", "swin_large", 737_500, (655_556, 735_184)),
        ("coco", "dinat_large", 737_500, (655_556, 710_184)),
        ("coco", "internimage_huge", 737_500, (655_556, 735_184)),
        ("ade20k", "swin_large", 160_000, None),
        ("cityscapes", "swin_large", 90_000, None),
        ("mapillary", "swin_large", 300_000, None),
    ],
)
def test_length_and_steps(dataset, variant, steps, boundaries):
    config = recipe(dataset, variant)
    optim = settings.optim_config(config)
    assert optim.steps == steps
    if boundaries:
        assert optim.boundary_steps == boundaries
        with config.unlocked():  # a shorter run keeps the shape of the schedule
            config.train.steps = steps // 10
        short = settings.optim_config(config).boundary_steps
        assert short == tuple(round(b / 10) for b in boundaries)


@pytest.mark.parametrize(
    ("name", "crop", "edges", "max_size"),
    [
        (
            "ade20k:swin_tiny",
            (512, 512),
            "256 307 358 409 460 512 563 614 665 716 768 819 870 921 972 1024",
            2048,
        ),
        (
            "ade20k:swin_large",
            (640, 640),
            "320 384 448 512 576 640 704 768 832 896 960 1024 1088 1152 1216 1280",
            2560,
        ),
        (
            "ade20k:swin_large,res=896",
            (896, 896),
            "448 537 627 716 806 896 985 1075 1164 1254 1344 1433 1523 1612 1702 1792",
            3584,
        ),
        (
            "cityscapes:internimage_huge,head=1024",
            (896, 896),
            "448 537 627 716 806 896 985 1075 1164 1254 1344 1433 1523 1612 1702 1792",
            3584,
        ),
        (
            "ade20k:swin_large,res=1280",
            (1280, 1280),
            "640 768 896 1024 1152 1280 1408 1536 1664 1792 1920 2048 2176 2304 2432 2560",
            5120,
        ),
        (
            "cityscapes:swin_large",
            (512, 1024),
            "512 614 716 819 921 1024 1126 1228 1331 1433 1536 1638 1740 1843 1945 2048",
            4096,
        ),
        (
            "mapillary:swin_large",
            (1024, 1024),
            "1024 1228 1433 1638 1843 2048 2252 2457 2662 2867 3072 3276 3481 3686 3891 4096",
            8192,
        ),
    ],
)
def test_sizes_of_training_images(name, crop, edges, max_size):
    data = recipe(*name.split(":")).data
    augment = transforms.AugmentConfig(crop_size=data.crop_size, **data.augment)
    assert tuple(augment.crop_size) == crop
    assert augment.short_edges() == tuple(int(edge) for edge in edges.split())
    assert augment.max_size == max_size


@pytest.mark.parametrize(
    ("name", "edges", "max_size"),
    [
        ("ade20k:resnet50", "256 384 512 640 768 896", 3584),
        ("ade20k:swin_large", "320 480 640 800 960 1120", 4480),
        ("ade20k:dinat_large,res=896", "448 678 896 1120 1344 1568", 6272),
        ("ade20k:dinat_large,res=1280", "640 960 1280 1600 1920 2240", 8960),
        ("cityscapes:swin_large", "512 768 1024 1280 1536 1792", 4096),
        ("cityscapes:internimage_huge,head=1024", "448 678 896 1120 1344 1568", 6272),
        ("mapillary:swin_large", "512 768 1024 1280 1536 1792", 4096),
    ],
)
def test_sizes_of_test_time_augmentation(name, edges, max_size):
    settings = recipe(*name.split(":")).eval
    assert TtaConfig.from_settings(settings.tta, settings.short_edge) == TtaConfig(
        tuple(int(edge) for edge in edges.split()), max_size
    )


def test_variants_are_named_freely_but_must_exist():
    rows = {"a,res=1": 1, "a,res=2": 2, "a,res=2,from=x": 3, "b": 4}

    def select(variant):
        return common.select("configs/x.py", variant, rows)

    assert select("a") == ("a", 1)
    assert select("a,res=2") == ("a", 2)
    assert select("a,from=x,res=2") == select("a, from=x") == ("a", 3)
    assert select("b") == ("b", 4)
    for wrong in ("", "c", "a,res=3", "b,res=1", "a,", "a,from=x,res=1"):
        with pytest.raises(ValueError, match=r"configs/x.py has no variant") as error:
            select(wrong)
        assert str(error.value).endswith("it has a,res=1 | a,res=2 | a,res=2,from=x | b")


@pytest.mark.parametrize("dataset", DATASETS)
def test_unknown_variants_list_the_known(dataset):
    with pytest.raises(ValueError, match=f"configs/{dataset}.py has no variant 'swin_huge'") as e:
        RECIPES[dataset].get_config("swin_huge")
    assert all(variant in str(e.value) for variant in RECIPES[dataset].VARIANTS)
    with pytest.raises(ValueError, match="'swin_large,res=9'"):
        RECIPES[dataset].get_config("swin_large,res=9")


# ---------------------------------------------------------------- parameters


@functools.cache
def _millions(config: OneFormerConfig) -> tuple[float, float]:
    """Trained parameters in millions, to the third decimal: with and without the text branch."""
    params = functional.abstract(config, training=True).params
    trees = (params, functional.inference_params(params))
    counts = (sum(x.size for x in jax.tree.leaves(tree)) for tree in trees)
    return tuple(round(count / 1e6, 3) for count in counts)


# With and without the text branch, of every architecture whose total is known.
TOTALS = {
    "coco:resnet50": (64.824, 47.281),
    "coco:swin_tiny": (68.275, 50.732),
    "coco:swin_large": (236.324, 218.781),
    "ade20k:swin_large": (236.354, 218.811),
    "ade20k:convnext_large": (237.386, 219.843),
    "ade20k:convnext_xlarge": (389.550, 372.007),
    "ade20k:dinat_large": (240.763, 223.220),
    "cityscapes:dinat_large": (240.528, 222.985),
    "cityscapes:internimage_huge": (1114.733, 1097.190),
    "coco:internimage_huge,head=1024": (1477.467, 1349.100),
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name):
    config = model(*name.split(":"))
    assert _millions(config) == TOTALS[name]


@every_variant
def test_every_recipe_builds_with_the_total_of_its_backbone(dataset, variant):
    """Models of one backbone differ by classes, queries and a trained norm alone."""
    config, backbone = model(dataset, variant), variant.split(",")[0]
    exact = f"{dataset}:{variant}"
    wide = "head=1024" in variant
    same = [n for n in TOTALS if f":{backbone}" in n and ("head=1024" in n) == wide]
    name = exact if exact in TOTALS else same[0]
    other = model(*name.split(":"))
    expected = TOTALS[name][0]
    expected += 1e-6 * (config.num_classes - other.num_classes) * (config.hidden_dim + 1)
    expected += 1e-6 * (config.num_queries - other.num_queries) * config.hidden_dim
    if backbone == "resnet50" and config.backbone != other.backbone:
        assert (other.backbone.norm, config.backbone.norm) == ("frozen", "batch")
        expected += 23.508 - 23.455
    assert _millions(config)[0] == pytest.approx(expected, abs=1.1e-3)


# ---------------------------------------------------------------- the table of published models


def _names(found):
    return [m.variant for m in found]


def test_find_gives_the_models_with_the_same_tensors():
    swin = OneFormerConfig.published("ade20k:swin_large,res=640")
    found = architecture.find(swin)
    assert _names(found) == ["swin_large,res=640", "swin_large,res=896", "swin_large,res=1280"]
    assert {m.dataset for m in found} == {"ade20k"}
    # What tensors do not show plays no part.
    other = dataclasses.replace(
        swin,
        backbone=dataclasses.replace(swin.backbone, drop_path_rate=0.0),
        num_context=20,
        query_init_dropout=0.0,
        text_layers=3,
    )
    assert architecture.find(other) == found
    dinat = model("ade20k", "dinat_large")
    assert len(architecture.find(dinat)) == 3
    assert _names(architecture.find(dinat, "1280x1280_250_16_dinat_l_oneformer_ade20k_160k")) == [
        "dinat_large,res=1280"
    ]
    frozen = dataclasses.replace(
        OneFormerConfig.published("cityscapes:resnet50"),
        backbone=OneFormerConfig.published("coco:resnet50").backbone,
    )
    assert _names(architecture.find(frozen)) == ["resnet50"]
    assert architecture.find(frozen)[0].config == "configs/cityscapes.py:resnet50"
    for change in ({"num_queries": 100}, {"num_classes": 151}, {"decoder_layers": 6}):
        assert architecture.find(dataclasses.replace(swin, **change)) == ()


def test_find_goes_by_the_name_of_the_file_where_tensors_do_not_decide():
    swin = OneFormerConfig.published("ade20k:swin_large,res=640")
    name = "896x896_250_16_swin_l_oneformer_ade20k_160k"
    for file in (name, f"{name}.pth", f"weights/{name}.pth", f"C:\\weights\\{name}.pth"):
        assert _names(architecture.find(swin, file)) == ["swin_large,res=896"]
    assert len(architecture.find(swin, "mine.pth")) == 3
    # A name never outweighs the tensors.
    coco = architecture.find(OneFormerConfig.published("coco:swin_large"), f"{name}.pth")
    assert [m.config for m in coco] == ["configs/coco.py:swin_large"]


def test_the_page_on_weights_lists_the_released_files():
    rows = re.findall(r"^\| `(\w+:[^`]+)` \|.* \| ([^|]+) \|$", PAGE.read_text("utf-8"), re.M)
    told = dict(rows)
    assert len(told) == len(rows) > 20
    for model in catalogue.MODELS:
        assert told.pop(model.name, "not released") == (model.file or "not released")
    assert not told, "the page lists models that the catalogue lacks"


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS + OTHERS)
def test_a_recipe_card_lists_its_variants(dataset, variant):
    assert re.search(rf"^  {re.escape(variant)}(  |$)", RECIPES[dataset].__doc__, re.M)


def test_file_names_are_unique():
    files = [m.file for m in catalogue.MODELS if m.file]
    assert len(set(files)) == len(files)
    assert len(files) > 10
