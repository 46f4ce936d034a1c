"""The page of `serve` in headless Chromium, from the question to the answer; skipped where there is no Chromium."""

import os
from pathlib import Path

import pytest
from chromium import Tab, browser, needs_chromium
from serving import MODEL, TEXT, Serving, serving, wait_until

from dpost_lite.server.gate import Access

pytestmark = needs_chromium
DONE = "document.querySelector('#status').textContent.includes('answer') && !document.querySelector('#solve').disabled"


@pytest.fixture(scope="module")
def served():
    with serving(max_outstanding=16) as served:
        yield served


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def page(tab: Tab, served: Serving) -> Tab:
    tab.events.clear()
    tab.look(width=1280)
    tab.open(served.url)
    tab.wait(f"document.querySelector('#model').textContent === '{MODEL}'")
    served.solver.asked.clear()
    return tab


def texts(page: Tab, selector: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll('{selector}')].map((element) => element.textContent)")


def save(page: Tab, name: str) -> None:
    """Keep a picture in $DPOST_PICTURES, for a look."""
    if folder := os.environ.get("DPOST_PICTURES"):
        page.picture(Path(folder) / f"{name}.png")


def test_a_question_is_asked_and_answered_by_keyboard(page, served):
    page.write("Pablo ran 7 miles")  # the field has the focus
    page.press("Enter", shift=True)
    page.write("a day for four days. How many?")
    page.press("Enter")
    page.wait(DONE)
    assert [message.content for message in served.solver.asked[0].messages] == [
        "Pablo ran 7 miles\na day for four days. How many?"
    ]
    assert texts(page, ".answer") == ["28"]
    assert texts(page, ".text") == [TEXT]
    assert texts(page, "mark") == ["28>>28"]
    assert texts(page, "#status") == ["The answer is 28."]
    sizes = page.js("['.answer', '.text'].map((s) => parseFloat(getComputedStyle(document.querySelector(s)).fontSize))")
    assert sizes[0] >= 2 * sizes[1]
    assert page.complaints() == []
    assert page.addresses() == {f"{served.url}{path}" for path in ("/", "/v1/models", "/v1/chat/completions")}


def test_samples_are_counted(page, served):
    page.js("document.querySelector('#samples').value = '5'")
    page.write("seed")
    page.press("Enter")
    page.wait(DONE)
    assert len({request.seed for request in served.solver.asked}) == 5
    votes = [request.seed % 3 for request in served.solver.asked]
    shown = page.js("[...document.querySelectorAll('.votes li')].map((e) => [...e.children].map((c) => c.textContent))")
    assert {int(answer): int(count.split(" of ")[0]) for answer, _, count in shown} == {
        v: votes.count(v) for v in votes
    }
    assert all(count.endswith(" of 5") for *_, count in shown)
    counts = [int(count.split(" ")[0]) for *_, count in shown]
    assert counts == sorted(counts, reverse=True)
    assert texts(page, ".answer") == [shown[0][0]]
    assert len(texts(page, "details")) == 5
    save(page, "samples")


def test_with_and_without_the_calculator_side_by_side(page, served):
    page.js("document.querySelector('input[value=both]').click()")
    page.js("document.querySelector('#question').focus()")
    page.write("How many?")
    page.press("Enter")
    page.wait(DONE)
    assert sorted(request.uses_tools for request in served.solver.asked) == [False, True]
    assert texts(page, "article h2") == ["Calculator on", "Calculator off"]
    assert texts(page, "#status") == ["The answer with calculator on is 28. The answer with calculator off is 28."]
    left, right = page.js("[...document.querySelectorAll('article')].map((e) => e.getBoundingClientRect().left)")
    assert left < right


def test_text_of_the_model_is_shown_as_text(page):
    page.write("<img src=x onerror=\"document.title = 'run'\"> html")
    page.press("Enter")
    page.wait(DONE)
    assert "<b id=bold>7</b><script>" in texts(page, ".text")[0]
    assert texts(page, ".question")[0].startswith("<img src=x")
    assert page.js("document.querySelectorAll('#bold, #result img, #result script').length") == 0
    assert page.js("document.title") == "dpost-lite"
    assert page.js("document.querySelectorAll('#history img').length") == 0


def test_an_answer_that_is_cut_off_does_not_count(page):
    page.write("cut")
    page.press("Enter")
    page.wait("document.querySelector('.note:not(#keys)')?.textContent.startsWith('cut off')")
    page.wait("document.querySelector('#status').textContent === 'No answer.'")
    assert texts(page, ".answer") == ["no answer stated"]


def test_an_answer_is_stopped(page, served):
    page.write("endless")
    page.press("Enter")
    page.wait("document.querySelector('.text')?.textContent.includes('on and on')")
    page.press("Escape")
    page.wait("document.querySelector('#status').textContent === 'Stopped.'")
    wait_until(lambda: not served.solver.running)
    assert page.js("!document.querySelector('#solve').disabled && document.querySelector('#stop').disabled")


def test_errors_are_shown(page):
    page.write("long")
    page.press("Enter")
    page.wait("document.querySelector('#status.error')?.textContent.includes('9000 tokens')")
    assert page.js("!document.querySelector('#solve').disabled")


def test_history_stays_in_the_page(page, served):
    for question in ("seed", "How many?"):
        page.js("document.querySelector('#question').value = ''")
        page.js("document.querySelector('#question').focus()")
        page.write(question)
        page.press("Enter")
        page.wait(f"document.querySelector('.question')?.textContent === '{question}' && {DONE}")
    assert texts(page, "#history button") == ["How many?", "seed"]
    page.js("document.querySelectorAll('#history button')[1].focus()")
    page.press("Enter")
    assert texts(page, ".question") == ["seed"]
    assert page.js("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.open(served.url)
    assert texts(page, "#history button") == []


def test_a_solution_is_copied(page, served):
    page.call(
        "Browser.grantPermissions", origin=served.url, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.write("How many?")
    page.press("Enter")
    page.wait(DONE)
    page.js("document.querySelector('article button').click()")
    page.wait("document.querySelector('article button').textContent === 'Copied'")
    assert page.js("navigator.clipboard.readText()") == TEXT


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_it_fits_and_can_be_read(page, width, dark):
    page.look(width=width, dark=dark)
    page.js("document.querySelector('input[value=both]').click(); document.querySelector('#samples').value = '3'")
    page.js("document.querySelector('#question').focus()")
    page.write("Pablo ran 7 miles a day for four days. What is the number of miles Pablo ran? " + "x" * 80)
    page.press("Enter")
    page.wait(DONE)
    save(page, f"{width}-{'dark' if dark else 'light'}")
    assert page.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    for selector in ("body", ".note", "mark", ".answer", "#solve", "#status", "summary"):
        assert page.js(CONTRAST % selector) >= 4.5, selector
    is_dark = page.js("luminance(getComputedStyle(document.body).backgroundColor) < 0.5")
    assert is_dark == dark


CONTRAST = """(() => {
  globalThis.luminance = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
    const [r, g, b] = parts.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(%r);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const [dim, bright] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
    .map(luminance).sort((a, b) => a - b);
  return (bright + 0.05) / (dim + 0.05);
})()"""


def test_a_screen_reader_gets_names_and_news(page):
    page.write("How many?")
    page.press("Enter")
    page.wait(DONE)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}
    assert {
        ("textbox", "Word problem"), ("group", "Calculator"), ("radio", "on"), ("radio", "side by side"),
        ("combobox", "Samples"), ("button", "Solve"), ("button", "Stop"), ("region", "Result"),
        ("navigation", "History"), ("button", "Copy"), ("heading", "Calculator on"),
    } <= named  # fmt: skip
    assert any(role == "status" for role, _ in named)


def test_a_key_is_asked_for_if_one_is_needed(tab):
    with serving(access=Access("sesame")) as served:
        tab.open(served.url)
        tab.wait("!document.querySelector('#key-row').hidden")
        tab.js("document.querySelector('#key').focus()")
        tab.write("sesame")
        tab.js("document.querySelector('#question').focus()")
        tab.write("How many?")
        tab.press("Enter")
        tab.wait(DONE)
        assert texts(tab, ".answer") == ["28"]


def test_code_is_named_as_such(tab):
    with serving(tools="code") as served:
        tab.open(served.url)
        tab.wait("document.querySelector('#tools-name').textContent === 'Code'")
