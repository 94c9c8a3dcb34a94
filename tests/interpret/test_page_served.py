"""Browser, server and model together: what a reader sees is what the model did."""

import numpy as np
import pytest
from PIL import Image
from serving import serving

from megacocomix.interpret.decode import Sampling, decode
from megacocomix.interpret.inspection import inspect
from megacocomix.interpret.page import render
from megacocomix.interpret.reading import read_windows, text_windows
from megacocomix.interpret.steering import parse_edit
from megacocomix.interpret.token_text import TextStream

pytestmark = pytest.mark.slow
PROMPT = "Once <b>upon</b>"


@pytest.fixture(scope="module")
def made(student, tmp_path_factory):
    """The record of a text that the student has read."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Lily had a red ball. She ran home with <it>.\n")
    return inspect(student, read_windows(student, text_windows(student, [str(file)], 4096)), {}, 4096)


def text_of(student, steps, place):
    """What a text of one stream reads as."""
    stream = TextStream(student.tokenizer, student.tokenizer.encode_batch([PROMPT])[0])
    texts = [stream.push(step[place].token) for step in steps if step[place] and not step[place].is_end]
    return "".join(texts) + stream.flush()


def test_a_steering_round_trip_shows_what_the_model_writes(open_page, student, made, tmp_path):
    concept = made["concepts"][0]["id"]
    live = {"context": student.context, "max_new_tokens": 16, "num_concepts": student.model.config.num_concepts}
    with serving(student, page=render(made, live)) as client:
        page = open_page(url=f"http://127.0.0.1:{client.port}/")
        page.get_by_test_id("search").fill(str(concept))
        page.get_by_test_id("concept-list").get_by_role("button", name=f"Steer {concept}").first.click()
        page.get_by_test_id("steer-slider").fill("8")
        page.get_by_test_id("prompt").fill(PROMPT)
        for label, value in (("new tokens", "8"), ("temperature", "1"), ("top-p", "1"), ("seed", "5")):
            page.get_by_label(label, exact=True).fill(value)
        page.get_by_test_id("generate").click()
        page.get_by_test_id("status").get_by_text("Done.").wait_for()
        shown = [page.get_by_test_id(name).locator(".tokens").text_content() for name in ("plain", "steered")]
        effect = page.get_by_test_id("effect").inner_text()
        page.screenshot(path=tmp_path / "page.png")
        assert {address.split("/")[2] for address in page.asked} == {f"127.0.0.1:{client.port}"}
    ids = student.tokenizer.encode_batch([PROMPT])[0]
    edits = [[], [parse_edit(f"{concept}=8", student.model.config.num_concepts)]]
    steps = list(decode(student, [ids, ids], Sampling(max_new_tokens=8, seed=5), edits, seeds=[5, 5]))
    assert shown == [PROMPT + text_of(student, steps, place) for place in (0, 1)]
    assert shown[0] != shown[1]
    kept = sum(any(kept == concept for kept, _ in step[1].kept) for step in steps)
    assert f"was selected at {kept} of 8 steps" in effect
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 50 and counts.max() < 0.95 * len(pixels)  # not blank
