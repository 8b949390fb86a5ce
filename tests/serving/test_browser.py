"""The pages in a real headless Chromium, over HTTP, with the real model. Screenshots go to tests/screenshots/.

AXE's rules are those of WCAG 2 A and AA: https://github.com/dequelabs/axe-core/blob/develop/doc/rule-descriptions.md
"""

import csv
import os
import shutil
import threading
from datetime import timedelta

import pytest
from werkzeug.serving import make_server

from app import create_app
from hatespeech.serving import store as log
from tests.conftest import ROOT, some_texts
from tests.serving.test_pages import HOSTILE

SHOTS = ROOT / "tests" / "screenshots"
SIZES = {"desktop": {"width": 1100, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as player:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium refuses to be root in its sandbox
        with player.chromium.launch(executable_path=chromium, args=arguments) as browser:
            yield browser


@pytest.fixture(scope="module")
def site(server, ollama_host, run, tmp_path_factory):
    """The app's address, with some days of answers in its log."""
    folder = tmp_path_factory.mktemp("site")
    config = {"MODEL_DIR": str(run), "OLLAMA_HOST": ollama_host, "UPLOADS_DIR": str(folder / "files")}
    app = create_app(config | {"DATABASE_URL": f"sqlite:///{folder}/log.sqlite3"})
    client, texts = app.test_client(), some_texts()
    with pytest.MonkeyPatch.context() as patch:
        now = log.now()
        for day in range(5):
            patch.setattr(log, "now", lambda day=day: now - timedelta(days=day))
            for text in [*texts[6 * day : 6 * day + 6], "I hope you all have a lovely day", HOSTILE]:
                assert client.post("/infer", data=text.encode()).status_code == 200
    http = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


@pytest.fixture
def page(browser, site):
    """A page that fails the test on an error in a script, or on what the content security policy blocked."""
    context = browser.new_context(base_url=site, viewport=SIZES["desktop"])
    context.set_default_timeout(20_000)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    assert wrong == []
    context.close()


def test_a_text_is_tried_and_corrected_by_keyboard_alone(page):
    page.goto("/")
    page.wait_for_function("document.activeElement.id === 'text'")
    page.keyboard.type("I hope you all have a lovely day")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("h2") == "Supportive"
    page.focus("button[value=Neutral]")
    page.keyboard.press("Enter")
    assert page.inner_text("[role=status]") == "Thank you: kept as Neutral."


def test_the_page_works_without_scripts(browser, site):
    page = browser.new_context(base_url=site, java_script_enabled=False).new_page()
    page.goto("/")
    page.fill("textarea", HOSTILE)
    page.click("text=Classify")
    assert page.input_value("textarea") == HOSTILE
    page.goto("/review")
    page.click("summary")
    assert page.is_visible("details .text")


def test_the_report_tells_and_draws(page):
    page.goto("/report")
    n = int(page.inner_text("dl dd").split(",")[0])  # 40, and what other tests have asked
    assert n >= 40
    assert f"{n}, {n} of them answered" in page.inner_text("dl")
    assert page.locator("figure.chart canvas").count() == 3
    assert int(page.locator("ol li").first.inner_text().split()[0]) >= 5
    assert not page.is_visible("ol .text")
    page.locator("ol details summary").first.click()
    assert page.is_visible("ol .text")
    page.click("text=All figures as JSON")
    assert f'"requests": {n}' in page.inner_text("body")


def test_the_review_goes_by_keys_can_be_undone_and_exported(page):
    def shown() -> str:
        return page.locator("form.correct input[name=id]").get_attribute("value")

    page.goto("/review?decided=open")
    left = int(page.inner_text("main [role=status]").split()[0])
    first = shown()
    text = page.locator("details .text")
    assert not text.is_visible()
    assert "blur" in page.locator(".veil").evaluate("element => getComputedStyle(element).filter")
    page.keyboard.press("s")
    assert text.is_visible()
    page.keyboard.press("n")
    page.wait_for_url("**after=**")
    second = shown()
    assert second != first
    page.keyboard.press("1")
    page.wait_for_url("**kept=Hate**")
    assert page.inner_text("main [role=status]").startswith(f"Kept as Hate. {left - 1} to see.")
    assert shown() == first
    page.keyboard.press("u")
    page.wait_for_url(lambda url: "kept" not in url)
    assert page.inner_text("main [role=status]").startswith(f"{left} to see.")
    page.goto("/review?words=lovely+day&decided=all")
    left = int(page.inner_text("main [role=status]").split()[0])
    assert left >= 5
    with page.expect_download() as download:
        page.click("text=Export them as CSV")
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["I hope you all have a lovely day"] * left
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences)


def test_a_file_is_dropped_classified_and_downloaded(page, tmp_path):
    path = tmp_path / "comments.csv"
    path.write_text('id,comment\n1,"I hope you all\nhave a lovely day"\n2,\n3,thank you\n')
    page.goto("/file")
    dropped = page.evaluate_handle(
        """text => {
            const data = new DataTransfer();
            data.items.add(new File([text], "comments.csv"));
            return data;
        }""",
        path.read_text(),
    )
    page.dispatch_event("form.drop", "drop", {"dataTransfer": dropped})
    page.click("text=Upload")
    page.select_option("#column", "comment")
    page.click("text=Classify")
    page.wait_for_selector("text=All 3 rows are classified, 1 of them without a label.")
    assert "line 4: there is no text" in page.inner_text("ul")
    with page.expect_download() as download:
        page.click("text=Download it")
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["label"]) for row in rows][::2] == [("1", "Supportive"), ("3", "Supportive")]
    page.click("text=Delete the file")
    page.wait_for_url("**/file")
    assert "comments.csv" not in page.content()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_page_is_accessible_and_fits(browser, site, size, colours, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(base_url=site, viewport=SIZES[size], color_scheme=colours)
    context.set_default_timeout(20_000)
    page = context.new_page()
    SHOTS.mkdir(exist_ok=True)

    def look(name: str) -> None:
        page.wait_for_load_state("networkidle")
        found = axe.run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]})
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than a {size}"
        page.screenshot(path=SHOTS / f"{name}-{size}-{colours}.png", full_page=True)

    page.goto("/")
    page.fill("textarea", "I hope you all have a lovely day")
    page.click("text=Classify")
    look("try")
    page.goto("/report")
    look("report")
    page.goto("/review?label=Neutral&decided=all")
    look("review")
    page.click("summary")
    look("review-shown")
    path = tmp_path / "some.csv"
    path.write_text("text\n" + "thank you\n" * 3)
    page.goto("/file")
    look("file")
    page.set_input_files("#file", path)
    page.click("text=Upload")
    look("file-column")
    page.click("text=Classify")
    page.wait_for_selector("text=All 3 rows are classified")
    look("file-done")
    page.click("text=Delete the file")
    page.goto("/review?low=much")
    look("error")
    context.close()
