"""The page in a real browser: a video by the keyboard alone, a reload in between, two tabs, a phone."""

from __future__ import annotations

import pytest
from blockstream_web.presets import load_presets

from tests.support.browser import Browser, chromium

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="no Chromium is installed"),
    pytest.mark.timeout(600),
]

TAB, ENTER, SPACE = ("Tab", 9), ("Enter", 13, "\r"), (" ", 32, " ")
READY = "document.querySelector('#link').textContent === 'connected'"
FOCUS = (
    "document.activeElement.dataset.key ?? document.activeElement.dataset.act ?? document.activeElement.id"
)
CARD = "document.querySelector('[data-id=\"%s\"] .state')?.textContent"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture
def browser(running):
    """A tab of its own, in which nothing may go wrong."""
    running.problems.clear()
    running.tab()
    yield running
    assert running.problems == []
    running.open("about:blank")


@pytest.fixture
def small(tmp_path):
    """The embedded model as it takes least."""
    path = tmp_path / "small.yaml"
    path.write_text("pipeline: movd\nprompt: a star\nheight: 32\nwidth: 32\nthreads: 1\n")
    return load_presets([str(path)])


def visit(browser, served):
    browser.open(served.address)
    browser.wait_for(READY)


def tab_to(browser, what):
    for _ in range(60):
        browser.press(*TAB)
        if browser.eval(FOCUS) == what:
            return
    raise AssertionError(f"{what} cannot be reached by Tab")


def type_over(browser, what, text):
    tab_to(browser, what)
    browser.eval("document.activeElement.select()")
    browser.write(text)


@pytest.mark.slow
def test_a_video_is_made_by_the_keyboard_alone_over_a_reload_and_seen_in_two_tabs(browser, serve, small):
    with serve(real=True, presets=small) as served:
        first = browser.tab()
        visit(browser, served)
        second = browser.tab()
        visit(browser, served)
        browser.use(first)
        tab_to(browser, "prompts")
        browser.write("a red star moving right")
        type_over(browser, "frames", "17")
        type_over(browser, "steps", "2")
        browser.eval("document.activeElement.blur()")  # what is typed is kept at the latest when it is left
        tab_to(browser, "go")
        browser.press(*ENTER)
        browser.wait_for(f"{CARD % '0001'} === 'running'")

        browser.call("Page.reload")
        browser.wait_for(f"document.readyState === 'complete' && {READY}")
        assert browser.eval("document.querySelector('#prompts').value") == "a red star moving right"
        assert browser.eval("document.querySelector('[data-key=frames]').value") == "17"
        browser.wait_for(f"{CARD % '0001'} === 'running' && !!document.querySelector('#now-curve .curve')")
        browser.wait_for("document.querySelectorAll('#now-stages li').length === 3", 300)

        for tab in (first, second):
            browser.use(tab)
            browser.wait_for(f"{CARD % '0001'} === 'done'", 300)
            assert browser.eval("document.querySelector('#now').hidden")
            assert "17" in browser.eval("document.querySelector('[data-id=\"0001\"]').innerText")
        browser.use(first)
        played = browser.eval(
            "(async () => { const v = document.querySelector('video'); await v.play();"
            " await new Promise(resolve => { v.ontimeupdate = () => v.currentTime > 0 && resolve() });"
            " v.pause(); return [v.videoWidth, v.videoHeight, v.error] })()"
        )
        assert played == [32, 32, None]
        browser.open(f"{served.address}runs/0001/report.html")
        browser.wait_for("!!document.documentElement.dataset.view")
        assert str(served.folder) not in browser.eval("document.documentElement.outerHTML")
        browser.open("about:blank")
        browser.use(second)


def test_a_run_is_stopped_and_goes_on_by_the_keyboard(browser, served):
    visit(browser, served)
    tab_to(browser, "prompts")
    browser.write("wait for me")
    browser.press("Enter", 13, "\r", modifiers=2)  # Ctrl: make it
    browser.wait_for("document.querySelector('#now-step').textContent === '3 of 3'")
    tab_to(browser, "stop")
    browser.press(*SPACE)
    browser.wait_for(f"{CARD % '0001'} === 'stopped'")
    (served.folder / "go").touch()
    tab_to(browser, "resume")
    browser.press(*ENTER)
    browser.wait_for(f"{CARD % '0001'} === 'done'")
    assert served.calls == [["run", "0001"], ["resume", "0001"]]


def test_what_is_wrong_is_said_and_settings_come_back(browser, served):
    visit(browser, served)
    set_to = (
        "(() => { const e = document.querySelector('%s'); e.value = '%s';"
        " e.dispatchEvent(new Event('change')) })()"
    )
    browser.eval(set_to % ("[data-key=frames]", "2"))
    browser.eval("document.querySelector('#go').click()")
    browser.wait_for("document.querySelector('#said').textContent.includes('frames')")
    browser.problems.clear()  # the console notes the answer 422
    browser.eval("document.querySelector('#reset').click()")
    browser.eval(set_to % ("[data-key=sampler]", "1"))
    browser.eval(set_to % ("[data-key=tolerance]", "0.2"))
    browser.eval("document.querySelector('[data-key=\"attention.tdtm\"]').click()")
    browser.eval("document.querySelector('#prompts').value = 'fail\\na <b>bold</b> star'")
    browser.eval("document.querySelector('#go').click()")
    browser.wait_for(f"{CARD % '0001'} === 'failed'")
    assert served.runs()["0001"]["asked"] == {
        "prompts": ["fail", "a <b>bold</b> star"],
        "settings": {"sampler": {"name": "lpl", "tolerance": 0.2}, "attention": ["tdtm"]},
    }
    assert "is damaged" in browser.eval("document.querySelector('.error').innerText")
    browser.eval("document.querySelector('#reset').click()")
    browser.eval("document.querySelector('[data-act=again]').click()")
    assert browser.eval("document.querySelector('#prompts').value") == "fail\na <b>bold</b> star"
    assert browser.eval("document.querySelector('[data-key=tolerance]').value") == "0.2"
    assert browser.eval("document.querySelectorAll('.run b').length") == 0


def test_a_plan_is_shown_and_two_runs_are_compared_and_deleted(browser, served):
    visit(browser, served)
    browser.eval("document.querySelector('#plan').click()")
    said = browser.wait_for("document.querySelector('#outlook .sentence')?.textContent")
    assert said == "This takes about 4 min 10 s in 3.2 GiB; +1.0 GiB saves 50 s."
    for name in ("0001", "0002"):
        served.make("a star")
        browser.wait_for(f"{CARD % name} === 'done'")
        browser.eval(f"document.querySelector('[data-id=\"{name}\"] [data-act=compare]').click()")
    assert browser.eval("document.querySelector('#tray a').getAttribute('href')") == "/compare/0001/0002"
    browser.eval("document.querySelector('[data-id=\"0002\"] [data-act=delete]').click()")
    assert browser.eval("document.activeElement.value") == "no"
    browser.press("Escape", 27)
    browser.wait_for("!document.querySelector('dialog').open")
    assert set(served.runs()) == {"0001", "0002"}
    browser.eval("document.querySelector('[data-id=\"0002\"] [data-act=delete]').click()")
    browser.eval("document.querySelector('dialog button.danger').click()")
    browser.wait_for("!document.querySelector('[data-id=\"0002\"]')")
    assert not (served.folder / "0002").exists()
    browser.problems[:] = [p for p in browser.problems if "media" not in p]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_width_of_a_phone(browser, served, scheme):
    browser.resize(360, 740, 2)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    served.make("wait " + "x" * 300)
    visit(browser, served)
    browser.wait_for(f"{CARD % '0001'} === 'running'")
    browser.eval("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.eval("document.documentElement.scrollWidth") <= 360
    assert browser.eval("document.querySelector('#now').getBoundingClientRect().top") < 120
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == (
        "rgb(251, 251, 252)" if scheme == "light" else "rgb(19, 19, 24)"
    )
    small = (
        "[...document.querySelectorAll('button, summary, select, textarea, input:not([type=checkbox])')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 30).map(e => e.outerHTML)"
    )
    assert browser.eval(small) == []


def test_a_server_that_is_gone_is_said_and_found_again(browser, serve):
    with serve() as served:
        visit(browser, served)
        port = served.port
    browser.wait_for("document.querySelector('#link').className === 'bad'")
    with serve(port=port):
        browser.wait_for("document.querySelector('#link').className === 'good'")
    browser.problems.clear()  # the console notes each try
