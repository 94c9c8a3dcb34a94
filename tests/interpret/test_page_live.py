import pytest
from fake_readings import (
    BALL,
    LILY,
    SCRIPT,
    choose,
    generate,
    status_becomes,
)

pytestmark = pytest.mark.slow


def test_steering_goes_from_the_concept_to_both_texts_and_back(open_page, server):
    page = open_page(url=server.url)
    choose(page, "girl")
    page.get_by_test_id("add-steer").click()
    slider = page.get_by_test_id("steer-slider")
    assert slider.evaluate("element => element === document.activeElement")
    while slider.input_value() != "8":
        page.keyboard.press("ArrowRight")
    page.get_by_test_id("search").fill("img")
    page.get_by_test_id("concept-list").get_by_role("button", name=f"Steer {BALL}").click()
    boxes = page.locator("#steers input[type=number]")
    boxes.nth(1).fill("-2.5")
    assert page.get_by_test_id("steer-slider").nth(1).input_value() == "-2.5"
    generate(page, "Once 🦊", seed="3")
    status_becomes(page, "Done.")

    path, headers, body = server.requests.pop()
    assert path == "/api/generate"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "prompt": "Once 🦊",
        "max_new_tokens": 64,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 3,
        "steer": [f"{LILY}=8", f"{BALL}=-2.5"],
        "place": "before",
    }
    plain, steered = page.get_by_test_id("plain"), page.get_by_test_id("steered")
    assert plain.locator(".tokens").text_content() == f"Once 🦊 Lily 🦊\n{SCRIPT}"
    assert steered.locator(".tokens").text_content() == f"Once 🦊 Lily girl\n{SCRIPT}"
    assert plain.locator("[data-heat]").all_text_contents() == [" Lily"]
    assert page.get_by_text("12 tokens of the prompt were dropped: the context is 256.").is_visible()
    effect = page.get_by_test_id("effect").inner_text()
    assert "The texts differ from new token 2 on. Mean KL of steered from plain: 0.25 nats a token." in effect
    assert f"{LILY} ‘the girl’ was selected at 3 of 4 steps." in effect
    steered.get_by_test_id("token").nth(0).hover()
    page.get_by_test_id("hover").get_by_text("new token 1 · KL 0.25 nats").wait_for()
    assert page.evaluate("window.pwned") is None

    for concept in (LILY, BALL):
        page.get_by_label(f"Do not steer {concept}").click()
    generate(page)
    status_becomes(page, "Done.")
    path, headers, body = server.requests.pop()
    assert headers["Authorization"] == "Bearer secret"
    assert "steer" not in body and "place" not in body
    assert page.get_by_test_id("steered").is_hidden()


def test_steering_that_changes_nothing_is_said_in_words(open_page, server):
    page = open_page(url=server.url)
    choose(page, "girl")
    page.get_by_test_id("add-steer").click()
    page.get_by_test_id("steer-slider").fill("1")
    page.locator("#place").select_option("after")
    generate(page)
    status_becomes(page, "Done.")
    effect = page.get_by_test_id("effect").inner_text()
    assert "The steering had no effect." in effect
    assert f"{LILY} ‘the girl’ was selected at 0 of 4 steps" in effect
    page.get_by_label(f"Do not steer {LILY}").click()
    assert page.get_by_text("No concept is steered.").is_visible()


def test_waiting_is_said_and_stop_leaves_the_server(open_page, server):
    page = open_page(url=server.url)
    generate(page, "waits")
    status_becomes(page, "2 requests are before yours.")
    assert page.get_by_test_id("generate").is_disabled()
    page.get_by_test_id("stop").click()
    status_becomes(page, "Stopped.")
    assert server.left.wait(5), "the server still writes to a client that stopped"
    generate(page)
    status_becomes(page, "Done.")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("too long", "The request has 70000 bytes; at most 65536 are read."),
        ("fails", "concept <b>99</b> does not exist"),
        ("breaks off", "The answer was truncated."),
    ],
)
def test_what_goes_wrong_is_shown_as_text(open_page, server, prompt, says):
    page = open_page(url=server.url)
    generate(page, prompt)
    status_becomes(page, says)
    assert page.get_by_test_id("status").text_content() == says
    assert page.get_by_test_id("status").get_attribute("role") == "status"
    assert page.get_by_test_id("stop").is_disabled()
    page.complaints.clear()  # the browser itself writes down a 413


def test_numbers_that_the_server_would_refuse_are_not_sent(open_page, server):
    page = open_page(url=server.url)
    generate(page, **{"new tokens": "129"})
    assert page.locator("#max-new-tokens").evaluate("element => element.validity.rangeOverflow")
    assert server.requests == []
