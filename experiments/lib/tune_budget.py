"""What tune may begin in the seconds that it has."""

import math

from experiments.lib import tune_codecs

_LEAST_SECONDS = 20.0  # Of a network: compiling it alone takes them.


class Budget:
  """Seconds for the codecs that were asked for; `record` is tune.json.

  Estimates are kept in the record, so that the same command says the same.
  """

  def __init__(self, seconds: float, tried, record: dict):
    """Takes the limit, the candidates that count, and what was tried."""
    self._limit, self._record = seconds, record
    self._names = [candidate.name for candidate in tried]

  @property
  def spent(self) -> float:
    """Seconds of those that were tried."""
    took = self._took()
    return sum(took[name] for name in self._names if name in took)

  def _took(self) -> dict[str, float]:
    rows = self._record["codecs"]
    return {r["codec"]: r["seconds"] for r in rows if "mse" in r}

  def guess(self, candidate, sample=None, seed: int = 0) -> float | None:
    """Seconds of a codec, None if unknown; with a sample it is measured."""
    took, known = self._took(), self._record.setdefault("guesses", {})
    if candidate.name in took:
      return took[candidate.name]
    if candidate.is_learned:
      everything = tune_codecs.candidates(self._record["header"]["bytes"])
      (like,) = [c for c in everything if c.name == candidate.like]
      base = self.guess(like, sample, seed)
      if base is None:
        return None
      return max(candidate.times * base, _LEAST_SECONDS)
    if candidate.name not in known and sample is not None:
      found = tune_codecs.seconds_of(candidate, sample, seed)
      known[candidate.name] = round(found, 1)
    return known.get(candidate.name)

  def too_long(self, candidate, sample=None, seed: int = 0) -> str | None:
    """Says so if a codec would probably end too late; pq never does."""
    if candidate.name == "pq":
      return None
    guess = self.guess(candidate, sample, seed)
    spent = self.spent
    if guess is None or spent + guess <= self._limit:
      return None
    enough = math.ceil(spent + guess)
    return (
      f"it would take about {enough - round(spent)} s more, with {spent:.0f} s "
      f"spent; --seconds={enough} tries it"
    )

  def passed(self) -> str:
    """Says so if more was spent than allowed."""
    if self.spent <= self._limit:
      return ""
    return (
      f"Fitting took {self.spent:.0f} s, more than --seconds={self._limit:g}."
    )
