"""What a user's text for a model means."""

from pathlib import Path

import pytest

from twotower_eval.errors import UserError
from twotower_eval.sources import SHIPPED_PAIR, Source, located, read_source


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_folder_of_that_path_wins(tmp_path: Path) -> None:
    assert read_source("org/name").kind == "hub"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert read_source("org/name") == Source(kind="folder", name="name", folder=Path("org/name"))
    assert read_source("miniature") is SHIPPED_PAIR
    (tmp_path / "miniature").mkdir()
    assert read_source("miniature").folder == Path("miniature")


def test_an_endpoint_is_known_by_its_prefix() -> None:
    source = read_source("openai:http://localhost:8000/v1#name")
    assert (source.kind, source.url, source.folder) == ("endpoint", "http://localhost:8000/v1#name", None)
    assert located(source) is source
    with pytest.raises(UserError, match="has no files here"):
        _ = source.files


@pytest.mark.parametrize("text", ["/nowhere", "../ckpt", "a/b/c", "./a", "~/a", "a b", "-a/"])
def test_what_can_be_no_name_is_a_folder_that_is_not_there(text: str) -> None:
    with pytest.raises(UserError, match="no such checkpoint folder") as raised:
        read_source(text)
    assert "\n" not in str(raised.value)


def test_a_bare_address_is_told_how_an_endpoint_is_written() -> None:
    with pytest.raises(UserError, match="is written as openai:http://host:8000/v1#NAME"):
        read_source("http://host:8000/v1#gpt")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.safetensors: no such checkpoint folder"):
        read_source("model.safetensors")
