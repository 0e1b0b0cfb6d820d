"""Tables of the supported datasets: class names, thing or stuff, colours, the dataset's own ids.

A class's *contiguous id* is its index in `DatasetInfo.class_names`. Names and order are those of
the official OneFormer repository (Detectron2's metadata), verbatim, because the text branch reads
the names and released weights depend on the order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from oneformer_jax.files import did_you_mean

# A task's index in this tuple is its id in a batch.
TASKS = ("panoptic", "instance", "semantic")


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The class table of a dataset.

    Attributes:
      dataset: name of the dataset.
      class_names: K names, indexed by contiguous class id.
      is_thing: K flags; True for countable classes, whose instances are told apart.
      colors: K RGB triples in 0..255.
      category_ids: K ids that the dataset's own files use.
      ignore_label: value of unlabelled pixels in a semantic map.
    """

    dataset: str
    class_names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    colors: tuple[tuple[int, int, int], ...]
    category_ids: tuple[int, ...]
    ignore_label: int = 255

    def __post_init__(self):
        count = len(self.class_names)
        if count == 0:
            raise ValueError(f"dataset {self.dataset!r} has no classes")
        for field in ("is_thing", "colors", "category_ids"):
            if len(getattr(self, field)) != count:
                raise ValueError(
                    f"dataset {self.dataset!r} has {count} class_names but "
                    f"{len(getattr(self, field))} {field}; give one per class"
                )
        for field in ("class_names", "category_ids"):
            values = getattr(self, field)
            if len(set(values)) != count:
                twice = sorted({str(v) for v in values if values.count(v) > 1})
                raise ValueError(
                    f"dataset {self.dataset!r} repeats {field} {', '.join(twice)}; "
                    "each class needs its own"
                )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def contiguous_ids(self) -> dict[int, int]:
        """Returns the mapping from the dataset's own category id to the contiguous class id."""
        return {category: index for index, category in enumerate(self.category_ids)}


@functools.cache
def _palette_candidates() -> tuple[np.ndarray, np.ndarray]:
    """sRGB grid colours uint8 [C, 3] of medium lightness and some chroma, and their CIELAB."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(1)  # relative to white
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack(
        [
            116 * root[:, 1] - 16,
            500 * (root[:, 0] - root[:, 1]),
            200 * (root[:, 1] - root[:, 2]),
        ],
        -1,
    )
    # Neither black nor white nor grey: such colours vanish on dark or light images.
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    keep = (lab[:, 0] > 38) & (lab[:, 0] < 88) & (chroma > 22) & (chroma < 92)
    return rgb[keep], lab[keep]


_DISTINCT = 1024  # more colours cannot be told apart, and are slow to find


@functools.cache
def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Returns `count` RGB colours, always the same; a longer palette begins with a shorter one.

    Starts with a blue and adds the colour of a fixed grid that is farthest (CIELAB distance) from
    all taken so far. Past `_DISTINCT` the colours repeat.
    """
    if count > _DISTINCT:
        return (palette(_DISTINCT) * -(-count // _DISTINCT))[:count]
    rgb, lab = _palette_candidates()
    taken = [int(np.abs(rgb.astype(int) - (0, 120, 195)).sum(1).argmin())]
    distance = np.full(len(rgb), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, np.square(lab - lab[taken[-1]]).sum(1))
        taken.append(int(distance.argmax()))
    return tuple(tuple(int(c) for c in rgb[i]) for i in taken[:count])


def _make_info(
    dataset: str,
    names: Sequence[str],
    things: Sequence[int],
    category_ids: Sequence[int],
    colors: tuple[tuple[int, int, int], ...] | None = None,
    ignore_label: int = 255,
) -> DatasetInfo:
    """Makes a table from names and the contiguous ids of its things."""
    things = frozenset(things)
    return DatasetInfo(
        dataset=dataset,
        class_names=tuple(names),
        is_thing=tuple(index in things for index in range(len(names))),
        colors=colors or palette(len(names)),
        category_ids=tuple(category_ids),
        ignore_label=ignore_label,
    )


def from_coco_categories(dataset: str, categories: Sequence[dict]) -> DatasetInfo:
    """Builds the table of a COCO-panoptic JSON from its "categories" list.

    As in the official mapping, things come first, then stuff, each in the order of the JSON.

    Args:
      dataset: name of the dataset.
      categories: dicts with id, name, isthing (0 or 1) and, optionally, color [R, G, B], which is
        used only if every category has one.

    Raises:
      ValueError: no category, a missing key, a repeated id or name.
    """
    if not categories:
        raise ValueError(f'dataset {dataset!r}: the JSON\'s "categories" list is empty')
    for category in categories:
        missing = [key for key in ("id", "name", "isthing") if key not in category]
        if missing:
            raise ValueError(
                f"dataset {dataset!r}: category {category} lacks {', '.join(missing)}; a "
                "COCO-panoptic category has id, name and isthing (instance-only JSON files "
                'have no "isthing": dataset.name="coco_instances" reads those)'
            )
    ordered = sorted(categories, key=lambda category: not category["isthing"])
    colors = None
    if all(len(category.get("color") or ()) == 3 for category in ordered):
        colors = tuple(tuple(int(c) for c in category["color"]) for category in ordered)
    return _make_info(
        dataset,
        [str(category["name"]) for category in ordered],
        range(sum(bool(category["isthing"]) for category in ordered)),
        [int(category["id"]) for category in ordered],
        colors=colors,
    )


# fmt: off
_COCO_NAMES = (
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|"
    "stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|"
    "backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|"
    "baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|"
    "bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|"
    "potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|"
    "oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush|"
    "banner|blanket|bridge|cardboard|counter|curtain|door-stuff|floor-wood|flower|fruit|gravel|"
    "house|light|mirror-stuff|net|pillow|platform|playingfield|railroad|river|road|roof|sand|sea|"
    "shelf|snow|stairs|tent|towel|wall-brick|wall-stone|wall-tile|wall-wood|water-other|"
    "window-blind|window-other|tree-merged|fence-merged|ceiling-merged|sky-other-merged|"
    "cabinet-merged|table-merged|floor-other-merged|pavement-merged|mountain-merged|grass-merged|"
    "dirt-merged|paper-merged|food-other-merged|building-other-merged|rock-merged|"
    "wall-other-merged|rug-merged"
)
_COCO_CATEGORY_IDS = (
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70,
    *range(72, 83), *range(84, 91),
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145,
    *range(147, 150), 151, 154, 155, 156, 159, 161, 166, 168, 171, *range(175, 179), 180, 181,
    *range(184, 201),
)
_ADE20K_NAMES = (
    "wall|building|sky|floor|tree|ceiling|road, route|bed|window |grass|cabinet|"
    "sidewalk, pavement|person|earth, ground|door|table|mountain, mount|plant|curtain|chair|car|"
    "water|painting, picture|sofa|shelf|house|sea|mirror|rug|field|armchair|seat|fence|desk|"
    "rock, stone|wardrobe, closet, press|lamp|tub|rail|cushion|base, pedestal, stand|box|"
    "column, pillar|signboard, sign|chest of drawers, chest, bureau, dresser|counter|sand|sink|"
    "skyscraper|fireplace|refrigerator, icebox|grandstand, covered stand|path|stairs|runway|"
    "case, display case, showcase, vitrine|pool table, billiard table, snooker table|pillow|"
    "screen door, screen|stairway, staircase|river|bridge, span|bookcase|blind, screen|"
    "coffee table|toilet, can, commode, crapper, pot, potty, stool, throne|flower|book|hill|bench|"
    "countertop|stove|palm, palm tree|kitchen island|computer|swivel chair|boat|bar|"
    "arcade machine|hovel, hut, hutch, shack, shanty|bus|towel|light|truck|tower|chandelier|"
    "awning, sunshade, sunblind|street lamp|booth|tv|plane|dirt track|clothes|pole|"
    "land, ground, soil|bannister, banister, balustrade, balusters, handrail|"
    "escalator, moving staircase, moving stairway|ottoman, pouf, pouffe, puff, hassock|bottle|"
    "buffet, counter, sideboard|poster, posting, placard, notice, bill, card|stage|van|ship|"
    "fountain|conveyer belt, conveyor belt, conveyer, conveyor, transporter|canopy|"
    "washer, automatic washer, washing machine|plaything, toy|pool|stool|barrel, cask|"
    "basket, handbasket|falls|tent|bag|minibike, motorbike|cradle|oven|ball|food, solid food|"
    "step, stair|tank, storage tank|trade name|microwave|pot|animal|bicycle|lake|dishwasher|"
    "screen|blanket, cover|sculpture|hood, exhaust hood|sconce|vase|traffic light|tray|"
    "trash can|fan|pier|crt screen|plate|monitor|bulletin board|shower|radiator|"
    "glass, drinking glass|clock|flag"
)
_ADE20K_THINGS = (
    7, 8, 10, 12, 14, 15, 18, 19, 20, 22, 23, 24, 27, 30, 31, 32, 33, 35, 36, 37, 38, 39, 41, 42,
    43, 44, 45, 47, 49, 50, 53, 55, 56, 57, 58, 62, 64, 65, 66, 67, 69, 70, 71, 72, 73, 74, 75, 76,
    78, 80, 81, 82, 83, 85, 86, 87, 88, 89, 90, 92, 93, 95, 97, 98, 102, 103, 104, 107, 108, 110,
    111, 112, 115, 116, 118, 119, 120, 121, 123, 124, 125, 126, 127, 129, 130, 132, 133, 134, 135,
    136, 137, 138, 139, 142, 143, 144, 146, 147, 148, 149,
)
_CITYSCAPES_NAMES = (
    "road|sidewalk|building|wall|fence|pole|traffic light|traffic sign|vegetation|terrain|sky|"
    "person|rider|car|truck|bus|train|motorcycle|bicycle"
)
_CITYSCAPES_COLORS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
)
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_MAPILLARY_NAMES = (
    "Bird|Ground Animal|Curb|Fence|Guard Rail|Barrier|Wall|Bike Lane|Crosswalk - Plain|Curb Cut|"
    "Parking|Pedestrian Area|Rail Track|Road|Service Lane|Sidewalk|Bridge|Building|Tunnel|Person|"
    "Bicyclist|Motorcyclist|Other Rider|Lane Marking - Crosswalk|Lane Marking - General|Mountain|"
    "Sand|Sky|Snow|Terrain|Vegetation|Water|Banner|Bench|Bike Rack|Billboard|Catch Basin|"
    "CCTV Camera|Fire Hydrant|Junction Box|Mailbox|Manhole|Phone Booth|Pothole|Street Light|Pole|"
    "Traffic Sign Frame|Utility Pole|Traffic Light|Traffic Sign (Back)|Traffic Sign (Front)|"
    "Trash Can|Bicycle|Boat|Bus|Car|Caravan|Motorcycle|On Rails|Other Vehicle|Trailer|Truck|"
    "Wheeled Slow|Car Mount|Ego Vehicle"
)
_MAPILLARY_THINGS = (0, 1, 8, *range(19, 24), *range(32, 43), *range(44, 58), *range(59, 63))
_SYNTHETIC_NAMES = (
    "circle|square|triangle|star|cross|ring|heart|sky|grass|water|brick wall|sand|road"
)
_SYNTHETIC_COLORS = (
    (230, 60, 50), (40, 90, 220), (245, 140, 30), (250, 215, 50), (150, 70, 200), (30, 190, 170),
    (240, 95, 165), (120, 195, 245), (85, 170, 60), (35, 120, 165), (170, 80, 60), (225, 195, 140),
    (110, 110, 125),
)
# fmt: on

COCO = _make_info("coco", _COCO_NAMES.split("|"), range(80), _COCO_CATEGORY_IDS)
ADE20K = _make_info("ade20k", _ADE20K_NAMES.split("|"), _ADE20K_THINGS, range(150))
CITYSCAPES = _make_info(
    "cityscapes", _CITYSCAPES_NAMES.split("|"), range(11, 19), _CITYSCAPES_IDS, _CITYSCAPES_COLORS
)
MAPILLARY = _make_info(
    "mapillary", _MAPILLARY_NAMES.split("|"), _MAPILLARY_THINGS, range(1, 66), ignore_label=65
)
# The rendered scenes of builders/synthetic.py. The ids have gaps, as COCO's do, so that the default
# dataset exercises the mapping from category to contiguous id.
SYNTHETIC = _make_info(
    "synthetic", _SYNTHETIC_NAMES.split("|"), range(7), (*range(1, 8), *range(101, 107)),
    _SYNTHETIC_COLORS,
)  # fmt: skip

_TABLES = {info.dataset: info for info in (COCO, ADE20K, CITYSCAPES, MAPILLARY, SYNTHETIC)}


def dataset_info(name: str) -> DatasetInfo:
    """Finds the table coco, ade20k, cityscapes, mapillary or synthetic; else a ValueError."""
    if name not in _TABLES:
        hint = did_you_mean(str(name).lower(), _TABLES)
        raise ValueError(
            f"unknown dataset {name!r}{hint}; the tables are {', '.join(sorted(_TABLES))}. For "
            "your own classes use the categories of a COCO-panoptic JSON (from_coco_categories)"
        )
    return _TABLES[name]
