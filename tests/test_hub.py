"""Names on the Hugging Face hub, asked of a hub on this machine's loopback, and of caches made by hand."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, go_online, serving, use_cache, write_cache
from huggingface_hub import constants

from twotower_eval.errors import UserError
from twotower_eval.hub import snapshot
from twotower_eval.plan import RunPlan, SpeedPlan, VerifyPlan, each_baseline
from twotower_eval.plan_files import load_plan, merge
from twotower_eval.plan_sources import arm_sources, check_checkpoints
from twotower_eval.sources import located, read_source

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{  }",
    "chat_template.jinja": b"{{ x }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling_own.py": b"pass",
    "onnx/model.json": b"{     }",
}
READ = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
SHARDS = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": b"1",
    "model-2.safetensors": b"2",
    "consolidated.safetensors": b"the same again",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(monkeypatch, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub()) as found:
        go_online(monkeypatch, found.url)
        yield found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def get(name: str, revision: str | None = None, **options: Any) -> tuple[Path, str]:
    return snapshot(name, revision, **{"extent": "all", "silent": True, **options})


def test_what_is_read_is_downloaded_once_and_nothing_else(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add("org/name", FILES)
    folder, found = get("org/name", silent=False)
    assert (found, names(folder), hub.downloaded()) == (commit, READ, READ)
    assert "Fetching" in capsys.readouterr().err, "with progress"
    hub.asked.clear()
    assert get("org/name") == get("org/name", commit) == (folder, commit)
    assert hub.asked == [], "from the cache when it is there"
    get("org/name", code=True)
    assert hub.downloaded() == ["modeling_own.py"]
    assert capsys.readouterr() == ("", "")


def test_revisions_are_other_models(hub: FakeHub) -> None:
    first = hub.add("org/name", FILES)
    second = hub.add("org/name", {**FILES, "config.json": b"{ }"}, "v2", "refs/pr/1")
    assert get("org/name")[1] == first
    assert get("org/name", "v2")[1] == get("org/name", "refs/pr/1")[1] == get("org/name", second)[1] == second


def test_shards_are_those_of_the_index(hub: FakeHub) -> None:
    hub.add("gpt2", SHARDS)
    folder, _ = get("gpt2", extent="settings")
    assert names(folder) == ["config.json", "model.safetensors.index.json"]
    assert names(get("gpt2")[0]) == sorted({*SHARDS} - {"consolidated.safetensors"})


def test_a_config_alone(hub: FakeHub) -> None:
    hub.add("org/bins", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    assert names(get("org/bins", extent="config")[0]) == ["config.json"]


def test_errors_of_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", FILES)
    hub.add("org/gated", FILES)
    hub.gated.add("org/gated")
    hub.add("org/bins", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})

    def told(name: str, revision: str | None = None) -> str:
        with pytest.raises(UserError) as raised:
            get(name, revision)
        assert "\n" not in str(raised.value)
        return str(raised.value).replace(hub.url, "HUB")

    assert told("org/nope") == (
        "org/nope is no folder here, and the hub has no model of this name; a private one needs HF_TOKEN"
    )
    assert told("org/nope", "0" * 40) == told("org/nope")
    assert told("org/name", "v9") == "org/name on the hub has no revision 'v9': see HUB/org/name/tree/main"
    assert told("org/name", "0" * 40).startswith("org/name on the hub has no revision '000")
    assert told("org/gated") == (
        "org/gated is gated: accept its terms at HUB/org/gated, then set HF_TOKEN or log in with `hf auth login`"
    )
    assert "only pytorch_model.bin: name a repository of safetensors" in told("org/bins")
    assert "org--name is no folder here, and no name on the hub" in told("org--name")
    hub.status = 503
    assert told("org/name") == "the hub at HUB answers 503 when asked for org/name"
    hub.status = 200
    assert told("org/name") == "what answers at HUB is no Hugging Face hub: see HF_ENDPOINT"
    go_online(monkeypatch, "http://127.0.0.1:9")
    for revision in (None, "v1", "0" * 40):
        assert told("org/name", revision).endswith("and the hub at http://127.0.0.1:9 cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert told("org/name", "v1") == (
        f"org/name is no folder here, nor at revision 'v1' in the Hugging Face cache {constants.HF_HUB_CACHE}, and the "
        "hub is not asked, as HF_HUB_OFFLINE is set"
    )


def test_a_token_opens_what_is_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", FILES)
    hub.gated.add("org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_of_mine")
    assert names(get("org/gated")[0]) == READ


def test_a_cache_is_read_offline(cache: Path) -> None:
    commit = write_cache(cache, "org/name", FILES, refs=("main", "v1"))
    for asked in (None, "v1", commit):
        folder, found = get("org/name", asked)
        assert (folder.name, found) == (commit, commit)


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_cache_that_is_not_whole_is_refused(cache: Path, lost: str) -> None:
    write_cache(cache, "org/name", FILES, lacks=(lost,))
    with pytest.raises(UserError, match=f"not whole: it lacks {lost}, and the hub is not asked"):
        located(read_source("org/name"))


def test_a_shard_that_is_not_there_is_named(cache: Path) -> None:
    write_cache(cache, "org/name", SHARDS, lacks=("model-2.safetensors",))
    with pytest.raises(UserError, match=r"is in the Hugging Face cache, but not whole: it lacks model-2\.safetensors"):
        get("org/name")


@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_download_that_was_cut_is_completed_or_refused(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    hub.add("org/name", FILES)
    folder, commit = get("org/name")
    (folder / lost).resolve().unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"not whole: it lacks {lost}, and the hub is not asked"):
        get("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert get("org/name") == (folder, commit)
    assert (folder / lost).read_bytes() == FILES[lost]


def test_what_other_programs_cached_is_completed_or_taken_as_it_is(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need not have asked for the tokenizer; and say nowhere which files there are."""
    hub.add("org/name", FILES)
    held = {name: FILES[name] for name in ("config.json", "model.safetensors")}
    home = cache / "models--org--name"
    write_cache(cache, "org/name", held)
    commit = hub.add("org/name", FILES)
    (home / "snapshots" / (home / "refs" / "main").read_text()).rename(home / "snapshots" / commit)
    (home / "refs" / "main").write_text(commit)
    url = hub.url
    go_online(monkeypatch, "http://127.0.0.1:9")
    assert names(get("org/name")[0]) == ["config.json", "model.safetensors"]
    go_online(monkeypatch, url)
    assert names(get("org/name")[0]) == READ
    assert hub.downloaded() == ["chat_template.jinja", "tokenizer.json"]


def test_a_plan_file_says_revisions_of_both_arms(cache: Path, tmp_path: Path) -> None:
    first = write_cache(cache, "org/name", FILES, refs=("main",))
    second = write_cache(cache, "org/name", {**FILES, "config.json": b"{ }"}, refs=("v2",))
    file = tmp_path / "plan.toml"
    file.write_text('model = "org/name"\nrevision = "v2"\nbaseline = "org/name"\nbaseline_revision = "main"\n')
    for cls in (RunPlan, SpeedPlan):
        plan = check_checkpoints(load_plan(file, cls))
        assert (plan.revision, plan.baseline_revision) == (second, first)
        candidate, baseline = arm_sources(plan)
        assert [one[0].commit for one in (candidate, baseline) if one[0] is not None] == [second, first]
    assert merge(load_plan(file, RunPlan), {"revision": "main"}).revision == "main"
    file.write_text('model = "org/name"\nrevision = "v2"\n')
    assert check_checkpoints(load_plan(file, VerifyPlan)).revision == second


def test_tables_of_baselines_say_their_revisions(cache: Path, tmp_path: Path) -> None:
    first = write_cache(cache, "org/name", FILES, refs=("main",))
    second = write_cache(cache, "org/name", {**FILES, "config.json": b"{ }"}, refs=("v2",))
    file = tmp_path / "plan.toml"
    tables = '[[baselines]]\nmodel = "org/name"\n[[baselines]]\nmodel = "org/name"\nrevision = "v2"\n'
    file.write_text(tables)
    plan = check_checkpoints(load_plan(file, RunPlan))
    assert [one.baseline_revision for one in each_baseline(plan)] == [first, second]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('revision = "v2"', "revision 'v2' has no effect on miniature: only models of the hub have revisions"),
        ('baseline_revision = "v2"', "baseline_revision has no effect on context-tower"),
        ('model = "org/name@v1"\nrevision = "v2"', "org/name@v1 and revision 'v2' say different things"),
        ('model = "org/name"\nrevision = "v9"', "org/name is no folder here, nor at revision 'v9' in the Hugging Face"),
        ('model = "org/name"\nrevison = "v2"', "unknown key 'revison' (did you mean 'revision'?)"),
        ('model = "org/name"\nrevision = 2', "revision must be a text, not 2"),
    ],
)
def test_revisions_that_cannot_be_are_refused(cache: Path, tmp_path: Path, text: str, words: str) -> None:
    write_cache(cache, "org/name", FILES)
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        check_checkpoints(load_plan(file, RunPlan))
