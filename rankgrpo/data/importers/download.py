"""A file from the network, kept only if it is, bit for bit, the one that was asked for."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from rankgrpo.errors import DataError
from rankgrpo.files.atomic import TEMPORARY, sync

CHUNK = 1 << 20
TIMEOUT_S = 60


def fetch_if_url(source: str, sha256: str | None, folder: Path) -> Path:
    """The local path of a source; of a URL the file that is downloaded into `folder`."""
    if source.startswith(("http://", "https://")):
        if sha256 is None:
            raise DataError(f"{source}: a URL needs --sha256, the checksum of the file that you mean")
        return download(source, sha256, folder)
    if sha256 is not None:
        raise DataError(f"--sha256 belongs to a URL, and {source} is none")
    return Path(source)


def download(url: str, sha256: str, folder: Path) -> Path:
    """The file of a URL in `folder`; one that is there with this checksum is not fetched again.

    Raises DataError when it cannot be fetched or is another file, and keeps nothing of it then.
    """
    sha256 = sha256.lower()
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DataError(f"{url}: --sha256 must be the 64 hexadecimal digits of the file's checksum, got {sha256!r}")
    path = folder / (Path(unquote(urlsplit(url).path)).name or "download")
    if path.is_file() and _checksum(path) == sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        found = _fetch(url, partial)
        if found != sha256:
            raise DataError(f"{url}: another file than asked for: its sha256 is {found}, expected {sha256}")
        sync(partial)
        os.replace(partial, path)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"{url}: not fetched ({error}); download it by other means and import the file") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, partial: Path) -> str:
    """Write the response into a file; its checksum."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, partial.open("wb") as file:
        total = response.headers.get("Content-Length")
        with tqdm(total=int(total) if total else None, desc=partial.name, unit="B", unit_scale=True) as bar:
            while chunk := response.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
