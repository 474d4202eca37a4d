"""Names that installed packages register in a form that cannot be used, and names of modules that are none."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import report_fixture as made

from twotower_eval import cli, names
from twotower_eval.analyse import report
from twotower_eval.engine.decoders import decoder_class
from twotower_eval.engine.decoders.autoregressive import Autoregressive
from twotower_eval.errors import UserError

PLACE = "twotower_eval.engine.decoders.autoregressive:Autoregressive"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path for packages' metadata."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    names.registered.cache_clear()
    yield tmp_path / "site"
    names.registered.cache_clear()


def install(site: Path, package: str, text: str | bytes) -> None:
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    names.registered.cache_clear()


def test_a_line_that_is_none_keeps_nobody_from_the_others(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``importlib.metadata.entry_points`` raises for all packages where one has a line without ``=``."""
    install(site, "bad", "[twotower_eval.decoders]\nbroken\nnoattr = pkg.mod\n# c = d\n\n[other]\nx\n")
    install(site, "good", f"[console_scripts]\na = b:c\n\n[twotower_eval.decoders]\nfine = {PLACE} [extra]\n[x]\ny=z:z")
    install(site, "latin", b"[twotower_eval.decoders]\n\xe9 = a:b\n")
    with pytest.raises((TypeError, ValueError)):
        metadata.entry_points(group="twotower_eval.decoders")
    assert names.registered("decoder") == {"fine": PLACE}
    assert decoder_class("fine") is Autoregressive
    assert cli.main(["run", "--help"]) == 0
    assert "From installed packages, as decoder: fine\n" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="'broken': package bad registers it as 'broken', which is not of the form name"
    ):
        decoder_class("broken")
    with pytest.raises(UserError, match=r"package bad registers it as 'noattr = pkg\.mod', which is not of the form"):
        decoder_class("noattr")
    with pytest.raises(UserError, match="decoder 'fin' is unknown; did you mean fine"):
        decoder_class("fin")


def test_the_first_copy_of_a_package_counts(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "mine", f"[twotower_eval.decoders]\nfast = {PLACE}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "earlier"))
    install(tmp_path / "earlier", "mine", "[twotower_eval.decoders]\nfast = newer.place:Fast\n")
    assert names.registered("decoder") == {"fast": "newer.place:Fast"}


def test_a_path_is_no_modules_name() -> None:
    with pytest.raises(UserError, match=r"'\.\./dec' is no module's name but, it seems, a file's: write module:D"):
        names.resolve("../dec:D")


def test_a_module_that_lacks_another_is_not_told_to_be_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found, though it lies in this folder; what it imports was not."""
    (tmp_path / "lacks_another.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"No module named 'nowhere_to_be_found'$"):
        names.resolve("lacks_another:Mine")


SECTIONS = """
from twotower_eval.analyse.report import Section
from twotower_eval.errors import UserError

def refuses(runs):
    raise UserError("no speed here")

def displaces(runs):
    return Section(title="Mine", markdown="x", files={"tables": b"x"})
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [("refuses", "section own_sections:refuses: no speed here"), ("displaces", "its files hold 'tables', which is")],
)
def test_what_a_section_says_names_it(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_sections.py").write_text(SECTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = made.quality_run(tmp_path, num_docs=5)
    with pytest.raises(UserError, match=words):
        report.write([path], tmp_path / "out", sections=[f"own_sections:{name}"])
