"""What the distributions hold, and what their metadata promises."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import BytesParser
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlx_mcsd

BUNDLED = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
PLANTED = ("metal/probe.metal", "mlx_mcsd/assets/probe/nested/probe.txt")


def is_packaged(path):
    """Whether the source tree's file `path` (relative) belongs into the wheel."""
    return path.suffix == ".py" or {
        "mlx_mcsd": path.parts[1] == "assets",
        "convert": False,
        "metal": path.suffix == ".metal" or path.name == "README.md",
    }.get(path.parts[0], False)


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """Source files that should be packaged, wheel and sdist, built from a copy of the tree."""
    tree = tmp_path_factory.mktemp("built") / "tree"
    ignored = (root / ".gitignore").read_text().split()
    shutil.copytree(
        root, tree, ignore=shutil.ignore_patterns(".git", *(name.strip("/") for name in ignored))
    )
    for name in PLANTED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("planted\n")
    files = {
        path.relative_to(tree)
        for folder in ("mlx_mcsd", "convert", "metal")
        for path in (tree / folder).rglob("*")
        if path.is_file() and is_packaged(path.relative_to(tree))
    }
    # `build` makes the wheel from the sdist, so the sdist is enough to build from.
    build = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    return files, wheel, sdist


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        yield archive


def dist_info(wheel, name):
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    return BytesParser().parsebytes(dist_info(wheel, "METADATA"))


def test_wheel_holds_every_file_under_its_installed_name_and_no_other(built, wheel):
    files, path, _ = built
    tree = path.parents[1]
    expected = {
        name if name.startswith("mlx_mcsd/") else f"mlx_mcsd/{name}": (tree / name).read_bytes()
        for name in map(Path.as_posix, files)
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == set(expected)
    assert {name for name in expected if wheel.read(name) != expected[name]} == set()
    assert {"mlx_mcsd/metal/probe.metal", "mlx_mcsd/assets/probe/nested/probe.txt"} <= found
    assert {"mlx_mcsd/convert/__main__.py", "mlx_mcsd/metal/README.md"} <= found
    assert "mlx_mcsd/convert/reference/modeling_mcsd.py" in found


def test_wheel_holds_the_bundled_model(wheel):
    stories = "mlx_mcsd/assets/stories/"
    assert {stories + name for name in BUNDLED} <= set(wheel.namelist())


def test_sdist_holds_the_sources_and_the_tests(built, root):
    files, _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(root).as_posix() for path in (root / "tests").rglob("*.py")}
    assert {path.as_posix() for path in files} | tests <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml"} <= names


def test_runtime_dependencies_are_these(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {"convert", "plot", "train", "evaluate", "test", "dev"}

    def installed(platform, extra=""):
        environment = {"sys_platform": platform, "extra": extra}
        return {
            (r.name, *r.extras)
            for r in requirements
            if r.marker is None or r.marker.evaluate(environment)
        }

    names = ("mlx-lm", "numpy", "regex", "sentencepiece", "safetensors", "tqdm")
    common = {(name,) for name in names}
    assert installed("darwin") == common | {("mlx",)}
    assert installed("linux") == common | {("mlx", "cpu")}
    assert ("torch",) in installed("linux", "convert")


def test_metadata_states_version_python_and_licence(metadata, wheel, root):
    assert metadata["Name"] == "mlx-mcsd"
    assert metadata["Version"] == mlx_mcsd.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert dist_info(wheel, "licenses/LICENSE") == (root / "LICENSE").read_bytes()


def test_every_command_has_a_console_script(wheel, root):
    scripts = ConfigParser(delimiters="=")
    scripts.optionxform = str
    scripts.read_string(dist_info(wheel, "entry_points.txt").decode())
    commands = {
        f"mlx_mcsd.{path.stem}": f"mlx_mcsd.{path.stem}:main"
        for path in (root / "mlx_mcsd").glob("*.py")
        if re.search(r"^def main\(", path.read_text(), re.MULTILINE)
    }
    for package in ("bench", "convert"):
        commands[f"mlx_mcsd.{package}"] = f"mlx_mcsd.{package}.__main__:main"
    assert dict(scripts["console_scripts"]) == commands
    for target in commands.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_converter_runs_from_the_root_of_the_checkout(root):
    """The folder's own mlx_mcsd comes first there and has no `convert` inside."""
    run = subprocess.run(
        [sys.executable, "-m", "mlx_mcsd.convert", "--help"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "--hf-path" in run.stdout
