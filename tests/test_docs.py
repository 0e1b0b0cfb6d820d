"""The documentation names only what exists: files, links, config keys, make targets."""

import functools
import importlib
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from oneformer_jax.configs import common

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]

CODE = re.compile(r"^```.*?^```|(?:^ {4}[^\n]*\n)+|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
# KEY and the like are placeholders: keys have no capitals.
OVERRIDE = re.compile(r"--(?:no)?config\.([a-z][a-z0-9_.]*[a-z0-9_])")
TARGET = re.compile(r"(?<![\w-])make +([a-z][a-z-]*)")
PYTHON_FILE = re.compile(r"[\w./-]+\.py\b")
FILE_ENDINGS = (".json", ".jsonl", ".md", ".png", ".py", ".txt")

page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def code(text: str) -> list[str]:
    """Code of a page: fenced and indented blocks, and what stands in backticks."""
    return CODE.findall(text)


def links(text: str) -> list[str]:
    """Targets of the links and pictures of a page that lead nowhere else on the web."""
    found = [a or b for a, b in LINK.findall(CODE.sub("", text))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@functools.cache
def config_keys() -> frozenset[str]:
    """Dotted keys of the base config and of all that start from it, groups included."""

    def walk(config, prefix):
        for name, value in config.items():
            yield prefix + name
            if isinstance(value, ConfigDict):
                yield from walk(value, f"{prefix}{name}.")

    files = [path.stem for path in (ROOT / "configs").glob("[!_]*.py") if path.stem != "common"]
    modules = [importlib.import_module(f"oneformer_jax.configs.{name}") for name in files]
    configs = [common.get_base()]
    for module in modules:
        for variant in getattr(module, "VARIANTS", [None]):
            configs.append(module.get_config(variant) if variant else module.get_config())
    return frozenset(key for config in configs for key in walk(config, ""))


def mentioned_keys(text: str) -> set[str]:
    """Keys in overrides (--config.optim.lr=...), and dotted names of a group (`optim.lr`)."""
    found = set(OVERRIDE.findall(text))
    groups = "|".join(key for key in config_keys() if "." not in key)
    name = re.compile(rf"`((?:{groups})\.[a-z][a-z0-9_.]*)(?:=[^`]*)?`")
    return found | {key for key in name.findall(text) if not key.endswith(FILE_ENDINGS)}


def mentioned_targets(text: str) -> set[str]:
    return {target for piece in code(text) for target in TARGET.findall(piece)}


def mentioned_python_files(text: str) -> set[str]:
    return {file for piece in code(text) for file in PYTHON_FILE.findall(piece)}


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M))


@page
def test_links_lead_to_files_and_headings(page):
    for target in links(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: the link {target} leads nowhere"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{page.name}: no heading {target}"


@page
def test_config_keys_exist(page):
    unknown = mentioned_keys(page.read_text("utf-8")) - config_keys()
    assert not unknown, f"{page.name} names keys that no config has: {unknown}"


@page
def test_make_targets_exist(page):
    unknown = mentioned_targets(page.read_text("utf-8")) - makefile_targets()
    assert not unknown, f"{page.name} names targets that the Makefile lacks: {unknown}"


@page
def test_python_files_exist(page):
    missing = {
        f for f in mentioned_python_files(page.read_text("utf-8")) if not (ROOT / f).exists()
    }
    assert not missing, f"{page.name} names files that do not exist: {missing}"


def test_the_checks_find_what_they_look_for():
    text = (
        "Make sure of [this](data.md#a-b), ![that](x.png) and [the web](https://a.b).\n\n"
        "    make train ARGS='--config.optim.lrr=1'\n\n"
        "```\nmake test-all && python gone/away.py --config.data.workers=0\n```\n"
        "`optim.typo`, `data.workers=0`, `model.json` and `--config.KEY=VALUE`; `make lint`\n"
        "`# no heading`\n\n## The A, B\n\nWe make believe: [so](y.md).\n"
    )
    assert links(text) == ["data.md#a-b", "x.png", "y.md"]
    assert mentioned_keys(text) == {"optim.lrr", "data.workers", "optim.typo"}
    assert mentioned_targets(text) == {"train", "test-all", "lint"}
    assert mentioned_python_files(text) == {"gone/away.py"}
    assert anchors(text) == {"the-a-b"}
    assert {"train", "test", "lint"} <= makefile_targets()
    assert {"seed", "optim", "optim.lr", "model.backbone.name"} <= config_keys()
    assert len(PAGES) >= 5
