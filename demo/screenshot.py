"""Makes demo/results.png, the picture of the page in README: `python demo/screenshot.py` after the demo's three rounds.

Needs Chromium. `python demo/screenshot.py PAGE PICTURE`: of another page, to another file. Shows what was found, and of
the questions those whose masked answers name a ground truth in a broken format, the first one opened.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser  # noqa: E402

# The answers whose format is broken, at the ranking and K that break most of them.
VIEW = "ranking=gradsae&k=50%25&show=format"

if __name__ == "__main__":
    page, picture = map(Path, sys.argv[1:] or (ROOT / "runs" / "demo" / "results.html", ROOT / "demo" / "results.png"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        browser.open(page, "document.querySelector('#count')?.textContent", width=1200, height=2000, fragment=VIEW)
        browser.run("document.querySelector('#questions tbody button')?.click()")
        picture.write_bytes(browser.screenshot())
        browser.close()
