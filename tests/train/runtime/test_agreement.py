"""Agreement of processes: who differs from the majority, in what, and who is silent."""

import json
import re

import pytest

from oneformer_jax import compilation
from oneformer_jax.train.runtime import agreement
from tests.train.runtime.test_distributed import free_port, start, start_job

HOSTS = dict(enumerate("abcdefghij"))


def differences(*facts, ahead=None):
    of_each = {
        number: {name: json.dumps(value) for name, value in ({"x": 1} | one).items()}
        for number, one in enumerate(facts)
    }
    return agreement.differences(of_each, ahead or dict.fromkeys(of_each, 0.0), HOSTS)


def test_the_odd_one_of_three_is_named():
    assert differences({}, {}, {}) == ""
    text = differences({"jax": "1"}, {"jax": "2", "--config.optim.lr": 0.1}, {"jax": "1"})
    assert text == (
        "process 1 (b) differs in jax (2, elsewhere 1), --config.optim.lr (0.1, elsewhere nothing)."
        " Give all hosts the same code, command and time"
    )
    assert "process 0 (a) differs in jax (1, elsewhere 2)" in differences(
        {"jax": "1"}, {"jax": "2"}, {"jax": "2"}
    )


def test_those_who_differ_alike_are_named_together():
    old, new = {"source": "0ld"}, {"source": "new"}
    assert "processes 1 (b), 4 (e) differ in source (0ld, elsewhere new)." in differences(
        new, old, new, new, old
    )
    text = differences(new, old, new, {"source": "newest"}, new)
    assert "process 1 (b) differs in source (0ld, elsewhere new); process 3 (d)" in text


def test_two_groups_of_one_size_are_both_named():
    text = differences({"jax": "1"}, {"jax": "2"})
    assert "the processes differ in jax (1 on process 0 (a), 2 on process 1 (b))" in text


@pytest.mark.parametrize(
    ("ahead", "named"),
    [
        ((0.0, 60.0, 0.2), "process 1 (b) differs in the clock (60 s ahead of the others)"),
        ((0.0, -60.0, 0.2), "process 1 (b) differs in the clock (60 s behind the others)"),
        # The clock that the others are compared with is the wrong one.
        ((0.0, 60.0, 61.0), "process 0 (a) differs in the clock (60 s behind the others)"),
        ((0.0, 60.0), "process 1 (b) differs in the clock (60 s ahead of the others)"),
    ],
)
def test_a_wrong_clock_is_named(ahead, named):
    ahead = dict(enumerate(ahead))
    assert named in differences(*({} for _ in ahead), ahead=ahead)


def test_many_differences_stay_one_line():
    facts = {f"--config.key{number}": "x" * 500 + "\n" for number in range(100)}
    text = differences(facts, *({} for _ in range(9)))
    assert "and 94 more" in text and "\n" not in text and len(text) < 1500
    everyone = differences(*({"source": str(number)} for number in range(10)))
    assert "and 4 more" in everyone and len(everyone) < 500


def test_the_facts_are_source_versions_flags_and_the_config():
    config = {"optim": {"lr": 0.1}, "data": {"workers": 4}, "dataset": {"data_dir": "here"}}
    facts = agreement.facts_of(config, {"mode": "train"})
    assert facts["--config.optim.lr"] == 0.1 and facts["--mode"] == "train"
    assert {"version", "source", "python", "jax", "jaxlib", "flax", "XLA_FLAGS"} <= facts.keys()
    assert not [name for name in facts if "workers" in name or "data_dir" in name]


def test_the_digest_is_that_of_every_module_and_table(tmp_path, monkeypatch):
    (tmp_path / "rooms").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernels").symlink_to(tmp_path / "rooms")
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "package" / "compilation.py"))
    found = [compilation.source_digest()]
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.json", "2"), ("kernels/c.py", "2")):
        (tmp_path / "package" / name).write_text(text)
        found.append(compilation.source_digest())
    (tmp_path / "package" / "kernels" / "c.py").rename(tmp_path / "package" / "kernels" / "d.py")
    found.append(compilation.source_digest())
    assert len(set(found)) == len(found)
    (tmp_path / "package" / "c.pyc").write_text("no source")
    assert compilation.source_digest() == found[-1]


# ------------------------------------------------------------------ processes

ROUNDS = """
import platform, sys, time, types
import jax
from oneformer_jax import compilation
from oneformer_jax.train.runtime import agreement, distributed

number = int(sys.argv[2])
distributed.start(distributed.find_place({}, sys.argv[1], 3, number), 60, {"mode": "test"})
odd = number == 1
versions, kinds, clock = compilation.ingredients, jax.local_devices, time.time

def call(topic, facts, timeout=60):
    try:
        agreement.agree(topic, facts, timeout=timeout, hosts={2: "the third"})
        print("agreed on", topic)
    except agreement.DisagreementError as error:
        print(f"{topic}: {error}")

def change(name, value):
    if odd:
        compilation.ingredients = lambda: versions() | {name: value}
    call(name, agreement.facts_of({"optim": {"lr": 0.1}}, {}))
    compilation.ingredients = versions

call("nothing", agreement.facts_of({}, {}))
change("source", "0123")
change("version", "0.0.1")
change("jax", "0.9")
change("jaxlib", "0.9")
agreement.platform = types.SimpleNamespace(python_version=lambda: "3.99" if odd else "3.11")
call("python", agreement.facts_of({}, {}))
agreement.platform = platform
call("config", agreement.facts_of({"optim": {"lr": float("inf") if odd else 0.1}}, {}))
call("flags", agreement.facts_of({}, {"workdir": "there" if odd else "here"}))
if odd:
    jax.local_devices = lambda: kinds() * 2
call("number of devices", agreement.device_facts())
if odd:
    jax.local_devices = lambda: [types.SimpleNamespace(device_kind="TPU v0")]
call("kind of devices", agreement.device_facts())
for name, seconds in (("a fast clock", 3600), ("a slow clock", -20), ("a good clock", 2)):
    if odd:
        time.time = lambda: clock() + seconds
    call(name, {})
    time.time = clock
if number == 0:
    time.time = lambda: clock() + 30
call("the first clock", {})
time.time = clock
call("nothing again", {})
if number == 2:
    import os
    sys.stdout.flush()
    os._exit(9)
call("silence", {}, timeout=1)
print("the end")
"""


def test_every_process_says_which_one_differs_and_in_what():
    """Three processes, of which the second is the odd one, in one thing after the other."""
    address = f"localhost:{free_port()}"
    started = [start(("-c", ROUNDS, address, number), 1) for number in range(3)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    # Those that are left end soon, in order, as they were told.
    assert [process.returncode for process in started] == [1, 1, 9], outputs
    assert [text.endswith("the end\n") for text in outputs] == [True, True, False]
    for text in outputs:
        for agreed in ("nothing", "a good clock", "nothing again"):
            assert f"agreed on {agreed}\n" in text
        for topic, found in (
            ("source", r"source \(0123, elsewhere [0-9a-f]{16}\)"),
            ("version", r"version \(0\.0\.1, elsewhere \d+\.\d+\.\d+\)"),
            ("jax", r"jax \(0\.9, elsewhere 0\.\d+\.\d.*\)"),
            ("jaxlib", r"jaxlib \(0\.9, elsewhere 0\.\d+\.\d.*\)"),
            ("python", r"python \(3\.99, elsewhere 3\.11\)"),
            ("config", r"--config\.optim\.lr \(Infinity, elsewhere 0\.1\)"),
            ("flags", r"--workdir \(there, elsewhere here\)"),
            ("number of devices", r"devices \(2 x cpu, elsewhere 1 x cpu\)"),
            ("kind of devices", r"devices \(1 x TPU v0, elsewhere 1 x cpu\)"),
            ("a fast clock", r"the clock \(3600 s ahead of the others\)"),
            ("a slow clock", r"the clock \(20 s behind the others\)"),
        ):
            line = rf"^{topic}: process 1 \(.*\) differs in {found}\. "
            assert re.search(line, text, re.M), (topic, text)
        first = r"^the first clock: process 0 \(.*\) differs in the clock \(30 s ahead"
        assert re.search(first, text, re.M), text
    for text in outputs[:2]:
        silence = r"^silence: process 2 \(the third\) joined, but did not report"
        assert re.search(silence, text, re.M), text


@pytest.mark.slow
def test_a_job_whose_processes_have_other_configs_ends_in_one_line(tmp_path):
    flags = (f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    started = [
        start_job(tmp_path / "run", tmp_path, 4, *flags, f"--process_id={n}", f"--config.seed={n}")
        for n in range(2)
    ]
    for process in started:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 1
        last = output.strip().splitlines()[-1]
        assert "error: the processes differ in --config.seed (0 on process 0 (" in last
    assert not (tmp_path / "run").exists()
