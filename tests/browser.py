"""A headless Chromium for the tests. Run as a program, it installs one where there is none."""

import os
import shutil
import subprocess
import sys

from playwright.sync_api import Browser, Error, Playwright, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PLAYWRIGHT = [sys.executable, "-m", "playwright", "install", "chromium-headless-shell"]
_DEBIAN = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]

MISSING = (
    "no Chromium: `make test` installs one, as `python -m playwright install "
    "chromium-headless-shell` and `apt-get install chromium` do"
)


def launch(playwright: Playwright) -> Browser | None:
    """The system's Chromium, else playwright's own; None if neither starts."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    try:
        return playwright.chromium.launch(executable_path=found)
    except Error:
        return None


def _starts() -> bool:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is not None:
            browser.close()
        return browser is not None


def main() -> None:
    """Install a Chromium, unless one starts; say so if none can be had."""
    if _starts():
        return
    print("installing Chromium for the tests of the page ...", flush=True)
    commands = [_PLAYWRIGHT]
    if shutil.which("apt-get") and os.geteuid() == 0:
        commands += [["apt-get", "update"], _DEBIAN]
    for command in commands:
        subprocess.run(command, capture_output=True, timeout=900)
    if not _starts():
        print(f"{MISSING}. The tests that need it are skipped.")


if __name__ == "__main__":
    main()
