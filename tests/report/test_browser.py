"""report.html in a real browser: it draws, zooms, plays, fits a phone and has nothing to complain of."""

from __future__ import annotations

import pytest

from blockstream.report.page import compare_html, report_html
from blockstream.report.record import read_run
from tests.support.browser import Browser, chromium

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")

VIEW = "document.documentElement.dataset.view.split(' ').map(Number)"
#: Pixels of a colour on the first timeline's canvas.
COUNT = """(red) => {
  const canvas = document.querySelector('.timeline canvas');
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let n = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    const [r, g, b] = [pixels[i], pixels[i + 1], pixels[i + 2]];
    if (red ? r > 190 && g < 90 && b < 100 : r < 40 && g < 40 && b < 45 && pixels[i + 3] > 200) n++;
  }
  return n;
}"""


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser


def open_page(browser, text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    browser.wait_for("!!document.documentElement.dataset.view")
    browser.eval("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    return path


def frame(browser):
    browser.eval("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")


def test_it_draws_zooms_and_moves_without_a_complaint(browser, tmp_path, finished):
    path = open_page(browser, report_html(read_run(finished)), tmp_path)
    begin, end = browser.eval(VIEW)
    assert begin == 0 and end == pytest.approx(read_run(finished).wall_s, abs=1e-3)
    assert browser.eval(f"({COUNT})(true)") > 2000
    assert browser.eval(f"({COUNT})(false)") > 2000

    browser.eval("document.querySelector('.timeline').scrollIntoView({block: 'center'})")
    box = browser.eval(
        "(() => { const b = document.querySelector('.timeline').getBoundingClientRect();"
        " return [b.x, b.y, b.width] })()"
    )
    x, y = box[0] + box[2] / 2, box[1] + 110
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300, modifiers=2)
    zoomed = browser.wait_for(f"(() => {{ const v = {VIEW}; return v[1] - v[0] < {end} * 0.8 && v }})()")
    assert zoomed[0] > 0 and zoomed[1] < end

    browser.mouse("mousePressed", x, y, button="left", clickCount=1)
    browser.mouse("mouseMoved", x - 80, y, button="left", buttons=1)
    browser.mouse("mouseReleased", x - 80, y, button="left", clickCount=1)
    dragged = browser.eval(VIEW)
    assert dragged[0] > zoomed[0]
    assert dragged[1] - dragged[0] == pytest.approx(zoomed[1] - zoomed[0])

    browser.mouse("mouseMoved", x, y)
    said = browser.wait_for("document.querySelector('.tip').innerText")
    assert "execute" in said and "pass" in said
    browser.eval("document.querySelector('[data-act=all]').click()")
    assert browser.eval(VIEW) == [begin, end]
    # Counting pixels, twice, is this test's own doing.
    assert [p for p in browser.problems if "willReadFrequently" not in p] == []
    assert [u for u in browser.requests if not u.startswith("data:")] == [path.as_uri()]


def test_the_wheel_scrolls_past_a_timeline_nobody_has_touched(browser, tmp_path, finished):
    open_page(browser, report_html(read_run(finished)), tmp_path)
    before = browser.eval(VIEW)
    browser.eval("document.querySelector('.timeline').scrollIntoView({block: 'center'})")
    at = browser.eval("scrollY")
    browser.mouse("mouseWheel", 600, 450, deltaX=0, deltaY=-120)
    browser.wait_for(f"scrollY < {at}")
    assert browser.eval(VIEW) == before


def test_keys_move_and_zoom(browser, tmp_path, finished):
    open_page(browser, report_html(read_run(finished)), tmp_path)
    press = "document.querySelector('.timeline').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    begin, end = browser.eval(VIEW)
    browser.eval(press % "+")
    a = browser.eval(VIEW)
    assert a[1] - a[0] == pytest.approx(0.6 * (end - begin))
    browser.eval(press % "ArrowRight")
    assert browser.eval(VIEW)[0] > a[0]
    browser.eval(press % "0")
    assert browser.eval(VIEW) == [begin, end]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_width_of_a_phone(browser, tmp_path, finished, killed, scheme):
    browser.resize(360, 740, 2)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    records = [read_run(finished), read_run(killed)]
    for text in (report_html(records[0]), report_html(records[1]), compare_html(records)):
        open_page(browser, text, tmp_path)
        assert browser.eval("document.documentElement.scrollWidth") <= 360
        assert browser.eval("document.querySelector('.timeline canvas').clientWidth") > 300
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == (
        "rgb(251, 251, 252)" if scheme == "light" else "rgb(19, 19, 24)"
    )
    assert browser.problems == []


def test_the_video_plays(browser, tmp_path, copied):
    av = pytest.importorskip("av")
    import numpy as np

    from movd.video import write_video

    del av
    frames = np.zeros((24, 64, 64, 3), np.uint8)
    frames[:, 20:40, 20:40, 0] = np.arange(0, 240, 10, np.uint8)[:, None, None]
    write_video(copied / "video.mp4", [frames], 24)
    open_page(browser, report_html(read_run(copied)), tmp_path)
    played = browser.eval(
        "(async () => { const v = document.querySelector('video'); await v.play();"
        " await new Promise(resolve => { v.ontimeupdate = () => v.currentTime > 0 && resolve() });"
        " return [v.videoWidth, v.videoHeight, v.error] })()"
    )
    assert played == [64, 64, None]
    assert browser.problems == []


def test_the_policy_stops_what_slips_in(browser, tmp_path, finished):
    text = report_html(read_run(finished)).replace("</main>", "<img src=x onerror='window.hacked=1'></main>")
    open_page(browser, text, tmp_path)
    browser.wait_for("document.readyState === 'complete'")
    frame(browser)
    assert browser.eval("window.hacked") is None
    assert any("Content Security Policy" in p for p in browser.problems)


def test_several_runs_share_one_view(browser, tmp_path, finished, killed):
    open_page(browser, compare_html([read_run(finished), read_run(killed)]), tmp_path)
    assert browser.eval("document.querySelectorAll('.timeline canvas').length") == 2
    assert browser.eval(VIEW)[1] == pytest.approx(read_run(finished).wall_s, abs=1e-3)
    assert browser.problems == []
