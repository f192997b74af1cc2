"""Links of the Markdown, as they become on the site."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.release.markdown import ROOT


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    specification = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts/site_pages.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "link", "becomes"),
    [
        ("README.md", "[jobs](docs/jobs.md)", "[jobs](jobs.md)"),
        ("README.md", "[docs/jobs.md](docs/jobs.md#exit-codes)", "[Jobs](jobs.md#exit-codes)"),
        ("README.md", "![page](docs/images/report.png)", "![page](images/report.png)"),
        ("README.md", "[Apache-2.0](LICENSE)", "[Apache-2.0](license.md)"),
        ("README.md", "[records](benchmarks/results)", "records"),
        ("README.md", "[gone](docs/gone.md)", "[gone](gone.md)"),
        ("README.md", "[elsewhere](nowhere/at-all)", "[elsewhere](nowhere/at-all)"),
        ("docs/jobs.md", "[files](files.md), [above](#top)", "[files](files.md), [above](#top)"),
        ("docs/jobs.md", "[notes](../CHANGELOG.md)", "[notes](changelog.md)"),
        ("docs/jobs.md", "[p](https://ui.perfetto.dev)", "[p](https://ui.perfetto.dev)"),
        ("benchmarks/README.md", "[docs](../docs/policies.md)", "[docs](../policies.md)"),
        ("README.md", "```sh\ncat [a](docs/jobs.md)\n```", "```sh\ncat [a](docs/jobs.md)\n```"),
    ],
)
def test_links_lead_to_pages(site_pages: ModuleType, source: str, link: str, becomes: str) -> None:
    assert site_pages.relinked(link, source, site_pages.pages_beside()) == becomes
