"""Codes <-> bits: the layouts of a packed checkpoint.

A weight of O rows and I columns becomes a uint8 tensor of O rows; every row starts at a byte, low bits first. Planes
(P, O, I) are packed one behind the other.

`1bit`, eight binary codes a byte, column 0 in the lowest bit:

    byte   76543210           -1 -> 0     +1 -> 1

`2bit`, four ternary codes a byte, columns 0, 1, 2, 3 from the low end, code c stored as c + 1:

    byte   33 22 11 00        -1 -> 00    0 -> 01    +1 -> 10    11 is an error

`dense`, five ternary codes a byte in base 3 (1.6 bits a weight), column 0 least significant:

    byte   (c0 + 1) + 3 (c1 + 1) + 9 (c2 + 1) + 27 (c3 + 1) + 81 (c4 + 1)        243..255 are errors

`4bit`, two codes of 4 bits a byte, column 0 in the low half, code c in -7..7 stored as c + 8, and `3bit`, the same
with codes in -3..3 (a start for fewer bits, not for the shelf: it takes 4 bits):

    byte   1111 0000          -7 -> 1    0 -> 8    +7 -> 15         0 is an error

`int8`, one signed byte a weight (as stored in uint8: two's complement), for 8-bit weights; -128 is an error. One more
byte ends each row: no packed tensor has the shape of the float weight, so none can be loaded as one.

Columns past I in the last byte of a row are stored as the digit 0, and anything else there is an error.
"""

from functools import lru_cache

import torch
from torch import Tensor


FORMAT_VERSION = 2
PACKINGS = ("2bit", "dense")  # the layouts a user may choose for ternary codes
_DIGITS = {"1bit": 8, "2bit": 4, "dense": 5, "3bit": 2, "4bit": 2, "int8": 1}  # codes a byte
_BASE = {"1bit": 2, "2bit": 4, "dense": 3, "3bit": 16, "4bit": 16, "int8": 256}
_ZERO = {"2bit": 1, "dense": 1, "3bit": 8, "4bit": 8}  # digit of code 0; a binary code c is stored as (c + 1) / 2
_LARGEST = {"3bit": 3, "4bit": 7}  # magnitude of a code


def packed_columns(columns: int, packing: str) -> int:
    """Bytes of one row of `columns` codes."""
    return columns + 1 if packing == "int8" else -(-columns // _DIGITS[packing])


def pack_codes(codes: Tensor, packing: str) -> Tensor:
    """int8 codes (..., O, I) -> uint8 (..., O, packed_columns(I))."""
    if codes.dim() == 3:
        return torch.stack([pack_codes(plane, packing) for plane in codes])
    if packing == "int8":
        return torch.nn.functional.pad(codes, (0, 1)).view(torch.uint8)
    digits, base = _DIGITS[packing], _BASE[packing]
    rows, columns = codes.shape
    padded = torch.zeros(rows, packed_columns(columns, packing) * digits, dtype=torch.int32, device=codes.device)
    padded[:, :columns] = (codes.int() + 1) // 2 if packing == "1bit" else codes.int() + _ZERO[packing]
    weights = torch.tensor([base**k for k in range(digits)], dtype=torch.int32, device=codes.device)
    return (padded.view(rows, padded.shape[1] // digits, digits) * weights).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, columns: int, packing: str) -> Tensor:
    """uint8 (..., O, bytes) -> int8 codes (..., O, columns)."""
    if packing == "int8":
        return packed[..., :columns].contiguous().view(torch.int8)
    table = _code_table(packing, packed.device)
    return table[packed.int()].flatten(-2)[..., :columns].contiguous()


def _make_code_table(packing: str) -> Tensor:
    """int8 (256, digits): the codes of every byte; a look-up beats arithmetic on bytes and exports as one operator."""
    byte, base = torch.arange(256, device="cpu").unsqueeze(1), _BASE[packing]
    places = torch.tensor([base**k for k in range(_DIGITS[packing])], device="cpu")
    digits = byte // places % base
    return (digits * 2 - 1 if packing == "1bit" else digits - _ZERO[packing]).to(torch.int8)


CODE_TABLES = {packing: _make_code_table(packing) for packing in _BASE if packing != "int8"}
_moved_code_table = lru_cache(lambda packing, device: CODE_TABLES[packing].to(device))


def _code_table(packing: str, device: torch.device) -> Tensor:
    """Made before anything is traced: a table made by torch.export holds no numbers, and a cache would keep it."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return CODE_TABLES[packing].to(device)
    return _moved_code_table(packing, device)


def find_invalid_code(packed: Tensor, columns: int, packing: str) -> tuple[int, int, int] | None:
    """(row, column, count) of the first stored value outside the alphabet, non-zero pads included; None when clean.

    Rows of planes are counted through. Rows are looked at in blocks: all of the word embedding would take several
    times its own size.
    """
    first, count, begin = None, 0, 0
    for block in packed.flatten(0, -2).split(_CHECKED_ROWS):
        found = _find_in_block(block, columns, packing)
        if found is not None:
            first = first or (begin + found[0], found[1])
            count += found[2]
        begin += len(block)
    return None if first is None else (*first, count)


_CHECKED_ROWS = 4096


def _find_in_block(packed: Tensor, columns: int, packing: str) -> tuple[int, int, int] | None:
    if packing == "1bit":
        bad = torch.zeros_like(packed, dtype=torch.bool)
    elif packing == "int8":
        bad = packed == 128
    elif packing == "dense":
        bad = packed >= 243
    elif packing == "2bit":
        bad = (packed & (packed >> 1) & 0x55) != 0
    else:
        low, high = _is_no_code(packed & 15, packing), _is_no_code(packed >> 4, packing)
        if columns % 2:
            high[:, -1] = False  # a pad
        bad = low | high
    digits = _DIGITS[packing]
    used = columns - (packed.shape[1] - 1) * digits  # codes in the last byte of a row
    if used < digits:
        bad[:, -1] |= packed[:, -1] >= _BASE[packing] ** used
    count = int(bad.sum())
    if not count:
        return None
    row, byte = divmod(int(bad.flatten().to(torch.uint8).argmax()), packed.shape[1])
    used = min(used, digits) if byte == packed.shape[1] - 1 else digits
    return row, byte * digits + _first_invalid_digit(int(packed[row, byte]), used, packing), count


def _is_no_code(digit: Tensor, packing: str) -> Tensor:
    return (digit < _ZERO[packing] - _LARGEST[packing]) | (digit > _ZERO[packing] + _LARGEST[packing])


def _first_invalid_digit(value: int, used: int, packing: str) -> int:
    """Place to blame in an invalid byte: a code 11, else the first pad; a byte past base 3 is wrong as a whole."""
    if packing == "1bit":
        return next(k for k in range(used, 8) if value >> k & 1)
    if packing == "2bit":
        return next(k for k in range(4) if value >> 2 * k & 3 == 3 or (k >= used and value >> 2 * k & 3))
    if packing in _LARGEST:
        return 0 if bool(_is_no_code(torch.tensor(value & 15), packing)) else 1
    return used if used < _DIGITS[packing] and value < 243 else 0
