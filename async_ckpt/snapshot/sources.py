"""The memory that a state's storages have: where it is, and whether it is still there.

Guarantees: memory is only looked for through const access, so a copy-on-write source stays shared. Each piece is seen
through an alias that nobody else has: whatever becomes of the state's tensors, it is the memory of the capture.

What does not belong here: copying (`host_pool`), what the memory means (`extraction`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Sources", "address_of", "bytes_of", "without_modes", "without_modes_if_any"]

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

address_of: Callable[[torch.Tensor], int] = getattr(torch.Tensor, "const_data_ptr", torch.Tensor.data_ptr)
"""Returns the address of the data, for reading; ``data_ptr`` makes a copy-on-write tensor copy its memory."""


@dataclass(slots=True, kw_only=True)
class Sources:
    """Pieces of memory, as columns: each a storage, or a part of one.

    Attributes:
        owners: the storages.
        sizes: the lengths of the pieces in bytes.
        begins: where in their storages they begin; empty if all pieces are whole storages.
        owner_sizes: the lengths of their storages; empty, too, then.
        aliases: tensors over the memory, to be asked for its address.
        skips: how many bytes after the beginning of its alias's data each piece begins; may be negative.
    """

    owners: list[torch.UntypedStorage] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    owner_sizes: list[int] = field(default_factory=list)
    aliases: list[torch.Tensor] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)

    def add(self, owner: torch.UntypedStorage, alias: torch.Tensor) -> int:
        """Add a whole storage, seen through *alias* from its first byte on; return its number."""
        self.owners.append(owner)
        self.sizes.append(owner.nbytes())
        self.aliases.append(alias)
        self.skips.append(0)
        return len(self.sizes) - 1

    def are_there(self) -> bool:
        """Return whether no storage was freed or resized."""
        return list(map(torch.UntypedStorage.nbytes, self.owners)) == (self.owner_sizes or self.sizes)

    def is_there(self, index: int) -> bool:
        """Return whether one was not."""
        return self.owners[index].nbytes() == (self.owner_sizes or self.sizes)[index]

    def addresses(self) -> list[int]:
        """Return where the pieces begin now; valid while their storages are not resized."""
        if not any(self.skips):
            return list(map(address_of, self.aliases))
        return list(map(int.__add__, map(address_of, self.aliases), self.skips))

    def address(self, index: int) -> int:
        """Return where one begins."""
        return address_of(self.aliases[index]) + self.skips[index]

    def view(self, index: int) -> torch.Tensor:
        """Return the bytes of a piece."""
        whole = bytes_of(self.owners[index])
        if not self.begins:
            return whole
        return whole[self.begins[index] : self.begins[index] + self.sizes[index]]


@contextmanager
def without_modes() -> Iterator[None]:
    """Disable torch's modes, in which the program may have replaced what any function returns."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def without_modes_if_any() -> AbstractContextManager[None]:
    """Do so at no cost where there are none."""
    are_any = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    return without_modes() if are_any else _nothing


_nothing = nullcontext()


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return the whole storage as a tensor of bytes."""
    with without_modes_if_any():
        if storage.device.type == "cpu":
            return _NOTHING.detach().set_(storage)  # cheaper than a new tensor
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
