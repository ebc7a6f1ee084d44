"""A real monitor's process, and requests over its unix socket."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import requests
import requests.adapters
import urllib3
import urllib3.connection

# How long an answer may take, in seconds: generous, as an emulated host is slow. Longer means that it hangs.
TIMEOUT = 60


class UnixConnection(urllib3.connection.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=TIMEOUT)
        self.path = path

    def _new_conn(self):
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(TIMEOUT)
        stream.connect(str(self.path))
        return stream


class UnixPool(urllib3.HTTPConnectionPool):
    """One connection that stays open."""

    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def _new_conn(self):
        return UnixConnection(self.path)


class UnixAdapter(requests.adapters.HTTPAdapter):
    """Sends every request of a session to one unix socket."""

    def __init__(self, path):
        super().__init__()
        self.pool = UnixPool(path)

    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        return self.pool


class Machine:
    """A monitor in a folder of its own; the paths that it is given are seen from there."""

    URL = "http://localhost"

    def __init__(self, folder: Path):
        self.folder = folder
        self.socket = folder / "api.sock"
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [os.environ["MAYFLY_BIN"], "--api-sock", self.socket],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.mount(self.URL, UnixAdapter(self.socket))
        self.wait_for_socket()

    def wait_for_socket(self):
        """Waits until the API can be reached."""
        deadline = time.monotonic() + TIMEOUT
        while not self.listens():
            self.check_alive()
            assert time.monotonic() < deadline, "no API socket"
            time.sleep(0.01)

    def listens(self):
        """True once the socket takes connections, a moment after it is there."""
        with socket.socket(socket.AF_UNIX) as stream:
            return stream.connect_ex(str(self.socket)) == 0

    def check_alive(self):
        """Fails when the process has ended."""
        code = self.process.poll()
        if code is not None:
            end = self.output.read_bytes()[-4000:].decode(errors="replace")
            raise AssertionError(f"the monitor has ended with {code}; its last words:\n{end}")

    def request(self, method, path, body=None):
        """Sends a request; the body is bytes, or a value that becomes JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        return self.session.request(method, self.URL + path, data=body, timeout=TIMEOUT)

    def do(self, method, path, body=None):
        """Sends a request that must be carried out."""
        answer = self.request(method, path, body)
        assert answer.status_code in (200, 204), f"{method} {path} {body}: {answer.status_code} {answer.text}"
        return answer

    def config(self):
        """All that requests can change and see."""
        return [self.do("GET", path).text for path in ("/", "/machine-config", "/vm/config", "/mmds")]

    def stop(self):
        """Ends the process."""
        self.session.close()
        self.process.kill()
        self.process.wait()
