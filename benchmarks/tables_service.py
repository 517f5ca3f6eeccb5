"""Tables and sentences about serving, many images, many machines and the browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median
from typing import Any

from tables_common import markdown, results, span, where

SERVED = {"ReViT micro, 32 px": "serve.json", "ViT-S, 224 px": "serve_vit_small.json"}


def _pace(a_second: float) -> str:
    return f"{a_second:.1f}" if a_second < 100 else f"{a_second:.0f}"


def service() -> str:
    """Requests a second beside LitServe."""
    lines = []
    for said, file in SERVED.items():
        found = results(file)
        ours, theirs = (found["median_requests_a_second"][who] for who in ("leanvit", "litserve"))
        for index, clients in enumerate(ours):
            name = f"{said} ([{file}](../benchmarks/results/{file}))" if index == 0 else ""
            alone = _pace(found["network_alone_images_a_second"]) if clients != "1" else ""
            cells = (_pace(ours[clients]), _pace(theirs[clients]), f"{found['ratio'][clients]:.2f}")
            lines.append((name, clients, *cells, alone))
    header = ("requests a second", "clients", "`leanvit serve`", "LitServe", "ratio", "the network alone")
    facts = results("serve.json")["facts"]
    return markdown(header, lines) + f"\n\n{where(facts)}, seed {facts['seed']}, medians of three rounds."


def service_bound() -> str:
    """How near both servers are to the network alone."""
    found = results("serve_vit_small.json")
    medians = [found["median_requests_a_second"][who]["16"] for who in ("leanvit", "litserve")]
    share = span([100 * one / found["network_alone_images_a_second"] for one in medians], 0)
    ours, theirs = (
        span([one["requests_a_second"] for one in found["rounds"][who]["16"]], 1) for who in ("leanvit", "litserve")
    )
    return (
        "*The network alone*: images a second in batches of 16 with nothing before or after them, which no server can "
        f"pass. With a ViT-S on two cores both servers are at {share}% of it: nothing is left to be won there, and "
        f"rounds ({ours} against {theirs}) differ by more than the two servers."
    )


def overload() -> str:
    """Twice as many requests as the server can do, and a long run."""
    micro, small = (results(file) for file in SERVED.values())
    refused, slowest, late = ([one[key] for one in micro["overload"]["rounds"]]
                              for key in ("refused_p99_ms", "refused_slowest_ms", "p99_ratio"))  # fmt: skip
    small_slowest, small_late = ([one[key] for one in small["overload"]["rounds"]]
                                 for key in ("refused_slowest_ms", "p99_ratio"))  # fmt: skip
    soak = micro["soak"]
    rounds = [one for found in (micro, small) for one in found["overload"]["rounds"]]
    assert not any(one["failed"] or one["refused_without_retry_after"] for one in rounds), (
        "the sentence no longer holds"
    )
    return (
        "Twice as many requests as the server can do (the clients on one core, the server on the other; queue of 64, "
        f"batches of 16): all that is refused has Retry-After, nothing fails. Refusals took {span(refused, 0)} ms at "
        f"p99, the slowest of three rounds {max(slowest):.0f} ms; what was taken had its answer, at p99, within "
        f"{span(late, 1)} times (queue + batch) / capacity. With the ViT-S, which had both cores: the slowest refusal "
        f"{max(small_slowest):.0f} ms, answers at p99 within {span(small_late, 2)} times. In {soak['answered']:,} "
        f"requests the process grew from {soak['rss_before_mib']} to {soak['rss_after_mib']} MiB."
    )


def service_ray() -> str:
    """The same service behind Ray."""
    found = results("ray_serve.json")
    lines = [
        (said, *(f"{one['requests_a_second']:.0f}, {one['p50_ms']:.1f} ms" for one in found[key]["clients"].values()))
        for said, key in (("`leanvit serve --threads 1`", "plain"),
                          ("the same with `--ray local --ray-workers 1`", "ray_one_replica"))
    ]  # fmt: skip
    header = (
        "",
        *(f"{clients} client{'s' * (clients != '1')}: requests/s, p50" for clients in found["plain"]["clients"]),
    )
    return (
        markdown(header, lines)
        + f"\n\n{where(found['facts'])}, **other work beside**: compare rows, read no absolutes."
    )


def service_ray_cost() -> str:
    """What a request more costs through Ray."""
    found = results("ray_serve.json")
    plain, ray = found["plain"], found["ray_one_replica"]
    hop = ray["clients"]["1"]["p50_ms"] - plain["clients"]["1"]["p50_ms"]
    return (
        f"A hop through Ray costs about {hop:.0f} ms of two shared cores a request, more than this network: with so "
        f"small a one Ray only adds safety and machines. It started in {ray['start_seconds']:.0f} s in place of "
        f"{plain['start_seconds']:.0f}."
    )


def service_ray_killed() -> str:
    """A replica killed under load."""
    found = results("ray_serve.json")["killed_of_two"]
    assert set(found["codes"]) == {"200", "503"}, "the sentence no longer holds"
    return (
        f"One of two replicas killed (SIGKILL) under 16 clients for 40 s: {found['codes']['200']:,} requests answered "
        f"200, {found['codes']['503']} answered 503, none lost; the loss was noticed in {found['noticed_after_s']} s, "
        f"the second replica was back after {found['two_again_after_s']} s, the slowest answer took "
        f"{found['slowest_ms'] / 1000:.1f} s."
    )


def many_images() -> str:
    """Prediction over folders with corrupt images in them."""
    found = results("predict.json")
    lines = [
        (
            f"{row['images']:,}",
            f"{row['images_per_second']:.0f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_mib']:.1f} MiB",
        )
        for row in found["results"]
    ]
    share = found["results"][-1]["images"] // found["corrupt"]
    kills = len(found["killed"]["killed_at_share"])
    assert found["killed"]["file_equals_uninterrupted"], "the sentence no longer holds"
    header = (f"images, of which 1 in {share} is corrupt", "images/s", "processor seconds", "peak memory")
    return markdown(header, lines, 0) + (
        f"\n\n`vit_micro.fmnist`, fp32, images of 28 to 64 pixels, {where(found)}, seed {found['seed']}, other work "
        f"beside (load {found['results'][0]['load_average_before']:.1f}): the speed is a lower limit, the processor "
        "time is what to go by. Both outputs are complete and in order, exit code 6. The same "
        f"{found['results'][-1]['images']:,} images with kill -9 at {kills} random moments and `--resume` after each: "
        f"the same file, byte for byte, and the {found['corrupt']} corrupt images counted."
    )


def browser() -> str:
    """A bundle in Chromium."""
    found = results("web.json")
    ((db, asked),) = re.findall(r"([\d.]+) dB, (\d+) needed", found["golden"])
    lines = [
        ("top-1 as `Predictor`'s", f"{found['same_top1']} of {found['images']} JPEGs of odd sizes"),
        ("golden logits in wasm", f"{db} dB, {asked} needed"),
        *((f"W8A8, batch {row['batch']}",
           f"{row['w8a8, a picture']} a picture, {row['faster']} as fast as float ({row['float, a picture']})")
          for row in found["times"]),
        ("size", f"{found['bytes']['w8a8'] / 1e6:.1f} MB, float {found['bytes']['fp32'] / 1e6:.1f} MB"),
    ]  # fmt: skip
    facts = found["facts"]
    version = found["browser"].partition(".")[0]
    return markdown(("what", "found"), lines, 2) + (
        f"\n\n{where(facts)}, seed {facts['seed']}, {found['threads'].replace('@', ' ')}, Chromium {version}."
    )


def ray_measured() -> str:
    """Prediction and search on Ray: what was lost, and how fast."""
    lost, speed = (
        next(r for r in results("ray_predict.json")["rows"] if r["case"] == case) for case in ("lose", "speed")
    )
    removed, killed = lost["events"]
    assert (lost["same_bytes"], lost["distinct_rows"]) == (True, lost["rows"]), "the sentence no longer holds"
    memory = lost["memory_mib"]
    start, pace = speed["start_seconds"], speed["images_per_second"]
    pays = (start["ray"] - start["alone"]) / (1 - pace["alone"] / pace["ray"])
    plan = results("scale_plan.json")["measured"]
    lines = "\n".join(
        (
            f"- **Lost**: of a cluster of two nodes one was removed after {removed['parts']} of {lost['parts']} "
            f"parts, the command killed after {killed['parts']} and started again with `--resume`: "
            f"{lost['distinct_rows']:,} rows, each once, the parts byte for byte those of one process. The command "
            f"stayed at {memory['driver']['last']:.0f} MiB, a worker at {memory['worker']['last']:.0f}.",
            f"- **Speed**: two workers of one core {pace['ray']:,.0f} images a second, one process with two threads "
            f"{pace['alone']:,.0f} (medians of {speed['rounds']} rounds without the start); the start took "
            f"{start['ray']:.1f} s, that of the process {start['alone']:.1f} s. So Ray pays from about {pays:.0f} "
            "s of work on.",
            _search(),
            f"- **A core** did {plan['images_per_second_and_core']:,.0f} images a second, the driver listed a name in "
            f"{plan['seconds_a_name_listed'] * 1e6:.0f} microseconds and wrote a part "
            f"({plan['part_bytes'] / 1000:.0f} kB) in {plan['seconds_a_part_written'] * 1000:.1f} ms.",
        )
    )
    return f"{lines}\n\n{where(lost)}, seed {results('scale_plan.json')['seed']}."


def _search() -> str:
    found = results("ray_search.json")
    options, row = found["options"], found["rows"][0]
    assert row["same"] == {"journal": True, "plan": True}, "the sentence no longer holds"
    alone, ray = ([one["search"] for one in row["rounds"][way]] for way in ("one thread", "ray"))
    each = ", ".join(f"{a / b:.2f}" for a, b in zip(alone, ray, strict=True))
    faster = {part: row["times_faster_on_ray"][part]["one thread"] for part in ("search", "whole")}
    return (
        f"- **Search**: journal and plan are the same bytes. `{options['model']}` with {row['images']} images to an "
        f"average of {options['bits']:.0f} bits, {options['rounds']} rounds in turns: {median(alone):.0f} s alone "
        f"with one thread, {median(ray):.0f} s with {options['workers']} processes, {faster['search']:.2f} times as "
        f"fast ({each}; medians). From reading the images to the quantized network, with the start of Ray and every "
        f"process's own network, it was {faster['whole']:.2f} times: a short search gains nothing."
    )


WORKERS = (1, 10, 100, 1000)
MILLION, BILLION = 10**6, 10**9
SLOW = "20 images/s a core"
"""What a network of ViT-S's size has: the second half of scale_plan.json."""


def _planned() -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(row["model"], row["images"], row["workers"]): row for row in results("scale_plan.json")["rows"]}


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds:,.0f} s"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def ray_plan() -> str:
    """Simulated time of a million and a billion images by workers."""
    rows = _planned()
    each = [(model, images) for model in ("as measured", SLOW) for images in (MILLION, BILLION)]
    lines = [(f"{n:,}", *(_time(rows[model, images, n]["seconds"]) for model, images in each)) for n in WORKERS]
    pace = results("scale_plan.json")["measured"]["images_per_second_and_core"]
    header = (
        "workers of a core",
        f"{MILLION:,} images at {pace:,.0f}/s",
        f"{BILLION:,}",
        f"{MILLION:,} at 20/s",
        f"{BILLION:,}",
    )
    return markdown(header, lines, 0)


def ray_limits() -> str:
    """What limits a cluster next."""
    measured, row = results("scale_plan.json")["measured"], _planned()[SLOW, MILLION, 1000]
    names = 1 / measured["seconds_a_name_listed"]
    micro = names / measured["images_per_second_and_core"]
    parts = -(-MILLION // 1024)
    return (
        f"What limits next: the driver lists {round(names, -3):,.0f} names a second, what {micro:.0f} workers of the "
        f"micro model read; with 20 images a second a core that is {round(names / 20, -2):,.0f} workers. Below that "
        f"it is the parts: a million images are {parts} parts of 1,024, so that 1,000 workers wait for the slowest "
        f"({row['efficiency']:.0%} at work); `--part-images 128` has eight times as many. A billion files of 100 kB "
        "read at 20,000 a second are 2 GB a second from the store; shards and Parquet files spare its listing and "
        "its requests."
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (service, service_bound, overload, service_ray, service_ray_cost, service_ray_killed, many_images,
                     browser, ray_measured, ray_plan, ray_limits)
}  # fmt: skip
