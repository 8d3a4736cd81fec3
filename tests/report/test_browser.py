"""The page in a real browser: two widths, light and dark, no error and nothing wider than the screen."""

import re
import shutil
import subprocess
from html import escape

import pytest
from PIL import Image

from kvsight.report.theme import DARK, LIGHT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)
THEMES = {"dark": (0, DARK), "light": (1, LIGHT)}
# what a browser knows about a page that has been laid out
PROBE = """<script>
const root = document.documentElement, wide = [];
for (const e of document.querySelectorAll("body *"))
  if (!e.closest(".scroll, svg") && e.getBoundingClientRect().right > root.clientWidth + 0.5)
    wide.push(e.tagName);
parent.document.documentElement.dataset.probe = [root.clientWidth, root.scrollWidth, wide.join("+"),
  [...document.querySelectorAll("figure svg")].filter(e => e.clientWidth > 0).length].join(" ");
</script>"""


def browse(profile, page, *flags):
    """(stdout, messages of the page's console)."""
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_an_error_would_be_seen(tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(
        '<meta http-equiv="Content-Security-Policy" content="img-src \'none\'"><img src="a.png">'
    )
    assert browse(tmp_path / "profile", broken, "--dump-dom")[1]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_drawn_without_an_error(page, tmp_path, width, theme):
    number, colours = THEMES[theme]
    shot = tmp_path / "shot.png"
    _, messages = browse(
        tmp_path / "profile",
        page,
        f"--window-size={width},2400",
        f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={number}",
    )
    assert messages == []
    with Image.open(shot) as file:
        image = file.convert("RGB")
    assert image.size == (width, 2400)
    corner = "#{:02x}{:02x}{:02x}".format(*image.getpixel((2, 2)))
    assert corner == colours["page"]
    found = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.getcolors(1 << 20)}
    # the curve of ours, and text
    assert {colours["ours"], colours["ink"]} <= found


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, tmp_path, width):
    # a window has a least width; a frame has none
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    inner = escape(text.replace("</body>", f"{PROBE}</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe width="{width}" height="800" frameborder="0" srcdoc="{inner}"></iframe>')
    out, messages = browse(tmp_path / "profile", frame, "--window-size=1400,900", "--dump-dom")
    assert messages == []
    probe = re.search(r'data-probe="(\d+) (\d+) (\S*) (\d+)"', out)
    # one drawing of every figure is on show
    assert probe.groups() == (str(width), str(width), "", "6")
