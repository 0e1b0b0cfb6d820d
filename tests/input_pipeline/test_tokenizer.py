"""Token ids against known CLIP encodings."""

import numpy as np
import pytest

from oneformer_jax import types
from oneformer_jax.input_pipeline import tokenizer

START, END = 49406, 49407


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a semantic photo", [320, 29119, 1550, 1125]),
        ("an instance photo", [550, 34572, 1125]),
        ("a panoptic photo", [320, 1072, 24755, 1125]),
        ("a photo with a road, route", [320, 1125, 593, 320, 1759, 267, 5261]),
    ],
)
def test_known_encodings(text, ids):
    row = tokenizer.tokenize([text])[0]
    expected = np.zeros(77, np.int32)
    expected[: len(ids) + 2] = [START, *ids, END]
    assert row.dtype == np.int32
    np.testing.assert_array_equal(row, expected)


def test_task_tokens_are_those_of_the_model():
    np.testing.assert_array_equal(tokenizer.task_tokens(), types.TASK_TOKENS)


def test_clean_up():
    same = tokenizer.tokenize(
        ["a photo with a window", "a photo with a window ", "  A Photo\twith \n a  WINDOW"]
    )
    np.testing.assert_array_equal(same, same[[0, 0, 0]])


def test_truncation_keeps_the_end_token_last():
    full = tokenizer.tokenize(["a photo with a road, route"])[0]
    cut = tokenizer.tokenize(["a photo with a road, route"], length=5)[0]
    np.testing.assert_array_equal(cut, [*full[:4], END])
    long = tokenizer.tokenize(["photo " * 200])[0]
    assert long.shape == (77,) and long[0] == START and long[-1] == END
    assert (long[1:-1] == 1125).all()


@pytest.mark.parametrize("text", ["café", "salt &amp; pepper", "a &#39; b", "“quoted”", "a\x00b"])
def test_texts_that_clip_would_rewrite_are_errors(text):
    with pytest.raises(ValueError, match="cannot tokenize"):
        tokenizer.tokenize(["road", text])


def test_plain_ampersand_is_fine():
    assert tokenizer.tokenize(["salt & pepper"])[0, 2] != 0


def test_no_texts_and_short_length():
    assert tokenizer.tokenize([]).shape == (0, 77)
    with pytest.raises(ValueError, match="length"):
        tokenizer.tokenize(["road"], length=1)


def test_text_table():
    names = ("road, route", "sky", "window ")
    table = tokenizer.text_table(names)
    road = [START, 320, 1125, 593, 320, 1759, 267, 5261, END]
    assert table.dtype == np.int32 and table.shape == (6, len(road))
    np.testing.assert_array_equal(table[0], road)
    np.testing.assert_array_equal(
        table[2], tokenizer.tokenize(["a photo with a window"])[0, : len(road)]
    )
    # Padding texts in the order of the task ids: panoptic, instance, semantic.
    np.testing.assert_array_equal(table[3, :6], [START, 320, 1072, 24755, 1125, END])
    np.testing.assert_array_equal(table[4, :5], [START, 550, 34572, 1125, END])
    np.testing.assert_array_equal(table[5, :6], [START, 320, 29119, 1550, 1125, END])


@pytest.mark.parametrize(
    ("template", "things", "stuff"),
    [
        ("a photo with a {CLS}", None, "a photo with a {}"),
        ("{CLS}", None, "{}"),
        ("a photo with a {CLS} {TYPE}", "a photo with a {} thing", "a photo with a {} stuff"),
        ("{TYPE}: {CLS}", "thing: {}", "stuff: {}"),
    ],
)
def test_text_table_of_a_template(template, things, stuff):
    names = ("road, route", "sky")
    texts = [stuff.format(name) for name in names]
    texts += ["a panoptic photo", "an instance photo", "a semantic photo"]
    texts += [things.format(name) for name in names] if things else []
    table = tokenizer.text_table(names, template)
    np.testing.assert_array_equal(table, tokenizer.tokenize(texts)[:, : table.shape[1]])
    assert tokenizer.names_type(template) == bool(things)


@pytest.mark.parametrize("template", ["", "a photo", "{TYPE}", "{CLS} {NAME}", "{CLS", "{CLS}}"])
def test_bad_templates(template):
    with pytest.raises(ValueError, match=r"data\.text_template is .* must hold {CLS}"):
        tokenizer.text_table(["road"], template)


def test_text_table_is_never_longer_than_the_context():
    table = tokenizer.text_table(["photo " * 100])
    assert table.shape == (4, 77) and table[0, -1] == END


def test_detokenize_gives_the_texts_back():
    names = ["road, route", "traffic light", "TV"]
    texts = tokenizer.detokenize(tokenizer.text_table(names))
    assert texts[:3] == [
        "a photo with a road , route",
        "a photo with a traffic light",
        "a photo with a tv",
    ]
    assert texts[3:] == ["a panoptic photo", "an instance photo", "a semantic photo"]
