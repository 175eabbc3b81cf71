"""Drives Chromium over its own debugging protocol, through pipes: no package, no port."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page in a headless Chromium. `events`: what it reported, network requests and the console's messages."""

    def __init__(self, profile):
        """profile: an empty folder of its own."""
        (read, to_browser), (from_browser, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (read, write)]
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-extensions",
        ]
        flags += ["--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-pipe"]
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
        # The browser reads from its file 3 and writes to its file 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", *command]
        self.process = subprocess.Popen(shell, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for file in (read, write, *theirs):
            os.close(file)
        self.out, self.back, self.events, self.number = open(to_browser, "wb"), open(from_browser, "rb"), [], 0
        self.rest, self.session = b"", None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Calls a method of the protocol and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.back.fileno(), 1 << 20) or self._fail()
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _fail(self):
        raise EOFError(f"Chromium ended: {self.process.wait()}")

    def open(self, path, ready, dark=False, width=1200, height=900, fragment=""):
        """Opens a file, and waits until the JavaScript expression `ready` holds."""
        self.send("Page.navigate", url="about:blank")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self.send("Page.navigate", url=f"{path.resolve().as_uri()}#{fragment}")
        end = time.monotonic() + 60
        while not self.run(f"Boolean({ready})"):
            assert time.monotonic() < end, f"{path} did not open: {str(self.events)[-2000:]}"
            time.sleep(0.02)
        # Of the fifty entries that a history holds Chromium drops first those that a script has left behind, this
        # page's own among them: back would lead out of the page.
        self.send("Page.resetNavigationHistory")

    def run(self, script):
        """The value of a JavaScript expression, or of a promise of one."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, str(found)[-2000:]
        return found["result"].get("value")

    def press(self, key, code):
        """Presses a key on the keyboard. code: its Windows virtual key code."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "char" else {}
            if kind != "char" or text:
                self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, whole=False):
        """The page as PNG bytes. whole: down to its end."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def close(self):
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.back.close()
