"""The web page in a real browser over a gateway without models, and its security headers."""

import base64
import hashlib
import itertools
import json
import re
import threading
import time

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from cluster.config import Config, ServingConfig
from serving.api_keys import create_key
from serving.backend import ApiError
from serving.gateway import build_api
from serving.web_ui import build_page
from tests.serving import browser
from tests.serving.standin import Echo, client, running

in_a_browser = pytest.mark.skipif(not browser.INSTALLED, reason="Chromium is not installed; run: apt-get install chromium chromium-driver")
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SCORES = {"Paris": 0.9, MARKUP: 0.4, "": 0.0, "Rome": -0.2}


class Cities(Echo):
    """Samples the same four responses in a cycle over all calls."""

    responses = itertools.cycle(["Rome", "Paris", MARKUP, ""])

    async def sample(self, *arguments):
        sampled = await super().sample(*arguments)
        for each in sampled["candidates"]:
            response = next(self.responses)
            each |= {"response": response, "tokens": 2, "finish_reason": "length" if response == "Rome" else "stop"}
        return sampled

    async def score(self, *arguments):
        scored = await super().score(*arguments)
        return scored | {"scores": [SCORES[response] for response in arguments[-1]]}


@pytest.fixture(scope="module")
def driver():
    with browser.chromium() as driver:
        yield driver


def gateway(backend, **serving):
    return running(build_api(Config(serving=ServingConfig(**serving)), backend))


def texts(driver, selector):
    return [each.text for each in driver.find_elements(By.CSS_SELECTOR, selector)]


def text(driver, selector):
    (only,) = texts(driver, selector)
    return only


def shows(driver, selector, expected):
    browser.wait(driver, f"document.querySelector('{selector}').textContent.includes({json.dumps(expected)})")


async def test_the_page_may_only_run_its_own_script_and_reach_its_own_server():
    async with client(Echo(), candidates=3, max_candidates=5) as http:
        answers = [await http.get("/") for _ in range(2)]
    assert answers[0].text == answers[1].text and answers[0].headers["x-request-id"] != answers[1].headers["x-request-id"]
    policy = dict(each.split(" ", 1) for each in answers[0].headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", answers[0].text, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
    assert 'max="5" value="3"' in answers[0].text and "{{" not in answers[0].text
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.:]+""", answers[0].text) == []


@in_a_browser
def test_an_answer_shows_the_candidates_best_first_with_scores_time_and_tokens(driver, tmp_path):
    backend = Cities()
    backend.responses = itertools.cycle(["Rome", "Paris", MARKUP, ""])
    with gateway(backend) as url:
        browser.open_page(driver, url)
        driver.find_element(By.ID, "count").send_keys(Keys.ARROW_LEFT * 2)
        browser.ask(driver, "What is the capital of France?")
        shows(driver, "#status", "Done in")
        browser.picture(driver, str(tmp_path / "page.png"))
    assert text(driver, "#text") == "Paris" and not driver.find_element(By.ID, "error").is_displayed()
    assert texts(driver, ".response") == ["Paris", MARKUP, "Rome", "(empty)"]
    assert texts(driver, ".score") == ["0.900", "0.400", "-0.200", "0.000"]
    assert texts(driver, ".tag") == ["winner", "", "", ""] and texts(driver, ".winner .response") == ["Paris"]
    bars = driver.find_elements(By.CSS_SELECTOR, ".bar")
    assert [round(10 * bar.rect["width"] / bars[0].find_element(By.XPATH, "..").rect["width"]) for bar in bars] == [9, 4, 0, 0]
    assert text(driver, "#pool-shown") == "6, 4 of them different"
    facts = texts(driver, ".candidate > .soft")
    assert "sampled 2 times" in facts[0] and "cut at the token limit" in facts[2]
    assert [each.split()[0] for each in texts(driver, "#times li")] == ["sampling", "scoring", "rest"]
    assert texts(driver, "#tokens li") == ["4 prompt tokens", "12 tokens sampled", "2 tokens of the answer"]
    # The text of a model created no element and ran no script.
    assert driver.title == "Cappy on Ray" and driver.find_elements(By.CSS_SELECTOR, "main img, main script") == []
    with Image.open(tmp_path / "page.png") as image:
        assert image.format == "PNG" and image.width > 800 and image.height > 800
        colours = image.convert("RGB").getcolors(1 << 24)
        assert len(colours) > 50 and max(count for count, _ in colours) < 0.9 * image.width * image.height


@in_a_browser
def test_the_request_has_the_values_of_the_sliders_and_the_model(driver):
    samplings = []

    class Asked(Cities):
        async def sample(self, *arguments):
            samplings.append([(decoding.name, decoding.temperature) for decoding in arguments[1]])
            return await super().sample(*arguments)

    with gateway(Asked(), model_name="boosted", candidates=2, max_candidates=2) as url:
        browser.open_page(driver, url)
        assert texts(driver, "#model option")[0] == "boosted" and text(driver, "#count-shown") == "2"
        browser.ask(driver, "a")
        shows(driver, "#status", "Done in")
        driver.find_element(By.ID, "own").send_keys(Keys.SPACE)
        driver.find_element(By.ID, "temperature").send_keys(Keys.ARROW_RIGHT * 3)
        assert text(driver, "#temperature-shown") == "1.3"
        driver.find_element(By.ID, "send").click()
        browser.wait(driver, "!document.querySelector('#send').disabled")
    assert len(samplings) > 1 and [name for each in samplings for name, _ in each].count("request") == 1
    assert samplings[-1] == [("request", 1.3)]


@in_a_browser
@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_an_error_before_or_in_the_stream_is_shown_as_text(driver, wait):
    with gateway(Cities(ApiError("the LLM <b>went</b> down", 503, code="unavailable"), wait), keep_alive_s=0.05) as url:
        browser.open_page(driver, url)
        browser.ask(driver, "What is the capital of France?")
        shows(driver, "#error", "the LLM <b>went</b> down")
    assert text(driver, "#error-title") == ("The server reported an error" if wait else "The server answered 503")
    assert re.fullmatch(r"unavailable · request [0-9a-f-]{32,36}", text(driver, "#error-detail"))
    assert not driver.find_element(By.ID, "answer").is_displayed() and driver.find_element(By.ID, "send").is_enabled()


@in_a_browser
def test_escape_and_the_button_cancel_the_request_and_its_sampling(driver):
    backend = Cities(wait=30)
    with gateway(backend, keep_alive_s=0.05) as url:
        browser.open_page(driver, url)
        for abort in (lambda: driver.find_element(By.ID, "cancel").click(), lambda: driver.switch_to.active_element.send_keys(Keys.ESCAPE)):
            browser.ask(driver, "What is the capital of France?")
            shows(driver, "#status", "Sampling and scoring")
            abort()
            shows(driver, "#status", "Cancelled")
            assert not driver.find_element(By.ID, "error").is_displayed()
        deadline = time.monotonic() + 30
        while backend.cancelled < len(backend.prompts) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert backend.cancelled == len(backend.prompts) > 1


@in_a_browser
def test_the_page_requests_a_required_key_and_sends_it(driver):
    key, sha256 = create_key()
    with gateway(Cities(), api_keys=[{"name": "a", "sha256": sha256}]) as url:
        browser.open_page(driver, url)
        assert "no API key" in text(driver, "#error-text")
        driver.find_element(By.ID, "key").send_keys(key, Keys.TAB)
        browser.wait(driver, "document.querySelector('#model option')")
        assert not driver.find_element(By.ID, "error").is_displayed()
        browser.ask(driver, "What is the capital of France?")
        shows(driver, "#status", "Done in")
        assert text(driver, "#text") == "Paris"
        assert key not in driver.execute_script("return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")


@in_a_browser
def test_the_page_reports_a_fallback(driver):
    with gateway(Cities(scorer_error=ApiError("the scorer is down", 503)), fallback="first") as url:
        browser.open_page(driver, url)
        browser.ask(driver, "What is the capital of France?")
        shows(driver, "#status", "Done in")
    assert text(driver, "#text") == "Rome" and "fallback selected the answer: first" in text(driver, "#note")
    assert set(texts(driver, ".score")) == {"no score"} and texts(driver, ".winner .response") == ["Rome"]


@in_a_browser
def test_the_page_fits_a_phone(driver):
    with gateway(Cities()) as url:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
        try:
            browser.open_page(driver, url)
            browser.ask(driver, "What is the capital of France?")
            shows(driver, "#status", "Done in")
            assert driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        finally:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_a_browser
@pytest.mark.parametrize("known", [True, False])
def test_candidates_are_shown_as_they_arrive_or_at_the_end_without_progress_events(driver, known):
    """The server's events are written by hand: the content of the page depends on their timing."""
    bodies, go = [], threading.Event()

    def candidate(response, score, chosen=False):
        facts = {"decoding": "sample", "tokens": 2, "logprob": -1.0, "finish_reason": "stop"}
        return {"response": response, "score": score, "chosen": chosen, **facts}

    def event(**chunk):
        return f"data: {json.dumps({'choices': [], **chunk})}\n\n"

    def stream():
        yield ": sampling\n\n"
        if "progress" in bodies[-1]["cappy"]:
            yield event(cappy={"progress": [candidate("Rome", 0.2), candidate("Paris", None)]})
            assert go.wait(60)
        answer = {"candidates": [candidate("Paris", 0.9, True), candidate("Rome", 0.2)], "sampled_tokens": 4}
        yield event(choices=[{"index": 0, "delta": {"content": "Paris"}}])
        usage = {"prompt_tokens": 4, "completion_tokens": 2}
        yield event(cappy=answer | {"latency": {"sampling_s": 0.1, "scoring_s": 0.01}}, usage=usage) + "data: [DONE]\n\n"

    api = FastAPI()
    api.add_api_route("/", lambda: build_page(ServingConfig()))
    api.add_api_route("/v1/models", lambda: {"data": [{"id": "cappy"}, {"id": "scorer", "cappy": {"llm": False}}]})

    @api.post("/v1/chat/completions")
    async def chat(http: Request):
        bodies.append(await http.json())
        if not known and "progress" in bodies[-1]["cappy"]:
            return JSONResponse({"error": {"message": "cappy.progress is not known", "param": "cappy.progress"}}, 400)
        return StreamingResponse(stream(), media_type="text/event-stream")

    with running(api) as url:
        browser.open_page(driver, url)
        assert texts(driver, "#model option") == ["cappy"]
        browser.ask(driver, "What is the capital of France?")
        if known:
            shows(driver, "#candidates", "Paris")
            assert texts(driver, ".response") == ["Rome", "Paris"] and texts(driver, ".score") == ["0.200", "no score"]
            assert texts(driver, ".tag") == ["best so far", ""] and driver.find_element(By.ID, "cancel").is_enabled()
            go.set()
        shows(driver, "#status", "Done in")
        assert texts(driver, ".response") == ["Paris", "Rome"] and texts(driver, ".tag") == ["winner", ""]
        driver.find_element(By.ID, "send").click()
        browser.wait(driver, "!document.querySelector('#send').disabled")
    assert [each["cappy"].get("progress") for each in bodies] == ([True, True] if known else [True, None, None])
