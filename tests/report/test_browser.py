"""The report in a real headless Chromium: sound, search, sort, keyboard, phone width, themes."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from musicscope.core import plots
from musicscope.data.clips import ClipStore
from musicscope.report import pages, snippets
from musicscope.report.answers import Answer
from musicscope.report.build import page as page_of
from musicscope.report.elements import Card, Figure, Moment, Players, Section, Table
from musicscope.report.metrics import plain
from tests.support.report import HOSTILE as UNSAFE
from tests.support.report import make_activity, make_inputs, tone

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --mute-audio "
    "--autoplay-policy=no-user-gesture-required"
)
UNFOLD = "document.querySelectorAll('.part > details').forEach((fold) => { fold.open = true; })"
HOSTILE = '</script><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'
LONG = "an_unbreakable_name_" * 12


def moment(caption: str, pitch: float) -> Moment:
    audio = tone(pitch)
    picture = snippets.png(snippets.spectrogram_levels(audio, 16_000))
    values = np.maximum(0, np.sin(np.arange(50) / 5))
    return Moment(
        caption, "0.00 to 1.00 s",
        snippets.data_uri("audio/mpeg", snippets.mp3(audio, 16_000)),
        snippets.data_uri("image/png", picture),
        (("nano-small", snippets.curve(values, 1.0), 0),), 50, "moment 1",
    )  # fmt: skip


def card(key: str, title: str, kind: str, energy: float | None, caption: str) -> Card:
    numbers = {"energy": energy, "firing_entropy": 0.5}
    facts = (("energy", plain(energy)), ("concept", "guitar" if energy else "none"))
    return Card(
        key, title, ((kind, f"kind {kind}"),), numbers, facts,
        Table("By model", ("through", "rate"), ((caption, "0.1"),)),
        (("matches Feature low, cosine .71", "low"),), (moment(caption, 440), moment(caption, 220)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    cards = (
        card("low", "Feature low", "a", 0.25, "calm flute"),
        card("high", "Feature high", "b", 30.0, "fast piano"),
        card("middle", "Feature middle", "a", 4.0, HOSTILE),
        card("none", f"Feature {LONG}", "b", None, LONG),
    )
    sorts = (("energy", "energy", True), ("firing_entropy", "firing entropy", True))
    drawn, axes = plots.new_figure()
    plots.interval_curve(axes[0, 0], [0, 1, 2], [0.5, 0.1, 0.02])
    folder = tmp_path_factory.mktemp("figures")
    plots.save_figure(drawn, folder / "a.png")
    image = snippets.data_uri("image/png", (folder / "a.png").read_bytes())
    figure = Figure(image, (539, 308), HOSTILE, HOSTILE)
    columns = tuple(f"column {i} {HOSTILE if i == 3 else ''}" for i in range(12))
    table = Table(HOSTILE, columns, (tuple(["row", *["0.123"] * 11]),))
    before_after = (moment("plain", 330), moment(HOSTILE, 550))
    players = Players(((f"{HOSTILE} off: {LONG}", before_after),))
    model = {
        "name": LONG, "clips": False, "prompts": "2", "seconds": "3.0", "layer": HOSTILE,
        "joint": None, "players": players, "doses": figure, "advantages": table,
        **dict.fromkeys(("success", "costs", "curves", "cross_talk"), table),
    }  # fmt: skip
    found = {
        "name": "folded", "numbers": [table], "best": table,
        "players": Players((("folded", (moment("plain", 660),)),)),
    }  # fmt: skip
    kinds = {"a": "kind a", "b": "kind b"}
    sections = [
        Section("layers", "Layers", {"figures": [figure, HOSTILE], "tables": [table]}, (HOSTILE,)),
        Section("judges", "Judges", {"means": table, "families": table, "own": None}),
        Section("features", "Features", {"cards": cards, "kinds": kinds, "sort_keys": sorts}),
        Section("steering", "Concepts off and on", {"models": [model]}),
        Section("finder", "Concepts found", {"models": [found]}),
    ]
    short = Table(HOSTILE, ("", "result", "null", "above it"), ((LONG, HOSTILE, "0.5", "no"),))
    answers = [
        Answer("steering", short, 1, Players(((HOSTILE, before_after),))),
        Answer("layers", short, 0, figure),
        Answer("gallery", None, 0, players),
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_of(f"Test report {LONG}", sections, answers), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, page):
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.get(page)
    chromium.execute_script(UNFOLD)
    return chromium


def press(browser, *keys: str) -> None:
    webdriver.ActionChains(browser).send_keys(*keys).perform()


def shown(browser) -> list[str]:
    """Keys of the visible cards in the order of the page."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.card')].filter(c => c.offsetParent).map(c => c.id)"
    )


def test_sound_plays_one_at_a_time_with_a_playhead(browser):
    found = browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const [first, second] = document.querySelectorAll('#low .moment');
        const [a, b] = [first, second].map((m) => m.querySelector('audio'));
        first.querySelector('.play').click();
        setTimeout(() => {
          const early = a.currentTime;
          const head = first.querySelector('.playhead').style;
          const seen = {early, head: parseFloat(head.left), duration: a.duration, error: a.error,
                        visible: head.visibility, label: first.querySelector('.play').ariaLabel};
          second.querySelector('.play').click();
          setTimeout(() => done({...seen, late: b.currentTime, stopped: a.paused,
                                 failed: document.querySelectorAll('.failed').length}), 300);
        }, 400);""")
    assert found["error"] is None
    assert found["failed"] == 0
    assert 0 < found["early"] < 1
    assert found["late"] > 0
    assert found["stopped"] is True
    assert found["duration"] == pytest.approx(1, abs=0.08)
    assert found["head"] > 0
    assert found["visible"] == "visible"
    assert found["label"].startswith("Pause: moment 1, Feature low")


def test_every_sound_and_picture_can_be_decoded(browser):
    found = browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const all = (what) => [...document.querySelectorAll(what)];
        const loads = all('.moment audio').map((sound) => new Promise((ok) => {
          sound.addEventListener('loadedmetadata', () => ok(sound.duration), {once: true});
          sound.addEventListener('error', () => ok(-1), {once: true});
          sound.preload = 'metadata'; sound.load();
        }));
        const wide = all('.moment img').map((image) => image.naturalWidth);
        Promise.all(loads).then((durations) => done({durations, wide}));""")
    assert len(found["durations"]) == 4 + 8 + 3  # answers, cards, parts
    assert min(found["durations"]) > 0.9
    assert set(found["wide"]) == {51}
    charts = "return [...document.querySelectorAll('figure img')].map((i) => i.naturalWidth)"
    assert set(browser.execute_script(charts)) == {770}


def test_search_narrows_by_all_words_and_escape_clears(browser):
    assert len(shown(browser)) == 4
    press(browser, "/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    press(browser, "calm FLUTE")
    assert shown(browser) == ["low"]
    assert browser.find_element("id", "count").text == "1 of 4 features"
    press(browser, " piano")
    assert shown(browser) == []
    press(browser, webdriver.Keys.ESCAPE)
    assert len(shown(browser)) == 4
    press(browser, "a/b")  # a slash inside the field is a character
    assert browser.find_element("id", "search").get_attribute("value") == "a/b"


def choose(browser, name: str, value: str) -> None:
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('change'))", name, value,
    )  # fmt: skip


def test_filter_by_kind_and_sort_both_ways_with_missing_numbers_last(browser):
    assert shown(browser) == ["high", "middle", "low", "none"]  # by number, not as text
    choose(browser, "order", "up")
    assert shown(browser) == ["low", "middle", "high", "none"]
    choose(browser, "sort", "firing_entropy")  # all equal: the order of the page as written
    assert shown(browser) == ["low", "high", "middle", "none"]
    choose(browser, "kind", "a")
    assert shown(browser) == ["low", "middle"]


def test_hostile_text_stays_text(browser):
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert browser.execute_script("return document.scripts.length") == 1
    assert HOSTILE in browser.find_element("css selector", "#middle .what").text
    assert browser.find_element("css selector", "#layers .missing").text == HOSTILE


def test_page_works_from_the_keyboard(browser):
    tab, order = webdriver.Keys.TAB, []
    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    for _ in range(48):
        press(browser, tab)
        order.append(browser.execute_script(
            "const e = document.activeElement; const s = getComputedStyle(e);"
            "return [e.id || e.className || e.tagName, s.outlineStyle]"))  # fmt: skip
    names = [name for name, _ in order]
    assert names[0] == "skip"
    places = [names.index(name) for name in ("search", "kind", "sort", "order")]
    assert places == sorted(places), names
    assert "play" in names[places[-1] :]  # the cards come after
    assert names.index("scroll") < names.index("search")  # wide tables can be scrolled
    assert all(style != "none" for _, style in order), order
    while browser.switch_to.active_element.get_attribute("class") != "play":
        press(browser, tab)
    press(browser, webdriver.Keys.ENTER)
    playing = "return [...document.querySelectorAll('audio')].filter(a => !a.paused).length"
    assert browser.execute_script(playing) == 1
    press(browser, webdriver.Keys.SPACE)
    assert browser.execute_script(playing) == 0


def test_players_beside_each_other_play_from_the_keyboard(browser):
    title, _, steered = browser.execute_script("""
        const box = document.querySelector('#steering .players');
        return [box.querySelector('h3').textContent,
                ...[...box.querySelectorAll('.play')].map((b) => b.getAttribute('aria-label'))]""")
    assert title == f"{HOSTILE} off: {LONG}"
    assert steered == f"Play: moment 1, {title}"
    places = browser.execute_script("""
        return [...document.querySelectorAll('#steering .players')[0].querySelectorAll('.moment')]
          .map((m) => [m.getBoundingClientRect().left, m.getBoundingClientRect().top])""")
    assert places[0][0] < places[1][0]
    assert places[0][1] == places[1][1]
    browser.execute_script("document.querySelectorAll('#steering .play')[1].focus()")
    press(browser, webdriver.Keys.ENTER)
    playing = "return [...document.querySelectorAll('audio')].map(a => !a.paused)"
    assert browser.execute_script(playing).index(True) == 4 + 9
    press(browser, webdriver.Keys.ENTER)
    assert True not in browser.execute_script(playing)
    fold = browser.find_element("css selector", "#steering details details summary")
    fold.send_keys(webdriver.Keys.ENTER)
    assert browser.execute_script("return document.querySelector('#steering details details').open")


def test_link_to_a_match_shows_it_even_when_it_is_filtered_out(browser):
    choose(browser, "kind", "b")
    assert "low" not in shown(browser)
    browser.execute_script("document.querySelector('#high .matches a').click()")
    # The hash changes in a task of its own, after the click.
    browser.execute_async_script("setTimeout(arguments[arguments.length - 1], 100)")
    assert "low" in shown(browser)
    assert browser.switch_to.active_element.get_attribute("id") == "low"


@pytest.mark.parametrize("width", [390, 320, 1280])
def test_nothing_overflows(browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    assert browser.execute_script("return innerWidth") == width
    browser.execute_script("document.querySelector('#steering details details').open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Text may neither leave its box nor the page; tables scroll in their own frame.
    wide = browser.execute_script("""
        return [...document.querySelectorAll('body *')].filter((e) =>
          !e.closest('.scroll') && !e.closest('svg') && !e.closest('.skip') && e.offsetParent &&
          (e.getBoundingClientRect().right > innerWidth + 1 || e.scrollWidth > e.clientWidth + 1)
          && getComputedStyle(e).display !== 'inline').map((e) => e.outerHTML.slice(0, 90));""")
    assert wide == []
    small = browser.execute_script("""
        return [...document.querySelectorAll('button, input, select')]
          .filter((e) => e.offsetParent && e.getBoundingClientRect().height < 43)
          .map((e) => e.outerHTML.slice(0, 80));""")
    assert small == []


CONTRAST = """
    const luminance = (colour) => colour.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const parse = (css) => {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const behind = (e) => {
      for (; e; e = e.parentElement) {
        const colour = parse(getComputedStyle(e).backgroundColor);
        if (colour[3] === 255) return colour;
      }
      return [255, 255, 255, 255];
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const low = [];
    let seen = 0;
    while (walker.nextNode()) {
      const e = walker.currentNode.parentElement;
      if (!walker.currentNode.textContent.trim() || !e.getClientRects().length) continue;
      const style = getComputedStyle(e);
      const [a, b] = [parse(e.closest('svg') ? style.fill : style.color), behind(e)].map(luminance);
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      seen += 1;
      if (ratio < 4.5) low.push([ratio.toFixed(2), e.outerHTML.slice(0, 80)]);
    }
    const page = getComputedStyle(document.body).backgroundColor;
    return {low, seen, page: luminance(parse(page))};
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(browser, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    found = browser.execute_script(CONTRAST)
    assert found["seen"] > 60
    assert found["low"] == []
    assert (found["page"] > 0.5) == (scheme == "light")


def test_everything_has_a_name(browser):
    nameless = browser.execute_script("""
        const named = (e) => e.ariaLabel || e.alt || e.textContent.trim() || (e.labels || []).length
          || e.getAttribute('aria-labelledby');
        return [...document.querySelectorAll('button, input, select, figure img, [role=region], a')]
          .filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 80));""")
    assert nameless == []
    assert browser.execute_script("return document.documentElement.lang") == "en"
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_no_request_leaves_the_page_and_the_console_is_silent(chromium, page):
    chromium.get("about:blank")
    chromium.get_log("performance"), chromium.get_log("browser")
    chromium.get(page)
    press(chromium, "/", "flute", webdriver.Keys.ESCAPE)
    chromium.execute_script("document.querySelector('.play').click()")
    messages = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
    urls = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert urls[0] == page
    assert all(url.startswith("data:") for url in urls[1:]), urls
    assert chromium.get_log("browser") == []


# The folded page


def test_answers_come_first_and_every_part_is_folded(chromium, page):
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    chromium.get(page)
    seen = chromium.execute_script("""
        const top = (name) => document.querySelector(name).getBoundingClientRect().top;
        return [document.documentElement.scrollHeight, top('.answers'), top('.part'),
                document.querySelectorAll('.part > details[open]').length,
                document.querySelectorAll('.answer .play').length];""")
    assert seen[0] <= 5 * 900
    assert seen[1] < seen[2]
    assert seen[3:] == [0, 4]
    chromium.execute_script("document.querySelector('#answer-layers .ends a').click()")
    chromium.execute_async_script("setTimeout(arguments[arguments.length - 1], 100)")
    opened = """return [...document.querySelectorAll('.part > details[open]')]
        .map((fold) => fold.parentElement.id)"""
    assert chromium.execute_script(opened) == ["layers"]
    chromium.get(f"{page}#high")  # a card inside a folded part
    chromium.refresh()
    assert chromium.execute_script(opened) == ["features"]
    assert chromium.switch_to.active_element.get_attribute("id") == "high"


def test_no_table_is_clipped_on_a_screen_of_1440_pixels(chromium, page):
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    chromium.get(page)
    clipped = chromium.execute_script("""
        document.querySelectorAll('details').forEach((fold) => { fold.open = true; });
        return [...document.querySelectorAll('.scroll')]
          .filter((e) => e.querySelector('table') && e.scrollWidth > e.clientWidth + 1)
          .map((e) => e.ariaLabel);""")
    assert clipped == []


# Feature pages


@pytest.fixture(scope="module")
def viewer(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("viewer")
    make_activity(root, make_inputs(root))
    tables = pages.read(root, "top1", "top1", "top1")
    pages.write(root / "pages", tables, ClipStore.open(root / "data/clips"))
    return (root / "pages/index.html").as_uri()


def opened(chromium, address: str) -> None:
    """Open a feature and wait until it is shown."""
    chromium.get("about:blank")
    chromium.get_log("performance"), chromium.get_log("browser")
    chromium.get(address)
    wait(chromium, "return document.querySelectorAll('#feature .moment').length")


def wait(chromium, script: str):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(chromium, 20).until(lambda driver: driver.execute_script(script))


def test_a_feature_opens_from_a_file_and_its_sound_plays(chromium, viewer):
    opened(chromium, f"{viewer}#sae-wide-top1/5")
    assert chromium.find_element("css selector", "#feature h2").text == "Feature 5"
    found = chromium.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const sound = document.getElementById('sound');
        document.querySelectorAll('#feature .play')[1].click();
        sound.addEventListener('playing', () => setTimeout(() => done({
          time: sound.currentTime, length: sound.duration,
          text: document.querySelectorAll('#feature .where')[1].textContent}), 150), {once: true});
        sound.addEventListener('error', () => done({error: sound.error.message}));""")
    start, end = map(float, re.search(r"([\d.]+) to ([\d.]+) s", found["text"]).groups())
    assert start <= found["time"] <= end + 0.1
    assert found["length"] == pytest.approx(2, abs=0.1)
    pictures = "return [...document.querySelectorAll('#feature img')].map((i) => i.naturalWidth)"
    assert max(wait(chromium, pictures)) > 90
    assert not chromium.execute_script("return document.querySelectorAll('.failed').length")
    messages = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages
            if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
    folder = viewer.removesuffix("index.html")
    assert all(url.startswith((folder, "data:")) for url in urls), urls
    assert chromium.get_log("browser") == []


def test_features_are_found_by_concept_number_and_model(chromium, viewer):
    opened(chromium, viewer)
    listed = "return [...document.querySelectorAll('#list a')].map((a) => a.getAttribute('href'))"

    def search(text: str, dictionary: str) -> list[str]:
        chromium.execute_script(
            "const s = document.getElementById('search'); s.value = arguments[0];"
            "const d = document.getElementById('dictionary'); d.value = arguments[1];"
            "document.getElementById('count').textContent = '';"
            "d.dispatchEvent(new Event('change'))", text, dictionary,
        )  # fmt: skip
        wait(chromium, "return document.getElementById('count').textContent")
        return chromium.execute_script(listed)

    assert search("electric piano", "sae-tiny-top1") == [
        f"#sae-tiny-top1/{n}" for n in (4, 9, 14, 19)
    ]
    assert set(search("7", "")) == {"#sae-tiny-top1/7", "#sae-wide-top1/7", "#usae-top1/7"}
    assert search("wide 7", "") == ["#sae-wide-top1/7"]
    assert search("nothing like this", "") == []


def test_steps_links_and_hostile_names(chromium, viewer):
    opened(chromium, f"{viewer}#sae-tiny-top1/7")
    assert UNSAFE in chromium.find_element("css selector", "#feature table").text
    assert chromium.execute_script("return window.pwned") is None
    press(chromium, webdriver.Keys.ARROW_RIGHT)
    wait(chromium, "return document.querySelector('#feature h2').textContent === 'Feature 8'")
    chromium.find_element("id", "previous").click()
    wait(chromium, "return document.querySelector('#feature h2').textContent === 'Feature 7'")
    links = "return [...document.querySelectorAll('#feature a')].map((a) => a.getAttribute('href'))"
    found = chromium.execute_script(links)
    assert f"{pages.STUDIO}?model=tiny&feature=7" in found
    assert "#usae-top1/7" in found
    chromium.execute_script("location.hash = '#usae-top1/7'")
    wait(chromium, "return document.querySelectorAll('#feature .legend li').length === 2")
    chromium.execute_script("location.hash = '#usae-top1/999'")
    wait(
        chromium, "return document.querySelector('#feature').textContent.includes('fires in none')"
    )


@pytest.mark.parametrize("width", [390, 1440])
def test_no_part_of_a_feature_page_overflows(chromium, viewer, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(chromium, f"{viewer}#usae-top1/7")
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
