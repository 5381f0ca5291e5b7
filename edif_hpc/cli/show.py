"""How sizes, times and durations look in tables."""

from __future__ import annotations

import time

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(number: float | None) -> str:
    if number is None:
        return ""
    for unit in UNITS:
        if number < 1024 or unit == UNITS[-1]:
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit in ("B", "KiB") or number >= 100 else f"{number:.1f} {unit}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def moment(at: float | None) -> str:
    """A time of today as a clock time, an older one with its date."""
    if not at:
        return ""
    local, today = time.localtime(at), time.localtime()
    same_day = local[:3] == today[:3]
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M", local)
