"""How channels are cut into groups: the one rule for norm groups and for key groups.

A width that the wanted number of groups does not divide takes the divisor nearest in ratio, and no group may
hold a single value, since one value standardizes to zero and has no variance.
"""

from __future__ import annotations

import math

__all__ = ["KEY_GROUP_SIZE", "REDUCTION", "bottleneck", "divisors", "key_groups", "nearest_groups"]

KEY_GROUP_SIZE = 16
REDUCTION = 16


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest_groups(num_channels: int, wanted: float, *, positions: int = 1) -> int:
    """The number of groups that divides ``num_channels`` and is nearest to ``wanted`` in ratio.

    Args:
        num_channels: the width, at least 1.
        wanted: the number of groups asked for; may be fractional (``num_channels / group_size``).
        positions: values each channel contributes to one group (1 for tokens, ``H * W`` for images). Counts whose
            groups would hold a single value are passed over; a lone channel with one position has no better choice
            than 1.

    Returns:
        A divisor of ``num_channels``; of two equally near, the smaller (larger groups).

    Example:
        >>> nearest_groups(64, 32), nearest_groups(48, 32), nearest_groups(257, 16)
        (32, 24, 1)
    """
    allowed = [g for g in divisors(num_channels) if num_channels // g * positions >= 2] or [1]
    return min(allowed, key=lambda g: (round(abs(math.log(g / wanted)), 9), g))


def key_groups(num_channels: int, key_group_size: int = KEY_GROUP_SIZE, *, positions: int = 1) -> int:
    """The number ``K`` of key groups (paper, section 3.2: 16 channels each), by the rule of :func:`nearest_groups`.

    Example:
        >>> key_groups(64), key_groups(8), key_groups(40)
        (4, 1, 2)
    """
    return nearest_groups(num_channels, max(num_channels / key_group_size, 1.0), positions=positions)


def bottleneck(num_key_groups: int, reduction: int = REDUCTION, *, mode: str = "preserve", grouped: bool = True) -> int:
    """Width ``e`` of the predictor's embedding.

    The authors' release takes ``K // r``, and 2 where ``K`` is below ``r`` (Group Norm) or not above it (Instance and
    Layer Norm). Mode ``preserve`` keeps at least 2, so that the pair of opposite encoder rows always has a live unit.

    Example:
        >>> bottleneck(16, mode="paper"), bottleneck(16, mode="paper", grouped=False), bottleneck(16)
        (1, 2, 2)
    """
    if mode == "paper":
        wide = num_key_groups >= reduction if grouped else num_key_groups > reduction
        return num_key_groups // reduction if wide else 2
    return max(2, num_key_groups // reduction)
