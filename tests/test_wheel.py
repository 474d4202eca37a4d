"""The wheel: built, installed away from the checkout, and used there as a newcomer would use it."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEED_OPTIONS = ("--num-prompts", "2", "--min-rounds", "2", "--new-tokens", "8")

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without any variable that could lead back to the checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TWOTOWER_EVAL"))}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of a new environment with only the wheel in it, which sees the packages installed here."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    call(
        sys.executable, "-m", "pip", "--python", home, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home
    )
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "installed_here.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return home / "bin"


def test_the_wheel_carries_package_tasks_suites_and_miniature_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("tasks", "tasks/suites", "tasks/claims", "tasks/miniature"):
        shipped = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        prefix = f"twotower_eval/_data/{folder}/"
        assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} >= shipped
    pair = {f"twotower_eval/miniature/pair/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert pair <= names
    assert "twotower_eval/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"twotower_eval", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    where = call(installed / "python", "-c", "import twotower_eval; print(twotower_eval.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))


def test_the_demo_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    tool = installed / "twotower-eval"
    run = Path(call(tool, "run", "--tasks", "miniature", "--limit", "2", cwd=tmp_path).splitlines()[-1])
    speed = Path(call(tool, "speed", "--tasks", "miniature", *SPEED_OPTIONS, cwd=tmp_path).splitlines()[-1])
    assert (tmp_path / run / "done.json").is_file()
    assert (tmp_path / speed / "done.json").is_file()
    report = Path(call(tool, "report", cwd=tmp_path).splitlines()[-1])
    text = (tmp_path / report).read_text(encoding="utf-8")
    assert run.name in text
    assert speed.name in text
