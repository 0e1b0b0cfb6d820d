"""CLIP byte-pair token ids of the text list and of the task strings, on the host.

The vocabulary and merges come from `instant-clip-tokenizer`. CLIP's own tokenizer also repairs
broken Unicode (ftfy) and unescapes HTML. Class names need neither; a text that might need it is an
error here, instead of other ids.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence

import instant_clip_tokenizer
import numpy as np

from oneformer_jax import config_rules
from oneformer_jax.input_pipeline.datasets import TASKS

CONTEXT_LENGTH = 77
_ARTICLES = {"panoptic": "a", "instance": "an", "semantic": "a"}
TEXT_TEMPLATE = "a photo with a {CLS}"


@functools.cache
def _tokenizer() -> instant_clip_tokenizer.Tokenizer:
    return instant_clip_tokenizer.Tokenizer()


def _clean(text: str) -> str:
    """Lowers the case and collapses white space; ValueError for a text outside plain ASCII."""
    cleaned = " ".join(text.split()).lower()
    if not (cleaned.isascii() and cleaned.isprintable()) or html.unescape(cleaned) != cleaned:
        raise ValueError(
            f"cannot tokenize {text!r}: only plain ASCII without HTML entities is supported, as "
            "CLIP would rewrite anything else; rename the class in the dataset's category list"
        )
    return cleaned


def tokenize(texts: Sequence[str], length: int = CONTEXT_LENGTH) -> np.ndarray:
    """Returns token ids of CLIP's byte-pair encoding.

    Args:
      texts: n texts.
      length: number of ids per text, at least 2. Longer texts are cut, the end token stays last.

    Returns:
      int32 [n, length]: start token 49406, the text, end token 49407, zeros.

    Raises:
      ValueError: a text that is not plain ASCII or contains an HTML entity.
    """
    if length < 2:
        raise ValueError(f"length is {length}; it must hold the start and the end token")
    if not texts:
        return np.zeros((0, length), np.int32)
    cleaned = [_clean(text) for text in texts]
    return np.asarray(_tokenizer().tokenize_batch(cleaned, context_length=length), np.int32)


def names_type(template: str) -> bool:
    """Tells whether the texts of `template` distinguish things from stuff.

    Raises:
      ValueError: it lacks {CLS}, or has something in braces besides {CLS} and {TYPE}.
    """
    config_rules.require({"data.text_template": template})
    return "{TYPE}" in template


def text_table(class_names: Sequence[str], template: str = TEXT_TEMPLATE) -> np.ndarray:
    """Returns token ids of every text that a text list of a dataset can hold, each once.

    Args:
      class_names: K names in order of contiguous class id, verbatim from the dataset.
      template: text of a segment, with {CLS} for its class and, if wanted, {TYPE} for "thing" or
        "stuff".

    Returns:
      int32 [K + 3, T], or [2K + 3, T] if the template has {TYPE}: row k is the text of class k, as
      stuff; row K + t is the padding text of TASKS[t]; row K + 3 + k is the text of class k as a
      thing. T is the length of the longest, at most 77. Cutting columns of zeros changes nothing:
      the text encoder is causal and reads the end token only.

    Raises:
      ValueError: a bad template, or a text that is not plain ASCII.
    """

    def texts_as(kind: str) -> list[str]:
        return [template.replace("{CLS}", name).replace("{TYPE}", kind) for name in class_names]

    things = texts_as("thing") if names_type(template) else []
    padding = [f"{_ARTICLES[task]} {task} photo" for task in TASKS]
    ids = tokenize([*texts_as("stuff"), *padding, *things])
    return ids[:, : int((ids != 0).sum(axis=1).max())]


def task_tokens() -> np.ndarray:
    """Returns int32 [3, 77]: ids of "The task is {task}" in the order of TASKS."""
    return tokenize([f"The task is {task}" for task in TASKS])


def detokenize(ids: np.ndarray) -> list[str]:
    """Decodes rows of token ids, int [n, T], without start token, end token and padding.

    The texts are in lower case, and may have a blank before a comma.
    """
    tokenizer = _tokenizer()
    start, end = tokenizer.start_of_text(), tokenizer.end_of_text()
    return [
        tokenizer.decode([int(i) for i in row if i not in (0, start, end)]).strip() for row in ids
    ]
