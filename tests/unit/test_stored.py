"""Reducing updates that lie on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkeel
from fedkeel.cli import app
from fedkeel.core.registry import build, definition, names
from fedkeel.ship.stored import WORKING
from fedkeel.testing import sample

N, P = 9, 10_000
SMALL = 2 * WORKING + 8 * N * 4096  # three blocks
COLUMNWISE = [name for name in names("reducer") if "coordinatewise" in definition("reducer", name).traits]


def updates(n: int = N, columns: int = P) -> torch.Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", updates().numpy())
    return tmp_path / "rows.npy"


@pytest.mark.parametrize("name", COLUMNWISE)
@pytest.mark.parametrize("apart", [False, True])
def test_it_is_what_memory_would_give(name: str, apart: bool, rows: Path, tmp_path: Path) -> None:
    U, rule = updates(), sample("reducer", name)
    w = torch.tensor([1.0, 0, 2, 1, 1, 3, 1, 1, 1], dtype=torch.float64)
    np.save(tmp_path / "w.npy", w.numpy())
    files: Path | list[Path] = rows
    if apart:
        files = [tmp_path / f"{i}.npy" for i in range(N)]
        for path, row in zip(files, U, strict=True):
            np.save(path, row.numpy())
    seen: list[int] = []
    out = fedkeel.reduce_files(
        files, rule, tmp_path / "out.npy", tmp_path / "w.npy", memory=SMALL, watch=lambda done, _: seen.append(done)
    )
    found = torch.from_numpy(np.load(out))
    torch.testing.assert_close(found, rule(U, w), rtol=1e-6, atol=1e-7)
    assert seen == [0, 4096, 8192, P]
    assert not list(tmp_path.glob("out.npy.*"))


def test_interrupted_it_goes_on_where_it_was(rows: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.npy", []

    def stop(done: int, columns: int) -> None:
        seen.append(done)
        if done == 8192:
            raise KeyboardInterrupt

    with pytest.raises(fedkeel.InterruptedRunError, match="with the same arguments it goes on"):
        fedkeel.reduce_files(rows, "median", out, memory=SMALL, watch=stop)
    assert not out.exists()
    part = tmp_path / "out.npy.part"
    with part.open("ab") as file:
        file.write(b"xy")  # a value that was being written
    again: list[int] = []
    fedkeel.reduce_files(rows, "median", out, memory=SMALL, watch=lambda done, _: again.append(done))
    assert again == [8192, P]
    w = torch.ones(N, dtype=torch.float64)
    assert torch.equal(torch.from_numpy(np.load(out)), build("reducer", "median")(updates(), w))


@pytest.mark.parametrize("other", ["trimmed_mean(trim=1)", "weights", "rows"])
def test_what_another_call_left_is_not_gone_on_with(other: str, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"

    def stop(done: int, columns: int) -> None:
        if done == 4096:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedkeel.reduce_files(rows, "median", out, memory=SMALL, watch=stop)
    if other == "rows":
        np.save(rows, -updates().numpy())
    again: list[int] = []
    reducer = other if "(" in other else "median"
    weights = [2.0] + [1.0] * (N - 1) if other == "weights" else None
    fedkeel.reduce_files(rows, reducer, out, weights, memory=SMALL, watch=lambda done, _: again.append(done))
    assert again[0] == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_stays_within_its_bound(tmp_path: Path) -> None:
    """400 rows, which are sorted: 640 MB on the disk, in 256 MiB."""
    file = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (400, 400_000))
    file[:] = updates(1, 400_000).numpy()
    file[::2] += 1
    del file
    code = (
        "import sys, torch, fedkeel\n"
        "from pathlib import Path\n"
        "from fedkeel.core.registry import build\n"
        "build('reducer', 'median')(torch.randn(300, 100), torch.ones(300, dtype=torch.float64))\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "before = peak()\n"
        "fedkeel.reduce_files(sys.argv[1], 'median', sys.argv[2], memory='256MiB')\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "rows.npy"), str(tmp_path / "out.npy")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 10_000 < grown < 256 << 10, "KiB"
    wanted = updates(1, 400_000).numpy()[0] + 0.5
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, atol=1e-6)


def test_two_calls_never_write_the_same_file(rows: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out.npy", []

    def another(done: int, columns: int) -> None:
        if done == 4096:
            for reducer in ("median", "mean"):
                with pytest.raises(
                    fedkeel.InputError, match=r"out.npy.part' is being written by another call"
                ) as caught:
                    fedkeel.reduce_files(rows, reducer, out, memory=SMALL)
                said.append(caught)

    fedkeel.reduce_files(rows, "median", out, memory=SMALL, watch=another)
    assert len(said) == 2
    w = torch.ones(N, dtype=torch.float64)
    assert torch.equal(torch.from_numpy(np.load(out)), build("reducer", "median")(updates(), w))


def test_a_row_that_goes_away_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.npy" for i in range(N)]
    for path, row in zip(paths, updates(), strict=True):
        np.save(path, row.numpy())
    kept = paths[3].read_bytes()

    def away(done: int, columns: int) -> None:
        paths[3].unlink(missing_ok=True)

    with pytest.raises(fedkeel.RunError, match=r"3.npy can not be read any more .No such file"):
        fedkeel.reduce_files(paths, "median", tmp_path / "out.npy", memory=SMALL, watch=away)
    paths[3].write_bytes(kept)
    fedkeel.reduce_files(paths, "median", tmp_path / "out.npy", memory=SMALL)
    w = torch.ones(N, dtype=torch.float64)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "out.npy")), build("reducer", "median")(updates(), w))


@fedkeel.rule("reducer", name="test_double", traits=("coordinatewise",))
def double(U: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Gives float64."""
    return U.double().mean(0)


def test_a_reducer_that_gives_something_else_is_heard(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(fedkeel.RunError, match=r"'test_double' made torch.float64 .* it must give float32"):
        fedkeel.reduce_files(rows, "test_double", tmp_path / "out.npy")


def header(path: Path, shape: tuple[int, ...]) -> Path:
    """A file that promises much."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return path


def broken(tmp_path: Path) -> dict[str, tuple[list[Path], dict[str, object], str]]:
    """Rows, arguments, and what is said."""
    good, U = tmp_path / "rows.npy", updates().numpy()
    np.save(tmp_path / "double.npy", U.astype(np.float64))
    np.save(tmp_path / "turned.npy", np.asfortranarray(U))
    np.save(tmp_path / "short.npy", U[0, :50])
    np.save(tmp_path / "row.npy", U[0])
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "cut.npy").write_bytes(good.read_bytes()[:-4])
    return {
        "no file": ([tmp_path / "none.npy"], {}, "none.npy' can not be read .No such file.*: give .npy files"),
        "no npy": ([tmp_path / "text.npy"], {}, "is no .npy file: write it with numpy.save"),
        "double": ([tmp_path / "double.npy"], {}, r"holds float64 \(9, 10000\): write rows of float32"),
        "fortran": ([tmp_path / "turned.npy"], {}, "in Fortran order: write rows of float32"),
        "cut": ([tmp_path / "cut.npy"], {}, "ends before its .* values do: write it again"),
        "two": ([good, good], {}, "is one of 2 files: give it alone"),
        "widths": ([tmp_path / "row.npy", tmp_path / "short.npy"], {}, "has 50 columns, .* has 10000: give updates"),
        "rule": (
            [good],
            {"reducer": "geometric_median"},
            "looks at whole rows: out of core there are mean, mean_around",
        ),
        "few": ([good], {"reducer": "trimmed_mean(trim=5)"}, "needs 11 rows of weight above 0, not 9"),
        "weights": ([good], {"weights": [1.0]}, "these are no weights of 9 rows: give 9 finite numbers"),
        "no weights": ([good], {"weights": tmp_path / "text.npy"}, "text.npy' holds no weights of 9 rows: give 9"),
        "no columns": ([header(tmp_path / "h.npy", (5, 0))], {}, r"holds float32 \(5, 0\): write rows of float32"),
        "negative": ([header(tmp_path / "m.npy", (5, -3))], {}, r"holds float32 \(5, -3\): write rows of float32"),
        "no rows": ([header(tmp_path / "z.npy", (0, 5))], {}, r"holds float32 \(0, 5\): write rows of float32"),
        "vast": ([header(tmp_path / "v.npy", (2**32, 2**32))], {}, "ends before its .* values do"),
        "itself": ([good], {"out": good}, "is one of the files that are read: choose another one to write"),
        "no reducer": ([good], {"reducer": 3}, "reducer = 3 is no reducer: write a name"),
        "words": ([good], {"weights": ["a"] * N}, "these are no weights of 9 rows"),
        "huge": ([good], {"weights": [10**400] * N}, "these are no weights of 9 rows"),
        "memory": ([good], {"memory": "1MB"}, "memory = 1000000 bytes is too little for 9 rows: give at least"),
        "size": ([good], {"memory": "much"}, "memory = 'much' is not valid: write a size, as 512MB"),
    }


CASES = [
    *("no file", "no npy", "double", "fortran", "cut", "two", "widths"),
    *("no columns", "negative", "no rows", "vast", "itself", "no reducer", "words", "huge"),
    *("rule", "few", "weights", "no weights", "memory", "size"),
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case: str, rows: Path, tmp_path: Path) -> None:
    files, given, words = broken(tmp_path)[case]
    with pytest.raises(fedkeel.InputError, match=words):
        fedkeel.reduce_files(files, **{"reducer": "median", "out": tmp_path / "out.npy", **given})  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out.npy*"))


def test_a_place_that_can_not_be_written_is_said(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(fedkeel.RunError, match=r"could not be written .No such file"):
        fedkeel.reduce_files(rows, "median", tmp_path / "no" / "out.npy")


def test_on_the_command_line(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npy"
    app([str(a) for a in ("reduce", rows, "--rule", "median", "--out", out, "--json")], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"out": str(out)}
    assert np.load(out).shape == (P,)
