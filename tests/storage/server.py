"""A Cloud Storage of our own, in a process of its own: objects in memory, exact preconditions, and faults on demand.

It speaks the part of the JSON API that the client library uses: metadata, lists with pages, downloads with ranges, simple,
multipart and resumable uploads, rewrites in several rounds, deletes, bucket policies. What a test wants to know or to break
goes through `Server`, whose requests have no faults.
"""

import base64
import dataclasses
import hashlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c

BUCKET = "flexjax-test"
BEFORE = ("503", "429", "500", "reset", "stall")  # nothing has happened when these come
KINDS = {  # what may go wrong where; `lost`: done, but the answer does not come
    "get": (*BEFORE, "html", "wrong_crc", "short"),
    "list": (*BEFORE, "html", "short"),
    "bucket": (*BEFORE, "html", "short"),
    "download": (*BEFORE, "short", "flip", "stall_body", "reset_body", "long"),
    "upload": (*BEFORE, "lost", "503_after", "412", "412_after", "flip", "wrong_crc", "html", "short"),
    "begin": (*BEFORE, "lost"),
    "chunk": (*BEFORE, "lost", "503_after", "412_after", "flip", "partial"),
    "rewrite": (*BEFORE, "lost", "503_after", "412", "412_after", "flip", "wrong_crc", "html", "short"),
    "delete": (*BEFORE, "lost", "503_after", "412", "412_after"),
}


def crc32c(data):
    return base64.b64encode(google_crc32c.value(bytes(data)).to_bytes(4, "big")).decode()


@dataclasses.dataclass
class Stored:
    data: bytes
    generation: int


class Refused(Exception):
    """An HTTP status with which a request ends."""

    def __init__(self, status, headers=None):
        super().__init__(status)
        self.status, self.headers = status, headers


class Broken(Exception):
    """The connection ends here, without a word."""


class State:
    """Everything the service knows; one lock, since tests are small."""

    def __init__(self):
        self.lock = threading.RLock()
        self.reset({})

    def reset(self, settings):
        with self.lock:
            self.objects = {}
            self.sessions, self.rewrites = {}, {}
            self.last = 1000
            self.settings = {"page": 3, "round": 2**20, "versioning": False, "soft_delete": 0, "retention": 0, **settings}
            self.counters = {}
            self.rules, self.random, self.rate, self.kinds, self.seconds = [], None, 0.0, None, 1.0

    def put(self, name, data):
        self.last += 1
        self.objects[name] = Stored(bytes(data), self.last)
        return self.objects[name]

    def check(self, name, query):
        """Raises 412 unless the object has the generation that the request names (0: there is none)."""
        wanted = query.get("ifGenerationMatch")
        found = self.objects[name].generation if name in self.objects else 0
        if wanted is not None and int(wanted) != found:
            raise Refused(412)

    def count(self, endpoint, requests=0, received=0, sent=0):
        with self.lock:
            counter = self.counters.setdefault(endpoint, {"requests": 0, "in": 0, "out": 0})
            counter["requests"] += requests
            counter["in"] += received
            counter["out"] += sent

    def fault(self, endpoint):
        """The fault that this request meets, or "": the first rule for its endpoint, else a random one."""
        with self.lock:
            for rule in self.rules:
                if rule["endpoint"] == endpoint and rule["times"] > 0:
                    if rule.get("skip", 0) > 0:
                        rule["skip"] -= 1
                        continue
                    rule["times"] -= 1
                    return rule["kind"]
            if self.random is None or self.random.random() >= self.rate:
                return ""
            kind = self.random.choice(KINDS[endpoint])
            return kind if self.kinds is None or kind in self.kinds else ""


STATE = State()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_any()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.split("/")[1:]]
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if parts[0] == "control":
                self.answer(200, control(parts[1], self.query, self.body))
                return
            endpoint, work = self.route(parts)
            STATE.count(endpoint, requests=1)
            self.fault = STATE.fault(endpoint)
            self.before()
            with STATE.lock:
                status, headers, body = work()
            self.after(endpoint, status, headers, body)
        except Refused as refused:
            said = {400: "Provided CRC32C doesn't match", 403: "subject to a retention policy"}.get(refused.status, "")
            message = {"error": {"code": refused.status, "message": said, "errors": [{"message": said}]}}
            self.answer(refused.status, json.dumps(message).encode(), refused.headers)
        except Broken:
            self.sever()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def route(self, parts):
        """The endpoint's name and the work of this request."""
        if parts[0] == "upload":
            if parts[4] != BUCKET:
                return "upload", self.missing
            if self.command == "PUT":
                return "chunk", self.chunk
            kind = self.query["uploadType"]
            return ("begin", self.begin) if kind == "resumable" else ("upload", getattr(self, f"upload_{kind}"))
        if parts[0] == "download":
            return "download", lambda: self.download(parts[6])
        if parts[3] != BUCKET:
            return "bucket", self.missing
        if len(parts) == 4:
            return "bucket", self.policies
        if len(parts) == 5:
            return "list", self.listing
        if len(parts) == 11:
            assert parts[6:8] == ["rewriteTo", "b"], parts
            return "rewrite", lambda: self.rewrite(parts[5], parts[10])
        work = {"GET": self.metadata, "DELETE": self.remove}[self.command]
        return {"GET": "get", "DELETE": "delete"}[self.command], lambda: work(parts[5])

    def before(self):
        """Faults that come instead of the work."""
        if self.fault in ("503", "500", "412", "403"):
            raise Refused(int(self.fault))
        if self.fault == "429":
            raise Refused(429, {"Retry-After": "0"})
        if self.fault == "reset":
            raise Broken
        if self.fault == "stall":
            time.sleep(STATE.seconds)
            raise Broken

    def after(self, endpoint, status, headers, body):
        """Faults that come after it."""
        fault = self.fault
        if fault == "lost":
            raise Broken
        if fault.endswith("_after"):
            raise Refused(int(fault.removesuffix("_after")))
        if fault == "html":
            self.answer(200, b"<html>Please log in to the network</html>", {"Content-Type": "text/html"})
            return
        if fault == "flip" and endpoint == "download" and body:
            body = flipped(body)
        if fault == "long":
            body += b"more"
        sent = len(body) // 2 if fault in ("short", "stall_body", "reset_body") else len(body)
        if endpoint == "download":
            STATE.count(endpoint, sent=sent)
        if fault == "trickle":  # each piece comes before the connection counts as stalled
            self.answer(status, body, headers, 0)
            for start in range(0, len(body), 8192):
                self.wfile.write(body[start : start + 8192])
                self.wfile.flush()
                time.sleep(STATE.seconds)
            return
        self.answer(status, body, headers, sent)
        if sent < len(body):
            self.wfile.flush()
            time.sleep(STATE.seconds if fault == "stall_body" else 0)
            if fault != "short":
                raise Broken
            self.close_connection = True

    def answer(self, status, body, headers=None, sent=None):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:sent])

    def sever(self):
        """Ends the connection with a reset."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def resource(self, name, stored):
        fault = self.fault
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.data)),
            "crc32c": crc32c(stored.data + b"?" * (fault == "wrong_crc")),
            "contentType": "application/octet-stream",
        }

    def found(self, name, generation=None):
        stored = STATE.objects.get(name)
        if stored is None or generation not in (None, str(stored.generation)):
            raise Refused(404)
        return stored

    def missing(self):
        raise Refused(404)

    def policies(self):
        known = STATE.settings
        described = {
            "kind": "storage#bucket",
            "name": BUCKET,
            "versioning": {"enabled": known["versioning"]},
            "softDeletePolicy": {"retentionDurationSeconds": str(known["soft_delete"])},
        }
        if known["retention"]:
            described["retentionPolicy"] = {"retentionPeriod": str(known["retention"])}
        return 200, {}, json.dumps(described).encode()

    def listing(self):
        names = sorted(name for name in STATE.objects if name.startswith(self.query.get("prefix", "")))
        start = int(self.query.get("pageToken") or 0)
        end = start + min(int(self.query.get("maxResults") or 1000), STATE.settings["page"])
        answer = {"kind": "storage#objects", "items": [self.resource(name, STATE.objects[name]) for name in names[start:end]]}
        if end < len(names):
            answer["nextPageToken"] = str(end)
        return 200, {}, json.dumps(answer).encode()

    def metadata(self, name):
        return 200, {}, json.dumps(self.resource(name, self.found(name, self.query.get("generation")))).encode()

    def remove(self, name):
        self.found(name)
        STATE.check(name, self.query)
        del STATE.objects[name]
        return 204, {}, b""

    def download(self, name):
        stored = self.found(name, self.query.get("generation"))
        headers = {"X-Goog-Hash": f"crc32c={crc32c(stored.data)}", "X-Goog-Generation": stored.generation}
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
        data = stored.data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{len(stored.data)}"
        return 206, headers, data

    def keep(self, name, data, stated, query):
        """Stores an upload whose bytes have the checksum that came with them."""
        STATE.count("upload", received=len(data))
        if self.fault == "flip" and data:
            data = flipped(data)
        STATE.check(name, query)
        if stated is not None and stated != crc32c(data):
            raise Refused(400)
        if self.fault == "bad_disk" and data:
            data = flipped(data)  # after the check
        return json.dumps(self.resource(name, STATE.put(name, data))).encode()

    def upload_media(self):
        return 200, {}, self.keep(self.query["name"], self.body, None, self.query)

    def upload_multipart(self):
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, described, rest = self.body.split(b"--" + boundary, 2)
        described = json.loads(described.split(b"\r\n\r\n", 1)[1])
        data = rest.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--" + boundary + b"--", 1)[0]
        return 200, {}, self.keep(described["name"], data, described.get("crc32c"), self.query)

    def begin(self):
        described = json.loads(self.body)
        number = str(len(STATE.sessions))
        STATE.sessions[number] = {
            "name": described["name"],
            "crc32c": described.get("crc32c"),
            "query": self.query,
            "data": bytearray(),
            "done": None,
        }
        where = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
        return 200, {"Location": where}, b""

    def chunk(self):
        session = STATE.sessions[self.query["upload_id"]]
        if session["done"]:
            return 200, {}, session["done"]
        start, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]).groups()
        kept, body = session["data"], self.body
        STATE.count("chunk", received=len(body))
        if self.fault == "partial":
            body = body[: len(body) // 2]
        if self.fault == "flip" and body:
            body = flipped(body)
        if start is not None and int(start) <= len(kept):  # what it has already, it does not take again
            kept += body[len(kept) - int(start) :]
        if total == "*" or len(kept) < int(total):
            return 308, {"Range": f"bytes=0-{len(kept) - 1}"} if kept else {}, b""
        self.fault = "" if self.fault == "flip" else self.fault
        session["done"] = self.keep(session["name"], bytes(kept), session["crc32c"], session["query"])
        return 200, {}, session["done"]

    def rewrite(self, name, target):
        source = self.found(name, self.query.get("sourceGeneration"))
        STATE.check(target, self.query)
        token = self.query.get("rewriteToken") or f"token-{len(STATE.rewrites)}"
        begun = STATE.rewrites.setdefault(token, {"from": (name, source.generation), "done": 0})
        if begun["from"] != (name, source.generation):
            raise Refused(404)
        begun["done"] += STATE.settings["round"]
        size = len(source.data)
        answer = {"kind": "storage#rewriteResponse", "objectSize": str(size)}
        if begun["done"] < size:
            answer |= {"done": False, "rewriteToken": token, "totalBytesRewritten": str(begun["done"])}
        else:
            data = flipped(source.data) if self.fault == "flip" and source.data else source.data
            resource = self.resource(target, STATE.put(target, data))
            answer |= {"done": True, "totalBytesRewritten": str(size), "resource": resource}
        return 200, {}, json.dumps(answer).encode()


def flipped(data):
    """The same bytes with one bit changed, in the middle."""
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


def control(verb, query, body):
    """What a test asks for: `reset`, `fail`, `put`, `get`, `objects`, `counters`."""
    with STATE.lock:
        if verb == "reset":
            STATE.reset(json.loads(body))
        elif verb == "fail":
            asked = json.loads(body)
            STATE.rules, STATE.seconds = asked["rules"], asked["seconds"]
            STATE.rate, STATE.kinds = asked["rate"], asked["kinds"]
            STATE.random = random.Random(asked["seed"]) if asked["rate"] else None
        elif verb == "put":
            return json.dumps(STATE.put(query["name"], body).generation).encode()
        elif verb == "get":
            return STATE.objects[query["name"]].data
        elif verb == "objects":
            described = {n: [o.generation, hashlib.sha256(o.data).hexdigest()] for n, o in sorted(STATE.objects.items())}
            return json.dumps(described).encode()
        elif verb == "counters":
            return json.dumps(STATE.counters).encode()
        return b"{}"


class Server:
    """Starts the service in a process of its own, and tells it what to hold and what to break."""

    def __init__(self):
        command = [sys.executable, os.path.abspath(__file__)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def close(self):
        self.process.kill()
        self.process.communicate()

    def _ask(self, verb, body=b"", **query):
        url = f"{self.url}/control/{verb}?{urllib.parse.urlencode(query)}"
        with self._opener.open(urllib.request.Request(url, data=body, method="POST"), timeout=60) as response:
            return response.read()

    def reset(self, **settings):
        """Empties the bucket; settings: page (names per list), round (bytes per rewrite), versioning, soft_delete, ..."""
        self._ask("reset", json.dumps(settings).encode())

    def fail(self, *rules, rate=0.0, seed=0, kinds=None, seconds=1.0):
        """Sets the faults: rules (endpoint, kind[, times[, skip]]) first, then at `rate` random ones of `kinds` (None: all)."""
        names = ("endpoint", "kind", "times", "skip")
        named = [{"times": 1, **dict(zip(names, rule, strict=False))} for rule in rules]
        asked = {"rules": named, "rate": rate, "seed": seed, "kinds": kinds, "seconds": seconds}
        self._ask("fail", json.dumps(asked).encode())

    def put(self, name, data):
        """Stores an object, as somebody else would, and returns its generation."""
        return json.loads(self._ask("put", data, name=name))

    def get(self, name):
        return self._ask("get", name=name)

    def objects(self):
        """{name: [generation, SHA-256]} of all objects."""
        return json.loads(self._ask("objects"))

    def counters(self):
        """{endpoint: {"requests", "in", "out"}}, the latter two in bytes of objects."""
        return json.loads(self._ask("counters"))


@contextmanager
def connected(server, environment, deadline=5.0):
    """Leads this process, and those that it starts, to the server: sets variables in `environment` (a pytest.MonkeyPatch)."""
    from flexjax.bucket import objects

    environment.setenv("STORAGE_EMULATOR_HOST", server.url)
    environment.setenv("FLEXJAX_STORAGE_DEADLINE", str(deadline))
    environment.setenv("NO_PROXY", "127.0.0.1")
    server.reset()
    try:
        yield f"gs://{BUCKET}"
    finally:
        server.fail()
        objects.client().close()


class Service(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError | ValueError):  # ValueError: the socket was severed
            super().handle_error(request, client_address)


if __name__ == "__main__":
    service = Service(("127.0.0.1", 0), Handler)
    print(service.server_address[1], flush=True)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()  # ends when whoever started it does
