"""The charts and the tables of the documentation, from the recorded samples: ``python -m stress.bench.charts``.

Guarantees: the same samples give the same files. Every figure in a chart, its title included, comes from a recording in
``stress/bench/samples``; a title says what these say. Medians of the rounds, with the lowest and the highest where
there is room.

What does not belong here: how a chart looks (`chart_style`), how samples are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.ticker import MaxNLocator

from stress.bench.chart_style import OURS, THEMES, WIDTH, Axes, Chart, Theme, label_of, rendered
from stress.bench.loop import EVERY
from stress.bench.page import PAGE, filled
from stress.bench.recording import SAMPLES, read
from stress.bench.s3_report import LIGHTNING as LIGHTNING_S3

__all__ = ["CHARTS", "STATIC", "main"]

STATIC = Path(__file__).parents[2] / "docs" / "_static"

KEPT = "dcp.async_save, kept stager"
_LINES = {"async_ckpt": "-", KEPT: "--"}
_MARKS = {"async_ckpt": "o", "Lightning": "s", "dcp.async_save": "^", KEPT: "v", "torch.save": "D"}


def main() -> None:
    """Draw every chart, for light and for dark paper, and write the tables."""
    for name, draw in CHARTS.items():
        for theme in THEMES:
            (STATIC / f"{name}-{theme.name}.svg").write_text(rendered(draw, theme), encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def samples_of(name: str) -> Any:
    """Return the samples of a recording."""
    return read(SAMPLES / f"{name}.json")["samples"]


# -- the front page: stall and memory of one GiB


def _overview(theme: Theme) -> Chart:
    recording = read(SAMPLES / "local.json")
    large, cpus = recording["samples"]["large"], recording["machine"]["cpus"]
    names = ("torch.save", "Lightning", KEPT, OURS)
    stalls = [[run["warm_stall_seconds"] * 1e3 for run in large[name]] for name in names]
    memory = [[run["extra_bytes"] / 2**30 for run in large[name]] for name in names]
    ours, theirs = median(stalls[3]), median(stalls[1])
    chart = Chart(
        theme,
        height=226,
        title=f"To save a GiB stops training for {ours:.0f} ms,\nwith Lightning’s own plugin for {theirs:.0f} ms",
        subtitle=f"64 tensors to local disk; medians on {cpus} CPUs",
    )
    for left, width, what, values, form in (
        (132, 138, "the call takes, ms", stalls, "{:,.0f}"),
        (290, 118, "extra memory, × state", memory, "{:.2f}"),
    ):
        chart.text(left, 64, what, color=theme.soft, size=9.5)
        axes = chart.axes(left, 80, width, 140)
        _bars(axes, theme, names, values, form, spread=False)
        if left == 132:
            _row_names(axes, theme, names)
    return chart


def _bars(
    axes: Axes,
    theme: Theme,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    form: str,
    *,
    spread: bool = True,
) -> None:
    """Draw a bar for each median with its figure behind it, and how far the rounds were apart."""
    middles = [median(runs) for runs in values]
    for row, (name, runs, middle) in enumerate(zip(names, values, middles, strict=True)):
        axes.barh(row, middle, height=0.62, color=theme.of(name))
        if spread:
            axes.plot([min(runs), max(runs)], [row, row], color=theme.ink, linewidth=0.9)
        figure = form.format(middle) if middle > 0.005 else "none"
        _figure_beside(axes, theme, name, figure, (max(runs) if spread else middle, row), gap=4)
    axes.set_xlim(0, max(middles) * 1.3)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _figure_beside(
    axes: Axes,
    theme: Theme,
    name: str,
    figure: str,
    point: tuple[float, float],
    *,
    gap: float,
    **options: Any,
) -> None:
    """Write a figure of a contestant to the right of a point."""
    axes.annotate(
        figure,
        point,
        xytext=(gap, 0),
        textcoords="offset points",
        va="center_baseline",
        color=theme.ink,
        weight="bold" if name == OURS else "normal",
        size=9.5,
        **options,
    )


def _row_names(axes: Axes, theme: Theme, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label_of(name) for name in names])
    for words, name in zip(axes.get_yticklabels(), names, strict=True):
        words.set_color(theme.ink)
        words.set_weight("bold" if name == OURS else "normal")


# -- the stall by size


def _stall(theme: Theme) -> Chart:
    samples = samples_of("sizes")
    sizes = list(samples[OURS][0]["stall_seconds"])
    last = sizes[-1]

    def stall(name: str, size: str) -> list[float]:
        return [run["stall_seconds"][size] * 1e3 for run in samples[name]]

    ours, kept, theirs = (median(stall(name, last)) for name in (OURS, KEPT, "Lightning"))
    chart = Chart(
        theme,
        height=330,
        title=f"For a GiB the call takes {ours:.0f} ms, with a kept DCP\n"
        f"stager {kept:.0f} ms, with Lightning’s own plugin {theirs:.0f} ms",
        subtitle="warm stall in ms by size of the state, both scales logarithmic",
    )
    axes = chart.axes(36, 66, 216, 232)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = [float(size) for size in sizes]
    for name in samples:
        runs = [stall(name, size) for size in sizes]
        middles = [median(each) for each in runs]
        colour = theme.of(name)
        axes.vlines(
            places, [min(each) for each in runs], [max(each) for each in runs], color=colour, lw=1, alpha=0.6
        )
        axes.plot(
            places,
            middles,
            color=colour,
            linestyle=_LINES.get(name, "-"),
            marker=_MARKS[name],
            markersize=5,
            linewidth=2.6 if name == OURS else 1.4,
        )
    axes.set_xticks(
        places, [f"{size} MiB" if float(size) < 1024 else f"{float(size) / 1024:g} GiB" for size in sizes]
    )
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    ends = {name: median(stall(name, last)) for name in samples}
    _end_labels(axes, theme, places[-1], ends, lambda name, value: f"{label_of(name)}  {value:,.0f}")
    return chart


def _end_labels(
    axes: Axes, theme: Theme, x: float, ends: dict[str, float], words: Callable[[str, float], str]
) -> None:
    """Name each line at its end, far enough from each other to be read."""
    axes.figure.canvas.draw()
    least = 13.0
    heights: list[float] = []
    ordered = sorted(ends.items(), key=lambda end: end[1])
    for _, value in ordered:
        at = axes.transData.transform((x, value))[1] * 72 / axes.figure.dpi
        heights.append(max(at, heights[-1] + least) if heights else at)
    for (name, value), height in zip(ordered, heights, strict=True):
        at = axes.transData.transform((x, value))[1] * 72 / axes.figure.dpi
        axes.annotate(
            words(name, value),
            (x, value),
            xytext=(8, height - at),
            textcoords="offset points",
            va="center",
            color=theme.of(name) if name != "torch.save" else theme.soft,
            weight="bold" if name == OURS else "normal",
            size=9.5,
            annotation_clip=False,
        )


# -- the whole loop


def _loop(theme: Theme) -> Chart:
    samples = samples_of("loop")
    names = list(samples["every CPU at work"])
    cadences = list(EVERY)
    panel_height = 22 * len(names)

    def ratio(training: str, name: str, every: str) -> list[float]:
        return [100 * (run[every]["ratio"] - 1) for run in samples[training][name]]

    worst = "every CPU at work"
    ours, kept, theirs = (median(ratio(worst, name, cadences[-1])) for name in (OURS, KEPT, "Lightning"))
    chart = Chart(
        theme,
        height=88 + (panel_height + 46) * len(samples),
        title=f"With a save every {cadences[-1]} steps, training on every CPU takes\n"
        f"{ours:.0f} % longer; torch DCP: {kept:.0f} %, Lightning’s plugin: {theirs:.0f} %",
        subtitle="time beyond that of the same steps without saves, until the last save has ended",
    )
    most = max(median(ratio(training, name, cadences[0])) for training in samples for name in names)
    chart.text(
        2, 60, f"○ a save every {cadences[0]} steps, ● every {cadences[-1]}, | a single round", size=9.5
    )
    for panel, training in enumerate(samples):
        top = 106 + panel * (panel_height + 46)
        chart.text(2, top - 20, training, size=10, weight="bold")
        axes = chart.axes(132, top, WIDTH - 132 - 10, panel_height)
        axes.axvline(0, color=theme.soft, linewidth=0.8)
        for row, name in enumerate(names):
            for every, offset in ((cadences[0], -0.17), (cadences[-1], 0.17)):
                runs, colour, at = ratio(training, name, every), theme.of(name), row + offset
                axes.plot(runs, [at] * len(runs), "|", color=colour, markersize=6, alpha=0.65)
                face = colour if offset > 0 else theme.paper
                axes.plot([median(runs)], [at], "o", mec=colour, mfc=face, markersize=6.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(-0.1 * most, 1.2 * most)
        axes.grid(axis="x", color=theme.grid, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
        _row_names(axes, theme, names)
    return chart


# -- how long the steps of such a training take


def _steps(theme: Theme) -> Chart:
    samples = samples_of("loop")
    last = list(EVERY)[-1]
    height = 26 + 21 * len(samples["every CPU at work"])
    chart = Chart(
        theme,
        height=84 + (height + 34) * len(samples),
        title="How much longer a step takes while a save is under way",
        subtitle=f"steps of a training with a save every {last} steps, as multiples of those without;\n"
        "one mark a step, ● the median, the longest in figures",
    )
    most = 1.0
    panels = []
    for panel, (training, contestants) in enumerate(samples.items()):
        top = 92 + panel * (height + 34)
        chart.text(2, top - 20, training, size=10, weight="bold")
        axes = chart.axes(132, top, WIDTH - 132 - 40, height - 14)
        axes.axvline(1, color=theme.soft, linewidth=0.8)
        for row, (name, runs) in enumerate(contestants.items()):
            steps = sorted(
                step / median(run[last]["idle_steps_ms"]) for run in runs for step in run[last]["steps_ms"]
            )
            most = max(most, steps[-1])
            colour = theme.of(name)
            axes.plot(steps, [row] * len(steps), "|", color=colour, markersize=7, alpha=0.35)
            axes.plot([median(steps)], [row], "o", color=colour, markersize=5)
            longest, edge = f"{steps[-1]:.1f}", ("axes fraction", "data")
            _figure_beside(axes, theme, name, longest, (1, row), gap=6, xycoords=edge)
        axes.set_ylim(len(contestants) - 0.4, -0.6)
        axes.grid(axis="x", color=theme.grid, linewidth=0.7)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
        _row_names(axes, theme, list(contestants))
        panels.append(axes)
    for axes in panels:
        axes.set_xlim(0.5, 1.03 * most)
    return chart


# -- memory over time


def _memory(theme: Theme) -> Chart:
    recording = read(SAMPLES / "memory.json")
    samples, mib = recording["samples"], recording["parameters"]["mib"]
    names = list(samples)

    def peak(name: str) -> float:
        return median(max(held for _, held in run["held"]) for run in samples[name]) / mib

    chart = Chart(
        theme,
        height=100 + 66 * len(names),
        title=f"A save needs {peak(OURS):.1f} times the state besides it;\n"
        f"with Lightning’s own plugin {peak('Lightning'):.1f} times",
        subtitle="memory beyond the state, while a training saves 1 GiB twice\n"
        "bars below: thick, the call; thin, until the save has ended",
    )
    most = max(peak(name) for name in names)
    for row, name in enumerate(names):
        top = 78 + row * 66
        axes = chart.axes(2, top + 14, WIDTH - 50, 46)
        run = sorted(samples[name], key=lambda each: each["saves"][-1][2])[len(samples[name]) // 2]
        times, held = zip(*run["held"], strict=True)
        colour = theme.of(name)
        heights = [max(each, 0) / mib for each in held]
        axes.fill_between(times, heights, color=colour, alpha=0.35, linewidth=0)
        axes.plot(times, heights, color=colour, linewidth=1.2)
        for began, returned, ended in run["saves"]:
            axes.plot([began, ended], [-0.16 * most] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(
                [began, returned], [-0.16 * most] * 2, color=theme.ink, linewidth=4, solid_capstyle="butt"
            )
        axes.set_xlim(-0.4, 8.2)
        axes.set_ylim(-0.26 * most, most * 1.05)
        axes.set_yticks([0, 1, 2], ["0", "1 ×", "2 ×"])
        axes.yaxis.tick_right()
        axes.grid(axis="y", color=theme.grid, linewidth=0.7)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xticks(
            range(0, 9, 2), [f"{at} s" for at in range(0, 9, 2)] if row == len(names) - 1 else [""] * 5
        )
        most_held = f"{peak(name):.2f} ×" if peak(name) > 0.05 else "none"
        words = f"{label_of(name)}: {most_held}"
        chart.text(2, top, words, color=colour, weight="bold" if name == OURS else "normal", size=10)
    return chart


# -- loading


def _load(theme: Theme) -> Chart:
    local, remote = samples_of("local_load"), samples_of("s3")["load"]
    sections = (
        ("from the disk", list(local), [[run["cold_seconds"] for run in runs] for runs in local.values()]),
        (
            "from the page cache",
            list(local),
            [[run["warm_seconds"] for run in runs] for runs in local.values()],
        ),
        (
            "from S3, a real server",
            list(remote),
            [[run["seconds"] for run in runs] for runs in remote.values()],
        ),
    )
    ours, theirs = (median(run["seconds"] for run in remote[name]) for name in (OURS, LIGHTNING_S3))
    share = median(
        mine[what] / torchs[what]
        for what in ("cold_seconds", "warm_seconds")
        for mine, torchs in zip(local[OURS], local["torch.load"], strict=True)
    )
    rows = sum(len(names) for _, names, _ in sections)
    chart = Chart(
        theme,
        height=74 + 17 * rows + 34 * len(sections),
        title=f"A GiB from S3 is loaded in {ours:.1f} s instead of {theirs:.1f};\n"
        f"a local file in {share:.2f} times what torch.load takes",
        subtitle="seconds to load a state of 1 GiB; medians, lines from lowest to highest",
    )
    most = max(median(runs) for _, _, values in sections for runs in values)
    top = 64.0
    for words, names, values in sections:
        chart.text(2, top, words, size=10, weight="bold")
        height = 17.0 * len(names)
        axes = chart.axes(166, top + 16, WIDTH - 166 - 4, height)
        _bars(axes, theme, names, values, "{:.2f}")
        axes.set_xlim(0, most * 1.36)
        _row_names(axes, theme, names)
        top += height + 34
    return chart


CHARTS: dict[str, Callable[[Theme], Chart]] = {
    "overview": _overview,
    "stall": _stall,
    "loop": _loop,
    "steps": _steps,
    "memory": _memory,
    "load": _load,
}
"""Every chart, by the name of its files."""

if __name__ == "__main__":
    main()
