"""A browser for tests, and what can be wrong with a page in it."""

import shutil
from urllib.parse import urljoin

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
DESKTOP = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}

LOOK = """() => {
  // what is folded must fit as well
  document.querySelectorAll("main details").forEach((fold) => { fold.open = true; });
  const faults = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) {
    const worst = [...document.querySelectorAll("main *")]
      .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1)
      .map((e) => e.tagName + "." + e.className).slice(0, 3);
    faults.push(`the page is ${wide} pixels too wide: ${worst}`);
  }
  for (const image of document.images) {
    const box = image.getBoundingClientRect();
    if (!image.naturalWidth || !box.width || !box.height) {
      faults.push(`image ${image.getAttribute("src")} is not visible`);
    }
  }
  const formulas = [...document.querySelectorAll(".math")];
  for (const formula of formulas) {
    const drawn = formula.querySelector("mjx-container");
    // a contents list beside the page may hold one that is folded away
    const shown = formula.checkVisibility();
    if (!drawn || (shown && !drawn.getBoundingClientRect().width)) {
      faults.push(`formula ${formula.textContent.slice(0, 40)} is not drawn`);
    } else if (drawn.querySelector("mjx-merror, [data-mjx-error]")) {
      faults.push(`formula ${drawn.textContent.slice(0, 40)} is wrong`);
    }
  }
  return faults;
}"""


class Visitor:
    """A browser's page that notes what goes wrong."""

    def __init__(self, browser, address: str):
        self.address = address
        self.page = browser.new_page(viewport=DESKTOP)
        self.noted: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.noted.append(f"error: {error}"))
        self.page.on("requestfailed", self._on_failure)
        self.page.on("response", self._on_response)
        # nothing leaves this machine, and the attempt is noted
        self.page.route(lambda url: not self._is_here(url), self._on_stranger)

    def _on_failure(self, request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the next page was opened
            self.noted.append(f"failed: {request.url}")

    def _is_here(self, url: str) -> bool:
        return url.startswith((self.address, "data:", "blob:"))

    def _on_stranger(self, route) -> None:
        self.noted.append(f"another host: {route.request.url}")
        route.abort()

    def _on_console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.noted.append(f"console: {message.text}")

    def _on_response(self, response) -> None:
        if response.status >= 400:
            self.noted.append(f"{response.status}: {response.url}")

    def open(self, name: str, size: dict = DESKTOP) -> None:
        self.noted.clear()
        self.page.set_viewport_size(size)
        self.page.goto(urljoin(self.address, name), wait_until="load")
        # MathJax draws after the page has loaded
        self.page.evaluate("() => window.MathJax?.startup?.promise")

    def faults(self, name: str) -> list[str]:
        """Open a page at both widths and return what is wrong."""
        self.open(name)
        found = self.page.evaluate(LOOK)
        self.page.set_viewport_size(PHONE)
        found += [f"phone: {fault}" for fault in self.page.evaluate(LOOK)]
        return [f"{name}: {fault}" for fault in dict.fromkeys(self.noted + found)]

    def finds(self, word: str) -> list[str]:
        """Return the titles that a search gives."""
        self.open(f"search.html?q={word}")
        results = self.page.locator("#search-results li a")
        try:
            results.first.wait_for(timeout=5_000)
        except Exception:
            return []
        return results.all_inner_texts()

    def unfolds(self, selector: str) -> bool:
        """Whether a click on the first such fold shows what is in it."""
        fold = self.page.locator(selector).first
        content = fold.locator(":scope > :not(summary)").first
        folded = not content.is_visible()
        fold.locator(":scope > summary").click()
        self.page.wait_for_timeout(100)
        return folded and content.is_visible()
