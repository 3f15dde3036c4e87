"""What decides a machine's results beside its input: Python, rankjax's own sources, packages."""

import functools
import hashlib
import importlib.metadata
import pathlib
import sys

import rankjax


@functools.cache
def of(*packages: str) -> dict[str, str]:
    """{"python", "rankjax", package: version}; rankjax's with a digest of its sources, as a working
    copy that somebody edited has the version that it had."""
    digest = hashlib.sha256()
    home = pathlib.Path(rankjax.__file__).parent
    for path in sorted(home.rglob("*.py")):
        digest.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "rankjax": f"{rankjax.__version__} (sources {digest.hexdigest()[:12]})",
        **{name: importlib.metadata.version(name) for name in packages},
    }
