"""Formats figures and their changes."""

from typing import Any


def title(settings: dict[str, Any]) -> str:
    """Returns one line that describes the measured text."""
    first = settings["first_token"] or "no token"
    quantized = f", the base in {form}" if (form := settings.get("base_quantization")) else ""
    return (
        f"{settings['text']}: {settings['windows']} windows of {settings['length']} tokens, "
        f"{first} prepended, {settings['dtype']}{quantized}"
    )


def change(ratio: float) -> str:
    """Formats a ratio as a change in percent, or as a factor if it is large."""
    if ratio >= 2:
        return f"{figure(ratio)}x higher"
    if 0 < ratio <= 0.5:
        return f"{figure(1 / ratio)}x lower"
    return f"{100 * (ratio - 1):+.1f}%"


def figure(value: float | None) -> str:
    """Formats a figure with three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    if abs(rounded := float(f"{value:.3g}")) >= 1000:
        return f"{rounded:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def size(count: float) -> str:
    """Formats a number of bytes."""
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_each:
            return f"{figure(count / bytes_each)} {unit}"
    return f"{count:g} bytes"
