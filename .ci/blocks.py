"""Prints one of README.md's ```bash blocks, exactly as it stands there.

python .ci/blocks.py README.md study    the first block: install and quick study
python .ci/blocks.py README.md tests    the second block: install and tests

A block is what stands between a line "```bash" and the next line "```". Exits with status 1 and a
reason where the file does not hold exactly two of them.
"""

import pathlib
import sys

NAMES = ("study", "tests")


def bash_blocks(text: str) -> list[str]:
    """The contents of the fenced bash blocks, in order. Raises ValueError on an unclosed fence."""
    blocks, block, fence = [], [], None
    for number, line in enumerate(text.splitlines(), start=1):
        mark = line.rstrip()
        if fence is None and mark.startswith("```"):
            fence, block = mark, []
        elif fence is not None and mark == "```":
            if fence == "```bash":
                blocks.append("\n".join(block) + "\n")
            fence = None
        elif fence is not None:
            if mark.startswith("```"):
                raise ValueError(f"line {number}: found {mark!r} inside a {fence} block")
            block.append(line)
    if fence is not None:
        raise ValueError(f"the last {fence} block is never closed")
    return blocks


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[1] not in NAMES:
        print(__doc__, file=sys.stderr)
        return 2
    path = pathlib.Path(arguments[0])
    try:
        blocks = bash_blocks(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if len(blocks) != len(NAMES):
        expected = f"expected exactly {len(NAMES)} (install and study, install and tests)"
        print(f"{path}: found {len(blocks)} ```bash blocks, {expected}", file=sys.stderr)
        return 1
    print(blocks[NAMES.index(arguments[1])], end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
