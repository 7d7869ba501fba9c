"""Settings that say how items with the same code are told apart."""

import dataclasses

import numpy as np

from vqjax.core import check_range

RESOLVERS = ("nearest", "backtrack", "sinkhorn", "token", "none")
DUPLICATES = ("share", "token", "backtrack")
TOKEN_FOR = ("collided", "all")


@dataclasses.dataclass(frozen=True)
class Resolver:
  """How items with the same code are told apart.

  `nearest` gives them other last codewords, at the least error added over all;
  `backtrack` other ones before the last, too; `sinkhorn` is the loop of LC-Rec;
  `token` appends a token that counts them; `none` leaves them.
  """

  resolve: str = "nearest"
  capacity: int = 1  # Items that may share an id.
  token_for: str = "collided"  # Who gets the token of `token`: or "all".
  # Items whose vectors are the same: "share" an id (and count as one), or are
  # told apart by one more "token", or as different items by "backtrack".
  separate_duplicates: str = "share"
  sk_epsilon: float | None = None  # None: the codec's, else 0.003.
  sk_iters: int | None = None  # None: the codec's, else 50.
  max_rounds: int = 20  # Of `sinkhorn`.

  def __post_init__(self):
    """Raises ValueError if settings do not fit."""
    for name, known in (
      ("resolve", RESOLVERS),
      ("token_for", TOKEN_FOR),
      ("separate_duplicates", DUPLICATES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name} must be one of {', '.join(known)}; got "
          f"{getattr(self, name)!r}."
        )
    check_range("capacity", self.capacity, 1, 1 << 31)
    check_range("max_rounds", self.max_rounds, 1, 1 << 31)
    if self.sk_iters is not None:
      check_range("sk_iters", self.sk_iters, 1, 1 << 31)
    if self.sk_epsilon is not None and not 0 < self.sk_epsilon < np.inf:
      raise ValueError(f"sk_epsilon must be above 0, got {self.sk_epsilon}.")
    if self.separate_duplicates == "backtrack" and not self.is_settled:
      raise ValueError(
        "separate_duplicates='backtrack' needs resolve='nearest' or "
        f"'backtrack'; with {self.resolve!r} take 'token'."
      )

  @property
  def is_settled(self) -> bool:
    """Whether it looks for free ids."""
    return self.resolve in ("nearest", "backtrack")

  @property
  def merges_duplicates(self) -> bool:
    """Whether equal vectors are one item until a token tells them apart."""
    return self.is_settled and self.separate_duplicates != "backtrack"

  @property
  def adds_token(self) -> bool:
    """Whether ids may get a token more."""
    return "token" in (self.resolve, self.separate_duplicates)

  def of(self, info: dict) -> "Resolver":
    """Returns it with what a codec says of Sinkhorn if that is unset."""
    if self.resolve != "sinkhorn":
      return self
    epsilon = (info.get("sk_epsilons") or [0.0])[-1]
    return dataclasses.replace(
      self,
      sk_epsilon=self.sk_epsilon or (epsilon if epsilon > 0 else 0.003),
      sk_iters=self.sk_iters or info.get("sk_iters") or 50,
    )
