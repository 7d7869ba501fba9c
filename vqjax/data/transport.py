"""Opens a file on a server at any byte, over http, https or ftp.

What can be mended by waiting raises `TryLater`; all other errors are sentences
for a user.
"""

import contextlib
import email.utils
import ftplib
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

from vqjax import __version__

SCHEMES = ("http", "https", "ftp")
_TIMEOUT = 60  # Seconds without any byte.
_LATER = (408, 425, 429, 500, 502, 503, 504)
_GONE = (404, 410)
_REFUSED = (401, 403, 407, 451)
_NETWORK = (OSError, EOFError, http.client.HTTPException)


class TryLater(Exception):  # noqa: N818 Not an error yet.
  """What a server or a network may have overcome a little later.

  `wait` is the seconds that the server asks for, None if it does not say.
  """

  def __init__(self, reason: str, wait: float | None = None):
    super().__init__(reason)
    self.wait = wait


class Reply(NamedTuple):
  """An open file on a server.

  `read_fn(n)` returns up to n bytes, from byte `start` on, b"" at the end.
  `total` is the size of the whole file and `version` what tells it from a
  changed one; None and "" if the server does not say.
  """

  read_fn: Callable[[int], bytes]
  close_fn: Callable[[], None]
  start: int
  total: int | None
  version: str


def check_url(url: str) -> None:
  """Raises ValueError unless `url` is of a known scheme and has a host."""
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in SCHEMES or not parts.hostname:
    raise ValueError(
      f"An address must begin with one of {', '.join(SCHEMES)}, as "
      f"https://host/folder; got {url!r}."
    )


def open_url(url: str, start: int = 0, version: str = "") -> Reply:
  """Opens a file at byte `start`; at 0 if that cannot be had.

  That is so if the server has no ranges, or the file is not of the `version`
  of which there are `start` bytes already.

  Raises:
    TryLater: Waiting may help.
    FileNotFoundError: The server has no such file.
    OSError: Any other refusal.
  """
  check_url(url)
  if url.startswith("ftp:"):
    return _open_ftp(url, start, version)
  return _open_http(url, start, version)


def size_of(url: str) -> int | None:
  """Returns the bytes of a file on a server, None if it does not say.

  Raises as `open_url`.
  """
  check_url(url)
  if url.startswith("ftp:"):
    reply = _open_ftp(url, 0, "", is_opened=False)
    return reply.total
  try:
    with _request(url, {}, method="HEAD") as answer:
      return _number(answer.headers.get("Content-Length"))
  except urllib.error.HTTPError as error:
    if error.code in (*_GONE, *_LATER):
      raise _explained(url, error) from error
    return None  # Some servers refuse to be asked this.


def _request(url: str, headers: dict, method: str = "GET"):
  """The answer of a server; HTTPError is left to the caller."""
  headers = {
    "Accept-Encoding": "identity",
    "User-Agent": f"vqjax/{__version__}",
    **headers,
  }
  request = urllib.request.Request(url, headers=headers, method=method)
  try:
    return urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError:
    raise
  except urllib.error.URLError as error:
    if isinstance(error.reason, ssl.SSLCertVerificationError):
      raise OSError(
        f"The certificate of {url} is not trusted here: "
        f"{error.reason.verify_message}. Is there a proxy in between?"
      ) from error
    raise TryLater(f"no answer ({error.reason})") from error
  except _NETWORK as error:
    raise TryLater(f"no answer ({_said(error)})") from error


def _open_http(url: str, start: int, version: str) -> Reply:
  headers = {}
  if start:
    headers["Range"] = f"bytes={start}-"
    if version and not version.startswith("W/"):  # Weak ones may not be asked.
      headers["If-Range"] = version
  try:
    answer = _request(url, headers)
  except urllib.error.HTTPError as error:
    if error.code != 416 or not start:
      raise _explained(url, error) from error
    total = _total(error.headers)
    if total == start:  # All is here already.
      return Reply(lambda n: b"", lambda: None, start, total, version)
    return _open_http(url, 0, "")
  _check_body(url, answer)
  first, total = 0, _number(answer.headers.get("Content-Length"))
  if answer.status == 206:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    first = int(found[1]) if found else -1
    total = _total(answer.headers) or (total and first + total)
  found = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
  is_other = first and (first != start or (version and found != version))
  if is_other:
    answer.close()
    if not start:
      raise OSError(
        f"{url} answers with a part of the file that was not asked for; try "
        "another address (--base_url)."
      )
    return _open_http(url, 0, "")
  read_fn = lambda n: _in_words(lambda: answer.read(n))
  return Reply(read_fn, answer.close, first, total, found)


def _in_words(read_fn) -> bytes:
  """What is read; TryLater if the connection breaks."""
  try:
    return read_fn()
  except _NETWORK as error:
    raise TryLater(f"the connection broke ({_said(error)})") from error


def _said(error: Exception) -> str:
  return str(error) or type(error).__name__


def _check_body(url: str, answer) -> None:
  """Raises OSError if an answer is something else than the bytes of a file."""
  kind = answer.headers.get_content_type()
  coding = answer.headers.get("Content-Encoding", "identity")
  if kind == "text/html":
    problem = "a web page (text/html)"
  elif coding != "identity":
    problem = f"{coding}, which was not asked for"
  else:
    return
  answer.close()
  raise OSError(
    f"{url} answers with {problem} instead of the file: is a login or a proxy "
    "in between? Open the address in a browser."
  )


def _explained(url: str, error: urllib.error.HTTPError) -> Exception:
  """The refusal of a server as a sentence, or as TryLater."""
  said = f"{error.code} {error.reason}".strip()
  with contextlib.closing(error):
    if error.code in _LATER:
      return TryLater(f"it answers {said}", _wait_of(error.headers))
  if error.code in _GONE:
    return FileNotFoundError(
      f"{url} answers {said}: the file is not there, or not any more. "
      "--base_url=ADDRESS takes it from a mirror."
    )
  if error.code in _REFUSED:
    return PermissionError(
      f"{url} answers {said}: the server does not give it to you. "
      "--base_url=ADDRESS takes it from a mirror."
    )
  return OSError(f"{url} answers {said}, which no waiting changes.")


def _wait_of(headers) -> float | None:
  """Seconds of Retry-After, which is a number or a date."""
  text = headers.get("Retry-After", "").strip()
  if text.isdecimal():
    return float(text)
  with contextlib.suppress(ValueError, TypeError):
    date = email.utils.parsedate_to_datetime(text)
    return max(0.0, date.timestamp() - time.time())
  return None


def _number(text: str | None) -> int | None:
  return int(text) if text and text.isdecimal() else None


def _total(headers) -> int | None:
  """N of `Content-Range: bytes 5-9/N`, or of `bytes */N`."""
  return _number(headers.get("Content-Range", "").rpartition("/")[2])


def _open_ftp(url: str, start: int, version: str, is_opened=True) -> Reply:
  parts = urllib.parse.urlsplit(url)
  path, ftp = urllib.parse.unquote(parts.path), ftplib.FTP(timeout=_TIMEOUT)
  try:
    ftp.connect(parts.hostname, parts.port or ftplib.FTP_PORT)
    ftp.login()
    ftp.voidcmd("TYPE I")
    total, found = _ftp_size(ftp, path), _ftp_date(ftp, path)
    if not is_opened:
      ftp.close()
      return Reply(lambda n: b"", lambda: None, 0, total, found)
    if start and ((version and found != version) or start > (total or start)):
      start = 0
    connection, start = _retrieve(ftp, path, start)
  except ftplib.error_perm as error:
    ftp.close()
    kind = FileNotFoundError if str(error).startswith("550") else OSError
    raise kind(
      f"{url} answers {error}. --base_url=ADDRESS takes it from a mirror."
    ) from error
  except (ftplib.Error, *_NETWORK) as error:
    ftp.close()
    raise TryLater(f"no answer ({_said(error)})") from error

  def close():
    connection.close()
    ftp.close()

  read_fn = lambda n: _in_words(lambda: connection.recv(n))
  return Reply(read_fn, close, start, total, found)


def _ftp_size(ftp: ftplib.FTP, path: str) -> int | None:
  try:
    return ftp.size(path)
  except ftplib.error_perm as error:
    if str(error).startswith("550"):
      raise
    return None  # It does not know the question.


def _ftp_date(ftp: ftplib.FTP, path: str) -> str:
  with contextlib.suppress(ftplib.Error):
    return ftp.voidcmd(f"MDTM {path}")
  return ""


def _retrieve(ftp, path: str, start: int) -> tuple[socket.socket, int]:
  """The connection of the file from `start` on, or from 0 if it must be."""
  try:
    return ftp.transfercmd(f"RETR {path}", rest=start or None), start
  except ftplib.error_perm:
    if not start:
      raise
    return ftp.transfercmd(f"RETR {path}"), 0  # It knows no REST.
