"""Makes demo/results.png, the picture of the page in README: `python demo/screenshot.py` after the demo's three rounds.

Needs Chromium. `python demo/screenshot.py PAGE PICTURE`: of another page, to another file. Shows the questions that a
masked answer names right and the parser reads wrong, the first one opened.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser  # noqa: E402

SHOW = """
    const show = document.getElementById("state");
    show.value = "misparsed";
    show.dispatchEvent(new Event("change", {bubbles: true}));
    document.querySelector("#questions tbody button").click();
"""

if __name__ == "__main__":
    page, picture = map(Path, sys.argv[1:] or (ROOT / "runs" / "demo" / "results.html", ROOT / "demo" / "results.png"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        browser.open(page, "document.querySelector('#questions tbody button')", width=1300, height=1720)
        browser.run(f"{{ {SHOW} }}")
        picture.write_bytes(browser.screenshot())
        browser.close()
