"""Numbers as people read them: three significant digits and a unit."""

import math
import re

TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTE_UNITS = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes"))
RATE_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))
NONE = "-"


def significant(value: float) -> str:
    """Write three significant digits, without an exponent.

    Example:
        >>> significant(3.14159), significant(0.0123), significant(1234.5)
        ('3.14', '0.0123', '1234')
    """
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{significant(value / scale)} {name}"


def seconds(value: float | None) -> str:
    """Write a time.

    Example:
        >>> seconds(0.00263), seconds(None)
        ('2.63 ms', '-')
    """
    return NONE if value is None else _scaled(value, TIME_UNITS)


def size(value: float | None) -> str:
    """Write bytes.

    Example:
        >>> size(20070400)
        '19.1 MiB'
    """
    return NONE if value is None else _scaled(value, BYTE_UNITS)


def rate(name: str, value: float) -> str:
    """Write a ceiling, whose name ends in its unit.

    Example:
        >>> rate("copy B/s", 4.3e12)
        '4.30 TB/s'
    """
    return _scaled(value, RATE_UNITS) + name.split()[-1]


def times(value: float | None) -> str:
    """Write how many times as fast: at least two decimals below ten, so that 0.98 is not 1.

    Example:
        >>> times(1.337), times(21.26), times(0.0314)
        ('1.34x', '21.3x', '0.0314x')
    """
    if value is None:
        return NONE
    return f"{value:.2f}x" if 0.1 <= value < 10 else f"{significant(value)}x"


def share(value: float | None) -> str:
    """Write a fraction in percent.

    Example:
        >>> share(0.834), share(0.0042), share(0.00001)
        ('83 %', '0.4 %', '< 0.1 %')
    """
    if value is None:
        return NONE
    if value < 0.001:
        return "< 0.1 %"
    return f"{100 * value:.{0 if value >= 0.1 else 1}f} %"


def slug(text: str) -> str:
    """Write a name as part of a file name.

    Example:
        >>> slug("AMD EPYC, 2 cores")
        'amd-epyc-2-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """Return a key by which numbers within names sort as numbers.

    Example:
        >>> sorted(["batch 128", "batch 32"], key=natural)
        ['batch 32', 'batch 128']
    """
    parts = re.split(r"(\d+)", text)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
