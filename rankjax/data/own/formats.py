"""The rows of Parquet, CSV and Arrow files as frames, whatever their columns mean.

What cannot be read (half a file, a missing column, a line with too many cells) is a ValueError that
names the file and, of CSV files, the row, counted from 0 without the header.
"""

import codecs
import contextlib
import pathlib
import re
from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from rankjax.data.own import places, schema_file

PARQUET, CSV, ARROW = (".parquet", ".pq"), (".csv", ".tsv", ".txt"), (".arrow", ".feather", ".ipc")
HEAD = 16 << 20  # bytes of a CSV file that the types of its columns are told from
BLOCK = 4 << 20  # bytes of a CSV file that are parsed at once; pyarrow reads up to 32 blocks ahead
BATCH = 1 << 18  # rows of a Parquet or Arrow file that are decoded at once
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # what a writer of an Arrow stream closes it with

_CELL = re.compile(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to ([^:]+): (.*)", re.S)
_LINE = re.compile(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", re.S)


def columns_of(path: pathlib.Path, spec: schema_file.Files) -> list[str]:
    """The names of a file's columns, from its header."""
    with _refusals(path):
        kind = _kind(path)
        if kind in PARQUET:
            with opened_parquet(path) as file:
                names = list(file.schema_arrow.names)
                return [*names, *(n for n in places.hive(path) if n not in names)]
        if kind in ARROW:
            with pa.memory_map(str(path)) as source:
                return list(_opened(path, source).schema.names)
        return list(_head(path, spec).names)


def raw_frames(
    path: pathlib.Path,
    spec: schema_file.Files,
    wanted: list[str] | None,
    more: schema_file.Negatives | None,
) -> Iterator[pl.DataFrame]:
    """The file's frames of any size, at least one, columns as they are; None = all columns."""
    with _refusals(path):
        kind = _kind(path)
        if kind in PARQUET:
            yield from _parquet(path, wanted)
        elif kind in ARROW:
            yield from _arrow(path, wanted)
        else:
            yield from _csv(path, spec, wanted, more)


def _kind(path: pathlib.Path) -> str:
    """The suffix, without .gz; ValueError where there is no file, nothing in it, or another one."""
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()
    if not path.is_file() or path.stat().st_size == 0:
        found = "an empty file" if path.is_file() else "no such file"
        raise ValueError(f"{path}: found {found}, expected rows")
    if kind not in (known := [*PARQUET, *CSV, *ARROW]):
        raise ValueError(f"{path}: found suffix {path.suffix!r}, expected one of {known}")
    if places.is_remote(path) and kind not in PARQUET:
        raise ValueError(
            f"{path}: found a {kind} file in an object store, expected Parquet there; copy it here"
        )
    return kind


@contextlib.contextmanager
def _refusals(path: pathlib.Path) -> Iterator[None]:
    """What the libraries say of a file, as a ValueError that names it."""
    try:
        yield
    except MemoryError:  # PyArrow's is one of its exceptions too, and the file is whole
        raise
    except (
        *(pa.ArrowException, OSError, UnicodeDecodeError),
        *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
    ) as error:
        raise ValueError(
            f"{path}: found {error}, expected a whole file of rows that all fit its columns"
        ) from error


def _checked(path: pathlib.Path, found: list[str], wanted: list[str] | None) -> list[str]:
    """The columns to read; ValueError where one is missing or there twice."""
    if wanted is None:
        return list(dict.fromkeys(found))
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{path}: found columns {found}, expected {missing} too")
    if twice := [name for name in wanted if found.count(name) > 1]:
        raise ValueError(f"{path}: found columns {twice} more than once, expected one of each")
    return wanted


@contextlib.contextmanager
def opened_parquet(path: pathlib.Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(path.open("rb")) if places.is_remote(path) else path
        yield stack.enter_context(
            pyarrow.parquet.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
        )


def _parquet(path: pathlib.Path, wanted: list[str] | None) -> Iterator[pl.DataFrame]:
    with opened_parquet(path) as file:
        own = file.schema_arrow.names
        folders = {name: x for name, x in places.hive(path).items() if name not in own}
        wanted = _checked(path, [*own, *folders], wanted)
        _check_place(path, file.metadata)
        # Where only folders are asked for, a column of the file tells how many rows there are.
        inside = [name for name in wanted if name not in folders] or own[:1]
        more = [pl.lit(folders[name], pl.String).alias(name) for name in wanted if name in folders]
        if file.metadata.num_rows == 0:
            empty = pl.from_arrow(file.schema_arrow.empty_table().select(inside))
            yield empty.with_columns(more).select(wanted)
        for batch in file.iter_batches(batch_size=BATCH, columns=inside):
            yield pl.from_arrow(batch).with_columns(more).select(wanted)


def _check_place(path: pathlib.Path, meta: pyarrow.parquet.FileMetaData) -> None:
    """Raises ValueError where bytes before the footer are gone, which decoders may not notice."""
    end = 0
    for group in map(meta.row_group, range(meta.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            end = max(end, start + column.total_compressed_size)
    footer = path.stat().st_size - 8 - meta.serialized_size  # 8: the footer's length, magic bytes
    if end > footer:
        raise ValueError(
            f"{path}: found {footer} bytes before the footer, expected at least {end}, as it says"
        )


def _arrow(path: pathlib.Path, wanted: list[str] | None) -> Iterator[pl.DataFrame]:
    with pa.memory_map(str(path)) as source:
        file = _opened(path, source)
        wanted = _checked(path, file.schema.names, wanted)
        yield pl.from_arrow(file.schema.empty_table().select(wanted))
        batches = file
        if isinstance(file, pa.ipc.RecordBatchFileReader):
            batches = map(file.get_batch, range(file.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                rows = batch.select(wanted).slice(start, BATCH)
                rows.validate(full=True)  # Polars trusts offsets and lengths
                yield pl.from_arrow(rows)


def _opened(
    path: pathlib.Path, source: pa.MemoryMappedFile
) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid as error:
        source.seek(max(source.size() - len(STREAM_END), 0))
        if source.read() != STREAM_END:  # a stream may be cut between two batches
            raise ValueError(
                f"{path}: found neither an Arrow file ({error}) nor the end of an Arrow stream, "
                "expected a whole file"
            ) from error
        source.seek(0)
        return pa.ipc.open_stream(source)


def _csv(
    path: pathlib.Path,
    spec: schema_file.Files,
    wanted: list[str] | None,
    more: schema_file.Negatives | None,
) -> Iterator[pl.DataFrame]:
    head = _head(path, spec)
    wanted = _checked(path, head.names, wanted)
    types = {f.name: _csv_type(f.type) for f in head}
    open_ = (pa.int64(), pa.null())  # later cells may hold more than those of the head
    types |= {n: pa.float64() for n in _number_columns(spec, more) if types.get(n) in open_}
    if spec.time_unit in schema_file.UNITS:
        birth = getattr(spec, "birth", "")
        types |= {birth: pa.int64()} if types.get(birth) == pa.null() else {}
    text = _text_columns(spec)
    types = {n: pa.string() if n in text or t == pa.null() else t for n, t in types.items()}
    convert = pyarrow.csv.ConvertOptions(
        column_types={n: types[n] for n in wanted}, include_columns=wanted
    )
    try:
        with pyarrow.csv.open_csv(path, **_options(spec, BLOCK), convert_options=convert) as reader:
            yield pl.from_arrow(reader.schema.empty_table())
            for batch in reader:
                # An empty cell is missing, but "NA" is a country; in numbers both are.
                yield pl.from_arrow(batch).with_columns(pl.col(pl.String).replace("", None))
    except pa.ArrowInvalid as error:
        raise _explained(path, spec, head.names, error) from error


def _options(spec: schema_file.Files, block: int) -> dict[str, object]:
    """One thread, because pyarrow tells the row of an error only then."""
    return {
        "read_options": pyarrow.csv.ReadOptions(
            column_names=spec.header, block_size=block, use_threads=False
        ),
        "parse_options": pyarrow.csv.ParseOptions(
            delimiter=spec.separator, newlines_in_values=True
        ),
    }


def _head(path: pathlib.Path, spec: schema_file.Files) -> pa.Schema:
    """A CSV file's columns and their types, told from its first HEAD bytes.

    Only those are read: a streaming reader of the whole file would read 32 such blocks ahead.
    """
    with pa.input_stream(str(path), compression="detect") as source:
        text = source.read(HEAD + 1)  # one more, so that a row that HEAD cuts is left out
    if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{path}: found UTF-16 text, expected UTF-8")
    head, convert = pa.BufferReader(text), pyarrow.csv.ConvertOptions(strings_can_be_null=True)
    try:
        with pyarrow.csv.open_csv(head, **_options(spec, HEAD), convert_options=convert) as reader:
            return reader.schema
    except pa.ArrowInvalid as error:
        raise _explained(path, spec, [], error) from error


def _explained(
    path: pathlib.Path, spec: schema_file.Files, names: list[str], error: pa.ArrowInvalid
) -> ValueError:
    """pyarrow's error with our count of rows; it counts lines that are not empty from 1."""
    first, text = 1 if spec.header else 2, str(error)
    if found := _CELL.search(text):
        column, row, kind, what = found.groups()
        return ValueError(
            f'{path}, column "{names[int(column)]}": row {int(row) - first}: found {what}, '
            f"expected {kind}, as in the file's first {HEAD >> 20} MiB"
        )
    if found := _LINE.search(text):
        row, expected, cells, line = found.groups()
        return ValueError(
            f"{path}: row {int(row) - first} holds {cells} cells, {line!r}, expected {expected} "
            f"(separator {spec.separator!r}; a cell that holds it needs quotes)"
        )
    if "straddl" in text:
        return ValueError(
            f"{path}: found a row of more than {BLOCK >> 20} MiB, expected less (a quote that is "
            "never closed?)"
        )
    return ValueError(f"{path}: found {text}, expected a header and rows")


def _csv_type(inferred: pa.DataType) -> pa.DataType:
    """Numbers, booleans and nothing as told by the head; whatever else it looked like is text."""
    if pa.types.is_integer(inferred):
        return pa.int64()
    kept = pa.types.is_floating(inferred) or pa.types.is_boolean(inferred)
    return inferred if kept or pa.types.is_null(inferred) else pa.string()


def _text_columns(spec: schema_file.Files) -> set[str]:
    """Columns whose CSV cells are text whatever they look like."""
    text = {x.column for x in spec.features.values() if x.kind == "ids"} | set(spec.text)
    times = [getattr(spec, name, "") for name in ("time", "birth")]
    if spec.time_unit not in schema_file.UNITS:
        text |= {name for name in times if name and name != schema_file.ROW}
    return text


def _number_columns(spec: schema_file.Files, more: schema_file.Negatives | None) -> set[str]:
    """Columns that are only measured, so that whole numbers may be followed by fractions."""
    inputs = [*spec.features.values(), *(more.features.values() if more else ())]
    tests = [spec.where, *(x.condition for x in getattr(spec, "labels", {}).values())]
    tests += [more.of] if more else []
    found = {x.column for x in inputs if x.kind == "dense" and not x.at}
    found |= {t.column for t in tests if t and t.equals is None and t.one_of is None}
    whole = {x.column for x in inputs if x.kind == "id"} | {x.at for x in inputs}
    for role in ("id", "user", "item", "request", "order", "position", "split"):
        names = getattr(spec, role, ())
        whole |= {names} if isinstance(names, str) else set(names)
    return found - whole


def rechunk(frames: Iterator[pl.DataFrame], rows: int) -> Iterator[pl.DataFrame]:
    """The same rows in frames of exactly `rows` (the last one: what is left), with a column `@row`.

    So that what an import writes does not depend on how a file was written.
    """
    held: list[pl.DataFrame] = []
    count = done = 0
    for frame in frames:
        held.append(frame)
        count += frame.height
        while count >= rows:
            whole = pl.concat(held)
            yield whole.head(rows).with_row_index("@row", done).cast({"@row": pl.Int64})
            held, count, done = [whole.slice(rows)], count - rows, done + rows
    if held and (count or not done):
        yield pl.concat(held).with_row_index("@row", done).cast({"@row": pl.Int64})
