"""Takes docs/app.png and docs/app_phone.png: the page of the small hybrid, asked about a picture, in Chromium.

pip install -e ".[app]" playwright
python docs/app_picture.py
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from mmmamba.app import PICTURE, build, launch, load
from mmmamba.cli.arguments import HYBRID


def main() -> None:
    page = build(*load(str(HYBRID)), "shapes-hybrid")
    launch(page, quiet=True, prevent_thread_lock=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height in (("app.png", 1200, 760), ("app_phone.png", 360, 740)):
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(page.local_url)
            tab.wait_for_selector("#branches input")
            tab.set_input_files("#composer input[type=file]", str(PICTURE))
            tab.wait_for_selector("#composer .thumbnail-item")
            for number, question in enumerate(("How many objects are there?", "What number is on the purple card?")):
                tab.fill("#composer textarea", question)
                tab.click("#composer .submit-button")
                tab.wait_for_function(
                    "n => document.querySelectorAll('#chat .bot.message').length > n "
                    "&& document.querySelector('#composer .submit-button')",
                    arg=number,
                )
            tab.wait_for_timeout(1500)
            tab.screenshot(path=Path(__file__).with_name(name))
        browser.close()
    page.close(verbose=False)


if __name__ == "__main__":
    main()
