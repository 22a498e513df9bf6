"""The registry: what was released is what is found, whoever writes at once, whatever is killed or changed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedkeel.core.errors import InputError
from fedkeel.release.registry import INDEX, Registry, Release, parse


def model(folder: Path, content: str) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for file in ("card.json", "model.safetensors", "plugins/own.py"):
        path = folder / file.replace("/", "-")
        path.write_text(f"{file} {content}")
        found[file] = path
    return found


def publish(registry: Registry, folder: Path, version: str, stage: str = "production", content: str = "") -> Release:
    now = registry.at("ward", stage)
    files = model(folder / f"{version}{content[:9]}", version + content)
    return registry.publish(
        "ward", version, f"print-{version}{content}", files, stage, {"passed": True}, now.id if now else None
    )


def test_what_was_released_is_found_by_stage_and_version(tmp_path: Path):
    with Registry(tmp_path / "r", create=True) as registry:
        first = publish(registry, tmp_path, "1.0.0")
        second = publish(registry, tmp_path, "1.1.0")
        publish(registry, tmp_path, "1.2.0", "candidate")
        assert registry.find(None, "production") == second == registry.find("ward", "1.1.0")
        assert registry.find("ward", "1.0.0") == first
        out = registry.checkout(first, tmp_path / "out")
        assert (out / "plugins" / "own.py").read_text() == "plugins/own.py 1.0.0"
        assert [(m.kind, m.stage, m.version) for m in registry.history("ward")] == [
            ("published", "production", "1.0.0"),
            ("published", "production", "1.1.0"),
            ("published", "candidate", "1.2.0"),
        ]
        assert registry.history("ward", "production")[1].previous == first.id
        with pytest.raises(InputError, match=r"nothing at 'staging': it has candidate, production, 1.0.0, 1.1.0"):
            registry.find("ward", "staging")
        with pytest.raises(InputError, match="no model 'wart'"):
            registry.find("wart", "production")
        with pytest.raises(InputError, match="exists already"):
            registry.checkout(first, tmp_path / "out")


def test_a_reference_is_a_directory_a_model_and_a_stage(tmp_path: Path):
    Registry(tmp_path / "r", create=True).close()
    place = tmp_path / "r"
    assert parse(f"{place}") == (place, None, "production")
    assert parse(f"{place}@1.2.0") == (place, None, "1.2.0")
    assert parse(f"{place}/ward@staging") == (place, "ward", "staging")
    assert parse(f"{place}/ward") == (place, "ward", "production")
    assert parse(f"{tmp_path}") is None
    (place / "own.pt").write_bytes(b"")
    assert parse(f"{place}/own.pt") is None


def test_a_version_is_given_once(tmp_path: Path):
    with Registry(tmp_path / "r", create=True) as registry:
        publish(registry, tmp_path, "1.0.0")
        again = publish(registry, tmp_path, "1.0.0", "staging")
        assert registry.releases("ward") == [again]
        with pytest.raises(InputError, match=r"'ward' 1.0.0 is released already, with other weights: raise model"):
            publish(registry, tmp_path, "1.0.0", "staging", content="other")
        registry.collect(keep=0)
        assert len(registry.history("ward")) == 2


def test_what_was_judged_against_another_release_is_not_let_in(tmp_path: Path):
    with Registry(tmp_path / "r", create=True) as registry:
        publish(registry, tmp_path, "1.0.0")
        files = model(tmp_path / "late", "late")
        with pytest.raises(InputError, match=r"1.0.0 is in production now, which was not so when 'ward' 1.1.0 was"):
            registry.publish("ward", "1.1.0", "late", files, "production", {}, None)
        assert [one.version for one in registry.releases("ward")] == ["1.0.0"]


class Stages(RuleBasedStateMachine):
    """The registry beside a list a stage."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        Stages.count = getattr(Stages, "count", 0) + 1
        self.place = Stages.folder / str(Stages.count)
        self.registry = Registry(self.place / "r", create=True)
        self.stacks: dict[str, list[str]] = {"staging": [], "production": []}
        self.minor, self.gone = 0, set[str]()

    @rule(stage=st.sampled_from(["staging", "production"]))
    def publish_new(self, stage: str) -> None:
        self.minor += 1
        publish(self.registry, self.place, f"1.{self.minor}.0", stage)
        self.stacks[stage].append(f"1.{self.minor}.0")

    @precondition(lambda self: self.minor > 0)
    @rule(stage=st.sampled_from(["staging", "production"]), data=st.data())
    def publish_again(self, stage: str, data: st.DataObject) -> None:
        version = f"1.{data.draw(st.integers(1, self.minor))}.0"
        publish(self.registry, self.place, version, stage)
        self.gone.discard(version)
        if self.stacks[stage][-1:] != [version]:
            self.stacks[stage].append(version)

    @rule(stage=st.sampled_from(["staging", "production"]))
    def roll_back(self, stage: str) -> None:
        stack = self.stacks[stage]
        if len(stack) < 2 or stack[-2] in self.gone:
            with pytest.raises(InputError, match=r"roll back to|was collected"):
                self.registry.rollback("ward", stage)
        else:
            stack.pop()
            assert self.registry.rollback("ward", stage).version == stack[-1]

    @rule(keep=st.integers(0, 2))
    def collect(self, keep: int) -> None:
        self.registry.collect(keep)
        needed = {version for stack in self.stacks.values() for version in stack[-1 - keep :]}
        self.gone |= {f"1.{minor}.0" for minor in range(1, self.minor + 1)} - needed

    @invariant()
    def stages_point_where_they_should_and_all_is_there(self) -> None:
        found = {stage: release.version for stage, release in self.registry.stages("ward").items()}
        assert found == {stage: stack[-1] for stage, stack in self.stacks.items() if stack}
        assert self.registry.verify() == []
        kept = {release.version for release in self.registry.releases("ward") if release.kept}
        assert kept == {f"1.{minor}.0" for minor in range(1, self.minor + 1)} - self.gone
        files = {path.name for path in (self.place / "r" / "objects").rglob("*") if path.is_file()}
        listed = {s.digest for one in self.registry.releases("ward") if one.kept for s in one.files.values()}
        assert listed <= files

    def teardown(self) -> None:
        self.registry.close()


def test_any_order_of_publishing_rolling_back_and_collecting(tmp_path: Path):
    Stages.folder = tmp_path
    run_state_machine_as_test(Stages, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))


def _writer(place: Path, number: int) -> None:
    with Registry(place / "r", create=True) as registry:
        for step in range(5):
            while True:
                try:
                    publish(registry, place, f"{number}.{step}.0")
                    break
                except InputError as error:  # another writer was faster: judge again
                    if "publish it again" not in str(error):
                        raise


def test_writers_at_once_lose_nothing(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_writer, args=(tmp_path, number)) for number in range(1, 5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    with Registry(tmp_path / "r") as registry:
        history = registry.history("ward")
        assert sorted(one.version for one in registry.releases("ward")) == sorted(
            f"{number}.{step}.0" for number in range(1, 5) for step in range(5)
        )
        assert [move.previous for move in history] == [None, *(move.release for move in history[:-1])]
        assert registry.verify() == []


_ENDLESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_releases import publish, Registry
with Registry(Path({place!r}) / "r", create=True) as registry:
    at = len(registry.releases("ward"))
    print("ready", flush=True)
    while True:
        at += 1
        publish(registry, Path({place!r}), f"1.{{at}}.0", content="x" * 200_000)
        if at % 3 == 0:
            registry.rollback("ward", "production")
        if at % 5 == 0:
            registry.collect(1)
"""


def test_killed_at_any_moment_it_is_whole(tmp_path: Path):
    code, luck = _ENDLESS.format(tests=str(Path(__file__).parent), place=str(tmp_path)), random.Random(8)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(luck.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Registry(tmp_path / "r") as registry:
            assert registry.verify() == []
            for release in registry.stages("ward").values():
                assert release.kept
    with Registry(tmp_path / "r") as registry:
        assert len(registry.releases("ward")) >= 5
        registry.collect(0)
        left = [path for path in (tmp_path / "r" / "objects").rglob("*") if path.is_file()]
        assert len(left) == 3


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    with Registry(folder / "r", create=True) as registry:
        publish(registry, folder, "1.0.0")
    return folder


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_changed_byte_is_found(released: Path, data: st.DataObject):
    with Registry(released / "r") as registry:
        release = registry.find("ward", "production")
        file = data.draw(st.sampled_from(sorted(release.files)))
        stored = release.files[file]
        path = released / "r" / "objects" / stored.digest[:2] / stored.digest
        whole = path.read_bytes()
        kind = data.draw(st.sampled_from(["change", "cut", "grow", "gone", "link", "pipe"]))
        at = data.draw(st.integers(0, len(whole) - 1))
        path.unlink()
        if kind == "change":
            path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
        elif kind == "cut":
            path.write_bytes(whole[:at])
        elif kind == "grow":
            path.write_bytes(whole + b"\0")
        elif kind == "link":
            (released / "elsewhere").write_bytes(whole)
            path.symlink_to(released / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(path)
        try:
            with pytest.raises(InputError, match="is not what was released"):
                registry.checkout(release, released / "out")
            assert not (released / "out").exists()
            assert len(registry.verify()) == 1
        finally:
            path.unlink(missing_ok=True)
            path.write_bytes(whole)


def test_a_store_that_leads_elsewhere_is_refused(released: Path, tmp_path: Path):
    with Registry(released / "r") as registry:
        release = registry.find("ward", "production")
        digest = release.files["card.json"].digest
        inside = released / "r" / "objects" / digest[:2]
        os.rename(inside, tmp_path / "moved")
        inside.symlink_to(tmp_path / "moved")
        with pytest.raises(InputError, match=r"card.json of 'ward' 1.0.0 is not what was released"):
            registry.checkout(release, tmp_path / "out")
        inside.unlink()
        os.rename(tmp_path / "moved", inside)


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/./b", "", "a\\b"])
def test_a_release_holds_its_own_files_only(tmp_path: Path, name: str):
    with Registry(tmp_path / "r", create=True) as registry, pytest.raises(InputError, match="cannot hold a file"):
        registry.publish("ward", "1.0.0", "", {name: tmp_path / "x"}, "production", {}, None)


def test_links_are_not_taken_in(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "card.json").symlink_to(tmp_path / "secret")
    with Registry(tmp_path / "r", create=True) as registry:
        with pytest.raises(InputError, match="is no regular file"):
            registry.publish("ward", "1.0.0", "", {"card.json": tmp_path / "card.json"}, "production", {}, None)
        assert registry.releases("ward") == []


def test_a_changed_index_is_refused(tmp_path: Path):
    import sqlite3

    with Registry(tmp_path / "r", create=True) as registry:
        publish(registry, tmp_path, "1.0.0")
    with sqlite3.connect(tmp_path / "r" / INDEX) as db:
        db.execute("UPDATE releases SET version = '1.0.1'")
    db.close()
    with Registry(tmp_path / "r") as registry, pytest.raises(InputError, match="index lists other files"):
        registry.find("ward", "production")


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + b"x" * 5000, b"text"])
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(InputError, match="is no index of a registry"):
        Registry(tmp_path)


def test_no_registry_is_made_by_reading(tmp_path: Path):
    with pytest.raises(InputError, match="is no registry: make one with fedkeel release init"):
        Registry(tmp_path / "r")
    assert not (tmp_path / "r").exists()
