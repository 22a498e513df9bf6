"""What the laws share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedkeel.kernels import native


@pytest.fixture(scope="module", params=["compiled", "plain"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every law of such a module holds with the compiled kernels and without."""
    if request.param == "compiled" and isinstance(native.library(), str):
        pytest.skip(str(native.library()))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(native, "library", lambda: "as if they were not built")
        yield
