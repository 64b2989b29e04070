"""The documentation against the code: every block runs or says why not, every link leads somewhere, every message is explained.

Blocks run as on a machine without a GPU, with small random models in the places of real ones: see `documentation.user`.
"""

import importlib.util
import inspect
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ipa_kernels

from ..documentation.messages import GAP, messages
from ..documentation.pages import (  # fmt: skip
    KINDS,
    ROOT,
    Block,
    anchors,
    blocks,
    explained,
    first_cells,
    headings,
    links,
    pages,
    sections,
)
from ..documentation.shell import commands
from ..documentation.user import User, same_output, without_hub_and_gpu

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting"
API = ROOT / "docs" / "api.md"


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def empty_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pages show what a machine without a GPU prints")
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)], ids=page_name)
def test_blocks_run(page: Path, empty_folder: None, empty_compiler: None) -> None:
    """In the order of the page, in one namespace; text blocks are what was printed."""
    user = User()
    with without_hub_and_gpu(page_name(page)):
        for block in blocks(page):
            user.do(block)


def test_no_block_is_left_out_without_a_word(record_property: Callable[[str, object], None]) -> None:
    """Every fence of every page is of a kind that is run, checked or compared, or says in its first line why it is not."""
    found = [block for page in pages() for block in blocks(page)]
    counts = Counter(block.kind for block in found)
    fences = sum(len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in pages())
    assert 2 * len(found) == fences
    for kind in KINDS:
        record_property(f"blocks of the documentation, {kind}", counts[kind])
    for block in found:
        assert block.kind in KINDS, block
        assert block.language in ("python", "sh", "text"), f"{block}: a fence names its language"
        assert block.kind != KINDS[4] or len(block.reason.split()) > 2, f"{block}: why?"
    assert counts["run"] > 2 * counts["not run, for the reason in it"]


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_name(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{page_name(page)}: {link} is outside of the repository"
        assert not anchor or anchor in anchors(target), f"{page_name(page)}: {link}: {sorted(anchors(target))}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    decisions = ROOT / "docs" / "decisions"
    missing = [page for page in (ROOT / "docs").rglob("*.md") if page not in linked and decisions not in page.parents]
    assert missing == [index]


def test_the_benchmarks_that_are_named_are_those_that_there_are() -> None:
    """In benchmarks/README.md: every module of the folder, and of the package none that does not exist."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    modules = {file.stem for file in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"\bbenchmarks\.(\w+)", text)) | set(re.findall(r"`(\w+)\.py`", text)) == modules
    for name in re.findall(r"\bipa_kernels(?:\.\w+)+", text):
        assert importlib.util.find_spec(name), name
    # names that are short for those of the package
    assert not re.search(r"^\|.*`\.\w+`", text, re.MULTILINE)


def test_the_table_of_the_code_has_every_room_once() -> None:
    """In docs/how-it-works.md: each file and each folder at the root of the package, and nothing else."""
    named = [name for cell in first_cells(sections(ROOT / "docs" / "how-it-works.md")["The code"]) for name in cell]
    package = ROOT / "ipa_kernels"
    files = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert sorted(named) == sorted(files | folders)


def test_what_is_detected_is_tested() -> None:
    """Each line of the table in docs/exact.md names a test that there is."""
    table = sections(ROOT / "docs" / "exact.md")["What is detected, and what is not"]
    named = re.findall(r"`(test_\w+)::(test_\w+)` \|$", table, re.MULTILINE)
    assert len(named) == len(re.findall(r"^\| (?!---|changed by)", table, re.MULTILINE)) > 20
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)


def test_pages_are_short() -> None:
    assert {page_name(page): n for page in pages() if (n := len(page.read_text(encoding="utf-8").splitlines())) > 160} == {}


def explanations() -> dict[str, Path]:
    return {message: page for page in sorted(TROUBLESHOOTING.glob("*.md")) for message in explained(page)}


def pattern(explanation: str) -> re.Pattern[str]:
    """What a message looks like: each … is some text."""
    return re.compile(re.escape(explanation).replace(re.escape(GAP), ".+"), re.DOTALL)


def test_every_message_is_explained(record_property: Callable[[str, object], None]) -> None:
    """A new message needs a row in docs/troubleshooting: what happened, why, what to do."""
    patterns = [pattern(message) for message in explanations()]
    known = messages()
    record_property("messages explained", len(known))
    unexplained = [
        f"{place}: {message}" for message, place in known.items() if not any(each.fullmatch(message) for each in patterns)
    ]
    assert unexplained == [], "\n".join(["not in a table of docs/troubleshooting:", *unexplained])


def test_every_explanation_is_of_a_message() -> None:
    """A row of a message that is gone, or has other words now, goes too."""
    known = messages()
    stale = [e for e in explanations() if not any(pattern(e).fullmatch(message) for message in known)]
    assert stale == []
    assert all(len(e.replace(GAP, "").split()) >= 2 for e in explanations()), "a row for everything explains nothing"


def test_messages_of_the_source_are_those_of_the_program() -> None:
    """What is read from the source is what comes: by the page, for some that are made of several pieces."""
    query = torch.zeros(1, 1, 4, 8)
    odd: dict[str, object] = {"attn_mask": torch.zeros(4, 4), "scale": -1.0, "impl": "triton"}
    with pytest.raises(ipa_kernels.UnsupportedError) as caught:
        ipa_kernels.decoupled_attention(query, query, query, [], [], **odd)  # type: ignore[arg-type]
    head, *reasons = str(caught.value).split("; ")
    shown = [head.partition(": ")[0] + ": ", head.partition(": ")[2], *reasons]
    patterns = [pattern(message) for message in explanations()]
    text = "; ".join(shown[1:])
    assert any(each.fullmatch(shown[0].strip()) for each in patterns), shown[0]
    assert sum(each.search(text) is not None for each in patterns) >= 2, text
    with pytest.raises(TypeError) as wrong:
        ipa_kernels.enable(object())
    assert any(each.fullmatch(str(wrong.value)) for each in patterns)


def test_every_public_name_is_described() -> None:
    """With each of its parameters or fields by name, and what it raises."""
    found = sections(API)
    for name in ipa_kernels.__all__:
        titles = [title for title in found if title.split("(")[0].strip("` ") == name]
        assert len(titles) == 1, f"{name}: {titles}"
        thing = getattr(ipa_kernels, name)
        text = titles[0] + found[titles[0]]
        if inspect.isfunction(thing):
            names = set(inspect.signature(thing).parameters) - {"arguments"}
            assert "Raises" in text, name
        else:
            names = set(getattr(thing, "__annotations__", {})) | set(vars(thing)) & {"triton", "eager", "stock", "to_dict"}
        for part in names - {"__module__", "__doc__"}:
            assert re.search(rf"\b{re.escape(part)}\b", text), f"{name}: {part} is not in docs/api.md"


def test_signatures_are_those_of_the_code() -> None:
    for _, title in headings(API):
        name, _, parameters = title.strip("`").partition("(")
        if parameters and name in ipa_kernels.__all__:
            signature = inspect.signature(getattr(ipa_kernels, name))
            bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
            code = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)).replace("'", '"')
            assert f"({parameters}" == code, title


def test_pictures_are_well_formed_and_described() -> None:
    """An SVG has a title and a description for who does not see it, and colours for a dark page."""
    pictures = sorted((ROOT / "docs").rglob("*.svg"))
    assert pictures
    for picture in pictures:
        root = ElementTree.parse(picture).getroot()
        space = {"svg": "http://www.w3.org/2000/svg"}
        assert root.find("svg:title", space) is not None
        assert root.find("svg:desc", space) is not None
        assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8")


def test_the_tests_of_blocks_can_fail(tmp_path: Path, empty_folder: None, empty_compiler: None) -> None:
    """Code that raises, output that differs, options, targets, extras and modules that do not exist."""
    page = tmp_path / "page.md"

    def outcome(text: str) -> str:
        page.write_text(text, encoding="utf-8")
        user = User()
        try:
            with without_hub_and_gpu():
                for block in blocks(page):
                    user.do(block)
        except (Exception, pytest.fail.Exception) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    assert outcome("```python\nprint(1.5, 'ms', 2)\n```\n```text\n1.5 ms 2\n```\n") == ""
    assert outcome("```python\nprint(pipe.nothing)\n```\n").startswith("AttributeError")
    assert "says" in outcome("```python\nprint(2)\n```\n```text\n3\n```\n")
    for line in (
        "make nothing",
        "make gpu IN=x",
        "pip install '.[nothing]'",
        "ipa-kernels demo --nothing",
        "nothing --help",
        "python -m benchmarks.growth --nothing",
        "python -m benchmarks.nothing",
        "python examples/nothing.py",
    ):
        assert outcome(f"```sh\n{line}\n```\n"), line
    assert outcome("```python\n# not run in the tests: it needs a GPU\n1 / 0\n```\n") == ""
    assert list(commands("A=1 make demo  # first\nmake \\\n  test\n")) == [["make", "demo"], ["make", "test"]]
    dots = Block(page, 1, "text", "a\n...\nc\n", "output compared")
    same_output(dots, "a\nb\nb\nc\n")
    same_output(Block(page, 1, "text", "a\n...\n", "output compared"), "a\nb\nc\n")
    with pytest.raises(AssertionError, match="says"):
        same_output(dots, "a\nb\n")
