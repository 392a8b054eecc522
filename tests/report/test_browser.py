"""The report in a real browser without a window: as wide as a phone or a desk, light and dark.

pip install -e ".[test,browser]"; playwright install chromium     # or a chromium of the system
"""

import os
import shutil

import made_runs
import pytest

from cpnas_jax.report import page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright; pip install -e '.[browser]'"
)

SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def browser():
    system = os.environ.get("CPNAS_TEST_BROWSER") or next(
        filter(None, map(shutil.which, SYSTEM)), None
    )
    with playwright.sync_playwright() as running:
        try:
            # A container's user, root, has no sandbox.
            found = running.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            reason = str(error).splitlines()[0]
            pytest.skip(f"no chromium starts ({reason}); playwright install chromium")
        yield found
        found.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Pages of a whole run, and of one with a name and classes as bad as can be."""
    base = tmp_path_factory.mktemp("runs")
    names = {
        "whole": tuple("0123456789"),
        "x" * 80 + "<b>": ("<i>" + "long" * 20, "b & c", "d" * 40),
    }
    for name, classes in names.items():
        page.write_report(made_runs.whole_run(base / name, class_names=classes))
    return [base / name / "report.html" for name in names]


def opened(browser, width, scheme, **options):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, **options
    )
    seen = {"console": [], "requests": []}
    tab = context.new_page()
    tab.on("console", lambda message: seen["console"].append(message.text))
    tab.on("pageerror", lambda error: seen["console"].append(str(error)))
    tab.on("request", lambda request: seen["requests"].append(request.url))
    return tab, seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_renders_offline_and_fits(browser, reports, width, scheme):
    for file in reports:
        tab, seen = opened(browser, width, scheme)
        tab.goto(file.as_uri())
        # Closed parts are looked at too.
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("document.documentElement.scrollHeight") > 3000
        assert tab.locator("figure svg").count() == 4
        broken = "i => !(i.complete && i.naturalWidth > 0)"
        assert tab.evaluate(f"[...document.images].filter({broken}).length") == 0
        assert seen["console"] == []
        others = [url for url in seen["requests"] if not url.startswith("data:")]
        assert others == [file.as_uri()]
        tab.context.close()


CONTRAST = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = numbers(colour).map(c => (c /= 255) <= .03928 ? c / 12.92
      : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const of = (selector, property) => [...document.querySelectorAll(selector)].map(element => {
    const own = light(getComputedStyle(element)[property]);
    return (Math.max(own, paper) + .05) / (Math.min(own, paper) + .05);
  });
  return Math.min(...of('p, h1, h2, h3, nav a, figcaption, main > section > p', 'color'),
    ...of('figure svg text', 'fill').map(ratio => ratio * 1.5));
}"""
"""Least contrast of texts with the page (WCAG); labels in drawings may have 3, their colours are
those of the lines."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_told_from_the_page(browser, reports, scheme):
    tab, _ = opened(browser, 1280, scheme)
    tab.goto(reports[0].as_uri())
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert tab.evaluate(CONTRAST) >= 4.5
    tab.context.close()


def test_it_is_read_without_a_mouse_and_without_scripts(browser, reports):
    # Links go at once to where they point.
    still = {"java_script_enabled": False, "reduced_motion": "reduce"}
    tab, _ = opened(browser, 360, "light", **still)
    tab.goto(reports[0].as_uri())
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#main")
    for anchor in ("search", "film", "answers", "commands"):
        link = tab.locator(f"nav a[href='#{anchor}']")
        link.focus()
        tab.keyboard.press("Enter")
        assert tab.url.endswith(f"#{anchor}")
        # Not under the bar that stays at the top.
        top = tab.locator(f"#{anchor}").bounding_box()["y"]
        assert 0 <= top < 800
    summary = tab.locator("summary").last
    summary.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("details").last.get_attribute("open") is not None
    tab.context.close()
