import json
import re
from io import BytesIO

import numpy as np
import pytest
from fake_readings import (
    BALL,
    IMAGE,
    LILY,
    NARROW,
    RUN,
    SCRIPT,
    SELDOM,
    STORY,
    TOKENS,
    choose,
    coloured,
    concept,
    generate,
    record,
    status_becomes,
    text_tokens,
    where,
)
from PIL import Image

from megacocomix.interpret.page import MOST_CONCEPTS, render

pytestmark = pytest.mark.slow


def embedded(html: str) -> dict:
    return json.loads(re.search(r'id="record">(.*?)</script>', html, re.S)[1])


def test_the_page_shows_the_text_and_is_not_blank(open_page):
    page = open_page()
    assert page.get_by_test_id("text").locator(".tokens").nth(0).text_content() == "".join(STORY)
    pixels = np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 100
    assert counts.max() < 0.95 * counts.sum(), "nearly all of the page is its background"


def test_a_newline_token_breaks_the_line_and_is_faintly_seen(open_page):
    page = open_page()
    before, newline, after = (text_tokens(page).nth(index) for index in (5, 6, 7))
    assert after.bounding_box()["y"] > before.bounding_box()["y"]
    mark = newline.locator(".newline").evaluate("element => getComputedStyle(element, '::before').content")
    assert mark == '"⏎"'


def test_a_file_asks_the_network_for_nothing(open_page):
    page = open_page()
    text_tokens(page).nth(0).click()
    assert page.asked == [page.url]
    assert page.url.startswith("file:")


def test_hostile_text_is_shown_as_text_and_runs_nothing(open_page):
    page = open_page()
    for text in [IMAGE[:8], "lily", "seldom"]:
        choose(page, text)
        page.get_by_test_id("search").fill("")
    texts = text_tokens(page).evaluate_all("all => all.map((token) => token.textContent)")
    assert texts == [token for tokens in TOKENS for token in tokens]
    assert SCRIPT in page.get_by_test_id("card").text_content()
    assert page.locator("h1").text_content().find(IMAGE) > 0
    assert page.evaluate("[window.pwned, document.images.length, document.scripts.length]") == [None, 0, 3]


def test_markup_that_got_into_the_page_would_not_run(open_page):
    page = open_page()
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.pwned = 1";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<b onclick='window.pwned = 2'></b>");
          document.body.lastChild.click();
        }"""
    )
    assert page.evaluate("window.pwned") is None
    assert len(page.complaints) == 2 and all("Content Security Policy" in line for line in page.complaints)
    page.complaints.clear()


def test_search_and_keyboard_choose_a_concept_and_colour_exactly_its_tokens(open_page):
    page = open_page()
    choose(page, "GIRL")
    assert page.get_by_test_id("card").get_by_role("heading").first.text_content() == f"{LILY} ‘the girl’"
    assert coloured(page) == where(lambda token: token in (" Lily", " She"))
    strongest, weakest = (text_tokens(page).nth(index).get_attribute("data-heat") for index in (0, len(TOKENS[0]) + 11))
    assert int(strongest) > int(weakest)

    page.get_by_label("teacher’s labels").check(force=True)
    assert coloured(page) == where(lambda token: token == " Lily")
    page.get_by_label("teacher’s activation").check(force=True)
    assert coloured(page) == where(lambda token: token == " Lily")
    page.get_by_label("student").check(force=True)
    page.get_by_test_id("search").fill(str(RUN))
    page.keyboard.press("Enter")
    assert coloured(page) == []


def test_a_concept_that_is_in_no_list_can_be_chosen_by_its_id(open_page):
    page = open_page()
    choose(page, "63")
    assert "neither kept nor a label" in page.get_by_test_id("card").text_content()
    assert coloured(page) == []
    page.get_by_test_id("search").fill("64")
    assert page.get_by_test_id("concept-list").locator("li").count() == 0


def test_the_hover_card_lists_what_the_record_says_of_the_token(open_page):
    page = open_page()
    text_tokens(page).nth(0).hover()
    hover = page.get_by_test_id("hover")
    hover.wait_for()
    rows = hover.locator("li").evaluate_all("all => all.map((row) => row.innerText.split('\\n').join(' '))")
    assert rows == [
        f"{LILY} ‘the girl’ 9 ✓ label ● active",
        f"{BALL} {IMAGE} 4.5 ● active",
        f"{SELDOM} ‘seldom’ 1.25",
        f"{LILY} ‘the girl’ ✓ kept, no. 1",
        f"{RUN} ‘running’ not kept",
        f"{LILY} ‘the girl’ 3.5 ✓ kept, no. 1",
        f"{BALL} {IMAGE} 2.5 ✓ kept, no. 2",
    ]
    hover.locator(f"[data-concept='{SELDOM}']").click()
    assert page.get_by_test_id("card").get_by_role("heading").first.text_content() == f"{SELDOM} ‘seldom’"
    page.keyboard.press("Escape")
    assert hover.is_hidden()


def test_tokens_are_one_tab_stop_and_arrow_keys_walk_them(open_page):
    page = open_page()
    assert page.get_by_test_id("text").locator("[tabindex='0']").count() == 1
    text_tokens(page).nth(0).focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    hover = page.get_by_test_id("hover")
    assert "window 1, token 3" in hover.text_content()
    assert "No concept slot" in hover.text_content()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")  # into the card, and Esc comes back
    assert page.evaluate("document.activeElement.dataset.concept") == str(BALL)
    page.keyboard.press("Escape")
    assert hover.is_hidden()
    assert page.evaluate("document.activeElement.textContent") == " had"
    assert page.get_by_test_id("text").locator("[tabindex='0']").count() == 1


def test_the_card_shows_numbers_histogram_and_contexts_that_lead_to_the_text(open_page):
    page = open_page()
    choose(page, "girl")
    card = page.get_by_test_id("card")
    facts = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents(), strict=True))
    assert facts["precision @1 · @4"] == "50 % · 75 %"
    assert facts["column norm"] == "0.39"
    bars = card.get_by_test_id("histogram").locator("rect")
    heights = [float(bar.get_attribute("height")) for bar in bars.all()]
    assert len(heights) == 20 and heights == sorted(heights) and heights[0] == 0
    assert card.locator("mark").all_text_contents() == [" Lily"] * 3
    card.locator(".contexts button").nth(1).click()
    assert page.evaluate("document.activeElement.textContent") == " Lily"
    assert page.evaluate("document.activeElement.closest('.window').id") == "window-1"


def test_a_record_without_a_teacher_speaks_of_none(open_page):
    made = record(teacher=None)
    for window in made["windows"]:
        window |= {"labels": None, "active": None}
    teacher_only = ["labelled", "active", "precision_1", "recall_1", "precision_4", "recall_4"]
    made["concepts"] = [entry | dict.fromkeys(teacher_only) for entry in made["concepts"]]
    made["totals"] |= dict.fromkeys(["labelled", "never_labelled", "teacher_dead", "hit_1", "hit_4", "recall_4"])
    page = open_page(made)
    text_tokens(page).nth(0).hover()
    page.get_by_test_id("hover").wait_for()
    assert not re.search("teacher|label|hit@", page.locator("body").inner_text(), re.I)


def test_of_many_concepts_the_page_keeps_those_of_the_windows_and_says_what_it_left(open_page):
    many = [concept(100 + index, f"‘{index}’", 5000 - index) for index in range(2 * MOST_CONCEPTS)]
    made = record(num_concepts=5000)
    made["concepts"] = [*many, *made["concepts"]]
    kept = embedded(render(made))
    ids = [entry["id"] for entry in kept["concepts"]]
    assert len(ids) == MOST_CONCEPTS
    assert {LILY, BALL, RUN, SELDOM} <= set(ids)
    assert ids[0] == 100 and ids[-5] == 100 + MOST_CONCEPTS - 5
    page = open_page(made)
    assert page.get_by_text("2,000 of 4,004 concepts; all are in the JSON that --out writes.").is_visible()
    assert page.get_by_test_id("concept-list").locator("li").count() == 100
    page.get_by_text("Show 100 more").click()
    assert page.get_by_test_id("concept-list").locator("li").count() == 200


def test_concepts_of_the_windows_that_had_no_room_keep_their_names():
    windows = record()["windows"]
    windows[0]["kept"][0] = [[100 + index, 1.0] for index in range(MOST_CONCEPTS + 2)]
    many = [concept(100 + index, f"‘{index}’", 5000 - index) for index in range(MOST_CONCEPTS + 2)]
    kept = embedded(render(record(windows=windows, concepts=many)))
    assert len(kept["concepts"]) == MOST_CONCEPTS
    assert kept["names"] == {str(100 + index): f"‘{index}’" for index in (MOST_CONCEPTS, MOST_CONCEPTS + 1)}


def test_the_record_comes_back_whole_from_the_page_and_no_number_is_nan():
    assert embedded(render(record()))["windows"] == record()["windows"]
    halves = record(model="\ud83e")  # half a fox is no UTF-8, and a file must be written
    assert embedded(render(halves).encode().decode())["model"] == "\ud83e"
    with pytest.raises(ValueError, match="JSON compliant"):
        render(record(step=float("nan")))


def test_a_file_offers_no_steering(open_page):
    page = open_page()
    assert page.get_by_test_id("generate").is_hidden()
    assert page.get_by_role("button", name="Steer").count() == 0
    assert "connect-src 'none'" in page.locator("meta[http-equiv]").get_attribute("content")


CONTRAST = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((value, index) => value * a + under[index] * (1 - a));
  const light = (rgb) => rgb.map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const style = getComputedStyle(element);
    const colours = style.backgroundImage.match(/rgba?\\([^)]*\\)/g) ?? [];
    // A token's colour is the second gradient, the first is the line under it.
    const own = element.matches(".token") && colours.length ? colours.at(-1) : style.backgroundColor;
    return over(parse(own), ground(element.parentElement));
  };
  const found = {};
  const tags = "p, dt, dd, h1, h2, h3, button:enabled, summary, .muted, .note, .id, .name, .value, .marks, .token";
  for (const element of document.querySelectorAll(tags)) {
    if (!element.checkVisibility() || !element.textContent.trim()) continue;
    const under = ground(element);
    const [a, b] = [light(over(parse(getComputedStyle(element).color), under)), light(under)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = element.tagName + "." + element.className;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_text_has_contrast(open_page, server, scheme):
    backgrounds = set()
    for url in [None, server.url]:
        page = open_page(url=url, viewport=NARROW, color_scheme=scheme)
        choose(page, "girl")
        if url:
            page.get_by_test_id("add-steer").click()
            generate(page)
            status_becomes(page, "Done.")
        page.locator("summary").click()
        text_tokens(page).nth(0).click()
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        texts = page.locator(".tokens").evaluate_all("all => all.map((text) => text.scrollWidth - text.clientWidth)")
        assert max(texts) <= 0, "a window's text is cut off at its right"
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 15
        assert min(ratios.values()) >= 4.5, {name: ratio for name, ratio in ratios.items() if ratio < 4.5}
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    (background,) = backgrounds
    assert (int(re.search(r"\d+", background)[0]) > 128) == (scheme == "light")


def test_a_model_that_mixes_no_concepts_in_has_a_page_too(open_page):
    totals = record()["totals"] | {"small_columns": None}
    bare = [entry | {"column_norm": None, "promotes": [], "suppresses": []} for entry in record()["concepts"]]
    page = open_page(record(totals=totals, concepts=bare))
    assert text_tokens(page).count() == sum(map(len, TOKENS))
    assert "small columns" not in page.locator("#totals").inner_text()
    choose(page, "girl")
    assert page.get_by_test_id("card").get_by_text("‘the girl’").first.is_visible()
