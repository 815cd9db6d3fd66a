"""One folder and one browser for all tests of pages.

The package is imported when a fixture asks for it: `--typed` has to come first.
"""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.browser import Page, browser


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    from moe_lens.atlas import write_atlas
    from tests.atlas.shown import hostile
    from tests.planted import planted_atlas

    out = tmp_path_factory.mktemp("atlas") / "with spaces & ü"
    write_atlas(hostile(planted_atlas()[1]), out)
    return out


@pytest.fixture(scope="session")
def page(folder, tmp_path_factory) -> Generator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
