"""The frames of a video that an example shows: the middle frame of each of several equally long parts."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.spec.errors import UserError
from sensitivity.spec.fields import MISSING, InvalidValue, not_a_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FRAMES = 8  # of a video whose line names no number
MAX_FRAMES = 64
KEPT = 2  # videos whose decoded frames are kept, since the frames of one video are read one after the other


@dataclass(frozen=True)
class Frame:
    """One of the frames that stand for a video; it is decoded when it is needed."""

    file: Path
    number: int
    count: int  # of all frames that stand for the video

    def read_bytes(self) -> bytes:
        """The frame, upright and uncompressed."""
        return _frames(self.file, self.count)[self.number]

    def resolve(self) -> tuple[Path, int, int]:
        """A value that is equal for equal frames."""
        return self.file.resolve(), self.number, self.count

    @property
    def name(self) -> str:
        """The name of the video's file."""
        return self.file.name

    def why_unusable(self) -> str | None:
        """Why the video cannot be used; None if it can."""
        if trouble := not_a_file(self.file):
            return "no video file" if trouble == MISSING else f"no video file: {trouble}"
        try:
            self.read_bytes()
        except InvalidValue as error:
            return f"a video without pictures ({error})"
        except Exception:  # each of the decoders has errors of its own
            return "a video that cannot be read"
        return None

    def __str__(self) -> str:
        return f"frame {self.number + 1} of {self.count} of {self.file}"


def frames_of(file: Path, count: int) -> tuple[Frame, ...]:
    """The frames that stand for a video; nothing is decoded yet."""
    if importlib.util.find_spec("av") is None:
        raise UserError("a video needs the extra video; type pip install 'vlm-sensitivity[video]'")
    return tuple(Frame(file, number, count) for number in range(count))


@lru_cache(maxsize=KEPT)
def _frames(file: Path, count: int) -> tuple[bytes, ...]:
    import av

    with av.open(str(file)) as container:
        if not container.streams.video:
            raise InvalidValue("it has sound only")
        shown = list(_middle_frames(container, container.streams.video[0], count))
    images = []
    for frame in shown:
        written = io.BytesIO()
        # phones store frames unrotated, with the angle by which a player has to rotate them
        frame.to_image().rotate(frame.rotation, expand=True).save(written, "PPM")
        images.append(written.getvalue())
    return tuple(images)


def _middle_frames(container: InputContainer, stream: VideoStream, count: int) -> Iterator[VideoFrame]:
    """The frames that a player shows in the middle of each of `count` equally long parts."""
    first, last = _times(container, stream)
    if (tick := stream.time_base) is None:
        raise InvalidValue("it does not say when its frames are shown")
    for number in range(count):
        at = first + (last - first) * (number + 0.5) / count
        container.seek(int(at / tick), stream=stream)  # to the last key frame before it
        before = None
        for frame in container.decode(stream):
            if before is not None and (frame.time or 0.0) > at:
                break
            before = frame
        if before is None:
            raise InvalidValue("it has no frame")
        yield before


def _times(container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """When a video begins and ends, in seconds; if its file does not say, all of it is decoded."""
    if stream.time_base and stream.duration:
        first = float((stream.start_time or 0) * stream.time_base)
        return first, first + float(stream.duration * stream.time_base)
    times = [frame.time or 0.0 for frame in container.decode(stream)]
    if not times:
        raise InvalidValue("it has no frame")
    return times[0], times[-1] + (times[-1] - times[0]) / max(len(times) - 1, 1)


def note(images: Sequence[object]) -> tuple[str, ...]:
    """A note for the user if a task shows frames of videos; () if it shows none."""
    counts = sorted({image.count for image in images if isinstance(image, Frame)})
    if not counts:
        return ()
    how_many = " or ".join(map(str, counts))
    return (f"a video is shown as {how_many} frames, the middle ones of equally long parts, without sound",)
