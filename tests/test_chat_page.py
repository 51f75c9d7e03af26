"""The chat page of `serve`, used in Chromium against the running server."""

import contextlib
import http.client
import re
import time

import pytest
from browser_helpers import DESKTOP, LOOK, PHONE, Visitor
from serving_helpers import (
    MODEL,
    NAME,
    TOKENIZER,
    Scripted,
    end_servers,
    endless,
    idle,
    serving,
    spell,
)

from qwen_analog.engine import AsyncEngine
from qwen_analog.server import OPEN, PAGE
from qwen_analog.chat_template import chat_ids

NARROW = {**PHONE, "width": 375}
MARKUP = "<img src=x onerror=alert(1)> & «жук» 漢字 <b>bold</b>"
QUESTION = [{"role": "user", "content": "Hello"}]


class Slow(Scripted):
    """Takes its time for each token."""

    def forward(self, input_ids, **rest):
        time.sleep(0.02)
        return super().forward(input_ids, **rest)


def answering(text, kind=Scripted):
    """An engine whose model answers the question with `text`."""
    script = spell(text, len(chat_ids(TOKENIZER, QUESTION)))
    return AsyncEngine(kind(script), TOKENIZER, max_batch=2, max_context=1024)


@pytest.fixture
def visit(browser):
    """Return a function that opens the page of a server; faults of it fail the test."""
    with contextlib.ExitStack() as stack:
        visitors = []

        def open_page(engine, size=DESKTOP, **options):
            port = stack.enter_context(serving(engine, **options))
            visitor = Visitor(browser, f"http://127.0.0.1:{port}/")
            visitor.open("", size)
            visitors.append(visitor)
            return visitor

        yield open_page
        for visitor in visitors:
            visitor.page.close()
            assert visitor.noted == []


def send(page, text="Hello"):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def answer(page, number=-1):
    """The text of an answer, once it is complete."""
    page.wait_for_selector(".assistant")
    page.wait_for_selector(".writing", state="detached")
    return page.locator(".assistant .text").nth(number).text_content()


def test_an_answer_is_text_and_nothing_else(visit):
    page = visit(answering(MARKUP)).page
    send(page)
    assert answer(page) == MARKUP
    assert page.title() == f"{NAME} – chat"
    assert page.locator("#chat img, #chat b").count() == 0
    assert page.locator(".user .text").text_content() == "Hello"
    notes = page.locator(".notes").text_content()
    # the end token is one that was written, too
    count = len(TOKENIZER.encode(MARKUP)) + 1
    assert re.fullmatch(
        rf"{count} tokens · [\d.]+ tokens/s · first after [\d.]+ s", notes
    )
    assert page.evaluate("document.activeElement.id") == "text"


@pytest.fixture
def slowly():
    """The model takes its time, so that an answer is short when it is stopped."""
    hook = MODEL.register_forward_pre_hook(lambda *given: time.sleep(0.01))
    yield
    hook.remove()


def test_an_answer_is_seen_while_it_is_written_and_can_be_stopped(visit, slowly):
    engine = endless(max_batch=1, max_context=3000)
    page = visit(engine).page
    send(page)
    page.locator(".token").nth(5).wait_for(state="attached")
    assert page.locator("#send").is_hidden() and page.locator("#stop").is_visible()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".writing", state="detached")
    assert "stopped" in page.locator(".notes").text_content()
    assert 5 < page.locator(".token").count() < 2900
    idle(engine)  # the row is free: nothing is written for nobody
    send(page, "again")
    page.locator(".assistant").nth(1).locator(".token").nth(5).wait_for(
        state="attached"
    )
    page.keyboard.press("Escape")
    page.wait_for_selector(".writing", state="detached")
    idle(engine)


def test_the_focus_is_never_lost(visit, slowly):
    page = visit(endless(max_batch=1, max_context=3000)).page

    def begin():
        page.keyboard.press("Enter")
        # a token may have no text yet, and is not to be seen then
        page.locator(".writing .token").nth(2).wait_for(state="attached")

    def focus():
        return page.evaluate("document.activeElement.id")

    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Tab")
    assert focus() == "send"
    begin()
    assert focus() == "stop"
    page.keyboard.press("Enter")
    page.wait_for_selector(".writing", state="detached")
    assert focus() == "text"
    again = page.get_by_role("button", name="Regenerate")
    again.focus()
    begin()
    assert focus() == "again" and again.is_disabled()
    page.keyboard.press("Enter")  # does nothing while an answer is written
    assert page.locator(".assistant").count() == 1
    page.keyboard.press("Escape")
    page.wait_for_selector(".writing", state="detached")
    assert focus() == "again" and again.is_enabled()
    # an answer that ends while Stop has the focus
    page.get_by_label("Most tokens").fill("200")
    again.focus()
    begin()
    page.locator("#stop").focus()
    page.wait_for_selector(".writing", state="detached")
    assert focus() == "text"


def test_another_answer_to_the_same_question(visit):
    page = visit(AsyncEngine(MODEL, TOKENIZER, max_batch=2, max_context=400)).page
    asked = []
    page.on("request", lambda r: r.method == "POST" and asked.append(r.post_data_json))
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("System prompt").fill("Be brief.")
    found = []
    for seed in "344":
        page.get_by_label("Seed").fill(seed)
        if found:
            page.get_by_role("button", name="Regenerate").click()
        else:
            send(page)
        found.append(answer(page))
        assert page.locator(".assistant").count() == page.locator(".user").count() == 1
    assert found[0] != found[1] == found[2]
    system = {"role": "system", "content": "Be brief."}
    for body, seed in zip(asked, (3, 4, 4), strict=True):
        assert body["messages"] == [system, *QUESTION]
        assert (body["seed"], body["temperature"]) == (seed, 1.5)
        assert "top_p" not in body  # as the model's makers want it
    send(page, "And now?")
    assert answer(page)
    roles = [message["role"] for message in asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert asked[-1]["messages"][2]["content"] == found[-1]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0


def test_probabilities_of_a_token(visit):
    page = visit(answering("ab漢<i>")).page
    send(page)
    assert answer(page) == "ab漢<i>"
    assert page.locator(".token").all_inner_texts() == list("ab漢<i>")
    tip = page.locator("#token")
    assert tip.is_hidden()
    page.locator(".token").nth(1).hover()
    rows = tip.locator("tr").all_inner_texts()
    assert len(rows) == 5 and rows[0].split() == ["b", "100.0", "%"]
    assert tip.locator(".drawn").count() == 1
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    # the same by keyboard; 漢 is three tokens
    page.locator(".assistant .text").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator(".chosen").inner_text() == "漢"
    assert tip.locator(".drawn").count() == 3
    page.keyboard.press("End")
    assert tip.locator(".drawn td").first.inner_text() == ">"
    page.keyboard.press("Escape")
    assert tip.is_hidden()


@pytest.mark.parametrize("size", [NARROW, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_page(visit, size):
    text = "A word " + "W" * 300 + "\n" + "several words " * 30
    visitor = visit(answering(text), size)
    page = visitor.page
    assert page.locator("#settings").evaluate("box => box.open") == (size == DESKTOP)
    send(page)
    assert answer(page) == text
    page.locator(".token").last.hover()
    wide = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(LOOK) == [] and page.evaluate(wide) <= 0
    page.locator("#settings").evaluate("box => box.open = true")
    assert page.evaluate(LOOK) == [] and page.evaluate(wide) <= 0
    boxes = [box.bounding_box() for box in page.locator("button, input").all()]
    for box in filter(None, boxes):
        assert 0 <= box["x"] and box["x"] + box["width"] <= size["width"]
    # the composer is on the screen, whatever is above it
    composer = page.locator("#composer").bounding_box()
    assert composer["y"] + composer["height"] <= size["height"]


def test_errors_are_one_line(visit):
    visitor = visit(AsyncEngine(MODEL, TOKENIZER, max_batch=1, max_context=64))
    page, error = visitor.page, visitor.page.locator("#error")
    send(page, "x" * 100)
    page.wait_for_selector("#error:not(:empty)")
    assert re.search("the context has 64 tokens", error.text_content())
    assert page.locator(".assistant").count() == 0
    page.get_by_label("Temperature").fill("9")
    page.get_by_role("button", name="New chat").click()
    assert error.text_content() == ""
    send(page)
    page.wait_for_selector("#error:not(:empty)")
    assert error.text_content().startswith("temperature must be a number from 0 to 2")
    # Chromium notes each refusal
    assert all("400" in line for line in visitor.noted) and len(visitor.noted) == 4
    visitor.noted.clear()


def refused(visitor, count=1):
    """The line of a refusal, which Chromium notes as well."""
    visitor.page.wait_for_selector("#error:not(:empty)")
    visitor.page.wait_for_selector(".writing", state="detached")
    assert all("400" in line for line in visitor.noted)
    assert len(visitor.noted) == 2 * count
    visitor.noted.clear()
    return visitor.page.locator("#error").text_content()


def short_answers(visit):
    """A visitor of a server with a small context, and what the page asks of it."""
    visitor, asked = visit(endless(max_batch=2, max_context=300)), []
    page = visitor.page
    page.on("request", lambda r: r.method == "POST" and asked.append(r.post_data_json))
    page.get_by_label("Most tokens").fill("5")
    return visitor, asked


def test_a_refusal_leaves_the_conversation_as_it_was(visit):
    visitor, asked = short_answers(visit)
    page = visitor.page
    send(page)
    first = answer(page)
    send(page, "x" * 400)  # does not fit without the first turn, either
    assert "of the prompt and 5 of the answer do not fit" in refused(visitor, 2)
    assert page.locator(".user").count() == page.locator(".assistant").count() == 1
    assert page.get_by_label("Message").input_value() == "x" * 400
    send(page, "short")
    answer(page, 1)
    assert page.locator("#error").text_content() == ""
    said = [message["content"] for message in asked[-1]["messages"]]
    assert said == ["Hello", first, "short"]
    # a setting that is refused: the former answer stays
    second = answer(page, 1)
    page.get_by_label("Seed").fill("1.5")
    page.get_by_role("button", name="Regenerate").click()
    assert "seed must be a whole number" in refused(visitor)
    assert answer(page, 1) == second
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Regenerate").click()
    answer(page, 1)
    assert page.locator(".user").count() == page.locator(".assistant").count() == 2
    assert [message["content"] for message in asked[-1]["messages"]] == said


def test_a_full_context_forgets_the_oldest_turns(visit):
    visitor, asked = short_answers(visit)
    page = visitor.page
    page.get_by_label("System prompt").fill("Be brief.")
    for turn in range(1, 13):
        send(page, f"question {turn}")
        page.locator(".assistant").nth(turn - 1).wait_for()
        answer(page)
        assert page.locator("#error").text_content() == ""
        assert page.locator(".assistant").count() == turn
        system, *rest = asked[-1]["messages"]
        assert system["content"] == "Be brief."
        roles = [message["role"] for message in rest]
        assert roles == ["user", "assistant"] * (len(rest) // 2) + ["user"]
        assert rest[-1]["content"] == f"question {turn}"
    left_out = 2 * 12 - 1 - len(rest)
    notes = page.locator("#chat > .notes").all_text_contents()
    assert len(notes) > 1 and notes[-1] == (
        f"The context is full: the first {left_out} messages are no longer read."
    )
    assert all("400" in line for line in visitor.noted)
    visitor.noted.clear()
    page.get_by_role("button", name="Regenerate").click()
    answer(page)
    assert asked[-1]["messages"] == [system, *rest]
    # the longest message that fits, alone
    empty = [system, {"role": "user", "content": ""}]
    long = "y" * (300 - 5 - len(chat_ids(TOKENIZER, empty)))
    send(page, long)
    answer(page)
    assert [m["content"] for m in asked[-1]["messages"]] == ["Be brief.", long]
    visitor.noted.clear()
    page.get_by_role("button", name="New chat").click()
    send(page)
    answer(page)
    assert asked[-1]["messages"] == [system, *QUESTION]


def test_an_error_in_the_middle_of_an_answer(visit):
    engine = answering("abcdefgh" * 20, Slow)
    page = visit(engine).page
    send(page)
    page.locator(".token").nth(3).wait_for(state="attached")
    engine.stop()
    page.wait_for_selector("#error:not(:empty)")
    assert page.locator("#error").text_content() == "the server is shutting down"
    assert answer(page).startswith("abcd")


def test_a_key(visit):
    visitor = visit(answering("yes"), api_key="secret")
    page = visitor.page
    page.wait_for_selector("#error:not(:empty)")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("secret")
    send(page)
    assert answer(page) == "yes" and page.locator("#error").text_content() == ""
    assert all("401" in line for line in visitor.noted) and len(visitor.noted) == 2
    visitor.noted.clear()


def test_the_page_may_not_load_anything_else():
    with serving(answering("yes"), api_key="secret") as port:
        for path in [*PAGE, "/metrics", "/v1/models"]:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            with contextlib.closing(connection):
                connection.request("GET", path)
                response = connection.getresponse()
                text = response.read().decode()
                assert response.status == (200 if path in OPEN else 401)
                if path in PAGE:
                    policy = response.headers["Content-Security-Policy"]
                    assert policy.startswith("default-src 'self'; ")
                    assert "//" not in re.sub(r"(?m)^ *// .*| // .*", "", text)
                    assert "innerHTML" not in text
