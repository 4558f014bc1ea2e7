"""Random bits from a counter: Philox-4x32-10, as torch operations.

The bits of an element depend on (seed, parameter, draw, element) alone: not on the device, on where a partition was
cut, or on earlier numbers. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

One counter gives four words of 32 bits, which are eight numbers of 16 bits. Elements of a parameter are laid out in
tiles of 8 rows of 256: counter `256 * tile + column` serves the eight elements of its column. So a kernel that works
row by row makes the words once a tile.
"""

import torch

ROW = 256  # also the elements that share a scale where moments have 8 bits
ROWS = 8
TILE = ROW * ROWS
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Four words for each counter; words, of counter and result alike, are int64 tensors of values below 2**32."""
    a, b, c, d = torch.broadcast_tensors(*counter)
    key0, key1 = key
    for _ in range(rounds):
        # 64-bit products wrap around in int64, but their bits are right.
        high = c * _MULTIPLIERS[1]
        low = a * _MULTIPLIERS[0]
        a = (high >> 32).bitwise_and_(_MASK).bitwise_xor_(b).bitwise_xor_(key0)
        c = (low >> 32).bitwise_and_(_MASK).bitwise_xor_(d).bitwise_xor_(key1)
        b, d = high.bitwise_and_(_MASK), low.bitwise_and_(_MASK)
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return a, b, c, d


def random_bits(
    element: int, numel: int, *, seed: int, parameter: int, draw: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """16 random bits, as int32, for each of the elements [element, element + numel) of a parameter."""
    first, last = element // TILE, -(-(element + numel) // TILE)
    counters = torch.arange(first * ROW, last * ROW, device=device)
    constant = torch.ones(1, dtype=torch.int64, device=device)
    words = philox(
        (counters & _MASK, counters >> 32, constant * (draw & _MASK), constant * (parameter & _MASK)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    rows = torch.empty(last - first, ROWS, ROW, dtype=torch.int32, device=device)
    for index, word in enumerate(words):
        word = word.to(torch.int32).view(-1, ROW)
        torch.bitwise_and(word, 0xFFFF, out=rows[:, 2 * index])
        torch.bitwise_and(word >> 16, 0xFFFF, out=rows[:, 2 * index + 1])
    begins = element - first * TILE
    return rows.view(-1)[begins : begins + numel]
