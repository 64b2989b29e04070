"""The pages, taken apart: blocks, links, anchors, and the messages that a page explains."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*) *$")
NOT_RUN = re.compile(r"# not run in the tests: (?P<reason>.+)")
"""The first line of a block that the tests leave out, for its readers to see."""

MESSAGES = "message"
"""The head of the first column of a table whose first cells are messages of the code."""


@dataclass(frozen=True)
class Block:
    """A fenced block. line: its number in the page, from 1; kind: one of `KINDS`; produces: of a "text", what printed it."""

    page: Path
    line: int
    language: str
    text: str
    kind: str
    produces: "Block | None" = None

    @property
    def reason(self) -> str:
        """Why it is not run, "" where it is."""
        found = NOT_RUN.match(self.text)
        return found["reason"] if found else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


KINDS = ("run", "arguments checked", "output compared", "parsed", "not run, for the reason in it", "output of what is not run")


def pages() -> list[Path]:
    """Every page whose blocks are run; the changelog has none."""
    folders = ("docs", "examples", "benchmarks")
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    return sorted(page for page in found if page.name != "CHANGELOG.md")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    raw = list(_fenced(page))
    for i, (line, language, text) in enumerate(raw):
        before = next((block for block in reversed(found) if block.language != "text"), None)
        if language == "text":
            kind = "output of what is not run" if before is None or NOT_RUN.match(before.text) else "output compared"
            assert before is not None, f"{page}:{line}: a text block is what the block before it printed"
            found.append(Block(page, line, language, text, kind, before))
            continue
        kind = {"python": "run", "sh": "arguments checked"}.get(language, "parsed")
        if language == "sh" and i + 1 < len(raw) and raw[i + 1][1] == "text":
            kind = "run"
        if NOT_RUN.match(text):
            kind = "not run, for the reason in it"
        found.append(Block(page, line, language, text, kind))
    return found


def _fenced(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of every fence."""
    opened: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, lines = (number, fence["language"], fence["indent"]), []
        elif opened is not None and line.strip() == "```":
            yield opened[0], opened[1], "\n".join(lines) + "\n"
            opened = None
        elif opened is not None:
            lines.append(line.removeprefix(opened[2]))
    assert opened is None, f"{page}:{opened}: a fence that is not closed"


def _prose(page: Path) -> list[str]:
    """The lines of a page that are in no fence."""
    inside, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            lines.append(line)
    return lines


def headings(page: Path) -> list[tuple[int, str]]:
    """(level, text) of each heading."""
    found = (re.match(r"(#+) (.+)", line) for line in _prose(page))
    return [(len(match[1]), match[2].strip()) for match in found if match]


def sections(page: Path) -> dict[str, str]:
    """The text under each heading, that of the headings below it included."""
    found: dict[str, str] = {}
    lines = page.read_text(encoding="utf-8").splitlines()
    marks = [(i, match) for i, line in enumerate(lines) if (match := re.match(r"(#+) (.+)", line))]
    for i, match in marks:
        ends = (j for j, other in marks if j > i and len(other[1]) <= len(match[1]))
        found[match[2].strip()] = "\n".join(lines[i + 1 : next(ends, len(lines))])
    return found


def anchors(page: Path) -> set[str]:
    """The names that a link may have after its #, as GitHub makes them of the headings."""
    found: set[str] = set()
    for _, text in headings(page):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).lower()).replace(" ", "-")
        again = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in found)
        found.add(f"{name}-{again}" if again else name)
    return found


def links(page: Path) -> list[str]:
    """The targets of links and pictures that are not addresses on the net."""
    text = re.sub(r"`[^`]*`", "", "\n".join(_prose(page)))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def first_cells(text: str) -> list[list[str]]:
    """What is in backticks in the first cell of each row of the tables in a text."""
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("|")]


def explained(page: Path) -> list[str]:
    """The messages that the tables of a page explain, a … for what differs from one to the next."""
    found, inside = [], False
    for line in _prose(page):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == MESSAGES:
            inside = True
        elif inside and not set(cells[0]) <= set("-: "):
            messages = re.findall(r"`([^`]+)`", cells[0])
            assert messages, f"{page}: no message in {line}"
            found += messages
    return found
