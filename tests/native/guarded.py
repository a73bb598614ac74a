"""Buffers that end, or begin, where memory that nobody may touch is."""

import ctypes
import mmap

import torch


PAGE = mmap.PAGESIZE


class Guarded:
    """The numbers of a tensor between two forbidden pages, against the one behind them or, with `front`, before."""

    def __init__(self, tensor: torch.Tensor, front: bool = False):
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // PAGE)
        libc = ctypes.CDLL(None, use_errno=True)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for page in (0, pages + 1):
            assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
        self.address = start + PAGE if front else start + (pages + 1) * PAGE - size
        self.dtype, self.shape = tensor.dtype, tensor.shape
        if size:
            ctypes.memmove(self.address, tensor.contiguous().data_ptr(), size)

    def tensor(self) -> torch.Tensor:
        """The memory itself as a tensor."""
        size = self.shape.numel() * self.dtype.itemsize
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer((ctypes.c_char * size).from_address(self.address), dtype=self.dtype).view(self.shape)
