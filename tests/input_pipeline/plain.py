"""The plain way to make a training sample: PIL, one binary mask per segment, texts as strings.

What the fast pipeline is checked against (test_against_plain.py) and timed against
(tests/bench/input.py). It follows the order of the official dataset mappers and draws its random
numbers in the order of `input_pipeline`, so that both make the same sample from the same generator.
"""

import io
import json
import pathlib

import numpy as np
from PIL import Image

from oneformer_jax.input_pipeline import tokenizer

TASKS = ("panoptic", "instance", "semantic")


class PlainFolder:
    """A COCO-panoptic folder, as a loop over its JSON would read it."""

    def __init__(self, images_dir, panoptic_dir, json_path):
        content = json.loads(pathlib.Path(json_path).read_text())
        self.images_dir, self.panoptic_dir = pathlib.Path(images_dir), pathlib.Path(panoptic_dir)
        self.names = {image["id"]: image["file_name"] for image in content["images"]}
        self.annotations = content["annotations"]
        # Contiguous ids: things first.
        ordered = sorted(content["categories"], key=lambda category: not category["isthing"])
        self.category = {category["id"]: k for k, category in enumerate(ordered)}
        self.class_names = [category["name"] for category in ordered]
        self.is_thing = [bool(category["isthing"]) for category in ordered]

    def read(self, index):
        """Image and panoptic picture, uint8 [H, W, 3] each, and the list of segments."""
        annotation = self.annotations[index]
        image = (self.images_dir / self.names[annotation["image_id"]]).read_bytes()
        panoptic = (self.panoptic_dir / annotation["file_name"]).read_bytes()
        return decode(image), decode(panoptic), annotation["segments_info"]


def decode(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def resize(pixels, size, method):
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), method))


def resize_both(image, panoptic, size):
    return (
        resize(image, size, Image.Resampling.BILINEAR),
        resize(panoptic, size, Image.Resampling.NEAREST),
    )


def pad(pixels, size, value):
    padded = np.full((*size, 3), value, np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return padded


def augment_lsj(rng, image, panoptic, crop, scale=(0.1, 2.0)):
    """Flip, large-scale jitter, fixed-size crop with one fraction, padding."""
    if rng.random() < 0.5:
        image, panoptic = image[:, ::-1], panoptic[:, ::-1]
    target = np.multiply(crop, rng.uniform(*scale))
    size = image.shape[:2]
    size = np.round(np.multiply(size, np.min(target / np.array(size)))).astype(int)
    image, panoptic = resize_both(image, panoptic, size)
    offset = np.round(np.maximum(np.subtract(size, crop), 0) * rng.random()).astype(int)
    window = np.s_[offset[0] : offset[0] + crop[0], offset[1] : offset[1] + crop[1]]
    return pad(image[window], crop, 128), pad(panoptic[window], crop, 0)


def augment_unified(rng, image, panoptic, crop, short_edges, max_size):
    """Short edge to one of the sizes, uniform crop, flip, padding; without the colour jitter."""
    short = short_edges[rng.integers(len(short_edges))]
    size = np.array(image.shape[:2]) * (short / min(image.shape[:2]))
    size = size * min(1.0, max_size / size.max())
    size = (size + 0.5).astype(int)
    image, panoptic = resize_both(image, panoptic, size)
    height, width = np.minimum(crop, size)
    top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
    window = np.s_[top : top + height, left : left + width]
    image, panoptic = image[window], panoptic[window]
    if rng.random() < 0.5:
        image, panoptic = image[:, ::-1], panoptic[:, ::-1]
    return pad(image, crop, 128), pad(panoptic, crop, 0)


def color_jitter(rng, image):
    """SSD's colour jitter in floating point, on uint8 [H, W, 3] in BGR order."""
    import cv2

    def scaled(pixels, alpha=1.0, beta=0.0):
        return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def contrast(image):
        return scaled(image, alpha=rng.uniform(0.5, 1.5)) if rng.integers(2) else image

    def saturation(image):
        if not rng.integers(2):
            return image
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = scaled(hsv[..., 1], alpha=rng.uniform(0.5, 1.5))
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)

    def hue(image):
        if not rng.integers(2):
            return image
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18, endpoint=True)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)

    if rng.integers(2):
        image = scaled(image, beta=rng.uniform(-32, 32))
    order = (contrast, saturation, hue) if rng.integers(2) else (saturation, hue, contrast)
    for step in order:
        image = step(image)
    return image


def draw_task(rng, semantic_prob=0.33, instance_prob=0.33):
    u = rng.random()
    if u < semantic_prob:
        return "semantic"
    return "instance" if u < semantic_prob + instance_prob else "panoptic"


def make_masks(panoptic, segments, task, category, is_thing):
    """Binary masks bool [N, H, W] and their classes [N]."""
    red, green, blue = panoptic.astype(np.int32).transpose(2, 0, 1)
    ids = red + 256 * green + 65536 * blue
    classes, masks = [], []
    for segment in segments:
        if segment.get("iscrowd", 0):
            continue
        k = category[segment["category_id"]]
        if task == "instance" and not is_thing[k]:
            continue
        mask = ids == segment["id"]
        if not mask.any():
            continue
        if task == "semantic" and k in classes:
            masks[classes.index(k)] |= mask
        else:
            classes.append(k)
            masks.append(mask)
    masks = np.stack(masks) if masks else np.zeros((0, *ids.shape), bool)
    return masks, np.array(classes, int)


def make_texts(classes, task, num_texts, class_names):
    """The text list as strings."""
    article = "an" if task == "instance" else "a"
    texts = [f"{article} {task} photo"] * num_texts
    named = [f"a photo with a {class_names[k]}" for k in sorted(classes)][:num_texts]
    texts[: len(named)] = named
    return texts


def lsj_sample(folder, index, rng, crop, num_texts):
    """A training sample of the COCO recipe."""
    image, panoptic, segments = folder.read(index)
    image, panoptic = augment_lsj(rng, image, panoptic, crop)
    task = draw_task(rng)
    masks, classes = make_masks(panoptic, segments, task, folder.category, folder.is_thing)
    tokens = tokenizer.tokenize(make_texts(classes, task, num_texts, folder.class_names))
    return {"image": image, "masks": masks, "classes": classes, "tokens": tokens, "task": task}
