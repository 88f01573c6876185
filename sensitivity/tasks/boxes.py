"""Boxes written as text, {<x1><y1><x2><y2>|<angle>}: reading them, and how far two of them overlap."""

from __future__ import annotations

import math
import re

Box = tuple[float, float, float, float, float]
Point = tuple[float, float]

_BOX = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>\|<(-?\d+)>\}")


def parse(text: str) -> list[Box]:
    """Every well-formed box in a text, as (x1, y1, x2, y2, angle); a box without area is not one."""
    found = [tuple(float(v) for v in match.groups()) for match in _BOX.finditer(text)]
    return [(x1, y1, x2, y2, angle) for x1, y1, x2, y2, angle in found if x2 > x1 and y2 > y1]


def corners(box: Box) -> list[Point]:
    """The upright box turned about its centre; a positive angle is anticlockwise as seen (y points down)."""
    x1, y1, x2, y2, angle = box
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    upright = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    return [(cx + (x - cx) * cos + (y - cy) * sin, cy - (x - cx) * sin + (y - cy) * cos) for x, y in upright]


def _area(polygon: list[Point]) -> float:
    following = polygon[1:] + polygon[:1]
    return sum(x * v - u * y for (x, y), (u, v) in zip(polygon, following, strict=True)) / 2


def _clip(subject: list[Point], start: Point, end: Point) -> list[Point]:
    """The part of a convex polygon on the inner side of one edge (Sutherland and Hodgman)."""

    def side(point: Point) -> float:
        return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])

    kept: list[Point] = []
    for here, there in zip(subject, subject[1:] + subject[:1], strict=True):
        a, b = side(here), side(there)
        if a >= 0:
            kept.append(here)
        if (a > 0 > b) or (a < 0 < b):
            t = a / (a - b)
            kept.append((here[0] + t * (there[0] - here[0]), here[1] + t * (there[1] - here[1])))
    return kept


def oriented_iou(a: Box, b: Box) -> float:
    """Intersection over union of two turned boxes."""
    overlap, other = corners(a), corners(b)
    whole = _area(overlap) + _area(other)
    for start, end in zip(other, other[1:] + other[:1], strict=True):
        overlap = _clip(overlap, start, end)
    shared = _area(overlap) if len(overlap) > 2 else 0.0
    return shared / (whole - shared)


def upright_iou(a: Box, b: Box) -> float:
    """Intersection over union of the boxes before they are turned: the angle does not count."""
    return oriented_iou((*a[:4], 0.0), (*b[:4], 0.0))
