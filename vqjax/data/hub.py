"""Files of the Hugging Face hub, by `hf://owner/name[@revision]`.

The package huggingface_hub does the work, so its environment holds: files are
kept in $HF_HUB_CACHE, else below $HF_HOME; HF_HUB_OFFLINE=1 asks no server;
HF_TOKEN or `hf auth login` opens what is private; HF_ENDPOINT is a mirror. This
module adds sentences for what can go wrong.
"""

import contextlib
import os
import pathlib
import re
from typing import NamedTuple

_START = re.compile(r"hf:/{1,2}(?=[^/])")  # pathlib keeps one slash.
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Address(NamedTuple):
  """A repository, and a branch, tag or commit of it; None for main."""

  repo: str
  revision: str | None = None

  def __str__(self) -> str:
    """As users write it."""
    return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_address(path) -> bool:
  """Whether a path is an address of the hub."""
  return _START.match(os.fspath(path)) is not None


def parse(path) -> Address:
  """Returns the parts of `hf://owner/name[@revision]`.

  Raises:
    ValueError: It has another form.
  """
  text = os.fspath(path)
  repo, at, revision = _START.sub("", text).partition("@")
  if not _REPO.fullmatch(repo) or (at and not revision):
    raise ValueError(
      f"{text} is no address of a codec on the hub; expected "
      "hf://OWNER/NAME or hf://OWNER/NAME@REVISION."
    )
  return Address(repo, revision or None)


def fetch(path, name: str) -> pathlib.Path:
  """Returns where a file of a repository lies in the cache; gets it if needed.

  Raises:
    ImportError: huggingface_hub is not installed.
    FileNotFoundError: There is no such repository, revision or file.
    ConnectionError: No server answers, or none may be asked, and the cache does
      not have it.
    ValueError: The address has another form.
  """
  address = parse(path)
  hub = _library(str(address))
  with _in_words(hub, address, name):
    found = hub.hf_hub_download(
      address.repo, name, revision=address.revision, library_name="vqjax"
    )
  return pathlib.Path(found)


def check_upload(repo: str, names, *, overwrite: bool = False) -> None:
  """Raises unless these files can be written into a repository, yours.

  Raises:
    ImportError: huggingface_hub is not installed.
    PermissionError: You are not logged in.
    ConnectionError: No server answers, or none may be asked.
    FileExistsError: It has such files already, and not `overwrite`.
    ValueError: `repo` is not OWNER/NAME.
  """
  if not _REPO.fullmatch(repo):
    raise ValueError(f"--to must be OWNER/NAME on the hub, got {repo!r}.")
  hub = _library(f"--to={repo}")
  with _in_words(hub, Address(repo), ""):
    api = hub.HfApi(library_name="vqjax")
    api.whoami()
    found = [name for name in names if api.file_exists(repo, name)]
  if found and not overwrite:
    raise FileExistsError(
      f"hf://{repo} has {', '.join(found)} already; choose another name, or "
      "add --overwrite: earlier commits stay in its history."
    )


def upload(folder, repo: str, names, *, private: bool, message: str) -> str:
  """Writes files of a folder into a repository, in one commit; returns it.

  Makes the repository if there is none. Raises as `check_upload`.
  """
  hub = _library(f"--to={repo}")
  with _in_words(hub, Address(repo), ""):
    api = hub.HfApi(library_name="vqjax")
    # None leaves the default of the organisation.
    api.create_repo(repo, private=private or None, exist_ok=True)
    made = api.create_commit(
      repo,
      [
        hub.CommitOperationAdd(name, os.fspath(pathlib.Path(folder, name)))
        for name in names
      ],
      commit_message=message,
    )
  return made.oid


def _library(what: str):
  """The package huggingface_hub."""
  try:
    import huggingface_hub.constants
    import huggingface_hub.errors
  except ImportError as error:
    raise ImportError(
      f"{what} needs huggingface_hub: pip install 'vqjax[hub]'."
    ) from error
  return huggingface_hub


@contextlib.contextmanager
def _in_words(hub, address: Address, name: str):
  """Turns errors of the package into sentences."""
  errors, at = hub.errors, f"{hub.constants.ENDPOINT}/{address.repo}"
  log_in = "log in by hf auth login, or set HF_TOKEN"
  try:
    yield
  except errors.LocalTokenNotFoundError as error:
    raise PermissionError(f"{at} needs your token: {log_in}.") from error
  except errors.GatedRepoError as error:
    raise PermissionError(
      f"{at} is given only to those who accept its terms: accept them on its "
      f"page, and {log_in}."
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise FileNotFoundError(
      f"There is no {at}, or it is private: check the name, or {log_in}."
    ) from error
  except errors.RevisionNotFoundError as error:
    raise FileNotFoundError(
      f"{at} has no branch, tag or commit {address.revision!r}; leave it out "
      "for main."
    ) from error
  except errors.LocalEntryNotFoundError as error:
    raise _no_answer(hub, address, name, error) from error
  except errors.EntryNotFoundError as error:
    raise FileNotFoundError(
      f"{address} has no {name}, so it is no codec of vqjax publish."
    ) from error
  except errors.OfflineModeIsEnabled as error:
    raise _no_answer(hub, address, name, error) from error
  except errors.HfHubHTTPError as error:
    code = error.response.status_code
    if code in (401, 403):
      raise PermissionError(
        f"{at} is refused ({code}): {log_in}, of a token that may do this."
      ) from error
    raise ConnectionError(
      f"{at} answers {code}: {str(error).strip().splitlines()[-1]} Run the "
      "same command again later."
    ) from error
  except (errors.HTTPError, errors.FileMetadataError) as error:
    raise _no_answer(hub, address, name, error) from error


def _no_answer(hub, address: Address, name: str, error) -> ConnectionError:
  """No server answers, or none may be asked."""
  problem = f"{address} is not in the cache {hub.constants.HF_HUB_CACHE}"
  if not name:
    problem = f"Nothing can be published as {address}"
  if hub.constants.HF_HUB_OFFLINE:
    return ConnectionError(
      f"{problem}, and HF_HUB_OFFLINE lets no server be asked: unset it."
    )
  cause = error.__cause__ or error
  return ConnectionError(
    f"{problem}, and {hub.constants.ENDPOINT} does "
    f"not answer ({str(cause).strip().splitlines()[0]}): check the network."
  )
