"""Live generation: what is streamed is what decoding gives, one client at a time, who may leave at any time."""

import json
import queue
import threading
import time
from dataclasses import replace

import pytest
from serving import CONTEXT, EOT, JSON, WAIT, serving

import tiny
from megacocomix.interpret import live
from megacocomix.interpret.decode import Sampling, Step, decode
from megacocomix.interpret.live import Limits, Task, generate
from megacocomix.interpret.steering import parse_edit


class Stepper:
    """Stands in for decode: each step waits for `step()`. Queues tell which prompts began and which were closed."""

    def __init__(self, student, monkeypatch):
        self.student = student
        self.begun, self.closed, self.allowed = queue.Queue(), queue.Queue(), threading.Semaphore(0)
        self.num_steps = 0
        monkeypatch.setattr(live, "decode", self.decode)

    def decode(self, student, prompts, sampling, edits, place, seeds):
        prompt = student.tokenizer.decode(prompts[0])
        self.begun.put(prompt)
        try:
            for _ in range(sampling.max_new_tokens):
                assert self.allowed.acquire(timeout=WAIT)
                self.num_steps += 1
                yield [Step(ord("x"), 0.0, [], False)] * len(prompts)
        finally:
            self.closed.put(prompt)

    def step(self, num_steps=1):
        self.allowed.release(num_steps)


@pytest.fixture
def stepper(student, monkeypatch):
    return Stepper(student, monkeypatch)


def of(events, stream, kind="token"):
    return [event for event in events if event["event"] == kind and event["stream"] == stream]


def text(events, stream="plain"):
    return "".join(event["text"] for event in of(events, stream))


def decoded(student, prompt, steer=(), **options):
    """Steps of the plain text, or of the steered one."""
    edits = [parse_edit(one, tiny.LATENTS) for one in steer]
    ids = list(prompt.encode())
    steps = decode(student, [ids], Sampling(**options), [edits])
    return [step for (step,) in steps]


def test_a_plain_text_is_what_decoding_gives(student, client):
    events = client.generate("Once <b>", max_new_tokens=12, seed=3, top_k=50)
    steps = decoded(student, "Once <b>", max_new_tokens=12, seed=3, top_k=50)
    assert events[0] == {"event": "start", "prompt": list("Once <b>"), "truncated": 0}
    assert text(events) == student.tokenizer.decode([step.token for step in steps])
    kept = [[[concept, pytest.approx(logit, rel=1e-3)] for concept, logit in step.kept] for step in steps]
    assert [event["kept"] for event in of(events, "plain")] == kept
    end = {"stream": "plain", "tokens": len(steps), "mean_kl": 0.0, "reason": "length", "selected": {}}
    assert events[-2:] == [{"event": "end"} | end, {"event": "done"}]
    assert {event.get("stream") for event in events} == {None, "plain"}


def test_a_steered_text_grows_beside_the_plain_one(student, client):
    concept = decoded(student, "Once", max_new_tokens=1, seed=3)[0].kept[0][0]
    other = (concept + 1) % tiny.LATENTS
    steer, options = [f"{concept}=set:40", f"{other}=max:-90"], {"max_new_tokens": 12, "seed": 3}
    events = client.generate("Once", steer=steer, **options)
    steps = decoded(student, "Once", steer, **options)
    assert text(events, "steered") == student.tokenizer.decode([step.token for step in steps])
    assert text(events, "plain") == text(client.generate("Once", **options)) != text(events, "steered")
    assert [e["kl"] for e in of(events, "steered")] == [pytest.approx(step.kl, rel=1e-3) for step in steps]
    assert not any(event["kl"] for event in of(events, "plain"))
    (end,) = of(events, "steered", "end")
    assert end["selected"] == {str(concept): 12, str(other): 0}
    assert end["mean_kl"] == pytest.approx(sum(step.kl for step in steps) / 12, rel=1e-3) != 0
    # Token by token: neither waits for the other to end.
    assert [e["stream"] for e in events if e["event"] == "token"] == ["plain", "steered"] * 12


def test_the_same_seed_gives_the_same_text(client):
    texts = [text(client.generate("Once", max_new_tokens=16, seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_that_ends_says_so(client, monkeypatch):
    steps = [[Step(ord("x"), 0.0, [], False)], [Step(EOT, 0.0, [], True)]]
    monkeypatch.setattr(live, "decode", lambda *_, **__: (step for step in steps))
    events = client.generate("Once", max_new_tokens=16)
    assert [event["text"] for event in of(events, "plain")] == ["x", ""]
    (end,) = of(events, "plain", "end")
    assert (end["tokens"], end["reason"]) == (2, "end of text")


def test_a_character_of_several_tokens_comes_whole(client, monkeypatch):
    tokens = [*"é".encode(), *"€".encode()[:2]]
    monkeypatch.setattr(live, "decode", lambda *_, **__: ([Step(token, 0.0, [], False)] for token in tokens))
    events = client.generate("ü", max_new_tokens=len(tokens))
    assert events[0]["prompt"] == ["", "ü"]
    assert [event["text"] for event in of(events, "plain")] == ["", "é", "", "\ufffd"]


def test_a_text_goes_on_where_its_prompt_ends(student, monkeypatch):
    """Some tokenizers write no space at the beginning of a text, but do inside it."""
    write = student.tokenizer.decode
    tokenizer = replace(student.tokenizer, decode=lambda ids: write(ids).removeprefix(" "))
    monkeypatch.setattr(live, "decode", lambda *_, **__: ([Step(token, 0.0, [], False)] for token in b" x"))
    task = Task("Once", Sampling(max_new_tokens=2), [], "before")
    student.__dict__["tokenizer"] = tokenizer
    assert text(list(generate(student, task))[1:]) == " x"


def test_html_in_a_prompt_comes_back_untouched(client):
    prompt = '</script><img src=x onerror="alert(1)">&amp;\u2028'
    events = client.generate(prompt, max_new_tokens=1)
    assert "".join(events[0]["prompt"]) == prompt


def test_a_prompt_longer_than_the_context_is_truncated_and_the_page_shows_it(client):
    prompt = "".join(chr(ord("a") + n % 26) for n in range(100))
    start, *_ = client.generate(prompt, max_new_tokens=8)
    assert (start["truncated"], "".join(start["prompt"])) == (100 - CONTEXT + 8, prompt[-CONTEXT + 8 :])


def test_an_empty_prompt_begins_a_document(client):
    events = client.generate("", max_new_tokens=2)
    assert events[0] == {"event": "start", "prompt": [""], "truncated": 0}
    assert events[-1] == {"event": "done"}


def test_two_clients_at_once_get_what_each_alone_gets(client):
    tasks = [{"prompt": "Once", "seed": 1, "max_new_tokens": 30}, {"prompt": "The", "seed": 2, "steer": ["7=set:30"]}]
    alone = [client.generate(**task) for task in tasks]
    streams = [client.stream(**task) for task in tasks]
    together = [[event for event in stream if event["event"] != "queued"] for stream in streams]
    assert together == alone


def test_who_waits_is_told_its_place_each_time_it_changes(client, stepper):
    streams = [client.stream(name, max_new_tokens=1) for name in "abc"]
    for name in "abc":
        assert stepper.begun.get(timeout=WAIT) == name
        stepper.step()
        assert stepper.closed.get(timeout=WAIT) == name
    places = [[event["ahead"] for event in stream if event["event"] == "queued"] for stream in streams]
    assert places == [[], [1], [2, 1]]


def test_a_client_that_leaves_while_it_waits_frees_its_place(client, stepper):
    first, second, third = (client.stream(name, max_new_tokens=1) for name in "abc")
    third = iter(third)
    assert next(third) == {"event": "queued", "ahead": 2}
    second.leave()
    assert next(third) == {"event": "queued", "ahead": 1}  # while the first still runs
    stepper.step(2)
    assert list(first)[-1] == list(third)[-1] == {"event": "done"}
    assert [stepper.begun.get(timeout=WAIT) for _ in range(2)] == ["a", "c"]
    assert stepper.begun.empty()


def test_a_client_that_leaves_while_it_generates_ends_the_decoding(client, stepper):
    first, second = client.stream("a", max_new_tokens=40), client.stream("b", max_new_tokens=1)
    stepper.step()
    events = iter(first)
    assert [next(events)["event"] for _ in range(2)] == ["start", "token"]
    first.leave()
    while stepper.closed.empty():  # the server learns of it some milliseconds later
        stepper.step()
        time.sleep(0.02)
    assert stepper.closed.get() == "a"
    assert stepper.num_steps < 30
    stepper.step()
    assert list(second)[-1] == {"event": "done"}


def test_a_full_line_takes_nobody(student, stepper):
    with serving(student, limits=Limits(max_waiting=2)) as client:
        streams = [client.stream(name, max_new_tokens=1) for name in "abc"]
        response, answer = client.ask("POST", "/api/generate", b'{"prompt": "d"}', **JSON)
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        assert json.loads(answer) == {"error": "2 generations are waiting already: try again later."}
        stepper.step(3)
        assert [list(stream)[-1] for stream in streams] == [{"event": "done"}] * 3
        stepper.step()
        assert client.generate("d", max_new_tokens=1)[-1] == {"event": "done"}


def test_an_error_of_decoding_is_said_and_logged_and_the_server_goes_on(client, monkeypatch, caplog):
    def broken(*_, **__):
        yield [Step(ord("x"), 0.0, [], False)]
        raise RuntimeError("out of memory\nin a long message")

    with monkeypatch.context() as patched:
        patched.setattr(live, "decode", broken)
        events = client.generate("a secret", max_new_tokens=4)
    message = "the generation failed: RuntimeError: out of memory"
    assert events[-1] == {"event": "error", "message": message}
    assert [event["event"] for event in events] == ["start", "token", "error"]
    assert "Traceback" in caplog.text
    assert "secret" not in caplog.text
    assert client.generate("Once", max_new_tokens=1)[-1] == {"event": "done"}


def test_numbers_that_json_has_no_word_for_end_the_stream(client, monkeypatch):
    monkeypatch.setattr(live, "decode", lambda *_, **__: ([Step(ord("x"), float("nan"), [], False)] for _ in range(1)))
    assert client.generate("a", max_new_tokens=1)[-1]["event"] == "error"


def test_a_stopped_server_tells_who_runs_and_who_waits(student, stepper):
    with serving(student) as client:
        streams = [iter(client.stream(name, max_new_tokens=40)) for name in "ab"]
        assert [next(stream)["event"] for stream in streams] == ["start", "queued"]
        client.stop()
        last = [list(stream)[-1] for stream in streams]
        stepper.step()  # the one that is being computed
    assert last == [{"event": "error", "message": "the server is stopping."}] * 2
    assert stepper.closed.get(timeout=WAIT) == "a"
    assert stepper.num_steps == 1
