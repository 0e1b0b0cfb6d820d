"""Writes the page: of one run in full, or of several side by side."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence

from oneformer_jax import files, remote
from oneformer_jax.config_rules import TASKS
from oneformer_jax.progress import duration
from oneformer_jax.report import runs
from oneformer_jax.report.charts import line_chart, text
from oneformer_jax.report.runs import Run

_HEADLINES = ("panoptic/PQ", "instance/AP", "semantic/mIoU")
# Title -> label -> scalar.
_CURVES = {
    "Loss": {"total": "loss"},
    "Terms of the loss": {
        "classes": "loss_ce",
        "mask": "loss_mask",
        "dice": "loss_dice",
        "contrastive": "loss_contrastive",
        "query classes": "loss_query_class",
    },
    "Panoptic quality": {
        "PQ": "panoptic/PQ",
        "things": "panoptic/PQ_things",
        "stuff": "panoptic/PQ_stuff",
    },
    "Average precision": {"AP": "instance/AP", "AP50": "instance/AP50"},
    "Mean IoU": {"mIoU": "semantic/mIoU"},
    "Gradient norm": {"gradient": "grad_norm"},
    "Learning rate": {"main": "lr/main", "backbone": "lr/backbone"},
    "Images per second": {"images/s": "time/images_per_second"},
}
# One chart each where runs are compared.
_COMPARED = {
    "Loss": "loss",
    "Panoptic quality": "panoptic/PQ",
    "Average precision": "instance/AP",
    "Mean IoU": "semantic/mIoU",
    "Gradient norm": "grad_norm",
    "Images per second": "time/images_per_second",
}
# Label -> scalar, and the format of its median.
_SPEEDS = {
    "images per second": ("time/images_per_second", "{:.3g}"),
    "seconds of a step": ("time/step_seconds", "{:.3g}"),
    "seconds a step waits for data": ("time/data_seconds", "{:.3g}"),
    "of the devices' peak FLOP/s": ("time/flop_utilisation", "{:.1%}"),
}
_CLASS_COLUMNS = ("PQ", "SQ", "RQ", "AP", "IoU", "ACC")
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1c20;--soft:#5d6069;--page:#f6f6f8;--card:#fff;
--line:#e0e1e6;--c0:#2a6fd0;--c1:#14875f;--c2:#b86e00;--c3:#c8366b;--c4:#6a4fc4;--c5:#0b7f93}
@media(prefers-color-scheme:dark){:root{--ink:#ececf0;--soft:#a3a6b1;--page:#15161a;--card:#1f2026;
--line:#383a43;--c0:#6aa5f5;--c1:#4cc596;--c2:#e5a23c;--c3:#f17fa5;--c4:#a896f2;--c5:#4fc0d4}}
*{box-sizing:border-box}body{margin:0 auto;padding:24px;max-width:1160px;background:var(--page);
color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:36px 0 12px}h3{font-size:15px;margin:20px 0 8px}
p{margin:4px 0;color:var(--soft)}code{font:13px/1.5 ui-monospace,monospace}
.row{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.tiles{margin-bottom:14px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0;
padding:12px 14px;overflow-x:auto}.tile b{display:block;font-size:28px;line-height:1.2}
figcaption{font-weight:600;margin-bottom:6px}svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}.dashed{stroke-dasharray:5 4}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 0 0;padding:0;
font-size:13px}.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;
margin-right:6px;vertical-align:-1px}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line)}th{color:var(--soft);
font-weight:600}td:first-child,th:first-child{text-align:left}.best{font-weight:700}
td{white-space:nowrap}
td:first-child,.text td{white-space:normal}.text td,.text th{text-align:left}
.bar{height:10px;border-radius:5px;background:var(--c0);
min-width:1px}img{max-width:100%;height:auto;display:block;border-radius:6px;background:#fff}
.picture img{margin:0 auto}.example{display:flex;flex-wrap:wrap;gap:8px 20px;margin-bottom:12px}
.example img{flex:0 1 760px;min-width:0}.example div{flex:1 1 220px}
ul{margin:6px 0;padding-left:20px}
"""
_STYLE += "".join(
    f"polyline.s{i}{{stroke:var(--c{i})}}circle.s{i}{{fill:var(--c{i})}}"
    f"i.s{i}{{background:var(--c{i})}}"
    for i in range(6)
)


def write_report(
    workdir: str | os.PathLike[str],
    compare: Sequence[str | os.PathLike[str]] = (),
    output: str | os.PathLike[str] | None = None,
) -> str:
    """Writes the report of a run, or a comparison with other runs, as one HTML file.

    Args:
      workdir: of the run.
      compare: workdirs of other runs.
      output: the file; None is report.html in the workdir, or comparison.html.

    Returns:
      The path of the file.

    Raises:
      FileError: a workdir holds no run, or a damaged file.
      OSError: the file cannot be written.
    """
    found = [runs.read_run(folder) for folder in (workdir, *compare)]
    name = "comparison.html" if compare else "report.html"
    path = output or remote.path_of(workdir) / name
    page = _comparison(found) if compare else _report(found[0])
    files.write_atomically(path, page.encode("utf-8", "replace"))
    return os.fspath(path)


def _report(run: Run) -> str:
    results = run.results
    facts = []
    if results is not None:
        facts.append(
            f"{text(results.dataset)}: {results.images:,} images of step {run.step:,}, "
            f"protocol {text(results.protocol)}"
        )
    facts += [text(run.texts["run/versions"])] if "run/versions" in run.texts else []
    if "run/command" in run.texts:
        facts.append(f"<code>{text(run.texts['run/command'].strip(), 2000)}</code>")
    head = f"<h1>{text(run.name)}</h1>" + "".join(f"<p>{fact}</p>" for fact in facts)
    charts = [
        line_chart(title, [(label, run.curve(name)) for label, name in curves.items()])
        for title, curves in _CURVES.items()
    ]
    confusion = ""
    if run.confusion:
        image = _image(run.confusion, "png", "Matrix of confused classes")
        confusion = f'<div class="card picture">{image}</div>'
    settings = runs.differences([runs.defaults(), run.config])
    return _page(
        run.name,
        head,
        _section("Scores", _scores(run)),
        _section("Curves", f'<div class="row">{"".join(charts)}</div>' if any(charts) else ""),
        _section("Confused classes", confusion),
        *(_section(*_images(run, task)) for task in TASKS),
        _section("Speed and time", _speed(run)),
        _section("Classes", _classes(run)),
        _section("Settings that are not the defaults", _settings(["default", "run"], settings)),
    )


def _comparison(found: Sequence[Run]) -> str:
    names = [run.name for run in found]
    scores: dict[str, list[float | None]] = {}
    for i, run in enumerate(found):
        for name, value in run.results.metrics.items() if run.results else ():
            scores.setdefault(name, [None] * len(found))[i] = value
    rows = [("step", ["–" if run.step is None else f"{run.step:,}" for run in found])]
    rows.append(("images", [f"{r.results.images:,}" if r.results else "–" for r in found]))
    rows += [(text(name), _marked(values)) for name, values in scores.items()]
    speeds = [
        (text(label), [_median(run, name, form) for run in found])
        for label, (name, form) in _SPEEDS.items()
    ]
    speeds.append(("time", [_duration(sum(run.time().values())) for run in found]))
    charts = [
        line_chart(title, [(run.name, run.curve(name)) for run in found])
        for title, name in _COMPARED.items()
    ]
    settings = runs.differences([run.config for run in found])
    head = "<h1>Comparison of runs</h1><p>The best of each score is bold.</p>"
    return _page(
        "Comparison of runs",
        head,
        _section("Scores", _table(["score", *map(text, names)], rows)),
        _section("Curves", f'<div class="row">{"".join(charts)}</div>' if any(charts) else ""),
        _section("Speed and time", _table(["median", *map(text, names)], speeds)),
        _section("Settings that differ", _settings(names, settings)),
    )


# ------------------------------------------------------------------ parts


def _scores(run: Run) -> str:
    if run.results is None:
        return "<p>The run has not been evaluated yet.</p>"
    metrics = run.results.metrics
    tiles = [
        f'<div class="card tile">{name.split("/")[1]}<b>{metrics[name]:.1f}</b></div>'
        for name in _HEADLINES
        if metrics.get(name) is not None
    ]
    groups = []
    for task in TASKS:
        names = [name for name in metrics if name.startswith(f"{task}/")]
        rows = [(text(name.partition("/")[2]), [_score(metrics[name]) or "–"]) for name in names]
        groups += [_table([task, "%"], rows)] if rows else []
    found = run.results.reasons.items()
    why = "".join(f"<p>{text(name)} is not defined: {text(reason)}</p>" for name, reason in found)
    top = f'<div class="row tiles">{"".join(tiles)}</div>' if tiles else ""
    return f'{top}<div class="row">{"".join(groups)}</div>{why}'


def _images(run: Run, task: str) -> tuple[str, str]:
    """Returns the title and the content of the best and worst images of a task."""
    cards = []
    for kind in ("worst", "best"):
        for example in run.examples.get(task, {}).get(kind, []):
            mistakes = [f"<li>{text(mistake, 500)}</li>" for mistake in example.mistakes]
            image = _image(example.picture, "jpeg", "Image, truth and prediction")
            cards.append(
                f'<div class="card example">{image}<div><b>{kind}: {example.score:.1f} %</b>'
                f"<p>{text(example.image)}</p><ul>{''.join(mistakes)}</ul></div></div>"
            )
    return f"Worst and best images, {task}", "".join(cards)


def _speed(run: Run) -> str:
    parts = []
    speeds = [
        (text(label), [_median(run, name, form)])
        for label, (name, form) in _SPEEDS.items()
        if run.median(name) is not None
    ]
    if speeds:
        parts.append(_table(["speed", "median"], speeds))
    times = run.time()
    if times:
        parts.append(_bars("time until the last step", times))
    if run.results is not None:
        seconds = {k: v for k, v in run.results.seconds.items() if k != "total"}
        parts.append(_bars("the last evaluation", seconds))
    return f'<div class="row">{"".join(parts)}</div>' if parts else ""


def _bars(title: str, seconds: dict[str, float]) -> str:
    whole = max(sum(seconds.values()), 1e-9)
    rows = []
    for part, value in seconds.items():
        share = max(0.0, min(100 * value / whole, 100.0))
        bar = f'<div class="bar" style="width:{share:.1f}px"></div>'
        rows.append((text(part), [_duration(value), f"{share:.0f} %", bar]))
    return _table([title, _duration(whole), "", ""], rows)


def _classes(run: Run) -> str:
    if run.results is None:
        return ""
    listed = run.results.per_class
    names = list(dict.fromkeys(name for row in listed for name in row))
    columns = [name for name in names if name.partition("/")[2] in _CLASS_COLUMNS]
    rows = [
        (
            text(row.get("class", "–")),
            [_score(runs.finite(row.get(name))) or "–" for name in columns],
        )
        for row in listed
    ]
    return _table(["class", *(text(name.partition("/")[2]) for name in columns)], rows)


def _settings(names: Sequence[str], settings: dict[str, list[str]]) -> str:
    if not settings:
        return "<p>None.</p>"
    rows = [
        (f"<code>{text(key)}</code>", [f"<code>{text(v, 500)}</code>" for v in values])
        for key, values in settings.items()
    ]
    return _table(["setting", *map(text, names)], rows, style="card text")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _marked(values: Sequence[float | None]) -> list[str]:
    """Formats scores, the best ones bold."""
    best = max((value for value in values if value is not None), default=None)
    return [
        f'<span class="best">{_score(value)}</span>'
        if value is not None and value == best
        else _score(value) or "–"
        for value in values
    ]


def _median(run: Run, name: str, form: str) -> str:
    value = run.median(name)
    return "–" if value is None else form.format(value)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _table(
    header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], style: str = "card"
) -> str:
    """Makes a table of HTML cells."""
    top = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><td>{first}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for first, cells in rows
    )
    return f'<div class="{style}"><table><tr>{top}</tr>{body}</table></div>'


def _image(content: bytes, kind: str, description: str) -> str:
    if not content:
        return "<p>The picture is missing.</p>"
    data = base64.b64encode(content).decode()
    return f'<img alt="{description}" src="data:image/{kind};base64,{data}">'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _page(title: str, *parts: str) -> str:
    # The policy keeps a page that names of classes and images went into from loading anything.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title[:200])}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
