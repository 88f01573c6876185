"""Boxes written as text, {<x1><y1><x2><y2>|<angle>}: parsing, polygons and intersection over union."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from sensitivity.tasks.examples.types import Box, Point

_BOX = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>\|<(-?\d+)>\}")


def parse(text: str) -> list[Box]:
    """Every well-formed box in a text as (x1, y1, x2, y2, angle); a box without area is skipped."""
    corners = [tuple(float(v) for v in match.groups()) for match in _BOX.finditer(text)]
    return [(x1, y1, x2, y2, angle) for x1, y1, x2, y2, angle in corners if x2 > x1 and y2 > y1]


def corners(box: Box) -> list[Point]:
    """The corners of a box rotated about its center; a positive angle is counterclockwise on screen (y points down)."""
    x1, y1, x2, y2, angle = box
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    upright = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    return [(cx + (x - cx) * cos + (y - cy) * sin, cy - (x - cx) * sin + (y - cy) * cos) for x, y in upright]


def _area(polygon: list[Point]) -> float:
    """The area of a polygon by the shoelace formula, positive if its corners go clockwise on screen."""
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
        # strict on both sides: a corner on the edge is already kept, and must not appear twice
        if (a > 0 > b) or (a < 0 < b):
            t = a / (a - b)
            kept.append((here[0] + t * (there[0] - here[0]), here[1] + t * (there[1] - here[1])))
    return kept


def oriented_iou(a: Box, b: Box) -> float:
    """Intersection over union of two rotated boxes."""
    return polygon_iou(corners(a), corners(b))


def polygon_iou(a: Sequence[Point], b: Sequence[Point]) -> float:
    """Intersection over union of two convex polygons of equal orientation, as `convex` returns them.

    No geometry library is needed, since the polygons are convex: one is clipped by each edge of the other.
    """
    overlap, other = list(a), list(b)
    whole = _area(overlap) + _area(other)
    for start, end in zip(other, other[1:] + other[:1], strict=True):
        overlap = _clip(overlap, start, end)
    shared = _area(overlap) if len(overlap) > 2 else 0.0
    return shared / (whole - shared)


def convex(points: Sequence[Sequence[float]]) -> tuple[Point, ...] | None:
    """The corners of a convex polygon, clockwise on screen, from any order; None if it has no area."""
    if len(points) < 3 or any(len(point) != 2 for point in points):
        return None
    cx, cy = (sum(point[i] for point in points) / len(points) for i in (0, 1))
    # a convex polygon's corners are in order when sorted by their angle around the mean point, which lies inside
    around = sorted(((float(x), float(y)) for x, y in points), key=lambda p: math.atan2(p[1] - cy, p[0] - cx))
    return tuple(around) if _area(around) > 1e-9 else None


def _diagonal(box: Box) -> list[Point]:
    """The corners if a box's two points are the ends of a diagonal d: the sides are d cos(angle) and d sin(angle)."""
    x1, y1, x2, y2, angle = box
    length = math.hypot(x2 - x1, y2 - y1)
    width, height = length * math.cos(math.radians(angle)), length * math.sin(math.radians(angle))
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    return corners((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2, angle))


# Ways to turn the corners and angle of a written box into a polygon. GeoChat's paper does not say which; its demo
# rotates the box counterclockwise (cv2.getRotationMatrix2D). Other evaluators rotate it clockwise, or read the corners
# as a diagonal, by which upright boxes (angle 0) have no area.
DECODINGS: dict[str, Callable[[Box], list[Point]]] = {
    "turned": corners,
    "clockwise": lambda box: corners((*box[:4], -box[4])),
    "diagonal": _diagonal,
}


def decoded(text: str, width: int, height: int, decoding: str = "turned") -> list[tuple[Point, ...]]:
    """The boxes in a text as polygons in pixels; written corners are percent of the image.

    All white space is removed first, since some tokenizers insert it between the numbers.
    """
    polygons = []
    for x1, y1, x2, y2, angle in parse("".join(text.split())):
        box = (x1 * width / 100, y1 * height / 100, x2 * width / 100, y2 * height / 100, angle)
        if (polygon := convex(DECODINGS[decoding](box))) is not None:
            polygons.append(polygon)
    return polygons


def written(polygon: Sequence[Point], width: int, height: int) -> str:
    """A true box as a model would write it: an upright box and the angle by which it is rotated.

    The two edges at the polygon's first corner give its sides.
    """
    cx, cy = (sum(point[i] for point in polygon) / len(polygon) for i in (0, 1))
    (ax, ay), (bx, by), (dx, dy) = polygon[0], polygon[1], polygon[-1]
    along, across = math.hypot(bx - ax, by - ay), math.hypot(dx - ax, dy - ay)
    angle = -round(math.degrees(math.atan2(by - ay, bx - ax)))  # counterclockwise on screen
    if not -45 <= angle <= 45:  # the same rectangle, its sides swapped if need be
        angle = (angle + 45) % 90 - 45
        if abs(math.remainder(-math.degrees(math.atan2(by - ay, bx - ax)) - angle, 180)) > 45:
            along, across = across, along
    ends = ((cx - along / 2) / width, (cy - across / 2) / height, (cx + along / 2) / width, (cy + across / 2) / height)
    return "{" + "".join(f"<{min(max(round(100 * end), 0), 100)}>" for end in ends) + f"|<{angle}>}}"


def matches(given: Sequence[Sequence[Point]], right: Sequence[Sequence[Point]], threshold: float) -> int:
    """The largest number of true boxes that given boxes can match, one to one.

    This is a maximum bipartite matching by augmenting paths; a greedy assignment could miss boxes.
    """
    near = [[polygon_iou(one, other) >= threshold for other in right] for one in given]
    taken: dict[int, int] = {}  # true box -> the given box that is matched with it

    def place(one: int, tried: set[int]) -> bool:
        """Whether given box `one` can get a true box, if need be by moving earlier ones; `tried` stops cycles."""
        for other, good in enumerate(near[one]):
            if good and other not in tried:
                tried.add(other)
                # take a true box that is free, or whose given box can move to another
                if other not in taken or place(taken[other], tried):
                    taken[other] = one
                    return True
        return False

    return sum(place(one, set()) for one in range(len(given)))
