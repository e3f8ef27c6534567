"""The file format: the layout of a checkpoint file, its parts, and reading it.

``lay_out`` turns a snapshot into a `Layout`, the exact bytes of the file as a scatter list;
``plan_parts`` cuts it; `reading.reader.read_checkpoint` reads a file.

What does not belong here: storage, memory, the order of saves.
"""

from __future__ import annotations

from async_ckpt.format.writing.layout import Layout, lay_out
from async_ckpt.format.writing.parts import plan_parts

__all__ = ["Layout", "lay_out", "plan_parts"]
