"""From packed numbers and their scales to numbers: the arithmetic of the formats that checkpoints are stored in.

Matrices are computed in float32, on any device; who calls casts them. No library of a format is needed.
"""

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The floats of 4 bits of MXFP4 and NVFP4 (OCP Microscaling Formats, 5.3.3), by their bits."""
POWERS = (torch.uint8, torch.float8_e8m0fnu)
"""What powers of two are stored as, by their exponents."""


def scaled(
    numbers: Shaped[Tensor, "rows columns"], scale: Float[Tensor, "*blocks"], block: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """Numbers times the scale of their block; the last block of a row or column may be cut off.

    Args:
        numbers: as they are stored.
        scale: one for each block, or a single one.
        block: rows and columns of a block.

    Raises:
        ValueError: there are not as many scales as blocks along each side.
    """
    numbers, scale = numbers.float(), scale.float()
    if scale.numel() == 1:
        return numbers * scale.reshape(())
    (rows, columns), (height, width) = numbers.shape, block
    blocks = -(-rows // height), -(-columns // width)
    if [length for length in scale.shape if length > 1] != [length for length in blocks if length > 1]:
        raise ValueError(
            f"{rows} × {columns} numbers in blocks of {height} × {width} need {blocks[0]} × {blocks[1]} scales, and "
            f"there are {' × '.join(map(str, scale.shape))}"
        )
    scale = scale.reshape(blocks)
    if not rows % height and not columns % width:
        whole = numbers.reshape(blocks[0], height, blocks[1], width)
        return (whole * scale[:, None, :, None]).view(rows, columns)
    scale = scale.repeat_interleave(height, 0)[:rows]
    return numbers * scale.repeat_interleave(width, 1)[:, :columns]


def exponents(scale: Shaped[Tensor, "*blocks"]) -> Float[Tensor, "*blocks"]:
    """Scales that are stored as powers of two (E8M0, or its bytes): 2^(byte − 127).

    Raises:
        ValueError: they are floats of 8 bits of another kind.
    """
    if scale.element_size() > 1:
        return scale.float()
    if scale.dtype not in POWERS:
        raise ValueError(f"its scales are {scale.dtype}, and powers of two are expected (E8M0, or its bytes)")
    return (scale.view(torch.uint8).float() - 127).exp2()


def scales(scale: Shaped[Tensor, "*blocks"]) -> Float[Tensor, "*blocks"]:
    """Scales as numbers: those in E8M0, or in its bytes, are powers of two, and all others what they are."""
    return exponents(scale) if scale.dtype in POWERS else scale.float()


def table(index: Integer[Tensor, "*shape"], values: Float[Tensor, " n"]) -> Float[Tensor, "*shape"]:
    """Values by their numbers."""
    return values.float()[index.long()]


def pairs(
    packed: UInt8[Tensor, "rows half"], values: Float[Tensor, "16"], *, low_first: bool = True
) -> Float[Tensor, "rows columns"]:
    """Of two numbers of 4 bits in each byte, the values that they stand for."""
    byte, values = torch.arange(256, device=packed.device), values.float()
    low, high = values[byte & 15], values[byte >> 4]
    both = torch.stack((low, high) if low_first else (high, low), -1)
    return both.index_select(0, packed.flatten().int()).view(len(packed), -1)


def e2m1(packed: UInt8[Tensor, "rows half"]) -> Float[Tensor, "rows columns"]:
    """Bytes of two floats of 4 bits, the lower half first."""
    return pairs(packed, torch.tensor(E2M1, device=packed.device))


def bit_stream(words: Integer[Tensor, "rows words"], bits: int, count: int) -> Integer[Tensor, "rows count"]:
    """Unsigned numbers that follow one another in words of 32 bits, the lowest bits first; they may straddle words.

    Args:
        words: as they are stored.
        bits: of a number, 1 to 8.
        count: how many numbers a row has.

    Raises:
        ValueError: there are not as many words as that takes.
    """
    if words.shape[1] != (needed := -(-count * bits // 32)):
        raise ValueError(f"{count} numbers of {bits} bits take {needed} words, and there are {words.shape[1]}")
    start = torch.arange(count, device=words.device) * bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    low = wide[:, start // 32] >> (start % 32)
    high = wide[:, start // 32 + 1] << (32 - start % 32)
    return ((low | high) & (2**bits - 1)).int()
