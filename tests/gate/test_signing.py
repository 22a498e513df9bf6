"""Signed releases: one changed byte, one file more or less, another key: refused before anything is read."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedkeel
from fedkeel.core.errors import InputError
from fedkeel.gate import policy, signing
from fedkeel.gate.publish import publish
from fedkeel.release.registry import SIGNATURE, Registry

PLUGIN = Path(__file__).parents[1] / "release" / "wards.py"
STAGES = "".join(f'[{stage}]\nrules = ["fingerprint"]\n' for stage in ("candidate", "staging", "production"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("signed")
    settings = ["data.source=patients", "data.clients=3", "data.partition=iid", "model.build=logistic"]
    job = fedkeel.Job(name="ward", rounds=1, plugins=(str(PLUGIN),)).with_settings(settings)
    fedkeel.run(job, folder / "run", with_report=False)
    signing.make_keys(folder / "keys")
    with Registry(folder / "registry", create=True) as registry:
        shutil.copy(folder / "keys" / "release.pub", registry.path)
        (registry.path / policy.FILE).write_text(f'signed = "release.pub"\n{STAGES}')
        assert publish(folder / "run", "production", registry, key=folder / "keys" / "release.key").passed
        registry.checkout(registry.find("ward", "production"), folder / "served")
        yield folder


def test_a_signed_release_is_loaded(place: Path):
    card, named = fedkeel.load_model(place / "served", place / "keys" / "release.pub")
    assert card.version == "1.0.0"
    assert set(named) == {parameter.name for parameter in card.parameters}
    files = sorted(path.relative_to(place / "served").as_posix() for path in (place / "served").rglob("*.*"))
    assert files == ["card.json", "job.toml", "model.safetensors", SIGNATURE, "plugins/wards.py"]
    assert stat.S_IMODE((place / "keys" / "release.key").stat().st_mode) == 0o600


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_changed_byte_in_any_file_is_refused(place: Path, data: st.DataObject):
    file = data.draw(st.sampled_from(["card.json", "job.toml", "model.safetensors", "plugins/wards.py"]))
    path = place / "served" / file
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.chmod(0o644)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    try:
        with pytest.raises(InputError, match="is not what was signed"):
            fedkeel.load_model(place / "served", place / "keys" / "release.pub")
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("file", ["more.txt", ".gitignore", "plugins/more.py"])
def test_a_file_more_is_refused(place: Path, file: str):
    (place / "served" / file).write_text("x")
    try:
        with pytest.raises(InputError, match="is not what was signed"):
            fedkeel.load_model(place / "served", place / "keys" / "release.pub")
    finally:
        (place / "served" / file).unlink()


def test_a_file_less_a_cut_signature_and_none_are_refused(place: Path, tmp_path: Path):
    served = Path(shutil.copytree(place / "served", tmp_path / "served"))
    (served / "job.toml").unlink()
    with pytest.raises(InputError, match="is not what was signed"):
        fedkeel.load_model(served, place / "keys" / "release.pub")
    shutil.copy(place / "served" / "job.toml", served)
    fedkeel.load_model(served, place / "keys" / "release.pub")
    whole = (served / SIGNATURE).read_bytes()
    for content in (b"", b"{}", whole[: len(whole) // 2], b"\xff" * 50, b'{"verificationMaterial": []}'):
        (served / SIGNATURE).chmod(0o644)
        (served / SIGNATURE).write_bytes(content)
        with pytest.raises(InputError, match="is not what was signed"):
            fedkeel.load_model(served, place / "keys" / "release.pub")
    (served / SIGNATURE).unlink()
    with pytest.raises(InputError, match=r"is not signed: it has no model.sig"):
        fedkeel.load_model(served, place / "keys" / "release.pub")
    fedkeel.load_model(served)


def test_another_key_is_refused(place: Path, tmp_path: Path):
    signing.make_keys(tmp_path / "other")
    with pytest.raises(InputError, match="is not what was signed"):
        fedkeel.load_model(place / "served", tmp_path / "other" / "release.pub")
    with Registry(place / "registry") as registry:
        with pytest.raises(InputError, match="are signed: name the secret key with --key"):
            publish(place / "run", "staging", registry)
        verdict = publish(place / "run", "staging", registry, key=tmp_path / "other" / "release.key")
        assert "is not what was signed" in "".join(verdict.reasons)
        assert "staging" not in registry.stages("ward")
        with pytest.raises(InputError, match="does not exist: fedkeel release keys makes a pair"):
            publish(place / "run", "staging", registry, key=tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    for key in (tmp_path / "text", place / "keys" / "release.pub"):
        with Registry(place / "registry") as registry, pytest.raises(InputError, match="cannot sign"):
            publish(place / "run", "staging", registry, key=key)
        with pytest.raises(InputError, match="cannot sign"):
            signing.sign(place / "served", key, tmp_path / "sig")


def test_signatures_are_kept_collected_and_checked_like_files(place: Path, tmp_path: Path):
    key = place / "keys" / "release.key"
    with Registry(tmp_path / "registry", create=True) as registry:
        (registry.path / policy.FILE).write_text(STAGES)
        assert publish(place / "run", "candidate", registry).passed
        assert registry.find("ward", "candidate").signature is None
        assert publish(place / "run", "production", registry, key=key).passed
        release = registry.find("ward", "production")
        assert release.signature is not None
        registry.collect(0)
        assert registry.verify() == []
        path = registry.store.path / release.signature.digest[:2] / release.signature.digest
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[:-1])
        assert registry.verify() == [
            "model.sig of 'ward' 1.0.0 is not what was released "
            f"({release.signature.digest[:12]}): restore the registry from a copy"
        ]


def test_keys_are_not_overwritten(place: Path):
    with pytest.raises(InputError, match=r"release.key' is there already"):
        signing.make_keys(place / "keys")
