"""``spalf init-workflow``: a directory with the workflow in it, ready for ``snakemake``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from spalf.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "workflow", "config", "paper", "environment.yml", "requirements.lock")
LINKS = {"profiles": Path("workflow", "profiles"), "slurm": Path("workflow", "profiles", "slurm")}
"""What Snakemake looks for beside the Snakefile, and where it is."""

LEFT_OUT = ("__pycache__", "install_*.sh", "write_*.py")
"""Compiled files, and what only the package itself needs."""


@click.command("init-workflow", epilog="Example: spalf init-workflow my-sweep")
@click.option("--force", is_flag=True, help="Replace the files of a project that is there already.")
@click.argument("directory", type=click.Path(path_type=Path))
def init_workflow(directory: Path, force: bool) -> None:
    """Copy the workflow into DIRECTORY: Snakefile, rules, configuration, profiles.

    The project belongs to whoever made it: edit config/config.yaml and run snakemake there.
    """
    write_project(directory, force=force)
    click.echo(
        f"{directory}: the workflow is ready. Edit config/config.yaml there, then, in that "
        "directory, `snakemake -n` shows what would run and `snakemake` runs it."
    )


def project_source() -> Path:
    """Where the workflow's files are: in the installed package, or in the source tree around it.

    Raises:
        UserError: in neither.
    """
    for place in (PACKAGE / "project", PACKAGE.parent):
        if all((place / part).exists() for part in PARTS):
            return place
    remedy = "this installation holds no workflow; install spalf again from its wheel"
    raise UserError("spalf", str(PACKAGE), remedy)


def write_project(directory: Path, *, force: bool = False) -> None:
    """Copy the workflow into ``directory``, which is made.

    Args:
        directory: of the new project.
        force: write into a directory that holds files; those of the same names are replaced and
            all others, results among them, are left alone.

    Raises:
        UserError: the directory is a file, or not empty, or holds something that a link of the
            project would have to replace.
    """
    if directory.is_symlink() and not directory.exists():
        raise UserError("DIRECTORY", str(directory), "is a link to nothing; give another one")
    if directory.exists() and not directory.is_dir():
        raise UserError("DIRECTORY", str(directory), "is a file; give the name of a directory")
    if not force and directory.is_dir() and any(directory.iterdir()):
        remedy = "is not empty; give a new directory, or --force to replace the workflow's files"
        raise UserError("DIRECTORY", str(directory), remedy)
    blocked = [name for name in LINKS if _is_not_ours(directory / name)]
    if blocked:
        remedy = f"is in the place of a link to {LINKS[blocked[0]]}; move it away"
        raise UserError("DIRECTORY", str(directory / blocked[0]), remedy)
    source = project_source()
    if directory.resolve() == source.resolve():
        raise UserError("DIRECTORY", str(directory), "is the workflow itself; give another one")
    directory.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        for file in _files(source / part):
            target = directory / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Without its permissions: an installed package may be read-only.
            shutil.copyfile(file, target)
    for name, target in LINKS.items():
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(target)


def _is_not_ours(link: Path) -> bool:
    return link.exists() and not link.is_symlink()


def _files(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    for path in sorted(source.iterdir()):
        if not any(path.match(pattern) for pattern in LEFT_OUT):
            yield from _files(path)
