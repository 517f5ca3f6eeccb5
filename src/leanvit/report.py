"""write_report(): the JSON files of a run folder as one HTML page that needs no network and no script.

A section is drawn where its file is there, so that the folder of a training, a quantization or a bundle
gives a page as well. Numbers that are missing or not finite are shown as a dash, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit import _svg as svg
from leanvit import report_quant
from leanvit._svg import Markup, finite, fixed, join, significant, tag
from leanvit._version import __version__
from leanvit.errors import DataError
from leanvit.files import read_json, write_atomic

Json = dict[str, Any]
REPORT_NAME = "report.html"
# Part of the report: where its file may lie in a run folder; the first that exists is read.
_PLACES = {
    "demo": ("demo.json",),
    "train": ("train/train.json", "train.json"),
    "attention": ("attention.json",),
    "bundle": ("bundle/bundle.json", "bundle.json"),
    "verify": ("bundle/verify.json", "verify.json"),
    "benchmark": ("benchmark.json",),
}
_QUANTIZED = ("quantize*/quantize.json", "quantize.json")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Run:
    """What was found in a run folder.

    parts: values of each part that is there. quantized: quantization reports by name, most bits first.
    files: path of every file that was read, by its name inside the folder.
    """

    folder: Path
    parts: dict[str, Json]
    quantized: dict[str, Json]
    files: dict[str, Path]

    def get(self, part: str) -> Json:
        """The values of a part, empty where its file isn't there."""
        return self.parts.get(part, {})


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Draw the page of a run folder and return its path; the default is RUN/report.html.

    run: folder of `leanvit demo`, of a training or a quantization, or a bundle.
    Raises DataError where the folder is missing, holds none of the known files, or a file lacks what it
    should hold; BundleError where a file isn't JSON; EnvironmentProblem where the page can't be written.
    """
    found = read_run(run)
    try:
        page = render(found)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{found.folder}: a file has content that can't be drawn ({type(error).__name__}: {error}), expected "
            f"{', '.join(found.files)} as leanvit {__version__} writes them. Make the run again."
        ) from error
    path = Path(output) if output is not None else found.folder / REPORT_NAME
    # A lone surrogate is legal in JSON and not in UTF-8.
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def read_run(run: str | Path) -> Run:
    """Read every known JSON file of a run folder. Raises DataError, BundleError."""
    folder = Path(run)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {state}, expected a run folder. Check the path, or make one: leanvit demo")
    places = {
        part: next((p for p in map(folder.joinpath, paths) if p.is_file()), None) for part, paths in _PLACES.items()
    }
    reports = [path for pattern in _QUANTIZED for path in sorted(folder.glob(pattern))]
    files = {str(path.relative_to(folder)): path for path in (*places.values(), *reports) if path is not None}
    if not files:
        known = ", ".join((*(paths[-1] for paths in _PLACES.values()), _QUANTIZED[-1]))
        raise DataError(
            f"{folder}: none of the known files found, expected one or more of {known}. "
            "Give the folder of leanvit demo, train, quantize or export."
        )
    parts = {part: _read_object(path) for part, path in places.items() if path is not None}
    quantized: dict[str, Json] = {}
    for report, path in sorted(((_read_object(path), path) for path in reports), key=lambda pair: -_bits(pair[0])[0]):
        weight, activation = _bits(report)
        name = f"W{weight}A{activation}" if weight and activation else path.parent.resolve().name
        quantized[name if name not in quantized else f"{name} ({path.parent.name})"] = report
    return Run(folder, parts, quantized, files)


def _read_object(path: Path) -> Json:
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a JSON {type(values).__name__}, expected an object. Make the run again.")
    return values


def _bits(report: Json) -> tuple[int, int]:
    config = report.get("config") or {}
    return int(finite(config.get("weight_bits")) or 0), int(finite(config.get("activation_bits")) or 0)


def render(run: Run) -> str:
    """The whole page as text."""
    sections = [
        ("result", "Result", result_section(run)),
        ("training", "Training", training_section(run)),
        ("quantization", "Quantization", quantization_section(run)),
        ("attention", "Attention through the depth", attention_section(run)),
        ("bundle", "Bundle", bundle_section(run)),
        ("gate", "Verification gate", gate_section(run)),
        ("benchmark", "Benchmark", benchmark_section(run)),
        ("origin", "How this was made", origin_section(run)),
    ]
    drawn = [(key, title, body) for key, title, body in sections if body is not None]
    nav = tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in drawn), aria_label="Sections")
    body = (
        tag("section", tag("h2", name, id=f"{key}-h"), text, id=key, aria_labelledby=f"{key}-h")
        for key, name, text in drawn
    )
    title = _title(run)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title} · leanvit report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(svg.STYLE)),
    )
    header = tag("header", tag("p", "leanvit report", class_="brand"), tag("h1", title), _lead(run), _cards(run), nav)
    footer = tag("footer", f"Written by leanvit {__version__}. This page is self-contained: it loads nothing.")
    return "<!doctype html>\n" + tag("html", head, tag("body", header, tag("main", *body), footer), lang="en") + "\n"


def _title(run: Run) -> str:
    train, manifest = run.get("train"), run.get("bundle")
    architecture = train.get("architecture") or manifest.get("architecture")
    data = train.get("data") or (manifest.get("accuracy") or {}).get("data")
    if not architecture:
        return run.folder.resolve().name
    return f"{architecture} on {data}" if data else str(architecture)


# ------------------------------------------------------------------------------------- words and numbers


def _megabytes(value: Any, unit: str = "") -> str:
    number = finite(value)
    return "–" if number is None else significant(number / 1e6, unit)


def _ratio(numerator: Any, denominator: Any) -> float | None:
    above, below = finite(numerator), finite(denominator)
    return None if above is None or not below else above / below


def _accuracy(values: Json) -> str:
    """'98.05% (352 of 359 images)', or a dash."""
    if finite(values.get("top1")) is None:
        return "–"
    return f"{fixed(values['top1'], 2, '%')} ({fixed(values.get('correct'))} of {fixed(values.get('images'))} images)"


def interval(correct: Any, images: Any) -> tuple[float, float] | None:
    """Wilson's 95% interval of an accuracy, in percent: how much so few test images can say."""
    hits, count = finite(correct), finite(images)
    if hits is None or not count:
        return None
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 100 / (1 + z * z / count)
    return scale * (middle - half), scale * (middle + half)


def duration(seconds: Any) -> str:
    """Seconds as '41 s' or '3 min 5 s'."""
    number = finite(seconds)
    if number is None:
        return "–"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _versions(values: Json) -> str:
    return ", ".join(f"{name} {version}" for name, version in (values.get("versions") or {}).items())


# ------------------------------------------------------------------------------------- headline and result


def _pick(rows: Sequence[Json]) -> int:
    """Index of the row that the page is about: the smallest model that really runs, after the reference."""
    real = [i for i, row in enumerate(rows) if i and not row.get("simulated") and finite(row.get("bytes"))]
    return min(real, key=lambda i: float(rows[i]["bytes"]), default=0)


def _lead(run: Run) -> Markup | None:
    rows = run.get("demo").get("table") or []
    if not rows or not _pick(rows):
        return None
    row, first = rows[_pick(rows)], rows[0]
    text = f"{row['name']}: {fixed(row.get('accuracy'), 2, '%')} of {fixed(row.get('images'))} images correct"
    a, b = finite(row.get("accuracy")), finite(first.get("accuracy"))
    if a is not None and b is not None:
        text += f", {a - b:+.2f} points".replace("-", "−") + f" against {first['name']}"
    size, speed = (_ratio(row.get(key), first.get(key)) for key in ("bytes", "throughput"))
    gains = [f"{100 * size:.0f}% of its size"] if size else []
    gains += [f"{significant(speed)} times its throughput"] if speed else []
    return tag("p", text + (f", with {' and '.join(gains)}." if gains else "."), class_="lead")


def _cards(run: Run) -> Markup | None:
    """Headline numbers: (name, value, unit, what to compare it with)."""
    rows = run.get("demo").get("table") or []
    cards = _result_cards(rows) if rows else _part_cards(run)
    if checks := run.get("verify").get("checks"):
        state = "passed" if run.get("verify").get("passed") else "failed"
        cards.append(("Verification gate", state, "", _count_checks(checks)))
    boxes = []
    for name, value, unit, why in cards:
        number = tag("dd", value, tag("small", unit) if unit else None, class_="big")
        boxes.append(tag("div", tag("dt", name), number, tag("dd", why, class_="why"), class_="card"))
    return tag("dl", *boxes, class_="cards") if boxes else None


def _result_cards(rows: Sequence[Json]) -> list[tuple[str, str, str, str]]:
    row, first = rows[_pick(rows)], rows[0]

    def card(name: str, key: str, unit: str, show: Any) -> tuple[str, str, str, str]:
        return name, show(row.get(key)), unit, f"{first['name']}: {show(first.get(key))} {unit}".rstrip()

    cards = [
        card("Accuracy", "accuracy", "", lambda value: fixed(value, 2, "%")),
        card("Size", "bytes", "MB", _megabytes),
        card("Latency, one image", "latency_ms", "ms", significant),
        card("Throughput", "throughput", "images/s", significant),
    ]
    return [card for card in cards if card[1] != "–"]


def _part_cards(run: Run) -> list[tuple[str, str, str, str]]:
    train, manifest = run.get("train"), run.get("bundle")
    parameters = _ratio(train.get("parameters"), 1e6)
    measured = [("Best accuracy", train.get("best")), ("Accuracy in the runtime", manifest.get("accuracy"))]
    measured += [(f"Accuracy, {name}, simulated", report.get("accuracy")) for name, report in run.quantized.items()]
    cards = [("Parameters", significant(parameters), "million", str(train.get("architecture")))]
    for name, values in measured:
        number, _, counts = _accuracy(values or {}).partition(" (")
        cards.append((name, number, "", counts.rstrip(")")))
    for name, report in run.quantized.items():
        share = _ratio(report.get("quantized_bytes"), report.get("float_bytes"))
        why = "" if share is None else f"{100 * share:.0f}% of float32"
        cards.append((f"Weights, {name}", _megabytes(report.get("quantized_bytes")), "MB", why))
    return [card for card in cards if card[1] != "–"]


def result_section(run: Run) -> Markup | None:
    """Accuracy, size and speed of every form of the model."""
    rows = run.get("demo").get("table") or []
    if not rows:
        return None
    first, cells = rows[0], []
    for row in rows:
        told = not row.get("simulated") or "simulated" in str(row["name"])
        name = row["name"] if told else join([row["name"], " ", tag("span", "simulated", class_="badge")])
        bounds = interval(row.get("correct"), row.get("images"))
        cells.append(
            [
                name,
                fixed(row.get("accuracy"), 2),
                f"{fixed(row.get('correct'))} / {fixed(row.get('images'))}",
                "–" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}",
                _megabytes(row.get("bytes")),
                fixed(_ratio(row.get("bytes"), first.get("bytes")), 2),
                significant(row.get("latency_ms")),
                significant(row.get("throughput")),
                significant(row.get("speedup"), "×"),
            ]
        )
    note = f"Accuracy, size and speed. Ratios and speed-ups refer to the first row, {first['name']}."
    if any(row.get("simulated") for row in rows):
        note += " Simulated: values are rounded as in the integers they stand for but computed in float, so that"
        note += " accuracy is real, size is that of the packed weights, and there is no speed to measure."
    batch = f" at batch {fixed(_batch_of(run, first.get('throughput')))}".removesuffix(" at batch –")
    heads = (
        "Model", "Accuracy, %", "Correct", "95% interval, %", "Size, MB", "Size ratio", "Latency at batch 1, ms",
        f"Throughput{batch}, images/s", "Speed-up",
    )  # fmt: skip
    speed = [_bar(row, i, row.get("throughput"), significant(row.get("throughput"))) for i, row in enumerate(rows)]
    size = [
        _bar(row, i, _ratio(row.get("bytes"), 1e6), _megabytes(row.get("bytes"), " MB")) for i, row in enumerate(rows)
    ]
    caption = (
        f"Throughput{batch} (longer is better) and size (shorter is better). Grey is the reference; a dashed outline "
        "marks what is only simulated."
    )
    charts = (
        svg.bar_chart(
            "throughput", "Throughput of each form of the model", speed, f"throughput{batch} (images per second)"
        ),
        svg.bar_chart("size", "Size of each form of the model", size, "size (MB)"),
    )
    return join([svg.table(note, heads, cells, "lrrrrrrrr", _pick(rows)), svg.figure(caption, svg.panels(*charts))])


def _batch_of(run: Run, throughput: Any) -> Any:
    """Batch size of the benchmark's result that the table quotes, None where there is none."""
    results = run.get("benchmark").get("results") or []
    return next((r.get("batch_size") for r in results if throughput and r.get("images_per_second") == throughput), None)


def _bar(row: Json, index: int, value: Any, text: str) -> svg.Row:
    number = finite(value)
    css = "simulated" if row.get("simulated") else "s1" if index else "s0"
    return svg.Row(str(row["name"]), number, "not measured" if number is None else text, css)


# ------------------------------------------------------------------------------------------- training


def training_section(run: Run) -> Markup | None:
    """Loss and accuracy over the epochs."""
    train = run.get("train")
    if not train:
        return None
    history = [row for row in train.get("history") or [] if finite(row.get("epoch")) is not None]
    best, sizes = train.get("best") or {}, [fixed(train.get(f"{split}_images")) for split in ("train", "val")]
    left_out = sum(len(names) for names in (train.get("left_out") or {}).values())
    seconds = sum(finite(row.get("seconds")) or 0.0 for row in history)
    facts = svg.facts(
        [
            ("Architecture", f"{train.get('architecture')}, {fixed(train.get('parameters'))} parameters"),
            ("Data", f"{train.get('data')}: {sizes[0]} images to train on, {sizes[1]} to validate"),
            ("Left out", f"{left_out} images that could not be read" if left_out else None),
            ("Best weights", f"{_accuracy(best)}, loss {fixed(best.get('loss'), 3)}" if best else None),
            ("Training time", f"{duration(seconds)} for {len(history)} epochs" if history else None),
            ("Computed on", f"{train.get('device')}, autocast {train.get('autocast')}, seed {train.get('seed')}"),
        ]
    )
    if not history:
        return facts
    top = max(history, key=lambda row: (finite(row.get("val_top1")) or 0.0, -(finite(row.get("val_loss")) or math.inf)))
    caption = (
        f"Loss and accuracy over the epochs; the ring marks epoch {fixed(top['epoch'])}, whose weights are kept. "
        "Training values are of augmented images, with label smoothing where it is set, and so may be the worse ones."
    )
    curves = (
        _curve("Loss over the epochs", history, top, "loss", "cross-entropy loss (nats)", 3),
        _curve("Accuracy over the epochs", history, top, "top1", "accuracy (%)", 2, "%"),
    )
    keys = {"epoch": 0, "train_loss": 4, "val_loss": 4, "train_top1": 2, "val_top1": 2, "lr": 6, "seconds": 1}
    heads = ("Epoch", "Training loss", "Validation loss", "Training %", "Validation %", "Learning rate", "Seconds")
    rows = [[fixed(row.get(key), digits) for key, digits in keys.items()] for row in history]
    return join(
        [
            facts,
            svg.figure(caption, svg.legend((("l1", "validation"), ("l2", "training"))), svg.panels(*curves)),
            svg.details("Numbers of this figure", svg.table("History of the training.", heads, rows, "rrrrrrr")),
        ]
    )


def _curve(
    title: str, history: Sequence[Json], top: Json, key: str, label: str, digits: int, unit: str = ""
) -> Markup | None:
    curves = []
    for part, css in (("train", "l2"), ("val", "l1")):
        pairs = [(finite(row["epoch"]), finite(row.get(f"{part}_{key}"))) for row in history]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        curves += [svg.Line(points, css)] if points else []
    if not curves:
        return None
    hints = []
    for row in history if len(history) <= 300 else ():
        values = [fixed(row.get(f"{part}_{key}"), digits, unit) for part in ("train", "val")]
        hints.append(
            (float(row["epoch"]), f"epoch {fixed(row['epoch'])}: training {values[0]}, validation {values[1]}")
        )
    best = finite(top.get(f"val_{key}"))
    text = f"{fixed(best, digits, unit)} at epoch {fixed(top['epoch'])}"
    mark = None if best is None else (float(top["epoch"]), best, text)
    said = f"{label} of training and validation over {len(history)} epochs; the kept weights have {text}."
    return svg.line_chart(f"curve-{key}", title, said, curves, x_label="epoch", y_label=label, mark=mark, hints=hints)


# --------------------------------------------------------------------------------------- quantization


def quantization_section(run: Run) -> Markup | None:
    """What quantization costs at every site, the bits it was given, and what was left in float."""
    if not run.quantized:
        return None
    names = list(run.quantized)
    by_run = [{str(site["name"]): site for site in report.get("sites") or []} for report in run.quantized.values()]
    order = list(dict.fromkeys(site for sites in by_run for site in sites))
    levels = [[(finite(s.get("sqnr_db")), name) for name, s in sites.items()] for sites in by_run]
    lowest = [min(((db, name) for db, name in known if db is not None), default=(0.0, "")) for known in levels]
    parts = [_plans_table(run.quantized, lowest)]
    if order:
        parts += [_sqnr_figure(names, order, by_run, [name for _, name in lowest]), _plan_figure(names, order, by_run)]
    parts += report_quant.inside(run.quantized)
    parts.append(tag("h3", "What was left out, and why"))
    for lines, who in _shared(run.quantized, _left_out):
        parts.append(tag("p", ", ".join(who), ":"))
        parts.append(tag("ul", *(tag("li", line) for line in lines)))
    parts.append(tag("h3", "Calibration"))
    parts += [tag("p", f"{', '.join(who)}: {text}") for text, who in _shared(run.quantized, _calibration)]
    return join(parts)


def _plans_table(quantized: dict[str, Json], lowest: Sequence[tuple[float, str]]) -> Markup:
    rows = []
    for (name, report), (level, site) in zip(quantized.items(), lowest, strict=True):
        size = report.get("quantized_bytes")
        rows.append(
            [
                name,
                fixed((report.get("accuracy") or {}).get("top1"), 2),
                fixed(report.get("average_weight_bits"), 2),
                _megabytes(size),
                fixed(_ratio(size, report.get("float_bytes")), 2),
                significant(_ratio(report.get("bitops"), 1e9)),
                fixed(len(report.get("sites") or [])),
                f"{fixed(level, 1)} at {site}" if site else "–",
                (report.get("config") or {}).get("smoothing", "–"),
            ]
        )
    heads = (
        "Plan", "Accuracy, %", "Weight bits, mean", "Weights, MB", "of float32", "BitOps, 10⁹", "Sites",
        "Lowest SQNR, dB", "Smoothing",
    )  # fmt: skip
    caption = (
        "The plans compared. W8A8 stands for weights and activations of 8 bits each; a site is one product that is "
        "quantized; BitOps are its multiply-adds times the bits of both sides."
    )
    return svg.table(caption, heads, rows, "lrrrrrrrl")


def _sqnr_figure(
    names: Sequence[str], order: Sequence[str], by_run: Sequence[dict[str, Json]], lowest: Sequence[str]
) -> Markup:
    levels = [(site, [finite(sites.get(site, {}).get("sqnr_db")) for sites in by_run]) for site in order]
    axis = svg.sqnr_axis(level for _, row in levels for level in row)
    half = math.ceil(len(order) / 2) if len(order) > 16 else len(order)
    charts = []
    for start in range(0, len(order), half):
        part = levels[start : start + half]
        title = f"SQNR of sites {start + 1} to {start + len(part)} of {len(order)}"
        charts.append(svg.site_bars(f"sqnr-{start}", title, part, axis=axis, names=names, lowest=lowest))
    rows = []
    for site in order:
        here = [sites.get(site, {}) for sites in by_run]
        known = next(values for values in here if values)
        row = [site, str(known.get("kind", "–")), fixed(known.get("macs"))]
        for values in here:
            row += [f"{fixed(values.get('weight_bits'))} / {fixed(values.get('activation_bits'))}"]
            row += [fixed(values.get("sqnr_db"), 1)]
        rows.append(row)
    heads = [
        "Site",
        "Kind",
        "Multiply-adds",
        *(f"{name} {what}" for name in names for what in ("bits W / A", "SQNR, dB")),
    ]
    caption = (
        "Signal to quantization noise ratio (SQNR) of every site's output as the whole quantized network runs, against "
        "the float network; 6 dB more is half the error. Sites in execution order"
        + (f", in each group from top to bottom {', '.join(names)}." if len(names) > 1 else ".")
    )
    note = "Sites in execution order. For a product of two activations, W is the second one."
    return join(
        [
            svg.figure(
                caption, svg.legend((f"s{i % 4 + 1}", name) for i, name in enumerate(names)), svg.panels(*charts)
            ),
            svg.details("Numbers of this figure", svg.table(note, heads, rows, "llr" + "rr" * len(names))),
        ]
    )


def _plan_figure(names: Sequence[str], order: Sequence[str], by_run: Sequence[dict[str, Json]]) -> Markup:
    plans = [{n: (int(s["weight_bits"]), int(s["activation_bits"])) for n, s in sites.items()} for sites in by_run]
    used = sorted({bits for plan in plans for pair in plan.values() for bits in pair})
    legend = [tag("li", svg.bit(bits), f"{bits} bits") for bits in used]
    legend += [tag("li", svg.bit(None), "float")] if any(len(plan) < len(order) for plan in plans) else []
    caption = (
        "The bit plan. A column is a block of the network, a row a site inside it; the left number is the bits of the "
        "weights, the right one those of the activations. qk and av, the two products of attention, multiply two "
        "activations."
    )
    grids = [
        tag("div", tag("h4", n), svg.bit_grid(f"Bit plan {n}", order, p)) for n, p in zip(names, plans, strict=True)
    ]
    wide = len({block for block, _ in svg.split_sites(order).values()}) > svg.MANY_BLOCKS
    return svg.figure(caption, tag("ul", *legend, class_="legend"), join(grids) if wide else svg.panels(*grids))


def _shared(quantized: dict[str, Json], describe: Any) -> Iterable[tuple[Any, list[str]]]:
    """Descriptions with the names of the plans that share them, so that what holds for all is said once."""
    groups: dict[Any, list[str]] = {}
    for name, report in quantized.items():
        groups.setdefault(describe(report), []).append(name)
    return groups.items()


def _left_out(report: Json) -> tuple[str, ...]:
    products, norms = report.get("unquantized") or (), report.get("smoothing_left_out") or ()
    smoothing = (report.get("config") or {}).get("smoothing", "none")
    lines = [f"not quantized, because no quantizer supports it: {line}" for line in products]
    lines = lines or ["no product was left out for want of a quantizer"]
    if smoothing == "none":
        return (*lines, "smoothing was off")
    norms = [f"not smoothed with {smoothing}: {line}" for line in norms]
    return (*lines, *(norms or [f"every LayerNorm was smoothed with {smoothing}"]))


def _calibration(report: Json) -> str:
    facts = report.get("calibration") or {}
    return (
        f"{fixed(facts.get('images'))} images, after normalisation mean {fixed(facts.get('mean'), 2)} and standard "
        f"deviation {fixed(facts.get('std'), 2)}. Neighbouring pixels correlate with "
        f"{fixed(facts.get('neighbour_correlation'), 2)}: photographs and scans are near 1, noise is near 0."
    )


# ------------------------------------------------------------------------------------------ attention


def attention_section(run: Run) -> Markup | None:
    """Where each layer looks, for a few images."""
    images = run.get("attention").get("images") or []
    if not images:
        return None
    # Times the number of patches: 1 is even attention, whatever the grid of a layer.
    shares = [[_grid(grid) for grid in image["maps"]] for image in images]
    top = max(
        1.0, float(np.percentile(np.concatenate([s.ravel() for maps in shares for s in maps] or [np.ones(1)]), 99.5))
    )
    rows = (_attention_row(image, maps, top, i) for i, (image, maps) in enumerate(zip(images, shares, strict=True), 1))
    ramp = svg.heat(np.linspace(0.0, top, 160)[None], top)
    scale = (tag("span", "0×"), tag("img", src=svg.png_uri(ramp), alt="colour scale from dark blue to yellow"),
             tag("span", f"{fixed(top, 1)}× and above"))  # fmt: skip
    caption = (
        "Attention that each patch receives, layer by layer: mean over heads and over the patches that look. 1× is "
        "what a patch receives when attention is even; all maps share one scale. Spread is the share of patches that "
        "attention is effectively spread over (exponential of its entropy): 100% is even, small is focused."
    )
    return svg.figure(caption, *rows, tag("div", *scale, class_="ramp"))


def _grid(values: Any) -> NDArray[np.float64]:
    grid = np.nan_to_num(np.asarray(values, np.float64), posinf=0.0, neginf=0.0)
    if grid.ndim != 2 or not grid.size:
        raise ValueError(f"an attention map has shape {grid.shape}, not (rows, columns)")
    return grid * grid.size


def _attention_row(image: Json, maps: Sequence[NDArray[np.float64]], top: float, number: int) -> Markup:
    pixels = np.nan_to_num(np.asarray(image["image"], np.float64)).clip(0, 255).astype(np.uint8)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image {number} of attention.json has shape {pixels.shape}, not (height, width, 3)")
    label, predicted = str(image.get("label")), str(image.get("predicted"))
    verdict = f"predicted {predicted}, {'correct' if label == predicted else 'wrong'}"
    name = f"Input {number}, label {label}"
    cells = [_map(pixels, f"{name}, {verdict}", tag("b", f"label {label}"), verdict)]
    for depth, share in enumerate(maps, start=1):
        weights = share[share > 0] / max(float(share.sum()), 1e-12)
        spread = f"spread {100 * math.exp(-float((weights * np.log(weights)).sum())) / share.size:.0f}%"
        row, column = np.unravel_index(int(share.argmax()), share.shape)
        said = (
            f"{name}: attention of layer {depth} on {share.shape[0]} by {share.shape[1]} patches, {spread}, most at "
            f"row {row + 1}, column {column + 1}"
        )
        cells.append(_map(svg.heat(share, top), said, f"layer {depth}", spread))
    wide, narrow = math.ceil(len(cells) / math.ceil(len(cells) / 9)), min(len(cells), 4)
    return tag("div", *cells, class_="maps", style=f"--wide:{wide};--narrow:{narrow}")


def _map(pixels: NDArray[np.uint8], alt: str, *lines: object) -> Markup:
    return tag("div", tag("img", src=svg.png_uri(pixels), alt=alt, title=alt), svg.lines(lines), class_="map")


# ----------------------------------------------------------------------------------- bundle and gate


def bundle_section(run: Run) -> Markup | None:
    """What the artifact is: input, labels, files."""
    manifest = run.get("bundle")
    if not manifest:
        return None
    accuracy = manifest.get("accuracy") or {}
    measured = f"{_accuracy(accuracy)} of {accuracy.get('data')}, measured in {accuracy.get('runtime')}"
    simulated = tag("span", "simulated", class_="badge") if manifest.get("simulated") else None
    chips = [tag("li", label) for label in manifest.get("labels") or []]
    more = svg.details(f"{len(chips) - 60} more", tag("ol", *chips[60:], class_="chips")) if len(chips) > 60 else None
    folder = next(path.parent for path in run.files.values() if path.name == "bundle.json")
    files = [[name, _file_size(folder / name), tag("code", sha)] for name, sha in (manifest.get("files") or {}).items()]
    facts = svg.facts(
        [
            ("Architecture", manifest.get("architecture")),
            ("Profile", join([manifest.get("profile"), " ", simulated])),
            ("Accuracy", measured if accuracy else "not measured"),
            ("Input", ", ".join(f"{key}: {value}" for key, value in (manifest.get("input") or {}).items())),
            ("Preprocessing", _preprocessing(manifest.get("preprocess") or {})),
            ("ONNX opset", manifest.get("opset")),
            ("Versions", _versions(manifest)),
            (f"{len(chips)} labels", join([tag("ol", *chips[:60], class_="chips"), more])),
        ]
    )
    caption = "Files and their digests. Every load compares them, byte for byte."
    return join([facts, svg.table(caption, ("File", "Size", "SHA-256"), files, "lrl") if files else None])


def _file_size(path: Path) -> str:
    size = path.stat().st_size if path.is_file() else None
    return "–" if size is None else significant(size / 1e6, " MB") if size >= 1e5 else significant(size / 1e3, " kB")


def _preprocessing(values: Json) -> str | None:
    if not values:
        return None
    mean, std = (", ".join(significant(v) for v in values.get(key) or ()) for key in ("mean", "std"))
    size = " × ".join(fixed(side) for side in values.get("input_size") or ())
    share = _ratio(values.get("crop_pct"), 0.01)
    crop = "both sides squashed" if values.get("crop_mode") == "squash" else f"centre crop of {fixed(share, 1, '%')}"
    return (
        f"{size} pixels, {values.get('interpolation')}, {crop}; mean {mean} and standard deviation {std} of R, G, B "
        "in units where 255 is 1, applied inside the graph"
    )


_STATES = {
    True: ("passed", "yes", tag("polyline", points="2.5,8.5 6.5,12.5 13.5,4")),
    False: ("failed", "no", tag("path", d="M3.5 3.5l9 9M12.5 3.5l-9 9")),
    None: ("not verified", "open", tag("circle", cx=8, cy=8, r=5.5, stroke_dasharray="2.5 3")),
}


def _state(passed: Any) -> tuple[str, str, Markup]:
    return _STATES[passed if isinstance(passed, bool) else None]


def _verdict(passed: Any, text: str = "") -> Markup:
    word, css, shape = _state(passed)
    return tag("span", tag("svg", shape, viewBox="0 0 16 16", aria_hidden="true"), text or word, class_=f"state {css}")


def _count_checks(checks: Sequence[Json]) -> str:
    words = [_state(check.get("passed"))[0] for check in checks]
    return ", ".join(f"{words.count(word)} {word}" for word, _, _ in _STATES.values())


def gate_section(run: Run) -> Markup | None:
    """The checklist that the bundle was held against."""
    checks = run.get("verify").get("checks") or []
    if not checks:
        return None
    passed = bool(run.get("verify").get("passed"))
    rows = []
    for check in checks:
        hint = check.get("hint") if check.get("passed") is not True else None
        todo = [tag("span", f"To do: {hint}", class_="mute")] if hint else []
        found = svg.lines([check.get("found"), *todo])
        rows.append([check["name"], _verdict(check.get("passed")), found, check.get("expected")])
    verdict = _verdict(passed, "The gate is passed." if passed else "The gate is not passed.")
    caption = "What the bundle had to prove when it was written. The same checks run again with: leanvit verify."
    return join(
        [
            tag("p", verdict, f" {_count_checks(checks)}.", class_="verdict"),
            svg.table(caption, ("Check", "State", "Found", "Expected"), rows, "llll"),
        ]
    )


# ----------------------------------------------------------------------------------- benchmark, origin


def benchmark_section(run: Run) -> Markup | None:
    """Latency with its spread for every batch size."""
    values = run.get("benchmark")
    results = values.get("results") or []
    if not results:
        return None
    first = str(results[0]["name"])
    charts = []
    for batch in dict.fromkeys(result.get("batch_size") for result in results):
        title = f"Latency at batch {fixed(batch)}"
        bars = [
            svg.Row(
                str(r["name"]), finite(r.get("median_ms")), significant(r.get("median_ms"), " ms"),
                "s1" if r["name"] != first else "s0", finite(r.get("p10_ms")), finite(r.get("p90_ms")),
            )
            for r in results if r.get("batch_size") == batch
        ]  # fmt: skip
        chart = svg.bar_chart(f"latency-{fixed(batch)}", title, bars, "milliseconds per batch")
        charts.append(tag("div", tag("h4", title), chart))
    cells = [
        [
            r["name"], fixed(r.get("batch_size")), significant(r.get("median_ms")),
            f"{significant(r.get('p10_ms'))} to {significant(r.get('p90_ms'))}",
            significant(r.get("images_per_second")), significant(r.get("ratio"), "×"),
            _megabytes(r.get("bytes")), r.get("runtime"), r.get("precision"),
        ]
        for r in results
    ]  # fmt: skip
    heads = (
        "Target",
        "Batch",
        "Median, ms",
        "p10 to p90, ms",
        "Images/s",
        "Ratio",
        "Model, MB",
        "Runtime",
        "Precision",
    )
    threads = finite(values.get("threads"))
    caption = (
        "Time of one batch, shorter is better: bar to the median, whisker from the 10th to the 90th percentile; "
        f"{fixed(threads)} thread{'s' * (threads != 1)}, {fixed(values.get('rounds'))} rounds in which the targets "
        "take turns. Grey is the first target; each batch size has an axis of its own."
    )
    note = (
        f"Latency and throughput. Ratio is the median of the first target, {first}, over the target's own at the same "
        "batch size: above 1 is faster."
    )
    return join([svg.figure(caption, svg.panels(*charts)), svg.table(note, heads, cells, "lrrrrrrll")])


def origin_section(run: Run) -> Markup:
    """Command, machine, versions and files behind the page."""
    demo, bench = run.get("demo"), run.get("benchmark")
    machine = demo.get("machine") or bench.get("machine") or {}
    cores = finite(machine.get("cores"))
    computer = [machine.get("cpu"), f"{cores:.0f} cores" if cores else "", ", ".join(machine.get("features") or [])]
    return svg.facts(
        [
            ("Command", tag("code", demo["command"]) if demo.get("command") else None),
            ("Date", str(demo.get("date") or bench.get("date") or "").replace("T", " ")),
            ("Duration", duration(demo.get("seconds"))),
            ("Seed", demo.get("seed", run.get("train").get("seed"))),
            ("Machine", "; ".join(str(part) for part in computer if part)),
            ("Versions", _versions(demo) or _versions(bench) or _versions(run.get("bundle"))),
            ("Files read", svg.lines(tag("code", name) for name in run.files)),
        ]
    )
