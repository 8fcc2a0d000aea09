"""The studio's page in headless Chromium: generate, hear, cancel, find, and messages."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.report.test_browser import BROWSER, DRIVER, chromium, webdriver  # noqa: F401 (a fixture)
from tests.support.steered import StubJudges, make_steerable

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[studio]'")

from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from musicscope.commands.studio import app as studio  # noqa: E402
from musicscope.commands.studio import logic  # noqa: E402
from musicscope.models.registry import load_model  # noqa: E402
from musicscope.steering.recipes import load_steering  # noqa: E402
from musicscope.steering.session import Session, TextInput  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword).*"),  # Gradio's own
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
    ),
]
HOSTILE = "<img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_musicgen):
    """The page, served from a folder with the tiny model."""
    root = tmp_path_factory.mktemp("studio")
    make_steerable(root, tiny_musicgen)
    (root / "uploads").mkdir()
    rng = np.random.default_rng(0)
    for side in ("with", "without"):
        (root / side).mkdir()
        for i in range(5):
            sound = 0.05 * rng.standard_normal(8000)
            if side == "with":
                sound += 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
            soundfile.write(root / side / f"{i}.wav", sound, 8000)
    (root / "with" / "not audio.wav").write_bytes(b"x" * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "no_proxy", "NO_PROXY"):
            patch.setenv(name, "")
        patch.setattr(logic, "open_judges", lambda path: StubJudges())
        logic.open_session.cache_clear()
        studio.prepare(str(root / "uploads"))
        page, where = studio.serve("cpu", None, wait=False)
        yield where
        page.close(verbose=False)


@pytest.fixture
def browser(chromium, address):  # noqa: F811
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get(address)
    wait(chromium, lambda d: d.find_elements("id", "steer-go"))
    return chromium


def wait(browser, until, seconds: float = 60):
    return WebDriverWait(browser, seconds, 0.1).until(until)


def fill(browser, place: str, text: str) -> None:
    """Type into the number or text field of a component."""
    field = browser.find_element(
        "css selector", f"#{place} input[type=number], #{place} textarea, #{place} input"
    )
    field.send_keys(webdriver.Keys.CONTROL, "a")
    field.send_keys((text or webdriver.Keys.BACKSPACE) + webdriver.Keys.TAB)


def press(browser, name: str) -> None:
    browser.execute_script("document.getElementById(arguments[0]).click()", name)


def message(browser, text: str) -> str:
    """The toast with some text, once it is there; all are closed then."""
    found = wait(browser, lambda d: [t for t in d.execute_script(
        "return [...document.querySelectorAll('.toast-body')].map((e) => e.innerText)")
        if text in t])  # fmt: skip
    browser.execute_script("document.querySelectorAll('.toast-close').forEach((b) => b.click())")
    return found[0]


def sounds(browser, name: str) -> list[str]:
    """Addresses of the two pieces; none before both are there."""
    found = browser.execute_script(
        "return arguments[0].flatMap((id) => "
        "[...document.querySelectorAll(`#${id} a[download]`)].map((a) => a.href))",
        [f"{name}-plain", f"{name}-steered"],
    )
    return found if len(found) == 2 else []


def fetched(url: str) -> tuple[np.ndarray, int]:
    with urllib.request.urlopen(url) as answer:
        return soundfile.read(io.BytesIO(answer.read()), dtype="float32")


def test_both_pieces_can_be_heard_and_are_those_of_the_model(browser):
    fill(browser, "steer-prompt", f"calm guitar {HOSTILE}")
    fill(browser, "steer-seconds", "0.5")
    fill(browser, "steer-seed", "11")
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    plain, steered = wait(browser, lambda d: sounds(d, "steer"))
    wait(browser, lambda d: len(d.find_elements("css selector", "#steer-scores tbody tr")) == 4)
    session, source = Session(load_model("tiny")), TextInput(f"calm guitar {HOSTILE}", 0.5, 11, 3.0)
    layer, steering = load_steering("tiny", {"guitar": "on"})
    for url, edit in ((plain, None), (steered, steering)):
        sound, rate = fetched(url)
        assert rate == 3200
        wanted = session.draw(source, layer, edit).audio
        np.testing.assert_allclose(sound, np.clip(wanted, -1, 1), atol=1e-3)
    rows = browser.find_elements("css selector", "#steer-scores tbody th")
    assert rows[0].text == "guitar on"
    pictures = browser.execute_script("""
        return ['plain', 'steered']
          .map((kind) => document.querySelector(`#steer-${kind}-picture img`))
          .map((image) => [image.naturalWidth, image.naturalHeight])""")
    assert pictures == [[640, 288], [640, 288]]
    # A player each, with a length that the browser decoded.
    times = [e.text for e in browser.find_elements("css selector", "[id$=duration]") if e.text]
    assert len(times) == 2
    assert browser.execute_script("return window.pwned") is None


def test_result_and_controls_are_on_one_screen(browser):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
        {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    fill(browser, "steer-seconds", "0.5")
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    wait(browser, lambda d: len(d.find_elements("css selector", "#steer-scores tbody tr")) == 4)
    time.sleep(0.5)
    browser.execute_script("window.scrollTo(0, 0)")
    places = browser.execute_script("""
        return ['steer-prompt', 'concept-0', 'concept-1', 'steer-go', 'steer-plain',
                'steer-steered', 'steer-plain-picture', 'steer-scores'].map((id) => {
          const box = document.getElementById(id).getBoundingClientRect();
          return [id, box.left, box.top, box.right, box.bottom];
        })""")
    for name, left, top, right, bottom in places:
        assert 0 <= left < right <= 1280, (name, places)
        assert 0 <= top < bottom <= 800, (name, places)


def test_the_prompt_names_what_is_switched_off(browser):
    def prompt():
        return browser.find_element("css selector", "#steer-prompt textarea").get_property("value")

    fill(browser, "steer-prompt", "a calm piece.")
    fill(browser, "concept-0", "-1")
    wait(browser, lambda d: prompt() == "a calm piece with guitar.")
    fill(browser, "steer-prompt", "")
    fill(browser, "steer-seconds", "0.5")
    press(browser, "steer-go")
    wait(browser, lambda d: "No prompt" in d.find_element("id", "steer-scores").text)


def test_results_of_earlier_settings_are_marked(browser):
    def marked():
        return browser.execute_script(
            "return getComputedStyle(document.getElementById('steer-result'), '::before').content"
        ) == '"These results are of earlier settings."'  # fmt: skip

    fill(browser, "steer-seconds", "0.5")
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    wait(browser, lambda d: len(d.find_elements("css selector", "#steer-scores tbody tr")) == 4)
    assert not marked()
    fill(browser, "concept-0", "0.5")
    wait(browser, lambda d: marked())
    press(browser, "steer-go")
    wait(browser, lambda d: not marked())
    wait(browser, lambda d: sounds(d, "steer"))
    assert not marked()
    fill(browser, "steer-seed", "-1")
    press(browser, "steer-go")
    message(browser, "seed -1")
    wait(browser, lambda d: marked())


def test_the_plain_sound_comes_before_the_steered_one_with_the_time_left(browser, monkeypatch):
    gate, draw = threading.Event(), Session.draw

    def slow(self, source, layer, steering=None, tick=None):
        if steering is not None:
            tick(0.5)
            assert gate.wait(60)
        return draw(self, source, layer, steering, tick)

    monkeypatch.setattr(Session, "draw", slow)
    fill(browser, "steer-seconds", "0.5")
    fill(browser, "steer-seed", "77")
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    wait(browser, lambda d: d.find_elements("css selector", "#steer-plain a[download]"))
    assert not browser.find_elements("css selector", "#steer-steered a[download]")
    wait(browser, lambda d: "s left" in d.find_element("id", "steer-result").text)
    gate.set()
    wait(browser, lambda d: sounds(d, "steer"))


def test_bad_input_is_a_message_and_the_next_press_works(browser):
    press(browser, "steer-go")
    assert "switch a concept off or on" in message(browser, "switch a concept")
    fill(browser, "concept-1", "1")
    fill(browser, "steer-seed", "-5")
    press(browser, "steer-go")
    message(browser, "seed -5")
    fill(browser, "steer-seed", "5")
    fill(browser, "steer-prompt", HOSTILE + "x" * 2100)
    press(browser, "steer-go")
    message(browser, "letters")
    fill(browser, "steer-prompt", "flute")
    fill(browser, "steer-seconds", "0.5")
    press(browser, "steer-go")
    assert wait(browser, lambda d: sounds(d, "steer"))
    assert browser.execute_script("return window.pwned") is None


def test_a_failure_is_a_short_message_not_a_traceback(browser, monkeypatch):
    def fail(*_):
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(logic, "perform", fail)
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    text = message(browser, "This did not work (RuntimeError)")
    assert HOSTILE not in text
    assert browser.execute_script("return window.pwned") is None


def test_single_features_are_edited(browser):
    browser.find_element("css selector", "#knobs button").click()
    wait(browser, lambda d: d.find_element("id", "feature-0").is_displayed())
    fill(browser, "feature-0", "500")
    press(browser, "steer-go")
    message(browser, "feature 500: the SAE has 0 to 95")
    fill(browser, "feature-0", "5")
    fill(browser, "steer-seconds", "0.5")
    press(browser, "steer-go")
    plain, steered = wait(browser, lambda d: sounds(d, "steer"))
    assert not np.array_equal(fetched(plain)[0], fetched(steered)[0])


def test_an_address_opens_a_feature(browser, address):
    browser.get(f"{address}?feature=7")
    wait(browser, lambda d: d.find_elements("css selector", "#knobs button"))[0].click()
    field = wait(browser, lambda d: d.find_elements("css selector", "#feature-0 input"))[0]
    wait(browser, lambda _: field.get_attribute("value") == "7")


def test_cancel_ends_the_job_and_frees_the_queue(browser):
    from musicscope.commands.studio import page as studio_page

    fill(browser, "steer-seconds", "30")
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    wait(browser, lambda d: studio_page._jobs)
    time.sleep(0.5)
    start = time.monotonic()
    press(browser, "steer-cancel")
    message(browser, "Cancelled")
    wait(browser, lambda d: not studio_page._jobs, 10)
    stopped = time.monotonic() - start
    assert not sounds(browser, "steer")
    fill(browser, "steer-seconds", "0.5")
    press(browser, "steer-go")
    assert wait(browser, lambda d: sounds(d, "steer"))
    assert stopped < 10


def test_closing_the_page_ends_its_job(browser, address):
    from musicscope.commands.studio import page as studio_page

    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(address)
    wait(browser, lambda d: d.find_elements("id", "steer-go"))
    fill(browser, "steer-seconds", "30")
    fill(browser, "concept-0", "1")
    press(browser, "steer-go")
    wait(browser, lambda d: studio_page._jobs)
    (event,) = studio_page._jobs.values()
    browser.close()
    browser.switch_to.window(first)
    wait(browser, lambda d: not studio_page._jobs)
    assert event.is_set()


def test_jobs_of_two_pages_run_one_at_a_time(browser, address, monkeypatch):
    running, most, perform = [], [], logic.perform

    def counted(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.5)
        try:
            return perform(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr(logic, "perform", counted)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    second = browser.current_window_handle
    browser.get(address)
    wait(browser, lambda d: d.find_elements("id", "steer-go"))
    for window in (first, second):
        browser.switch_to.window(window)
        fill(browser, "concept-0", "1")
        fill(browser, "steer-seconds", "0.5")
        press(browser, "steer-go")
    for window in (first, second):
        browser.switch_to.window(window)
        assert wait(browser, lambda d: sounds(d, "steer"))
    browser.close()
    browser.switch_to.window(first)
    assert most == [1, 1]


def upload(browser, side: str) -> None:
    field = browser.find_element("css selector", f"#{side} input[type=file]")
    field.send_keys("\n".join(str(p) for p in sorted(Path(side).resolve().iterdir())))
    files = len(list(Path(side).iterdir()))
    wait(browser, lambda d: len(
        d.find_elements("css selector", f"#{side} .file, #{side} tr")) >= files)  # fmt: skip


def found_text(browser, text: str) -> str:
    def look(d):
        found = d.find_element("css selector", "#found textarea").get_property("value")
        return found if text in found else ""

    return wait(browser, look)


def test_a_concept_is_found_in_uploads_and_steered(browser):
    tabs = browser.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if "Find a concept" in tab.text).click()
    wait(browser, lambda d: d.find_element("id", "find-go").is_displayed())
    press(browser, "found-go")
    message(browser, "find a concept first")
    press(browser, "find-go")
    message(browser, "0 recordings with the concept")
    fill(browser, "found-seconds", "0.5")
    # A sound alone, from upload to the steered piece with one press.
    upload(browser, "with")
    press(browser, "find-go")
    found_text(browser, "This is no test")
    first, _ = wait(browser, lambda d: sounds(d, "found"))
    upload(browser, "without")
    press(browser, "find-go")
    text = found_text(browser, "5 recordings with and 5 without the concept")
    assert "not audio.wav: not audio" in text
    plain, steered = wait(browser, lambda d: sounds(d, "found"))
    assert not np.array_equal(fetched(plain)[0], fetched(steered)[0])
    players = browser.find_elements("css selector", "#found-excerpts audio")
    assert len(players) == logic.PLAYED * logic.MOMENTS
    browser.execute_script("""
        const player = document.querySelector('#found-excerpts audio');
        player.preload = 'auto'; player.load()""")
    length = "return document.querySelector('#found-excerpts audio').duration"
    wait(browser, lambda d: (d.execute_script(length) or 0) > 0.5)
    off = steered
    fill(browser, "found-turn", "1")
    press(browser, "found-go")
    _, steered = wait(browser, lambda d: (of := sounds(d, "found")) and of[1] != off and of)
    assert not np.array_equal(fetched(off)[0], fetched(steered)[0])


def test_a_sound_can_be_recorded(browser):
    tabs = browser.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if "Find a concept" in tab.text).click()
    browser.find_element("css selector", "#recorder button").click()
    wait(browser, lambda d: d.find_elements("css selector", "#recorded button"))


def test_it_is_served_to_this_machine_alone_and_asks_no_other(chromium, address):  # noqa: F811
    assert address.startswith("http://127.0.0.1:")
    elsewhere = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(elsewhere)
    chromium.get("about:blank")
    chromium.get_log("performance"), chromium.get_log("browser")
    chromium.get(address)
    wait(chromium, lambda d: d.find_elements("id", "steer-go"))
    time.sleep(1)
    messages = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
    urls = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    outside = [u for u in urls if not u.startswith((address, "data:", "blob:", "chrome:"))]
    assert len(urls) > 5
    assert outside == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_sideways(browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    time.sleep(0.3)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_files_of_this_machine_are_not_served(address):
    for path in ("/etc/hostname", "data/sae/tiny/top1/seed-0/config.json"):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
