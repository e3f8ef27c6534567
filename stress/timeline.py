"""A real training, its timeline, and a picture of that: ``python -m stress.timeline docs/_static/timeline.svg``.

A Trainer trains a small network with ``ModelCheckpoint(save_last=True)`` on a disk that is made as slow as a far
bucket. What is drawn is what the trace file says and nothing else; ``--trace`` keeps that file, or draws one that is
there already, of any run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from time import time
from typing import Any

from async_ckpt import AsyncCheckpointIO
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing import Fault, FaultyStore
from async_ckpt.timeline import Timeline

__all__ = ["draw", "train"]

Record = dict[str, Any]

# -- the training


def train(trace: Path, *, steps: int = 60) -> None:
    """Train for *steps* steps with a slow disk, and write the timeline to *trace*."""
    import pytorch_lightning as pl
    import torch

    class Network(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))

        def training_step(self, batch: Any) -> Any:
            return self.layers(batch[0]).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    class Steps(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began_seconds = time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            timeline.slice("training thread", f"step {trainer.global_step}", self.began_seconds, time())

    data = torch.utils.data.TensorDataset(torch.randn(steps * 32, 1024))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Timeline(trace) as timeline:
        checkpoints = pl.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=12, save_top_k=-1, save_last=True
        )
        plugin: Any = AsyncCheckpointIO(
            store_factory=_slow, observer=timeline, part_size="8MiB", max_concurrent_saves=2, queue_depth=3
        )
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[Steps(), checkpoints],  # a step ends before its checkpoint begins
            plugins=[plugin],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Network(), torch.utils.data.DataLoader(data, batch_size=32))


def _slow(location: Location, workers: Workers) -> Store:
    faults = [Fault(operation="put", delay_seconds=0.35), Fault(operation="commit", delay_seconds=0.2)]
    return FaultyStore(open_store(location, workers=workers), faults)


# -- the picture

WIDTH, LEFT, RIGHT, ROW, BAR, AREA = 960, 128, 20, 26, 18, 70

#: What is drawn, its colour on light and on dark paper.
COLOURS = {
    "paper": ("#ffffff", "#16191d"),
    "ink": ("#24292f", "#d6dce2"),
    "step": ("#c2c9d1", "#4b545e"),
    "copying": ("#cf222e", "#f2545b"),
    "admission": ("#e8a33d", "#d99a2b"),
    "queued": ("#8c959f", "#767f89"),
    "writing": ("#2f7fd6", "#2f81f7"),
    "committing": ("#0b3d7c", "#9cc4ff"),
    "durable": ("#1a7f37", "#3fb950"),
    "rest": ("#b6d7ff", "#23405f"),
}
FONT = """text { font: 12px system-ui, sans-serif } .small { font-size: 10px } .end { text-anchor: end }
.in { fill: #fff; font-size: 10px } .line { stroke: #8886; stroke-width: 0.7; fill: none }"""

LEGEND = {
    "step": "training step",
    "admission": "stall: admission",
    "copying": "stall: copying",
    "queued": "queued",
    "writing": "writing",
    "committing": "committing",
    "durable": "durable",
}


def draw(trace: Record) -> str:
    """Return the picture of *trace*, as SVG."""
    records: list[Record] = trace["traceEvents"]
    titles = {r["tid"]: r["args"]["name"] for r in records if r["name"] == "thread_name"}
    timed = [r for r in records if r["ph"] in "XiC"]
    began = min(r["ts"] for r in timed)
    ended = max(r["ts"] + r.get("dur", 0) for r in timed)
    scale = (WIDTH - LEFT - RIGHT) / (ended - began)
    x = partial(_x, began, scale)
    top = 16
    body = []
    for tid, title in titles.items():
        body.append(f'<text class="ink end" x="{LEFT - 10}" y="{top + 14}">{escape(title)}</text>')
        shapes = [shape for r in timed if r.get("tid") == tid for shape in _shapes(r, x, top, scale)]
        body += sorted(shapes, key=lambda shape: shape.startswith("<text"))  # on top
        top += ROW
    body.append(f'<text class="ink end" x="{LEFT - 10}" y="{top + AREA / 2}">bytes in flight</text>')
    body += _area([r for r in timed if r["name"] == "bytes in flight"], x, top + 6, x(ended))
    top += AREA + 10
    body[:0] = _axis((ended - began) / 1e6, scale * 1e6, top)  # beneath the rest
    body += _legend(top + 36)
    size = f'viewBox="0 0 {WIDTH} {top + 52}" width="{WIDTH}" height="{top + 52}"'
    paper = '<rect width="100%" height="100%" rx="8" class="paper"/>'
    title = f"<title>{escape(_summary(timed, began, ended))}</title>"
    lines = [f"<style>\n{_style()}\n</style>", title, paper, *body]
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n' + "\n".join(lines) + "\n</svg>\n"


def _style() -> str:
    light, dark = (
        " ".join(f".{kind} {{ fill: {colours[index]} }}" for kind, colours in COLOURS.items())
        for index in (0, 1)
    )
    return f"{FONT}\n{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


def _x(began: int, scale: float, at: int) -> float:
    return round(LEFT + (at - began) * scale, 1)


def _shapes(record: Record, x: Any, top: float, scale: float) -> Iterator[str]:
    """Draw a slice or an instant; the outer slice of a save only lends its name."""
    name, left = record["name"], x(record["ts"])
    if record["ph"] == "i":
        colour = (
            "durable" if name == "durable" else "ink" if name.endswith(("removed", "linked")) else "copying"
        )
        yield f'<path d="M{left} {top}l5 9l-5 9l-5-9z" class="{colour}"/>'
        return
    kind = "copying" if name == "staging" else "step" if name.startswith("step ") else name
    width = round(max(record["dur"] * scale, 0.4), 1)
    if kind in LEGEND:
        gap = 0.6 if kind == "step" and width > 2 else 0
        yield f'<rect x="{left}" y="{top}" width="{width - gap:.1f}" height="{BAR}" class="{kind}"/>'
    elif "outcome" in record["args"] and width > 60:
        yield f'<text class="in" x="{left + 5}" y="{top + 12.5}">{escape(name)}</text>'


def _area(counts: list[Record], x: Any, top: float, right: float) -> Iterator[str]:
    """Draw the bytes of saves that are being written: those written, and on top of them those to write."""
    heights = {
        "rest": [sum(r["args"].values()) for r in counts],
        "writing": [r["args"]["written"] for r in counts],
    }
    most = max(heights["rest"], default=0) or 1
    floor = top + AREA
    for kind, values in heights.items():
        path = f"M{LEFT} {floor}"
        for record, value in zip(counts, values, strict=True):
            path += f"H{x(record['ts'])}V{floor - value / most * AREA:.1f}"
        yield f'<path d="{path}H{right}V{floor}z" class="{kind}"/>'
    yield f'<text class="ink small" x="{LEFT + 4}" y="{top + 9}">{most / 1e6:.0f} MB</text>'


def _axis(seconds: float, scale: float, top: float) -> Iterator[str]:
    yield f'<path d="M{LEFT} {top}H{WIDTH - RIGHT}" class="line"/>'
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, 86400) if seconds / s <= 12)
    for tick in range(int(seconds / step) + 1):
        at = round(LEFT + tick * step * scale, 1)
        yield f'<path d="M{at} 10V{top + 4}" class="line"/>'
        yield f'<text class="ink small" x="{at - 4}" y="{top + 15}">{tick * step:g} s</text>'


def _legend(top: float) -> Iterator[str]:
    left = LEFT
    for kind, words in LEGEND.items():
        shape = 'd="M6 0l5 6l-5 6l-5-6z"' if kind == "durable" else 'd="M0 0h11v11h-11z"'
        yield f'<path transform="translate({left} {top - 10})" {shape} class="{kind}"/>'
        yield f'<text class="ink small" x="{left + 16}" y="{top}">{words}</text>'
        left += 28 + round(5.6 * len(words))


def _summary(timed: list[Record], began: int, ended: int) -> str:
    stalls = [
        r["dur"] for r in timed if r["ph"] == "X" and "stall_seconds" in r["args"] and "url" not in r["args"]
    ]
    durable = [r["args"]["nbytes"] for r in timed if r["name"] == "durable"]
    return (
        f"{len(durable)} checkpoints, {sum(durable) / 1e6:.0f} MB, became durable in {(ended - began) / 1e6:.1f} s; "
        f"the loop stalled for {sum(stalls) / 1e6:.2f} s"
    )


def main() -> None:
    """Train, or take a trace that is there, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("--trace", type=Path, help="draw this file if it exists; else keep the trace there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = arguments.trace or Path(folder) / "trace.json"
        if not trace.exists():
            train(trace)
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        arguments.picture.write_text(draw(json.loads(trace.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
