"""The mixer under load and under attack: many visitors at once, and requests that make no sense.

Visitors speak to the page's own endpoints over HTTP, as the browser does: they press buttons, read the
stream of frames, and close their tab. What a button does is looked up in the page's description.
"""

import asyncio
import json
import secrets
import tempfile
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from helpers import card, network

import composable_ebm as ceb
from composable_ebm.experts import catalogue
from composable_ebm.experts.library import Library
from demos.mixer import app, clock
from demos.mixer import runs as runs_module
from demos.mixer.clock import FRAMES_PER_SECOND
from demos.mixer.guard import MAX_BODY_BYTES, Guard
from demos.mixer.runs import Runs
from demos.mixer.served import served
from demos.mixer.state import Limits, Request

httpx = pytest.importorskip("httpx")
TestClient = pytest.importorskip("fastapi.testclient").TestClient

USERS = 20
FRAMES = 5  # that everyone must get, however busy the machine is
MEGABYTE = 2**20
GROWTH = 40 * MEGABYTE  # what allocators keep to themselves; a leaking frame would be seen long before
NAN, INFINITY = float("nan"), float("inf")
SHAPE = (3, 16, 16)
RECIPE = "toys/base + 2*ratio(toys/hat, toys/hat[any])"
OTHER = "toys/base + 3*ratio(~toys/hat, toys/hat[any]) + ratio(toys/hue[red], toys/hue[any])"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    described = [
        card("base", ("image",), "toys", SHAPE, attribute="image"),
        card("hat", ("bare", "hat"), "toys", SHAPE),
        card("hue", ("red", "green", "blue"), "toys", SHAPE),
    ]
    for seed, each in enumerate(described):
        ceb.save_expert(folder / each.full_name, network(each, seed), each)
    return folder


class Server:
    """A page with a temporary folder of its own."""

    def __init__(self, mixer):
        self.process, self.temporary = mixer.process, mixer.temporary
        self.url = mixer.address.rstrip("/")

    @property
    def memory(self):
        """Bytes that the process holds."""
        return psutil.Process(self.process.pid).memory_info().rss

    def files(self):
        """What lies in its temporary folder."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def running(self):
        """How many visitors have chains running."""
        return self.call("running")[0]

    def call(self, name, *arguments):
        """The answer of an endpoint of the API; raises `Refused` with its error."""
        # Not `json=`, which would not write NaN.
        content = json.dumps({"data": list(arguments)})
        headers = {"content-type": "application/json"}
        start = httpx.post(f"{self.url}/gradio_api/call/{name}", content=content, headers=headers, timeout=60)
        if start.status_code != 200:
            raise Refused(start.text)
        event = start.json()["event_id"]
        answer = httpx.get(f"{self.url}/gradio_api/call/{name}/{event}", timeout=60).text
        kind, data = (line.partition(": ")[2] for line in answer.strip().split("\n")[-2:])
        if kind != "complete":
            raise Refused(data)
        return json.loads(data)

    def ask(self, path, **content):
        """What the page is answered."""
        headers = {"content-type": "application/json", "x-visitor": "visitor-of-a-test"}
        return httpx.post(
            f"{self.url}/ask/{path}", content=json.dumps(content), headers=headers, timeout=60
        ).json()


class Refused(Exception):
    """What the server says that is wrong with a request."""


class Visitor:
    """A browser's tab, open on the page."""

    def __init__(self, server, client):
        self.url, self.client = server.url, client
        self.headers = {"x-visitor": secrets.token_hex(8)}
        self.frames = 0
        self.ended = False
        self.problems = []

    async def ask(self, path, **content):
        """What the page is answered."""
        answer = await self.client.post(f"{self.url}/ask/{path}", json=content, headers=self.headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def play(self, seconds, recipe=RECIPE, chains=4, steer=None, leave=False, until=None):
        """Plays for some seconds, or longer, until something holds; then stops, or closes the tab."""
        reading = asyncio.create_task(self._read({"kind": "play", "recipe": recipe, "chains": chains}))
        await asyncio.sleep(seconds / 2)
        if steer:
            assert (await self.ask("read", recipe=steer))["recipe"] == steer
        await asyncio.sleep(seconds / 2)
        while until and not until():
            await asyncio.sleep(0.1)
        if not leave:
            await self.ask("stop")
            await asyncio.wait_for(reading, 60)
            assert self.ended
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, asked):
        asking = self.client.stream("POST", f"{self.url}/ask/run", json=asked, headers=self.headers)
        async with asking as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line)
                self.frames += message["kind"] == "frame"
                if message["kind"] == "error":
                    self.problems.append(message["problem"])
                self.ended = message["kind"] in ("end", "error")


def visit(server, count, seconds, until=None):
    """`count` visitors who play at once, a fifth of whom close their tab without a word."""

    async def run():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            visitors = [Visitor(server, client) for _ in range(count)]
            deadline = time.monotonic() + seconds + 60

            def enough():  # a busy machine takes longer
                return min(each.frames for each in visitors) >= FRAMES or time.monotonic() > deadline

            await asyncio.gather(
                *(
                    visitor.play(
                        seconds, leave=i % 5 == 4, steer=OTHER if i % 2 else None, until=until or enough
                    )
                    for i, visitor in enumerate(visitors)
                )
            )
            return visitors

    return asyncio.run(run())


def soon(check, seconds=30):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(models):
    with served("--num-threads", "1", models=models) as mixer:
        yield Server(mixer)


# -- many visitors ------------------------------------------------------------------------------------------


def check_load(server, seconds, share):
    """Twenty visitors all get frames, and a share of what the luckiest gets."""
    visit(server, USERS, 2)  # threads and arenas are made once
    soon(lambda: server.running() == 0)
    before = server.memory
    visitors = visit(server, USERS, seconds)
    frames = sorted(visitor.frames for visitor in visitors)
    assert frames[0] >= max(FRAMES, share * frames[-1]), frames
    assert not any(visitor.problems for visitor in visitors)
    soon(lambda: server.running() == 0)
    soon(lambda: server.memory < before + GROWTH)
    assert server.files() == []


def test_twenty_visitors_all_get_frames_and_memory_returns(server):
    check_load(server, 4, share=0)  # who comes last has little of four seconds


@pytest.mark.slow
def test_twenty_visitors_for_two_minutes_all_get_frames_and_memory_returns(server):
    check_load(server, 120, share=0.2)


# -- the guard, by itself -----------------------------------------------------------------------------------


def ask(guard, path="/", headers=(), pieces=(b"",)):
    """The answer (status, body) of an ASGI app to a request whose body comes in pieces."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "headers": list(headers)}, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), messages


async def echo(scope, receive, send):
    """Answers with the length of the body."""
    length = 0
    while (message := await receive())["more_body"]:
        length += len(message["body"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def test_guard_lets_small_requests_pass():
    assert ask(Guard(echo, 10), pieces=(b"12345", b"12345"))[:2] == (200, b"10")


@pytest.mark.parametrize("length", [b"11", b"-1", b"many", b"9" * 100])
def test_guard_refuses_large_requests_unread(length):
    status, body, unread = ask(Guard(echo, 10), headers=[(b"content-length", length)], pieces=[b"x"] * 3)
    assert status == 413
    assert b"at most" in body
    assert len(unread) == 3


def test_guard_stops_reading_a_body_that_grows_too_large():
    status, _, unread = ask(Guard(echo, 10), pieces=[b"123456"] * 100)
    assert status == 413
    assert len(unread) == 98


def test_guard_closes_paths():
    assert ask(Guard(echo), "/gradio_api/deep_link")[0] == 404
    assert ask(Guard(echo), "/gradio_api/queue/join")[0] == 200


@pytest.mark.parametrize("auth", [None, ("me", "secret")])
def test_what_is_served_is_closed_to_strangers(monkeypatch, auth):
    asked = {}

    def launch(**options):
        asked.update(options)
        raise KeyboardInterrupt

    found = SimpleNamespace(offer=SimpleNamespace(cards={}), close=lambda: None)
    monkeypatch.setattr(app, "build", lambda *options, **more: (SimpleNamespace(launch=launch), found))
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: name)  # with the extra installed
    with pytest.raises(KeyboardInterrupt):
        app.serve(auth=auth, root_path="/mixer")
    assert asked["server_name"] == "127.0.0.1"
    assert asked["auth"] == auth
    assert asked["root_path"] == "/mixer"
    assert asked["mcp_server"] is (auth is None)  # its tools would answer without the password
    assert not asked["share"]
    assert asked["state_session_capacity"] <= 1000  # a quarter of a megabyte each
    assert "allowed_paths" not in asked


def test_a_password_stands_before_all_that_the_page_does():
    server, runs = app.build(Limits())
    with TestClient(server) as client:
        server.auth, server.tokens, server.cookie_id = {"me": "secret"}, {"good": "me"}, "x"
        headers = {"x-visitor": "visitor-of-a-test"}
        assert "Log in" in client.get("/").text
        for path in ("world", "thumbs", "read", "run", "keep"):
            assert client.post(f"/ask/{path}", json={}, headers=headers).status_code == 401
        client.cookies.set("access-token-x", "good")
        assert "One-click starts" in client.get("/").text
        assert client.post("/ask/world", json={}, headers=headers).status_code == 200
        assert client.post("/ask/world", json={}).status_code == 400  # other sites cannot name a visitor
    runs.close()


@pytest.mark.parametrize("stripped", [False, True])
def test_a_proxy_may_show_the_page_under_a_path(stripped):
    server, runs = app.build(Limits())
    with TestClient(server, root_path="/mixer") as client:
        place = "" if stripped else "/mixer"
        page = client.get(f"{place}/").text
        assert 'src="page/main.js"' in page  # relative to wherever it is shown
        assert "http" not in page.replace("http-equiv", "")
        assert client.get(f"{place}/page/main.js").status_code == 200
        assert client.get(f"{place}/gradio_api/upload").status_code == 404
        headers = {"x-visitor": "visitor-of-a-test"}
        assert client.post(f"{place}/ask/world", json={}, headers=headers).status_code == 200
    runs.close()


# -- frames without end -------------------------------------------------------------------------------------


def play_frames(models, monkeypatch, tmp_path, count):
    """Drives the page's generator for `count` frames without waiting, and steers it now and then."""
    monkeypatch.setattr(catalogue, "model_folders", lambda: [models])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(clock, "FRAMES_PER_SECOND", 10**4)
    monkeypatch.setattr(runs_module, "MAX_PLAY_SECONDS", INFINITY)
    process = psutil.Process()
    runs = Runs(Library(), Limits())
    frames = runs.play(Request("toys/hat", 1, 10, 0), "visitor")
    recipe = "toys/hat"
    for step in range(count):
        next(frames)
        if step == min(200, count // 2):
            before = process.memory_info().rss
        if step % 100 == 99:
            recipe = "~toys/hat" if recipe != "~toys/hat" else "toys/hat"
            runs.steer(recipe, runs.understood(recipe, "visitor"), "visitor")
    assert process.memory_info().rss < before + GROWTH
    frames.close()
    assert runs.running() == 0
    runs.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # torch may make its empty folder


def test_frames_leave_no_file_and_no_memory(models, monkeypatch, tmp_path):
    play_frames(models, monkeypatch, tmp_path, 20 * FRAMES_PER_SECOND)


@pytest.mark.slow
def test_an_hour_of_frames_leaves_no_file_and_no_memory(models, monkeypatch, tmp_path):
    play_frames(models, monkeypatch, tmp_path, 3600 * FRAMES_PER_SECOND)


# -- requests that make no sense ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(server):
    """A visitor who plays all the while, to whom nothing happens."""
    visit(server, 2, 1)  # threads and arenas are made once
    server.call("sample", RECIPE, 64, 5, 0)
    server.ask("read", recipe="x" * 25 * MEGABYTE)
    before, over = server.memory, threading.Event()
    visitors = []
    thread = threading.Thread(target=lambda: visitors.extend(visit(server, 1, 2, until=over.is_set)))
    thread.start()
    yield
    over.set()
    thread.join()
    (visitor,) = visitors
    assert visitor.ended
    assert visitor.problems == []
    assert visitor.frames > FRAMES
    assert server.memory < before + GROWTH
    assert server.files() == []
    assert len(server.call("sample", RECIPE, 2, 1, 0)[0]["energies"]) == 2


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1e9*toys/hat", 4, 5, 0), "weight"),
        (("toys/base + 1e300*ratio(toys/hat, toys/hat[any])", 4, 5, 0), "weight"),
        (("toys/hat/1e-12", 4, 5, 0), "weight"),
        (("1e400*toys/hat", 4, 5, 0), "must be finite"),
        (("nan*toys/hat", 4, 5, 0), "unknown expert 'nan'"),
        (("toys/unicorn", 4, 5, 0), "unknown expert 'toys/unicorn'"),
        (("../../etc/passwd", 4, 5, 0), "'.' has no meaning in a recipe"),
        (("/etc/passwd", 4, 5, 0), "expected an expert"),
        (("toys/../toys/hat", 4, 5, 0), "has no meaning in a recipe|unknown expert|expected"),
        (("toys/hat\x00", 4, 5, 0), "has no meaning in a recipe"),
        (("C:\\windows", 4, 5, 0), "unknown expert 'C'|has no meaning"),
        (("https://example.org/expert", 4, 5, 0), "has no meaning|unknown expert"),
        (("__import__('os').system('id')", 4, 5, 0), "has no meaning|calls nothing but"),
        (("toys/hat + " * 5000 + "toys/hat", 4, 5, 0), "at most 10000 characters"),
        (("toys/hat", 10**6, 5, 0), "`num_chains` must be a whole number from 1 to 64, got 1000000"),
        (("toys/hat", 10**400, 5, 0), "`num_chains` must be"),
        (("toys/hat", NAN, 5, 0), "`num_chains` must be|JSON"),
        (("toys/hat", 4, -5, 0), "`num_steps` must be a whole number from 0 to 2000, got -5"),
        (("toys/hat", 4, INFINITY, 0), "`num_steps` must be|JSON"),
        (("toys/hat", 4, 10**9, 0), "`num_steps` must be"),
        (("toys/hat", 4, 5, -1), "`seed` must be"),
        (("toys/hat", 4, 5, "../0"), "`seed` must be"),
        (("toys/hat", [4], {"a": 5}, 0), "`num_chains` must be"),
        ((None, 4, 5, 0), "`recipe` must be text"),
        (({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, 4, 5, 0), "error"),
    ],
)
def test_bad_requests_get_a_clear_answer(server, arguments, message):
    with pytest.raises(Refused, match=message):
        server.call("sample", *arguments)


@pytest.mark.usefixtures("undisturbed")
def test_numbers_of_the_page_are_not_trusted_either(server):
    async def run():
        async with httpx.AsyncClient(timeout=60) as client:
            visitors = [Visitor(server, client) for _ in range(2)]
            await visitors[0].play(1, chains=10**6)
            await visitors[1].play(1, recipe="1e9*toys/hat", chains=-3)
            return visitors

    many, heavy = asyncio.run(run())
    assert many.problems == []  # as many as there may be
    assert "a weight may be 1000 here at most" in heavy.problems[0]
    assert heavy.ended
    assert many.ended


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    "texts",
    [
        {"recipe": "<script>alert(1)</script>"},
        {"recipe": "1e9*toys/hat"},
        {"recipe": "../../etc/passwd"},
        {"recipe": "toys/hat", "num_chains": "1000000"},
        {"recipe": "(" * 9000},
        {"recipe": ["toys/hat"]},
        {},
    ],
)
def test_hostile_pictures_are_explained(server, texts):
    said = server.ask("read", texts=texts)
    assert said["problem"]
    assert "words" not in said


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("read", {"mix": {"family": "toys", "picks": {"toys/hat": {"values": [1]}}}}),
        ("read", {"mix": 3}),
        ("read", {}),
        ("heat", {"recipe": RECIPE, "picture": "file:///etc/passwd"}),
        ("heat", {"recipe": RECIPE}),
        ("example", {"recipe": RECIPE}),
        ("film", {"chain": 3}),
        ("pack", {"pictures": ["data:image/png;base64,!!"]}),
        ("pack", {"pictures": [{"a": 1}]}),
        ("keep", {"name": "../../etc/passwd"}),
    ],
)
def test_nonsense_of_the_page_is_answered_with_a_sentence(server, path, content):
    assert server.ask(path, **content)["problem"]


@pytest.mark.usefixtures("undisturbed")
def test_an_upload_of_a_hundred_megabytes_is_refused(server):
    before, highest = server.memory, []

    def content(megabytes):
        for _ in range(megabytes):
            highest.append(server.memory)
            yield bytes(MEGABYTE)

    form = {"content-type": "multipart/form-data; boundary=x"}
    as_json = {"content-type": "application/json"}
    declared = {"content-length": str(100 * MEGABYTE)}
    # With a length, and then in chunks, where the length only shows as they come.
    for path, headers in (
        ("upload", {**form, **declared}),
        ("call/sample", as_json),
        ("../ask/read", {**as_json, "x-visitor": "visitor-of-a-test"}),
    ):
        try:
            url = f"{server.url}/gradio_api/{path}".replace("/gradio_api/..", "")
            status = httpx.post(url, content=content(100), headers=headers, timeout=60).status_code
        except httpx.TransportError:
            continue  # the server has hung up
        assert status in (400, 404, 413)
    assert max(highest) < before + GROWTH + MAX_BODY_BYTES
    assert server.files() == []


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../etc/passwd",
        "gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/file/etc/passwd",
        "gradio_api/proxy=https://example.org/",
        "gradio_api/deep_link?session_hash=x",
        "static/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "svelte/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "../etc/passwd",
        "page/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "page/..%2fapp.py",
        "page/starts.toml",
        "docs",
        "openapi.json",
    ],
)
def test_no_path_leads_to_a_file(server, path):
    answer = httpx.get(f"{server.url}/{path}", timeout=20)
    assert answer.status_code >= 400
    assert "root:" not in answer.text
