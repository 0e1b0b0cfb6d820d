"""Every command of the documentation parses: flags, config keys and values, modules, targets.

Nothing is run. Placeholders in capitals (DIR, CONFIG) stand for names of files.
"""

import argparse
import importlib.util
import inspect
import re
import runpy
import shlex
import sys

import pytest

from tests.test_config_rules import parse
from tests.test_docs import PAGES, ROOT, code, makefile_targets

PLACEHOLDERS = {"--config=CONFIG": "--config=synthetic", "--config=...": "--config=synthetic"}
ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)


def words_of_lines(text):
    """The words of each command line, with the variables that a page sets."""
    pieces = (piece.strip("`") if "\n" not in piece else piece for piece in code(text))
    variables = {}
    for piece in pieces:
        # A string may go over lines; what is Python or prose is no command and often no shell.
        joined = re.sub(r"\\\n\s*", " ", piece)
        for line in joined.splitlines():
            if not re.search(r"main\.py|oneformer-jax|python3? -m|make |^\s*[A-Z_]+=", line):
                continue
            words = shlex.split(line, comments=True)
            if len(words) == 1 and (assigned := ASSIGNMENT.fullmatch(words[0])):
                variables[f"${assigned[1]}"] = assigned[2].split()
            # As in a shell: a variable is split at spaces, quotes within it mean nothing.
            yield [part for word in words for part in variables.get(word, [word])]


def commands(text):
    """(program, arguments) of each; the program is "main.py", "make" or a module's name."""
    for words in words_of_lines(text):
        yield from commands_in(words)


def commands_in(words):
    for position, word in enumerate(words):
        rest = words[position + 1 :]
        if re.search(r"\s(python3? main\.py|oneformer-jax) ", word):  # a command within a word
            yield from commands_in(shlex.split(word))
        elif word == "oneformer-jax" and rest:
            yield "main.py", rest
        elif re.fullmatch(r"python3?", word) and rest[:1] == ["main.py"]:
            yield "main.py", rest[1:]
        elif re.fullmatch(r"python3?", word) and rest[:1] == ["-m"] and len(rest) > 1:
            yield rest[1], rest[2:]
        elif word == "make":
            yield "make", rest
        else:
            continue
        return


def found_commands():
    return [
        pytest.param(program, arguments, id=f"{page.stem}-{' '.join([program, *arguments])[:60]}")
        for page in PAGES
        for program, arguments in commands(page.read_text("utf-8"))
    ]


class Parsed(BaseException):
    """The end of a program whose command line was accepted."""


def check_main(arguments):
    # absl answers --help itself, before anything is parsed.
    parse(*(PLACEHOLDERS.get(word, word) for word in arguments if word != "--help"))


def check_make(arguments):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    settings = dict(re.findall(r"^([A-Z]+) \?= ?(.*)$", makefile, re.MULTILINE))
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    targets = [word for word in arguments if "=" not in word]
    assert set(given) <= set(settings), f"the Makefile has no {set(given) - set(settings)}"
    assert targets and set(targets) <= makefile_targets()
    if targets == ["train"]:
        used = settings | given
        check_main([f"--config={used['CONFIG']}", *shlex.split(used["ARGS"])])


def check_module(module, arguments):
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    if module in ("pytest", "pip"):
        paths = [word for word in arguments if "/" in word]
        assert all((ROOT / path).exists() for path in paths), paths
        return
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    source = spec.loader.get_source(spec.name)
    if "cli.run()" in source:  # the program, in a mode
        return check_main(["--mode=calibrate", *arguments])
    if "main(*sys.argv[1:])" in source:
        inspect.signature(importlib.import_module(spec.name).main).bind(*arguments)
        return
    assert re.search(r"argparse|cli\.main\(\)", source), f"{module} would run, not only parse"
    accept = argparse.ArgumentParser.parse_args

    def parse_only(*args, **options):
        accept(*args, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")


def check(program, arguments):
    if program == "main.py":
        check_main(arguments)
    elif program == "make":
        check_make(arguments)
    else:
        check_module(program, arguments)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize(("program", "arguments"), found_commands())
def test_a_documented_command_parses(program, arguments):
    check(program, arguments)


TEXT = """
    gpus ssh --command="cd here && \\
      python main.py --config=coco --mode=train"
    OPTIONS="--config=custom \\
      --config.dataset.data_dir=DIR"
    python main.py $OPTIONS --mode=eval   # scores
    make train ARGS='--config.seed=3 --config.train.steps=4'

Use `oneformer-jax --config=... --mode=inspect`,
`python -m tests.bench.losses --repeats 10`, or make
do with `python3`.

```python
words = "don't"
```
"""


def test_every_form_of_a_command_is_found():
    assert list(commands(TEXT)) == [
        ("main.py", ["--config=coco", "--mode=train"]),
        ("main.py", ["--config=custom", "--config.dataset.data_dir=DIR", "--mode=eval"]),
        ("make", ["train", "ARGS=--config.seed=3 --config.train.steps=4"]),
        ("main.py", ["--config=...", "--mode=inspect"]),
        ("tests.bench.losses", ["--repeats", "10"]),
    ]
    assert len(found_commands()) >= 40


@pytest.mark.parametrize(
    "command",
    [
        "python main.py --config=synthetic --workdirr=runs/a",
        "python main.py --config=synthetic --mode=trains",
        "python main.py --config=synthetik --mode=train",
        "python main.py --config=synthetic --config.optim.lrr=1",
        "oneformer-jax --config=synthetic --config.optim.lr=-1",
        "make trian",
        "make train STEPS=3",
        "make train ARGS='--config.optim.lrr=1'",
        "python -m tests.bench.gone",
        "python -m tests.bench.losses --repeat-s 10",
        "python -m oneformer_jax.kernels.bench no_such_operation",
        "python -m pytest tests/gone -s",
    ],
)
def test_a_wrong_command_is_noticed(command):
    ((program, arguments),) = commands(f"    {command}\n")
    with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError, TypeError)):
        check(program, arguments)
