"""A headless Chromium for the tests of the page; Debian has it as `chromium` and `chromium-driver`.

`python -m tests.serving.browser URL PNG INSTRUCTION` sends an instruction through the page of a running server
and saves a screenshot of the answer.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

INSTALLED = bool(shutil.which("chromium") and shutil.which("chromedriver"))
WIDTH = 1000
_QUIET = ("background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage")


@contextmanager
def chromium() -> Iterator[WebDriver]:
    """Start a browser with a temporary profile and stop it afterwards."""
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium has no sandbox for the user root, which containers use.
        flags = ["headless", "no-sandbox", "no-first-run", f"user-data-dir={profile}", f"window-size={WIDTH},900"]
        for flag in [*flags, *(f"disable-{each}" for each in _QUIET)]:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def wait(driver: WebDriver, script: str, timeout_s: float = 60.0) -> None:
    """Wait until a JavaScript expression is true."""
    WebDriverWait(driver, timeout_s, 0.05).until(lambda _: driver.execute_script(f"return Boolean({script})"), script)


def open_page(driver: WebDriver, url: str) -> None:
    """Load the page and wait until it shows the models or an error."""
    driver.get(url)
    wait(driver, "document.querySelector('#model option') || !document.querySelector('#error').hidden")


def ask(driver: WebDriver, instruction: str) -> None:
    """Type an instruction and send it with the keyboard."""
    driver.find_element(By.ID, "instruction").send_keys(instruction, Keys.CONTROL, Keys.ENTER)


def picture(driver: WebDriver, path: str) -> None:
    """Save the whole page as PNG after its animations have ended."""
    wait(driver, "document.getAnimations().length === 0")
    driver.set_window_size(WIDTH, 200 + driver.execute_script("return document.documentElement.scrollHeight"))
    assert driver.save_screenshot(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "png", "instruction"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    with chromium() as driver:
        open_page(driver, arguments.url)
        ask(driver, arguments.instruction)
        wait(driver, "!document.querySelector('#cost').hidden || !document.querySelector('#error').hidden", 300)
        picture(driver, arguments.png)


if __name__ == "__main__":
    main()
