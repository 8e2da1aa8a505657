"""Where text comes from: every kind of dataset as one deterministic stream of documents."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from spalf.config import DatasetConfig
from spalf.data.tokenised import Ids, array_files, cut_if_few, ids_of_cell, rows_of_arrays
from spalf.errors import UserError
from spalf.hub import hub_reachable, refusal

PYTHON_STDLIB = "python-stdlib"
"""The dataset that every Python has on disk: the source of its own standard library."""

PYTHON_PACKAGES = "python-packages"
"""The source of the packages installed beside the running Python: larger, and as reproducible as
the environment is."""

MIN_DOCUMENTS = 256
"""A dataset with fewer documents is cut into pieces, so that no split by document stays empty."""

PIECE_CHARACTERS = 16_384
"""Size of the pieces that a very large text file is cut into."""

_BLOCK_CHARACTERS = 2**20
_ROW_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".py"}
_OFFLINE = (
    "with no network, give `python-stdlib` or the path of a local text, jsonl or parquet file"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the key that decides which split it belongs to.

    The key is the relative path for ``python-stdlib``, so that a file stays in its split from one
    Python release to the next. Elsewhere, in ``python-packages`` too, it is a digest of the text,
    so that exact duplicates never straddle two splits. Where a dataset is tokenised already,
    ``ids`` takes the place of ``text``.
    """

    key: str
    text: str
    ids: Ids | None = field(default=None, compare=False)


def is_installed(dataset: DatasetConfig) -> bool:
    """Whether the dataset is source code that comes with the running Python."""
    return dataset.path in (PYTHON_STDLIB, PYTHON_PACKAGES)


def is_tokenised(dataset: DatasetConfig) -> bool:
    """Whether the dataset holds token ids instead of text."""
    path = Path(dataset.path).expanduser()
    return dataset.tokens_field is not None or bool(array_files(path))


def is_on_hub(dataset: DatasetConfig) -> bool:
    """Whether the dataset can only be one of the hub."""
    path = Path(dataset.path).expanduser()
    return not (is_installed(dataset) or path.exists() or _looks_local(dataset.path))


def documents(dataset: DatasetConfig) -> Iterator[Document]:
    """Every document of a dataset, always in the same order.

    Raises:
        UserError: the dataset is missing, unreachable, unreadable, empty, or has no text column.
    """
    if dataset.path == PYTHON_STDLIB:
        found = _stdlib_documents()
    elif dataset.path == PYTHON_PACKAGES:
        found = _package_documents()
    elif is_tokenised(dataset):
        rows = (row for row in cut_if_few(_token_rows(dataset)) if len(row))
        found = (Document(_digest_of_ids(row), "", row) for row in rows)
    else:
        texts = (text for text in _texts(dataset) if text.strip())
        found = (Document(_digest(text), text) for text in _cut_if_few(texts))
    first = next(found, None)
    if first is None:
        raise UserError("dataset", dataset.path, "holds no text; give a dataset with documents")
    return chain([first], found)


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of ``size`` to ``2·size`` characters, at blank lines if there are any.

    Joined together they are the text.
    """
    start = 0
    while len(text) - start > 2 * size:
        blank = text.find("\n\n", start + size, start + 2 * size)
        end = blank + 2 if blank >= 0 else start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _digest_of_ids(ids: Ids) -> str:
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _cut_if_few(texts: Iterable[str]) -> Iterator[str]:
    """The texts as they are, or cut into about 2·MIN_DOCUMENTS pieces if there are only a few."""
    rest = iter(texts)
    head = list(islice(rest, MIN_DOCUMENTS))
    if len(head) == MIN_DOCUMENTS:
        return chain(head, rest)
    size = sum(map(len, head)) // (2 * MIN_DOCUMENTS)
    size = min(max(size, 128), PIECE_CHARACTERS)
    return (piece for text in head for piece in pieces(text, size) if piece.strip())


def _stdlib_documents() -> Iterator[Document]:
    """The library's source files, ordered by a hash of the path: every prefix is a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for key in sorted(files, key=_digest):
        # Third-party packages are not the library; _sysconfigdata describes the build machine.
        if {"site-packages", "dist-packages"} & set(key.split("/")) or "_sysconfigdata" in key:
            continue
        text = files[key].read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(key, text)


def _package_documents() -> Iterator[Document]:
    """Source files of installed packages, each text once, ordered by a hash of the path."""
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    files = {
        path.relative_to(root).as_posix(): path for root in roots for path in root.rglob("*.py")
    }
    seen: set[str] = set()
    for name in sorted(files, key=_digest):
        text = files[name].read_text(encoding="utf-8", errors="replace")
        key = _digest(text)
        if text.strip() and key not in seen:
            seen.add(key)
            yield Document(key, text)


def _texts(dataset: DatasetConfig) -> Iterator[str]:
    path = Path(dataset.path).expanduser()
    rows = _rows(dataset, path)
    if rows is None:
        return _plain_texts(path)
    return _text_column(dataset, rows)


def _token_rows(dataset: DatasetConfig) -> Iterator[Ids]:
    path = Path(dataset.path).expanduser()
    if dataset.tokens_field is None:
        return rows_of_arrays(array_files(path))
    rows = _rows(dataset, path)
    if rows is None:
        remedy = "plain text has no columns; leave tokens_field out"
        raise UserError("dataset.tokens_field", dataset.tokens_field, remedy)
    cells = _column(dataset, rows, "tokens_field", dataset.tokens_field)
    return (ids_of_cell(dataset, cell) for cell in cells if cell is not None)


def _rows(dataset: DatasetConfig, path: Path) -> Any:
    """The dataset's rows, or ``None`` where it is plain text."""
    if path.is_dir():
        return _directory_rows(dataset, path)
    if path.is_file():
        builder = _row_format(path)
        if builder is None:
            return None
        return _load(dataset, builder, data_files=str(path), split="train")
    if _looks_local(dataset.path):
        remedy = "no such file or directory; give an existing path, `python-stdlib` or a hub id"
        raise UserError("dataset", dataset.path, remedy)
    if not hub_reachable():
        raise UserError("dataset", dataset.path, f"the hub cannot be reached; {_OFFLINE}")
    options = {"name": dataset.name, "split": dataset.split, "revision": dataset.revision}
    return _load(dataset, dataset.path, **options)


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist can only have been meant as a file."""
    is_hub_id = path.count("/") <= 1 and not path.startswith(("/", ".", "~"))
    return not is_hub_id or Path(path).suffix in set(_ROW_FORMATS) | _TEXT_SUFFIXES | {".npy"}


def _row_format(path: Path) -> str | None:
    """The ``datasets`` builder for a file name, compressed or not; ``None`` for plain text."""
    return next((_ROW_FORMATS[s] for s in path.suffixes if s in _ROW_FORMATS), None)


def _directory_rows(dataset: DatasetConfig, path: Path) -> Any:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _load_saved(dataset, path)
    files = _files(path)
    builders = {builder for file in files if (builder := _row_format(file))}
    if len(builders) > 1:
        remedy = f"mixes {' and '.join(sorted(builders))} files; give a directory of one kind"
        raise UserError("dataset", dataset.path, remedy)
    if builders:
        names = [str(file) for file in files if _row_format(file)]
        return _load(dataset, builders.pop(), data_files=names, split="train")
    return None


def _files(directory: Path) -> list[Path]:
    found = sorted(directory.rglob("*"))
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def _plain_texts(path: Path) -> Iterator[str]:
    if path.is_file():
        return _file_text(path)
    texts = (_file_text(file) for file in _files(path) if file.suffix in _TEXT_SUFFIXES)
    return chain.from_iterable(texts)


def _file_text(path: Path) -> Iterator[str]:
    """A text file as one document; one of more than a mebicharacter as many pieces."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_BLOCK_CHARACTERS)
            following = file.read(_BLOCK_CHARACTERS)
            if not following:
                yield text
                return
            while text:
                yield from pieces(text, PIECE_CHARACTERS)
                text, following = following, file.read(_BLOCK_CHARACTERS)
    except UnicodeDecodeError as error:
        remedy = f"not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        raise UserError("dataset", str(path), remedy) from None
    except OSError as error:
        raise UserError("dataset", str(path), f"cannot be read: {error.strerror}") from None


def _load(dataset: DatasetConfig, builder: str, **options: Any) -> Any:
    """A dataset that is read row by row, and never copied into a cache."""
    from datasets import load_dataset  # heavy, and not needed for text files

    try:
        return load_dataset(builder, streaming=True, **options)
    except Exception as error:  # the library raises dozens of types for one fault
        raise _unreadable(dataset, error) from None


def _load_saved(dataset: DatasetConfig, path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if dataset.split not in saved:
        remedy = f"has no such split; it has {', '.join(sorted(map(str, saved)))}"
        raise UserError("dataset.split", dataset.split, remedy)
    return saved[dataset.split]


def _text_column(dataset: DatasetConfig, rows: Any) -> Iterator[str]:
    for text in _column(dataset, rows, "text_field", dataset.text_field):
        if isinstance(text, str):
            yield text
        elif text is not None:
            remedy = f"holds {type(text).__name__}, not text; name the column that holds text"
            raise UserError("dataset.text_field", dataset.text_field, remedy)


def _column(dataset: DatasetConfig, rows: Any, field: str, name: str) -> Iterator[Any]:
    """One column of a dataset's rows; ``field`` of the configuration names it."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(dataset, error) from None
        if name not in row:
            remedy = f"no such column; the dataset has {', '.join(sorted(row))}"
            raise UserError(f"dataset.{field}", name, remedy)
        yield row[name]


def _unreadable(dataset: DatasetConfig, error: Exception) -> UserError:
    lines = str(error).splitlines() or [type(error).__name__]
    if Path(dataset.path).expanduser().exists():
        return UserError("dataset", dataset.path, f"cannot be read: {lines[0][:200]}")
    # Further lines say which configurations there are.
    why = refusal(error) or " ".join(lines)[:200]
    return UserError("dataset", dataset.path, f"cannot be fetched ({why}); {_OFFLINE}")
