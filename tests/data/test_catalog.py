"""The catalog: names, files of the user, and downloads from a server on this machine."""

import errno
import hashlib
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pooch
import pytest
from baby_xp_data import catalog

from baby_xp.errors import BabyError

TEXT = "Good night, moon. Good night, caf\u00e9.\n".encode() * 50


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(200 if self.path != "/missing.txt" else 404)
        body = TEXT[:100] if self.path == "/cut.txt" else TEXT
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def no_proxy(monkeypatch):
    """Servers on this machine are reached without the proxy that the environment may name."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def server(no_proxy):
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.paths = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder that does not exist yet, and no folder of the user."""
    folder = tmp_path / "cache" / "baby_xp"
    monkeypatch.delenv(catalog.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: folder.parent / project)
    return folder


@pytest.fixture
def add(monkeypatch):
    def add(url, content=TEXT):
        entry = catalog.Entry("moon", url, hashlib.sha256(content).hexdigest(), "moon.txt")
        monkeypatch.setitem(catalog.TEXTS, "moon", entry)
    return add


def url(server, path="/moon.txt"):
    return f"http://127.0.0.1:{server.server_port}{path}"


def failure(name="moon"):
    with pytest.raises(BabyError) as caught:
        catalog.find(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names():
    assert catalog.names() == ["nursery", "equations", "shakespeare"]
    for name, entry in catalog.TEXTS.items():
        assert entry.name == name
        assert entry.url.startswith("https://")
        assert len(bytes.fromhex(entry.sha256)) == 32
    assert failure("homer") == "no text is called 'homer'; the names are nursery, equations, shakespeare"
    for name in catalog.BUILT_IN:
        assert "is generated" in failure(name)


def test_download_once(server, cache, add, capfd):
    add(url(server))
    level = pooch.get_logger().level
    path = catalog.find("moon")
    assert pooch.get_logger().level == level
    assert path == cache / "moon.txt"
    assert path.read_bytes() == TEXT
    add("http://127.0.0.1:9/moon.txt")  # an address where no server answers
    assert catalog.find("moon") == path
    assert server.paths == ["/moon.txt"]
    assert [p.name for p in cache.iterdir()] == ["moon.txt"]
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_in_the_cache_is_downloaded_again(server, cache, add):
    add(url(server))
    catalog.find("moon").write_bytes(TEXT[:-1])
    assert catalog.find("moon").read_bytes() == TEXT
    assert len(server.paths) == 2


@pytest.mark.parametrize(("path", "content", "reason"), [
    ("/moon.txt", b"another text", "the download is not the expected text"),
    ("/missing.txt", TEXT, "the server answered 404"),
    ("/cut.txt", TEXT, "("),
])
def test_a_failed_download(server, cache, add, capfd, path, content, reason):
    add(url(server, path), content)
    message = failure()
    assert message.startswith("moon could not be downloaded (")
    assert reason in message
    assert f"download {url(server, path)} to {cache / 'moon.txt'}, or " in message
    assert "--data" in message
    assert "set BABY_XP_DATA to a folder that holds moon.txt" in message
    assert list(cache.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_refused_connection(cache, add, no_proxy):
    with socket.socket() as taken:  # bound but not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        add(f"http://127.0.0.1:{taken.getsockname()[1]}/moon.txt")
        assert "moon could not be downloaded (ConnectionError): " in failure()
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_an_error(server, cache, add):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    add(url(server))
    assert "could not be downloaded" in failure()
    assert server.paths == []


def test_the_folder_of_the_user_comes_first(server, cache, add, tmp_path, monkeypatch):
    add(url(server))
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, str(tmp_path))
    assert catalog.find("moon") == cache / "moon.txt"  # the folder does not contain it
    (tmp_path / "moon.txt").write_bytes(TEXT)
    assert catalog.find("moon") == tmp_path / "moon.txt"
    assert len(server.paths) == 1


def test_a_wrong_file_in_the_folder_of_the_user(server, cache, add, tmp_path, monkeypatch):
    add(url(server))
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "moon.txt").write_bytes(TEXT + b"!")
    message = failure()
    assert message.startswith(f"{tmp_path / 'moon.txt'} is not the expected moon (its SHA-256 differs)")
    assert server.paths == []


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/texts", "nowhere", "moon.txt/texts"])
def test_a_missing_folder_of_the_user_counts_as_empty(server, cache, add, tmp_path, monkeypatch, folder):
    add(url(server))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moon.txt").write_bytes(TEXT)
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, folder)
    assert catalog.find("moon") == cache / "moon.txt"


@pytest.mark.parametrize("function", ["stat", "open"])
def test_a_folder_or_file_of_the_user_without_permission(server, cache, add, tmp_path, monkeypatch, function):
    (tmp_path / "moon.txt").write_bytes(TEXT)
    add(url(server))
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, str(tmp_path))
    target, name = (os, "stat") if function == "stat" else (Path, "open")
    real = getattr(target, name)

    def denied(path, *arguments, **more):
        if isinstance(path, Path) and path.name == "moon.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(target, name, denied)
    message, advice = failure().split("; ")
    assert message == f"{tmp_path / 'moon.txt'} cannot be read ({os.strerror(errno.EACCES)})"
    assert advice == "check its permissions and those of its folders, or name another place with BABY_XP_DATA"
    assert server.paths == []


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege")
def test_circular_links_of_the_user(server, cache, add, tmp_path, monkeypatch):
    (tmp_path / "moon.txt").symlink_to("moon.txt")
    add(url(server))
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, str(tmp_path))
    assert "symbolic links lead in a circle" in failure()
