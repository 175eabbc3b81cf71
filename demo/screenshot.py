"""Makes demo/results.png, the picture of the page in README: `python demo/screenshot.py` after the demo's three rounds.

Needs Chromium. `python demo/screenshot.py PAGE PICTURE`: of another page, to another file. Shows what was found, the
figure, and the questions, the one whose answer lost most opened. The tables between them are left out: they are long.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser  # noqa: E402

WIDTH = 1400  # at which an opened question's latents stand beside its answers
SHOWN_BELOW = 150  # pixels below the opened question: rows of others

if __name__ == "__main__":
    page, picture = map(Path, sys.argv[1:] or (ROOT / "runs" / "demo" / "results.html", ROOT / "demo" / "results.png"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        browser.open(page, "document.querySelector('#count')?.textContent", width=WIDTH)
        browser.run("document.querySelector('#table-head').closest('section').hidden = true")
        browser.run("document.querySelector('#questions tbody button')?.click()")
        end = browser.run("document.querySelector('.detail').getBoundingClientRect().bottom + scrollY")
        height = round(end) + SHOWN_BELOW
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.send("Emulation.setDeviceMetricsOverride", **size)
        picture.write_bytes(browser.screenshot())
        browser.close()
