"""Compiled programs, kept between runs in the cache folder of the user."""

import contextlib
import os
import pathlib

import jax

_CACHE_BYTES = 1 << 30  # Of compiled programs.


def keep_compiled() -> None:
  """Keeps compiled programs between runs, in the user's cache folder.

  If there is none or it cannot be written, programs are compiled again.
  The oldest go when the folder holds more than a gigabyte.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = _cache_folder()
  if folder is None:
    return
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
      trim(folder, _CACHE_BYTES)
      jax.config.update("jax_compilation_cache_dir", str(folder))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _cache_folder() -> pathlib.Path | None:
  """The user's folder for compiled programs; None for one without a home."""
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # So the standard has it.
    home = os.environ.get("HOME", os.path.expanduser("~"))
    cache = os.path.join(home, ".cache") if os.path.isabs(home) else ""
  return pathlib.Path(cache, "vqjax") if cache else None


def trim(folder: pathlib.Path, max_bytes: int) -> None:
  """Deletes the files that were used longest ago, down to `max_bytes`."""
  last_used = lambda stat: max(stat.st_atime, stat.st_mtime)
  found = []
  for entry in os.scandir(folder):
    with contextlib.suppress(FileNotFoundError):  # Another process trims too.
      if entry.is_file(follow_symlinks=False):
        stat = entry.stat()
        found.append((last_used(stat), stat.st_size, entry.path))
  excess = sum(size for _, size, _ in found) - max_bytes
  for _, size, path in sorted(found):
    if excess <= 0:
      return
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    excess -= size
