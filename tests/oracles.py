"""What the package computes, as slow loops in plain NumPy and float64.

Written from the papers and the definitions, one vector, one word and one
candidate at a time. Nothing here uses JAX or the package.
"""

import numpy as np

# -- Distances and k-means --


def sq_distances(x, y):
  """Squared L2 between all rows: `[N, K]`."""
  out = np.zeros((len(x), len(y)))
  for i, a in enumerate(np.asarray(x, np.float64)):
    for j, b in enumerate(np.asarray(y, np.float64)):
      out[i, j] = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
  return out


def nearest(x, y):
  """Row of y nearest to each row of x, the lower of equals: `[N]`."""
  return np.array([int(np.argmin(row)) for row in sq_distances(x, y)])


def kmeans_step(x, weights, words):
  """One assignment and update: `(words, counts, objective)`.

  The e-th empty word moves to the vector with the e-th largest weighted error.
  """
  x, words = np.asarray(x, np.float64), np.asarray(words, np.float64)
  distances = sq_distances(x, words)
  ids = distances.argmin(axis=1)
  error = [
    w * row[i] for w, row, i in zip(weights, distances, ids, strict=True)
  ]
  far = np.argsort(-np.array(error), kind="stable")
  counts, out, num_empty = np.zeros(len(words)), words.copy(), 0
  for k in range(len(words)):
    total = np.zeros(x.shape[1])
    for row, weight, i in zip(x, weights, ids, strict=True):
      if i == k:
        total += weight * row
        counts[k] += weight
    if counts[k] > 0:
      out[k] = total / counts[k]
    else:
      out[k] = x[far[num_empty]]
      num_empty += 1
  return out, counts, sum(error)


# -- Beam search --


def _keep(candidates, size):
  """The `size` best of `(error, ...)`; equal errors keep their order."""
  order = sorted(range(len(candidates)), key=lambda i: candidates[i][0])
  return [candidates[i] for i in order[:size]]


def beam(books, x, beam_size):
  """Codes `[N, M]` of a beam search over additive codebooks, `[K, D]` each."""
  books = [np.asarray(book, np.float64) for book in books]
  codes = []
  for row in np.asarray(x, np.float64):
    kept = [(float(row @ row), (), np.zeros_like(row))]
    for book in books:
      grown = []
      for _, code, xhat in kept:
        for k, word in enumerate(book):
          new = xhat + word
          grown.append((float(((row - new) ** 2).sum()), (*code, k), new))
      kept = _keep(grown, beam_size)
    codes.append(kept[0][1])
  return np.array(codes, np.int32)


# -- QINCo --


def _weight(params, name, *at):
  """A float64 weight matrix of `QincoParams`, or None for an identity."""
  leaf = getattr(params, name)
  if leaf is None:
    return None
  leaf = np.asarray(leaf, np.float64)
  return leaf[at] if at else leaf


def _times(x, w):
  return x if w is None else x @ w


def qinco_word(params, t, k, xhat):
  """Word k of the t-th step with a network, given xhat; normalised units.

  Reference: arXiv 2401.14732, section 3; arXiv 2501.03078, section 3.
  """
  c = _weight(params, "codebooks_TKD", t, k)
  e = _concatenated(params, t, k, xhat)
  ups = _weight(params, "up_TJEH", t)
  downs = _weight(params, "down_TJHE", t)
  for up, down in zip(ups, downs, strict=True):
    e = e + np.maximum(e @ up, 0) @ down
  out = _times(e, _weight(params, "out_TED", t))
  return c + out if params.add_word else out


def _concatenated(params, t, k, xhat):
  """What the residual blocks of a step begin with."""
  c = _weight(params, "codebooks_TKD", t, k)
  e = _times(c, _weight(params, "in_TDE", t))
  both = np.concatenate([e, xhat])
  concat = np.concatenate(
    [_weight(params, "word_TEU", t), _weight(params, "state_TDU", t)]
  )
  step = _times(both @ concat, _weight(params, "mix_TUE", t))
  bias = _weight(params, "bias_TE", t)
  return e + step + (0 if bias is None else bias)


def ranker_word(params, ranker, t, k, xhat):
  """What a ranker takes word k of the t-th step for; normalised units."""
  at = lambda name: np.asarray(getattr(ranker, name), np.float64)[t]
  up = _weight(params, "up_TJEH", t)[0]
  hidden = np.maximum(_concatenated(params, t, k, xhat) @ up, 0)
  added = at("words_TKU")[k] + xhat @ at("state_TDU")
  added = added + hidden @ at("hidden_THU")
  return _weight(params, "preselect_TKD", t, k) + at("basis_TDU") @ added


def qinco_decode(params, codes):
  """Vectors in data units of codes `[N, <= M]`."""
  first = _weight(params, "first_KD")
  rows = []
  for code in np.asarray(codes):
    xhat = first[code[0]]
    for t, k in enumerate(code[1:]):
      xhat = xhat + qinco_word(params, t, k, xhat)
    rows.append(xhat * float(params.std) + _weight(params, "mean_D"))
  return np.array(rows)


def _preselect(residuals, book, num_candidates, num_joint):
  """Pairs (hypothesis, word) that go through the network, in slot order."""
  scores = [[float(((r - s) ** 2).sum()) for s in book] for r in residuals]
  if num_joint:
    pairs = [
      (score, f, k)
      for f, row in enumerate(scores)
      for k, score in enumerate(row)
    ]
    return [(f, k) for _, f, k in _keep(pairs, num_joint)]
  pairs = []
  for f, row in enumerate(scores):
    ranked = _keep([(score, k) for k, score in enumerate(row)], num_candidates)
    pairs += [(f, k) for _, k in ranked]
  return pairs


def _ranked(params, ranker, t, z, kept, pairs, num):
  """Those of the pairs whose words leave least, as the ranker sees them."""
  errors = []
  for f, k in pairs:
    xhat = kept[f][2]
    left = z - xhat - ranker_word(params, ranker, t, k, xhat)
    errors.append((float((left**2).sum()), f, k))
  return [(f, k) for _, f, k in _keep(errors, num)]


def _qinco_beam(
  params,
  z,
  num_candidates,
  beam_size,
  num_joint,
  ranker=None,
  num_ranked=0,
):
  """Hypotheses `(error, code, xhat)` of a normalised vector, best first.

  See `qinco_encode`; the last step keeps one of them.
  """
  num_networks, num_codewords = params.codebooks_TKD.shape[:2]
  is_all = not num_candidates and not num_joint
  kept = [
    (float(((z - word) ** 2).sum()), (k,), word)
    for k, word in enumerate(_weight(params, "first_KD"))
  ]
  kept = _keep(kept, 1 if params.is_ivf else beam_size)
  for t in range(num_networks):
    is_last = t == num_networks - 1
    one, joint = num_candidates, num_joint
    if params.is_ivf and t == 0:
      # One hypothesis must offer enough words for the whole beam.
      one, joint = max(joint or one, beam_size), 0
    elif joint and is_last:
      joint = max((joint + 3) // 4, min(joint, 16))
    if is_all:
      pairs = [(f, k) for f in range(len(kept)) for k in range(num_codewords)]
    else:
      residuals = [z - xhat for _, _, xhat in kept]
      book = _weight(params, "preselect_TKD", t)
      pairs = _preselect(residuals, book, one, joint)
    ranked = num_ranked
    if is_last and t > 0:
      ranked = max((ranked + 7) // 8, min(ranked, 8))
    if ranker is not None and ranked < len(pairs):
      pairs = _ranked(params, ranker, t, z, kept, pairs, ranked)
    grown = []
    for f, k in pairs:
      _, code, xhat = kept[f]
      new = xhat + qinco_word(params, t, k, xhat)
      grown.append((float(((z - new) ** 2).sum()), (*code, k), new))
    kept = _keep(grown, 1 if is_last else beam_size)
  return kept


def qinco_encode(
  params,
  x,
  num_candidates,
  beam_size,
  num_joint_candidates=0,
  ranker=None,
  num_ranked=0,
):
  """Codes of vectors in data units, one candidate after the other.

  `num_candidates` = 0 sends every word through the network. Ties go to the
  lower slot: hypothesis by hypothesis, in each by rank in the pre-selection;
  under the joint rule by rank among all pairs. The last step, which keeps one
  hypothesis, looks at a quarter of the joint candidates, at least 16. A ranker
  lets `num_ranked` of the joint
  candidates through, in such a last step an eighth of them, at least 8.
  """
  std = float(params.std)
  codes = []
  for row in np.asarray(x, np.float64):
    z = (row - _weight(params, "mean_D")) / std
    kept = _qinco_beam(
      *(params, z, num_candidates, beam_size, num_joint_candidates),
      ranker=ranker,
      num_ranked=num_ranked,
    )
    codes.append(kept[0][1])
  return np.array(codes, np.int32)
