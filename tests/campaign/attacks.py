"""One disturbance of a command, what it leaves, and the command run again."""

import shutil

from experiments.lib import errors, run_folder
from tests.campaign import interrupts, outcomes, subjects

LEFT = ["nothing", "description alone", "old", "a part", "all"]
COLUMNS = ["tries", *LEFT, "same after a rerun", "FORBIDDEN"]


class Attack:
  """A command, disturbed again and again in a folder of its own."""

  def __init__(self, table, name, inputs, tmp_path, others=None):
    """`others` made the outputs that are there before, to be replaced."""
    self.name, self.subject = name, subjects.COMMANDS[name]
    self._table, self._inputs, self._others = table, inputs, others
    self._options = {"overwrite": True} if others else {}
    self.row = f"{name} --overwrite" if others else name
    self.folder = tmp_path / "run"
    self.subject.run(inputs, tmp_path / "undisturbed")
    self.wanted = outcomes.snapshot(tmp_path / "undisturbed")
    self.before, self.num_changes = {}, 0

  def begin(self) -> None:
    """Makes the folder as it was before the command."""
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir()
    if self._others:
      self.subject.run(self._others, self.folder)
      self.before = outcomes.snapshot(self.folder)

  def run(self) -> None:
    """The command."""
    self.subject.run(self._inputs, self.folder, **self._options)

  def disturbed(self, act):
    """Runs it with `act` before each change; returns what it raised."""
    try:
      with interrupts.before_change(self.folder, act) as watch:
        self.run()
    except (Exception, interrupts.Killed, KeyboardInterrupt) as error:
      return error
    finally:
      self.num_changes = watch.num
    return None

  def add(self, column: str, detail: str | None = None) -> None:
    """Counts an outcome."""
    self._table.add(self.row, column, detail)

  def judge(self, what: str) -> None:
    """Counts what was left, and whether the command run again mends it."""
    self.add("tries")
    left, bad = self._look()
    self.add(left)
    if bad:
      self.add("FORBIDDEN", f"{what}: {bad}")
    outcomes.forget_process(self.folder)
    error = None
    try:
      self.run()
    except Exception as e:
      error = f"{type(e).__name__}: {e}"
    found = outcomes.snapshot(self.folder, is_lenient=True)
    found.pop(run_folder.LOCK_NAME, None)  # Of a dead process, known as such.
    if error is None and found == self.wanted:
      self.add("same after a rerun")
      return
    files = {*found, *self.wanted}
    differ = [f for f in files if found.get(f) != self.wanted.get(f)]
    error = error or f"{differ} differ"
    self.add("FORBIDDEN", f"{what}, {left} left: rerun: {error}")

  def _look(self) -> tuple[str, str | None]:
    """The class of what is left, and what is forbidden of it."""
    found = outcomes.snapshot(self.folder, is_lenient=True)
    left = {k: v for k, v in found.items() if not outcomes.is_temporary(k)}
    bad = None
    for file, content in left.items():
      if content not in (self.wanted.get(file), self.before.get(file)):
        bad = f"{file} is neither old nor new"
      bad = self._check_pair(left, file) or bad
    if self.subject.is_one and left not in ({}, self.wanted, self.before):
      bad = f"{sorted(left)} are of two outputs"
    only_json = all(file.endswith(".json") for file in left)
    if not left:
      return "nothing", bad
    if left == self.wanted:
      return "all", bad
    if left == self.before:
      return "old", bad
    if self.subject.is_described and only_json:
      return "description alone", bad
    return "a part", bad

  def _check_pair(self, left: dict, file: str) -> str | None:
    """What is wrong with an output and its description."""
    if not self.subject.is_described or file.endswith(".json"):
      return None
    beside = f"{file}.json"
    is_new = left[file] == self.wanted.get(file)
    of = self.wanted if is_new else self.before
    if left.get(beside) == of.get(beside):
      return None
    return f"{file} lies beside a description of something else"


def check_no_temporary(attack: Attack, what: str) -> None:
  """Temporary files are for kills alone: errors and signals remove theirs."""
  names = [p.name for p in attack.folder.rglob("*")]
  if names := [name for name in names if outcomes.is_temporary(name)]:
    attack.add("FORBIDDEN", f"{what}: left {names}")


def check_said(attack: Attack, what: str, error, *words: str) -> None:
  """An error must be one line for the user that has one of the words."""
  if not errors.is_for_user(error):
    said = f"traceback of {type(error).__name__}: {error}"
    attack.add("FORBIDDEN", f"{what}: {said}")
  elif words and not any(word in str(error) for word in words):
    attack.add("FORBIDDEN", f"{what}: unclear: {error}")
