import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_qbert.packing import find_invalid_code, pack_codes, packed_columns, unpack_codes


DIGITS = {"1bit": 8, "2bit": 4, "dense": 5, "3bit": 2, "4bit": 2}
EVERY_LAYOUT = (*DIGITS, "int8")


def random_codes(rows, columns, packing, seed=0):
    bound = {"int8": 127, "4bit": 7, "3bit": 3}.get(packing, 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-bound, bound + 1, (rows, columns), generator=generator, dtype=torch.int8)
    return torch.where(codes >= 0, 1, -1).to(torch.int8) if packing == "1bit" else codes


@pytest.mark.parametrize("packing", EVERY_LAYOUT)
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 41), seed=st.integers(0, 2**31))
def test_round_trip(packing, rows, columns, seed):
    codes = random_codes(rows, columns, packing, seed)
    packed = pack_codes(codes, packing)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_columns(columns, packing))
    assert packed.is_contiguous()
    back = unpack_codes(packed, columns, packing)
    assert back.dtype == torch.int8 and back.is_contiguous() and torch.equal(back, codes)
    assert find_invalid_code(packed, columns, packing) is None
    assert torch.equal(pack_codes(back, packing), packed)


def test_layouts_drawn_in_the_docstring():
    codes = torch.tensor([[-1, 0, 1, 1, -1, 1]], dtype=torch.int8)
    assert pack_codes(codes, "2bit").tolist() == [[0b10_10_01_00, 0b00_00_10_00]]
    assert pack_codes(codes, "dense").tolist() == [[0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 0, 2]]
    assert pack_codes(torch.tensor([[-127, -1, 0, 127]], dtype=torch.int8), "int8").tolist() == [[129, 255, 0, 127, 0]]
    binary = torch.tensor([[-1, 1, 1, -1, -1, -1, -1, 1, 1, -1]], dtype=torch.int8)
    assert pack_codes(binary, "1bit").tolist() == [[0b1000_0110, 0b0000_0001]]
    small = torch.tensor([[-7, 0, 7]], dtype=torch.int8)
    assert pack_codes(small, "4bit").tolist() == [[0x81, 0x0F]]
    assert pack_codes(small.clamp(-3, 3), "3bit").tolist() == [[0x85, 0x0B]]
    assert [packed_columns(n, "1bit") for n in (1, 8, 9, 768)] == [1, 1, 2, 96]
    assert [packed_columns(n, "2bit") for n in (1, 4, 5, 768)] == [1, 1, 2, 192]
    assert [packed_columns(n, "dense") for n in (1, 5, 6, 768)] == [1, 1, 2, 154]


@pytest.mark.parametrize("packing", EVERY_LAYOUT)
def test_packing_reads_any_memory_order(packing):
    codes = random_codes(12, 9, packing)
    assert torch.equal(pack_codes(codes.t().contiguous().t(), packing), pack_codes(codes, packing))
    assert torch.equal(pack_codes(codes[::2], packing), pack_codes(codes[::2].contiguous(), packing))


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 7, 10, 22])
@pytest.mark.parametrize("packing", DIGITS)
def test_every_byte_value(packing, columns):
    """In the first and the last byte of a row, exactly the bytes that some codes pack to are clean."""
    clean = pack_codes(random_codes(3, columns, packing), packing)
    digits = DIGITS[packing]
    for byte in {0, clean.shape[1] - 1}:
        used = min(digits, columns - byte * digits)
        bound = {"3bit": 3, "4bit": 7}.get(packing, 1)
        alphabet = torch.tensor([-1, 1] if packing == "1bit" else range(-bound, bound + 1), dtype=torch.int8)
        codes = torch.cartesian_prod(*[alphabet] * used).view(-1, used)
        legal = set(pack_codes(codes, packing).flatten().tolist())
        assert len(legal) == len(alphabet) ** used
        for value in range(256):
            packed = clean.clone()
            packed[2, byte] = value
            found = find_invalid_code(packed, columns, packing)
            assert (found is None) == (value in legal)
            if found:
                row, column, count = found
                assert row == 2 and count == 1
                assert byte * digits <= column < (byte + 1) * digits
                if packing == "2bit":  # the very code, or the first column past the row for a pad
                    pairs = [value >> 2 * k & 3 for k in range(4)]
                    wrong = next(k for k, pair in enumerate(pairs) if pair == 3 or (k >= used and pair))
                    assert column == byte * digits + wrong


def test_planes_follow_each_other():
    planes = torch.stack([random_codes(3, 11, "1bit", seed) for seed in range(2)])
    packed = pack_codes(planes, "1bit")
    assert packed.shape == (2, 3, 2) and torch.equal(packed[1], pack_codes(planes[1], "1bit"))
    assert torch.equal(unpack_codes(packed, 11, "1bit"), planes)
    packed[1, 2, 1] |= 128
    assert find_invalid_code(packed, 11, "1bit") == (5, 15, 1)


def test_first_of_many_and_their_count():
    packed = pack_codes(random_codes(5, 8, "2bit"), "2bit")
    packed[1, 1] = packed[4, 0] = packed[3, 1] = 0xFF
    assert find_invalid_code(packed, 8, "2bit") == (1, 4, 3)
    packed = pack_codes(random_codes(4, 6, "int8"), "int8")
    packed[3, 5] = 128
    assert find_invalid_code(packed, 6, "int8") == (3, 5, 1)
