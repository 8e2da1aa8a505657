"""The wheel alone is enough: commands, bundled models, type information and the workflow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from spalf.cli import init_workflow as init
from spalf.cli.errors import status_of
from spalf.errors import UserError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel, and its dependencies from the environment of the tests."""

    wheel: Path
    bin: Path
    home: Path

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, its two streams as one text."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=cwd or self.home,
            env={**kept, "PATH": os.pathsep.join([str(self.bin), os.defpath])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, built and installed. Nothing is downloaded."""
    home = tmp_path_factory.mktemp("an environment")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home), str(ROOT)]
    done = subprocess.run([*pip, *build], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = home.glob("spalf-*.whl")
    venv.create(home / "venv", symlinks=True)
    python = home / "venv" / "bin" / "python"
    (packages,) = (home / "venv" / "lib").glob("python*/site-packages")
    # A path file adds the packages that are here, without the path files of their directory: the
    # source tree that those name stays out of sight.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    install = ["--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed"]
    done = subprocess.run([*pip, *install, str(wheel)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return Installed(wheel, python.parent, home)


def test_the_wheel_holds_models_types_pages_and_workflow(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    wanted = {
        "spalf/py.typed",
        "spalf/bundled/demo-2l/model.safetensors",
        "spalf/bundled/demo-4l/tokenizer.json",
        "spalf/dashboard/assets/page.html",
        "spalf/interchange/card.md.j2",
        "spalf/project/Snakefile",
        "spalf/project/config/config.yaml",
        "spalf/project/workflow/schemas/config.schema.json",
        "spalf/project/workflow/profiles/default/config.yaml",
    }
    assert wanted <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "spalf").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"spalf"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_installed_package_is_the_one_that_runs(installed: Installed) -> None:
    code = (
        "import spalf; from spalf.models.load import resolve_model; "
        "print(spalf.__file__); print(resolve_model('spalf/demo-2l'))"
    )
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stdout
    for line in done.stdout.splitlines():
        assert line.startswith(str(installed.home / "venv")), done.stdout
    assert re.search(r"\d+\.\d+", installed.run("spalf", "--version").stdout)


CLIENT = """
from pathlib import Path

from spalf import LoadedSAE, load_sae, patched
from spalf.errors import UserError
from spalf.models import LanguageModel, load_model, patched_site


def width(folder: Path) -> int:
    sae: LoadedSAE = load_sae(folder, device="cpu")
    site = sae.hook_point or "blocks.0.hook_resid_post"
    model: LanguageModel = load_model(sae.model_name or "spalf/demo-2l", site, device="cpu")
    with patched(model, sae), patched_site(model, site, lambda x: 0.9 * x):
        return sae.d_sae + model.d_vocab


try:
    width(Path("sae"))
except UserError as error:
    print(error.key, error.remedy)
"""
WRONG = """
from spalf import load_sae

sae = load_sae(3)
name: str = sae.d_sae
sae.encodes
"""


def check_types(installed: Installed, directory: Path, text: str) -> tuple[int, str]:
    """What mypy says of a user's file; it takes a minute for the libraries that are left out."""
    (directory / "client.py").write_text(text, encoding="utf-8")
    others = ",".join(f"{name}.*" for name in ("torch", "transformers", "transformer_lens"))
    settings = f"[mypy]\nstrict = True\n[mypy-{others}]\nfollow_imports = skip\n"
    (directory / "mypy.ini").write_text(settings, encoding="utf-8")
    python = ["--python-executable", str(installed.bin / "python")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *python, "client.py"],
        cwd=directory,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_user_of_the_wheel_gets_its_types(installed: Installed, tmp_path: Path) -> None:
    assert check_types(installed, tmp_path, CLIENT) == (
        0,
        "Success: no issues found in 1 source file\n",
    )
    status, said = check_types(installed, tmp_path, WRONG)
    assert status == 1
    assert 'Argument 1 to "load_sae" has incompatible type "int"; expected "str | Path"' in said
    assert 'expression has type "int", variable has type "str"' in said
    assert '"LoadedSAE" has no attribute "encodes"' in said
    assert "Found 3 errors" in said


def test_every_extra_that_anything_names_is_one_of_the_wheel(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel)
    (metadata,) = (name for name in names.namelist() if name.endswith("METADATA"))
    extras = set(re.findall(r"^Provides-Extra: (\S+)", names.read(metadata).decode(), re.MULTILINE))
    found = set()
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("spalf/**/*.py")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        found |= {e for group in re.findall(r"spalf\[([a-z,]+)\]", text) for e in group.split(",")}
    assert {"baselines", "tensorboard", "wandb"} <= found <= extras


def test_a_project_from_the_wheel_is_ready_for_snakemake(
    installed: Installed, tmp_path: Path
) -> None:
    project = tmp_path / "my sweep"
    done = installed.run("spalf", "init-workflow", "my sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "my sweep" in done.stdout
    planned = installed.run(
        "python", "-m", "snakemake", "--dry-run", "--quiet", "rules", cwd=project
    )
    assert planned.returncode == 0, planned.stdout
    rows = dict(re.findall(r"^(\w+) +(\d+)$", planned.stdout, flags=re.MULTILINE))
    assert rows["phase2"] == rows["evaluate"] == "6"
    described = installed.run("spalf", "describe", "config/config.yaml", cwd=project)
    assert described.returncode == 0, described.stdout


def test_a_step_runs_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    assert installed.run("spalf", "init-workflow", "p", cwd=tmp_path).returncode == 0
    small = "train={F: 128, total_tokens: 20480, batch_size: 512, seq_len: 64, lr: 0.002}"
    target = "results/demo-2l/calibration/metadata.json"
    arguments = ["--cores", "1", "--config", small, "evaluate={tokens: 4096}", "--", target]
    done = installed.run("python", "-m", "snakemake", *arguments, cwd=tmp_path / "p")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "p" / target).exists()


def test_a_project_from_the_source_tree_is_the_same(tmp_path: Path) -> None:
    done = CliRunner().invoke(init.init_workflow, [str(tmp_path / "p")])
    assert done.exit_code == 0, done.output
    made = {p.relative_to(tmp_path / "p").as_posix() for p in (tmp_path / "p").rglob("*")}
    assert {"Snakefile", "config/config.yaml", "workflow/steps.py", "workflow/rules"} <= made
    assert not [name for name in made if "__pycache__" in name or name.endswith(".sh")]
    assert (tmp_path / "p" / "slurm" / "config.yaml").exists()
    assert (tmp_path / "p" / "profiles" / "default" / "config.yaml").exists()
    assert os.readlink(tmp_path / "p" / "profiles") == "workflow/profiles"


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty") as refused:
        init.write_project(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["Snakefile"]
    assert (tmp_path / "Snakefile").read_text(encoding="utf-8") == "mine"


def test_force_replaces_the_workflow_and_nothing_else(tmp_path: Path) -> None:
    init.write_project(tmp_path / "p")
    kept = tmp_path / "p" / "results" / "kept"
    kept.parent.mkdir()
    kept.write_text("kept", encoding="utf-8")
    (tmp_path / "p" / "Snakefile").write_text("broken", encoding="utf-8")
    init.write_project(tmp_path / "p", force=True)
    assert kept.read_text(encoding="utf-8") == "kept"
    ours = (ROOT / "Snakefile").read_text(encoding="utf-8")
    assert (tmp_path / "p" / "Snakefile").read_text(encoding="utf-8") == ours


def test_bad_directories_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "project" / "profiles").mkdir(parents=True)
    for given, words in {
        ("file",): "is a file",
        ("link",): "a link to nothing",
        ("file/inside",): "file",
        ("project", "--force"): "profiles",
    }.items():
        arguments = [str(tmp_path / given[0]), *given[1:]]
        status = status_of(
            lambda a=arguments: init.init_workflow.main(a, standalone_mode=False), debug=False
        )
        said = capsys.readouterr().err
        assert status in (1, 2)
        assert words in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "project" / "Snakefile").exists()
