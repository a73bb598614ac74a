"""What a packed model keeps in memory: no mapped file, and each bit once.

The engine has a layout of its own. While it runs an encoder, it alone holds the bits (`lend_buffer`), and the module
has them back as soon as anyone looks: another forward, `state_dict`, a copy, a cast.
"""

import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


def own_memory(model: nn.Module) -> None:
    """Copy every tensor out of the mapped file: whatever happens to the file afterwards, answers stay."""
    mapped = _mapped_files() if _libc is not None else []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.device.type == "cpu":
                    before = tensor.data
                    if isinstance(tensor, nn.Parameter):
                        tensor.data = before.clone()
                    else:
                        store[name] = tensor.clone()
                    _forget(before, mapped)
    return_free_memory()


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses between which this process has mapped a file; empty where that is unknown."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            fields = [line.split(maxsplit=5) for line in lines]
    except OSError:
        return []
    return [tuple(int(at, 16) for at in line[0].split("-")) for line in fields if line[4] != "0"]  # has an inode


def _forget(tensor: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Give back the pages of a tensor that was only read from a mapped file, which still has them."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    if any(low <= begin and end <= high for low, high in mapped):
        begin, end = (at // mmap.PAGESIZE * mmap.PAGESIZE for at in (begin + mmap.PAGESIZE - 1, end))  # of it alone
        if begin < end:
            _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def return_free_memory() -> None:
    """Give back what was freed: glibc keeps the top of its heap."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


class LentBuffers(dict):
    """The buffers of a module while the memory of one is free: a tensor on the meta device stands for it.

    Whoever looks at that buffer or changes any ends the loan: `take_back` makes the tensor again, and the module has
    its own dict back. Copies and pickles are ordinary dicts.
    """

    def __init__(self, module: nn.Module, name: str, take_back: Callable[[], Tensor]):
        self.own: dict[str, Tensor | None] = module._buffers
        super().__init__(self.own)
        self.module, self.name, self.take_back, self.lock = weakref.ref(module), name, take_back, threading.RLock()
        tensor = self.own[name]
        self.placeholder = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        super().__setitem__(name, self.placeholder)

    def end(self) -> dict[str, Tensor | None]:
        """The module's own dict, complete."""
        with self.lock:
            if self.take_back is not None:
                self.own[self.name] = self.take_back()
                super().__setitem__(self.name, self.own[self.name])
                self.take_back, module = None, self.module()
                if module is not None:
                    module._buffers = self.own
        return self.own

    def __getitem__(self, name: str) -> Tensor | None:
        return super().__getitem__(name) if name != self.name and self.take_back is not None else self.end()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        self.end()[name] = tensor
        super().__setitem__(name, tensor)

    def __delitem__(self, name: str) -> None:
        del self.end()[name]
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        super().pop(name, None)
        return self.end().pop(name, *default)

    def items(self) -> ItemsView:
        return self.end().items()

    def values(self) -> ValuesView:
        return self.end().values()

    def __iter__(self) -> Iterator[str]:  # what `dict(buffers)` and `**buffers` ask first
        return iter(self.end())

    def copy(self) -> dict[str, Tensor | None]:
        return self.end().copy()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return dict, (), None, None, iter(self.items())


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict in which a module has its buffers, lent or not."""
    return module._buffers.end() if isinstance(module._buffers, LentBuffers) else module._buffers


def lend_buffer(module: nn.Module, name: str, take_back: Callable[[], Tensor]) -> None:
    """Free a buffer that `take_back` can make again. Where anyone else holds the tensor or its memory, it stays."""
    own = own_buffers(module)
    reference, storage = TensorWeakRef(own[name]), own[name].untyped_storage()
    users = getattr(torch._C, "_storage_Use_Count", lambda _: 3)(storage._cdata)
    if users > 2:  # the tensor and our variable are two: no view, no array, no other tensor
        return
    lent = LentBuffers(module, name, take_back)
    module._buffers, own[name] = lent, lent.placeholder
    tensor = reference()
    if tensor is not None:
        own[name], lent.take_back, module._buffers = tensor, None, own
