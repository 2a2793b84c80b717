"""The page: escaped, complete without a network, and alive in a browser where there is one."""

import html.parser
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from report_pieces import ladder, old_row, row, strip

from utils.report_page import page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&@@SCRIPT@@"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install it)")


class Reader(html.parser.HTMLParser):
    """Collect the tags, their attributes and the text of a page; refuse what does not nest."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open:
            self.text += data


@pytest.fixture
def pictured(tmp_path) -> tuple[dict, dict[str, Path]]:
    """Make rows with pictures, and the folder that their paths are relative to."""
    rows = ladder()
    (tmp_path / "strips").mkdir()
    names = ("0.webp", "1.webp", "2.webp", "3.png")  # a row from before strips were WebP
    for file, noise in zip(names, (0, 0, 1, 20), strict=True):
        strip(tmp_path / "strips" / file, noise)
    for file, one in zip(names, [rows[1], rows[2], rows[0], rows[3]], strict=True):
        one |= {"pictures": f"strips/{file}", "reference_pictures": "strips/0.webp"}
    return {"h200.jsonl": rows, "cpu.jsonl": [old_row()]}, {"h200.jsonl": tmp_path}


def test_the_page_holds_everything(pictured):
    found = Reader(page(*pictured))
    for words in ("NVIDIA H200", "580.1", "700 W", "1755-1980 MHz", "2.13.0+cu130", "+ compile",
                  "failed: out of memory: 140 GiB", "0123456789ab", "74.4 TFLOP", "arithmetic",
                  "python run_benchmark.py --rows '+ fa3'", "fa3 (backend=fa3)"):  # fmt: skip
        assert words in found.text, words
    assert [tag for tag, _ in found.tags].count("svg") == 2  # ladder and leave-one-out
    images = [attrs for tag, attrs in found.tags if tag == "img"]
    kinds = [image["src"].partition(";")[0] for image in images]
    assert sorted(kinds) == ["data:image/png", *["data:image/webp"] * 3]
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    options = [a for tag, a in found.tags if tag == "option" and "data-strip" in a]
    assert len(options) == 4
    assert all(o["data-strip"] in ids and o["data-reference"] in ids for o in options)
    assert "prefers-color-scheme: dark" in page(*pictured)
    assert page(*pictured) == page(*pictured)


def test_nothing_is_loaded_from_outside(pictured):
    text = page(*pictured)
    for tag, attrs in Reader(text).tags:
        for key in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
            value = attrs.get(key) or ""
            assert not value or value.startswith(("data:", "#")), (tag, key)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and "http" not in policy


def test_everything_from_a_row_is_escaped():
    rows = []
    for series in ("ladder", "leave_one_out", None):
        evil = row(EVIL, series=series, command=EVIL, steps={EVIL: {"state": "on", "reason": EVIL}})
        evil["environment"] = {k: EVIL for k in ("device", "os", "commit", "driver")} | {
            "versions": {EVIL: EVIL}
        }
        evil["call"] = evil["call"] | {"ckpt": EVIL}
        evil["quality"] = evil["quality"] | {"quality_source": EVIL}
        evil["roofline"] = {"call": evil["roofline"]["call"] | {"bound": EVIL}}
        rows += [evil, evil | {"row": EVIL + "2", "failed": EVIL}]
    found = Reader(page({EVIL: rows, "b": rows}))
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [tag for tag, attrs in found.tags if tag == "img" or "onerror" in attrs]
    assert EVIL in found.text


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "none.png", "text.png", "a\0b"])
def test_pictures_come_from_the_folder_of_the_results_only(tmp_path, capsys, path):
    root = tmp_path / "root"
    root.mkdir()
    strip(tmp_path / "secret.png", 0)
    (root / "text.png").write_text("no picture")
    tags = Reader(page({"x.jsonl": [row(pictures=path)]}, {"x.jsonl": root})).tags
    assert not [tag for tag, attrs in tags if tag == "img" or attrs.get("class") == "viewer"]
    said = capsys.readouterr().err
    assert said.startswith(f"pictures {path!r}: left out: ") and said.count("\n") == 1


def chromium(file: Path, *flags: str) -> subprocess.CompletedProcess:
    """Open a file in headless Chromium, with a profile and a home of its own."""
    home = file.parent
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={home}/profile", "--virtual-time-budget=4000",
               "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
    return subprocess.run([*command, *flags, file.as_uri()], capture_output=True, text=True,
                          timeout=600, env=os.environ | {"HOME": str(home)})  # fmt: skip


@browser
def test_the_viewer_draws_in_a_browser(pictured, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(*pictured))
    done = chromium(file, "--dump-dom", "--enable-logging=stderr")
    assert 'data-part="said" aria-live="polite">identical<' in done.stdout
    assert re.search(r'"picture">(<option>\d</option>){3}</select>', done.stdout)
    assert "CONSOLE" not in done.stderr  # no error, and nothing that the policy refused


@browser
def test_the_viewer_follows_its_controls(pictured, tmp_path):
    """Choose the noisy row and its second picture, and pull the slider to a quarter."""
    script = """
    const set = (part, key, value, event) => {
      const control = document.querySelector(`[data-part="${part}"]`);
      control[key] = value;
      control.dispatchEvent(new Event(event));
    };
    setTimeout(() => {
      set("row", "selectedIndex", 3, "change");
      set("wipe", "value", 25, "input");
      setTimeout(() => set("picture", "selectedIndex", 1, "change"), 500);
    }, 500);"""
    file = with_script(tmp_path / "report.html", page(*pictured), script)
    dom = chromium(file, "--dump-dom").stdout
    assert re.search(r">PSNR 2\d\.\d dB, largest difference \d\d+ of 255<", dom)
    assert 'data-part="chosen">+ quant<' in dom
    assert 'style="clip-path: inset(0px 0px 0px 25%);"' in dom and 'style="left: 25%;"' in dom


def with_script(file: Path, text: str, script: str) -> Path:
    """Write a page with a script of the test's, which its policy would refuse."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", text)
    file.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return file


@browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_its_window(pictured, tmp_path, width):
    script = "document.body.dataset.width = document.documentElement.scrollWidth"
    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    with_script(file, page(*pictured), script)
    size = f"--window-size={width},900"
    dom = chromium(file, size, "--dump-dom").stdout
    assert int(re.search(r'data-width="(\d+)"', dom)[1]) <= width
    chromium(file, size, f"--screenshot={shot}")
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (width, 900)
