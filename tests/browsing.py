"""A real browser for tests: Qt's Chromium without a window, with real key presses and clicks.

Importing this module raises ImportError where PySide6 is missing, or a system library that Chromium needs (libnss3).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")  # root, as in a container, has no other way
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--disable-gpu --disable-background-networking")

import shiboken6
from PySide6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
from PySide6.QtTest import QTest
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

PATIENCE_MS = 30_000


class _Page(QWebEnginePage):
    """Keeps what the page says to the console, refused loads and scripts among it."""

    def __init__(self, profile: QWebEngineProfile) -> None:
        super().__init__(profile)
        self.console: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.console.append(f"{level.name} line {line}: {message}")


class Browser:
    """One page in a window of a given size."""

    def __init__(self, width: int = 1100, height: int = 900) -> None:
        self._app = QApplication.instance() or QApplication(["tests"])
        self._profile = QWebEngineProfile()  # without a name it stores nothing
        self._page = _Page(self._profile)
        self._view = QWebEngineView(self._page)
        self.resize(width, height)
        self._view.show()

    @property
    def console(self) -> list[str]:
        """What the page has said since it was opened."""
        return self._page.console

    def open(self, path: Path) -> None:
        """Load a file anew and wait until it is there."""
        self._page.console.clear()

        def start(done: Callable[[Any], None]) -> None:
            self._page.loadFinished.connect(done, Qt.ConnectionType.SingleShotConnection)
            self._page.load(QUrl.fromLocalFile(str(path)))

        assert _wait(start), f"{path} did not load"

    def resize(self, width: int, height: int) -> None:
        self._view.resize(width, height)

    def run(self, script: str) -> Any:
        """The value of an expression in the page, by way of JSON."""
        return json.loads(_wait(lambda done: self._page.runJavaScript(f"JSON.stringify({script}) ?? 'null'", 0, done)))

    def wait_until(self, script: str) -> None:
        """Until an expression is true."""
        for _ in range(PATIENCE_MS // 50):
            if self.run(f"!!({script})"):
                return
            QTest.qWait(50)
        raise AssertionError(f"never true: {script}")

    def press(self, key: str) -> None:
        """A character, or the name of a key such as `Enter` or `Right`."""
        if len(key) == 1:
            QTest.keyClicks(self._view.focusProxy(), key)
        else:
            QTest.keyClick(self._view.focusProxy(), Qt.Key[f"Key_{key}"])

    def click(self, selector: str) -> None:
        """The middle of the first element that the selector finds."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            "const box = e.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        QTest.mouseClick(self._view.focusProxy(), Qt.MouseButton.LeftButton, pos=QPoint(round(x), round(y)))

    def close(self) -> None:
        """In this order: a profile must outlive its pages."""
        for part in (self._view, self._page, self._profile):
            shiboken6.delete(part)


def _wait(start: Callable[[Callable[[Any], None]], None]) -> Any:
    """Start something that calls back, and wait for what it says."""
    loop, answers = QEventLoop(), []

    def done(answer: Any = None) -> None:
        answers.append(answer)
        loop.quit()

    timer = QTimer(singleShot=True)
    timer.timeout.connect(loop.quit)
    timer.start(PATIENCE_MS)
    start(done)
    if not answers:
        loop.exec()
    assert answers, "the browser did not answer"
    return answers[0]
