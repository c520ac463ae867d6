"""Uploading, against a hub that is not one."""

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from converting import convert, edit_json, main
from mlx_mcsd.convert import upload


class FakeApi:
    """Takes down what it is asked, and what the directory held then."""

    calls = []  # noqa: RUF012 (emptied by the fixture)
    failure = None

    def create_repo(self, **options):
        self.calls.append(("create_repo", options))

    def upload_folder(self, **options):
        if self.failure:
            raise self.failure
        self.calls.append(("upload_folder", options))


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(upload, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "failure", None)
    return FakeApi.calls


def test_the_fake_takes_what_the_hub_takes():
    """Names and keywords of the calls exist in the library that is installed."""
    from inspect import signature

    api = huggingface_hub.HfApi
    signature(api.create_repo).bind(None, repo_id="a/b", exist_ok=True)
    folder = {"folder_path": "x", "repo_id": "a/b", "repo_type": "model"}
    signature(api.upload_folder).bind(None, **folder)


def test_upload(source, target, calls, capsys):
    """The finished directory, its card naming the repository and what to install."""
    convert(source, target, "--upload-repo", "me/stories-mlx")
    folder = {"folder_path": str(target), "repo_id": "me/stories-mlx", "repo_type": "model"}
    create = {"repo_id": "me/stories-mlx", "exist_ok": True}
    assert calls == [("create_repo", create), ("upload_folder", folder)]
    assert "Uploaded to https://huggingface.co/me/stories-mlx" in capsys.readouterr().out
    card = (target / "README.md").read_text()
    assert "pip install mlx-mcsd" in card and "--model me/stories-mlx" in card
    assert huggingface_hub.ModelCard(card).data.library_name == "mlx"


@pytest.mark.parametrize("flags", [["--dry-run"], []], ids=["dry run", "failing"])
def test_nothing_is_uploaded(source, target, calls, flags, capsys):
    """Not by a dry run, and not when the conversion fails."""
    if not flags:
        edit_json(source / "config.json", hidden_size=63)
        with pytest.raises(SystemExit):
            convert(source, target, "--upload-repo", "me/stories-mlx")
    else:
        convert(source, target, "--upload-repo", "me/stories-mlx", *flags)
    assert calls == [] and not target.exists()


@pytest.mark.parametrize("repo", ["", "stories", "a/b/c", "me/ my model", "../x", "me/a--b"])
def test_refused_names(source, target, calls, repo, capsys):
    """Before any work."""
    with pytest.raises(SystemExit):
        convert(source, target, "--upload-repo", repo)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [upload] --upload-repo must be owner/name")
    assert calls == [] and not target.exists()


@pytest.mark.parametrize(
    "error",
    [OSError("no route"), OfflineModeIsEnabled("off"), upload.HTTPError("All attempts failed")],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_refuses(source, target, calls, monkeypatch, error, capsys):
    """One line; the model is there all the same."""
    monkeypatch.setattr(FakeApi, "failure", error)
    with pytest.raises(SystemExit):
        convert(source, target, "--upload-repo", "me/stories-mlx")
    (line,) = capsys.readouterr().err.splitlines()
    assert "is written but could not be uploaded to me/stories-mlx" in line
    assert (target / "config.json").exists()


def test_not_with_reverse(source, target, calls, capsys):
    with pytest.raises(SystemExit):
        main(["--reverse", "--mlx-path", str(source), "--hf-path", "x", "--upload-repo", "a/b"])
    assert "must go without --upload-repo" in capsys.readouterr().err
    assert calls == []
