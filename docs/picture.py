"""A picture of the report for the README: sensitivity demo, then python docs/picture.py runs/demo/report."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

OUT = Path(__file__).parent / "report.png"
WIDTH, HEIGHT = 1000, 1485  # of the window: the summary, the plan and the frontier
COLORS = 128  # of the palette: flat colors and text need no more
MAX_BYTES = 300_000  # bytes
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync")


def taken(page: Path) -> bytes:
    """The top of a page as a headless Chromium shows it."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no chromium here; install it (apt-get install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        picture = Path(folder) / "page.png"
        where = (f"--user-data-dir={folder}/profile", f"--screenshot={picture}", f"--window-size={WIDTH},{HEIGHT}")
        command = [chromium, *FLAGS, *where, page.absolute().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return picture.read_bytes()


def main() -> None:
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/report") / "index.html"
    if not page.exists():
        raise SystemExit(f"no report at {page}; run `sensitivity demo` first")
    small = Image.open(io.BytesIO(taken(page))).convert("RGB").quantize(COLORS)
    small.save(OUT, optimize=True)
    size = OUT.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{OUT} has {size} bytes, above {MAX_BYTES}")
    print(f"{OUT.name}: {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
