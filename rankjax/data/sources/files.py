"""Reading what others wrote: columns checked, downloads hash-checked, archives unpacked safely.

Everything a source reads comes through here, so that a missing file or column, a wrong type, a
null or an archive that climbs out of its folder is refused alike: ValueError with the file, what
was found and what was expected.
"""

import hashlib
import json
import os
import pathlib
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl
import pooch
import rich.progress

# What a column may be: a test of its type, and what it is read as. A "?" behind the kind allows
# nulls. "time" is whole seconds, or a date and time as published, read as UTC.
_NUMBER = (lambda t: t.is_numeric(), pl.Float64)
_WHOLE = (lambda t: t.is_integer(), pl.Int64)
_TEXT = (lambda t: t == pl.String, pl.String)
KINDS = {
    "int": _WHOLE,
    "float": _NUMBER,
    "text": _TEXT,
    "bool": (lambda t: t == pl.Boolean, pl.Boolean),
    "time": (lambda t: t.is_integer() or isinstance(t, pl.Datetime), pl.Int64),
}


def require(folder: str | os.PathLike, names: Sequence[str]) -> list[pathlib.Path]:
    """The paths of these files in `folder`; ValueError where one is not there."""
    folder = pathlib.Path(folder)
    for name in names:
        if not (folder / name).is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
            raise ValueError(f"{folder}: found {found}, expected the file {name!r}")
    return [folder / name for name in names]


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(folder: str | os.PathLike, paths: Iterable[pathlib.Path]) -> dict[str, str]:
    """{path below `folder`: sha256} of the files."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def check_columns(path: pathlib.Path, found: Sequence[str], expected: Sequence[str]) -> None:
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{path}: found columns {list(found)}, expected {missing} too")


def check_nulls(path: pathlib.Path, table: pl.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        null = table[name].is_null()
        if null.any():
            row = null.arg_true()[0]
            raise ValueError(f'{path}, column "{name}": row {row} is empty, expected a value')


def _typed(path: pathlib.Path, name: str, kind: str, dtype: pl.DataType) -> pl.Expr:
    """The column as its kind is read; ValueError where its type does not fit."""
    kind = kind.removesuffix("?")
    inner, column = kind.removeprefix("list of "), pl.col(name)
    many = inner != kind
    fits, target = KINDS[inner]
    if many != isinstance(dtype, pl.List) or not fits(dtype.inner if many else dtype):
        raise ValueError(f'{path}, column "{name}": found type {dtype}, expected {kind}')
    if inner == "time" and isinstance(dtype.inner if many else dtype, pl.Datetime):
        return column.list.eval(pl.element().dt.epoch("s")) if many else column.dt.epoch("s")
    return column.cast(pl.List(target) if many else target)


def parquet_columns(path: pathlib.Path) -> dict[str, pl.DataType]:
    """{column: type}; ValueError where the file is no readable Parquet."""
    try:
        return dict(pl.read_parquet_schema(path))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: found {error}, expected a readable Parquet file") from error


def read_parquet(path: pathlib.Path, kinds: Mapping[str, str]) -> pl.DataFrame:
    """The columns of `kinds` {name: kind}, a kind of KINDS, or "list of " one, and "?" for nulls.

    Raises ValueError: no readable Parquet; a column is missing, of another type, or has nulls.
    """
    found = parquet_columns(path)
    check_columns(path, list(found), list(kinds))
    typed = [_typed(path, name, kind, found[name]) for name, kind in kinds.items()]
    try:
        table = pl.read_parquet(path, columns=list(kinds)).select(typed)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: found {error}, expected a readable Parquet file") from error
    check_nulls(path, table, [name for name, kind in kinds.items() if not kind.endswith("?")])
    return table


def read_csv(path: pathlib.Path, kinds: Mapping[str, str]) -> pl.DataFrame:
    """As `read_parquet`, of a comma-separated UTF-8 file with a header ("int", "float", "text")."""
    try:
        check_columns(path, pl.read_csv(path, n_rows=0).columns, list(kinds))
        types = {name: KINDS[kind][1] for name, kind in kinds.items()}
        table = pl.read_csv(path, columns=list(kinds), schema_overrides=types)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: found {error}, expected columns {dict(kinds)}") from error
    check_nulls(path, table, list(kinds))
    return table.select(list(kinds))


def read_separated(
    path: pathlib.Path, separator: str, fields: int, kinds: Mapping[int, tuple[str, str]]
) -> pl.DataFrame:
    """A latin-1 file without header whose separator may have several characters ("::").

    fields: how many every line has. kinds: {field from 0: (name, "int" or "text")}.
    """
    # Not splitlines(): in latin-1 it would cut titles at 0x85.
    lines = pl.Series("", path.read_bytes().decode("latin-1").split("\n")).str.strip_chars_end("\r")
    if lines.len() and lines[-1] == "":
        lines = lines.head(-1)
    parts = lines.str.split(separator)
    wrong = parts.list.len() != fields
    if wrong.any():
        row = wrong.arg_true()[0]
        raise ValueError(
            f"{path}: line {row + 1} has {len(parts[row])} fields parted by {separator!r}, "
            f"expected {fields}"
        )
    columns = []
    for field, (name, kind) in kinds.items():
        text = parts.list.get(field).alias(name)
        column = text.cast(KINDS[kind][1], strict=False)
        if column.null_count():
            row = column.is_null().arg_true()[0]
            raise ValueError(
                f'{path}, field {field} ("{name}"): line {row + 1} holds {text[row]!r}, '
                f"expected {kind}"
            )
        columns.append(column)
    return pl.DataFrame(columns)


def vocabulary(*columns: pl.Series) -> np.ndarray:
    """The distinct values but null, sorted; `index` numbers them from 1."""
    return np.unique(np.concatenate([c.drop_nulls().unique().to_numpy() for c in columns]))


def index(words: np.ndarray, values: pl.Series) -> np.ndarray:
    """int32 ids, 1 + the place in the sorted `words`; 0 where null or not among them."""
    known = values.is_not_null().to_numpy()
    out = np.zeros(len(values), np.int32)
    present = values.drop_nulls().to_numpy()
    place = np.searchsorted(words, present)
    found = words[np.minimum(place, len(words) - 1)] == present if len(words) else place < 0
    out[known] = np.where(found, place + 1, 0)
    return out


class _Bar:
    """A rich progress bar with the few methods that pooch calls."""

    def __init__(self, name: str):
        self.total = 0
        self._progress = rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            rich.progress.DownloadColumn(),
            console=rich.console.Console(stderr=True),
        )
        self._task = self._progress.add_task(name, total=None)

    def update(self, amount: int) -> None:
        self._progress.start()
        self._progress.update(self._task, total=self.total or None, advance=amount)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop()


def fetch(url: str, folder: str | os.PathLike, *, pinned: str | None = None) -> pathlib.Path:
    """Downloads `url` into `folder` with progress, or takes what lies there; checks its hash.

    pinned: "md5:..." or "sha256:..." as published. None = none is published: then the sha256 is
    recorded beside the file (<name>.sha256.json) at first use, said so on stderr, and checked from
    then on.
    Raises ValueError for a wrong hash, OSError where the download fails.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = url.rsplit("/", 1)[-1]
    record = folder / f"{name}.sha256.json"
    expected = pinned
    if pinned is None and record.exists():
        expected = f"sha256:{json.loads(record.read_text())['sha256']}"
    get = pooch.HTTPDownloader(progressbar=_Bar(name), timeout=60)
    try:
        path = pathlib.Path(pooch.retrieve(url, expected, fname=name, path=folder, downloader=get))
    except OSError as error:
        raise OSError(
            f"{url}: the download failed ({error}); the file may be put at {folder / name} by hand"
        ) from error
    if expected is None:
        found = sha256(path)
        facts = {"url": url, "sha256": found, "bytes": path.stat().st_size}
        note = "no hash is published; recorded at first use and checked from then on"
        record.write_text(json.dumps({**facts, "note": note}, indent=1))
        print(f"{path}: sha256 {found}: {note} ({record.name})", file=sys.stderr)
    return path


def _check_member(archive: pathlib.Path, member: zipfile.ZipInfo) -> None:
    """Raises ValueError for a member that could end up outside the folder, or is no plain file."""
    name = member.filename
    parts = name.replace("\\", "/").split("/")
    problem = ""
    if name.startswith(("/", "\\")) or ":" in parts[0]:
        problem = "an absolute path"
    elif ".." in parts:
        problem = "a path that climbs out of the folder"
    elif "\\" in name:
        problem = "a path with backslashes"
    elif (kind := stat.S_IFMT(member.external_attr >> 16)) not in (0, stat.S_IFREG, stat.S_IFDIR):
        problem = "a link" if kind == stat.S_IFLNK else "a special file"
    elif member.flag_bits & 1:
        problem = "an encrypted file"
    if problem:
        raise ValueError(f"{archive}: member {name!r} is {problem}, expected plain files inside")


def unpack(
    archive: pathlib.Path, folder: str | os.PathLike, *, max_bytes: int = 16 << 30
) -> pathlib.Path:
    """Unpacks a zip into `folder`, all or nothing; a folder that is there already stays as it is.

    Raises ValueError, before anything is written, where the file is no zip, a member's path climbs
    out, is absolute or is a link, or the members are larger than `max_bytes` together.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        return folder
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                _check_member(archive, member)
            size = sum(member.file_size for member in opened.infolist())
            if size > max_bytes:
                raise ValueError(f"{archive}: holds {size} bytes, expected at most {max_bytes}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                opened.extractall(temporary)
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: found {error}, expected a zip archive") from error
    return folder
