"""What a distribution says of itself that the tree does not know: where its repository is.

The address is that of the git remote `origin`, or $REPOSITORY_URL; with it, links in the README become absolute, so
that they work on a package index, and the project has URLs. Without one, links stay as they are.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def address(root: Path) -> str:
    """Where the repository is on the web, or ""."""
    url = os.environ.get("REPOSITORY_URL", "")
    git = shutil.which("git")
    if not url and git:
        ask = [git, "-C", str(root), "remote", "get-url", "origin"]
        url = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    found = re.fullmatch(r"(?:https://|git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", url)
    return f"https://{found[1]}/{found[2]}" if found else ""


def absolute(readme: str, url: str) -> str:
    """The README with absolute links: to pages as the web shows them, to pictures as files."""
    readme = re.sub(r"(!\[[^]]*\]\()(?![a-z]+:|#)", rf"\1{url}/raw/main/", readme)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?![a-z]+:|#)", rf"\1{url}/blob/main/", readme)


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        url, readme = address(root), (root / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(readme, url) if url else readme}
        if url:
            pages = {"Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
            metadata["urls"] = {"Repository": url, **{name: f"{url}/{page}" for name, page in pages.items()}}
