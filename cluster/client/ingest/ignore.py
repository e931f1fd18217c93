"""What `.gitignore` files say about the entries of one tree. Only those inside it count: it is the same everywhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

FILE_NAME = b".gitignore"
_DIRECTORY = "ps_d"  # pathspec's group for the slash after what a pattern names; what follows it is inside of that
_ANY_DIRECTORY = f"(?P<{_DIRECTORY}>/)"  # its expression for `*/` and `**/`
_MARK = b"\xef\xbb\xbf"
_CLASS = re.compile(r"(\[[^\]]*?)\[:(\w+):\]")  # of POSIX, which pathspec does not know
_CLASSES = {
    "alpha": "a-zA-Z", "digit": "0-9", "alnum": "a-zA-Z0-9", "upper": "A-Z", "lower": "a-z", "xdigit": "0-9a-fA-F",
    "space": " \t\n\r\f\v", "blank": " \t", "punct": r"!-.:-@\[-`{-~", "print": " -.0-~", "graph": "!-.0-~",
    "cntrl": "\x00-\x1f\x7f",
}  # fmt: skip


class IgnoreRules:
    """The patterns in force inside a folder: those of its `.gitignore` after those of the folders around it."""

    def __init__(self) -> None:
        self._levels: tuple[tuple[int, tuple[tuple[re.Pattern[str], bool], ...]], ...] = ()

    def inside(self, depth: int, content: bytes) -> IgnoreRules:
        """Return the rules inside a folder, `depth` folders below the top, whose `.gitignore` has this content."""
        rules = IgnoreRules()
        rules._levels = (*self._levels, (depth, tuple(_patterns(content))))
        return rules

    def ignores(self, path: Sequence[bytes], is_folder: bool) -> bool:
        """Return whether git would leave out an entry whose parent folder it does not.

        Args:
            path: its components, from the top of the tree.
        """
        for depth, patterns in reversed(self._levels):
            name = b"/".join(path[depth:]).decode("latin-1") + ("/" if is_folder else "")
            for pattern, is_ignored in reversed(patterns):
                if _names(pattern, name):
                    return is_ignored
        return False


def _names(pattern: re.Pattern[str], name: str) -> bool:
    """Return whether a pattern names this entry itself, not only a folder around it."""
    match = pattern.search(name)
    if match is None or _DIRECTORY not in pattern.groupindex or match.end(_DIRECTORY) == -1:
        return match is not None
    return match.end(_DIRECTORY) == len(name) or (pattern.pattern == _ANY_DIRECTORY and name.endswith("/"))


def _patterns(content: bytes) -> list[tuple[re.Pattern[str], bool]]:
    """Return (expression, whether it ignores) of every line that has one; a line that git could not read has none."""
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern  # here: most sources are no folders

    found = []
    for line in content.removeprefix(_MARK).split(b"\n"):
        text = line.removesuffix(b"\r").decode("latin-1")
        if text.endswith("/**/"):
            text = text.removesuffix("/") + "/*/"  # folders inside; pathspec would include the folder itself
        while match := _CLASS.search(text):
            text = text[: match.end(1)] + _CLASSES.get(match[2], "") + text[match.end() :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of odd brackets
            try:
                pattern = GitIgnoreSpecPattern(text)
            except (ValueError, re.error):
                continue
        if pattern.regex is not None and pattern.include is not None:
            found.append((pattern.regex, pattern.include))
    return found
