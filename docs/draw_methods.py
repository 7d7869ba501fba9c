"""Draws the pictures of docs/methods from bundled vectors and small codecs.

python docs/draw_methods.py          # all, a few minutes
python docs/draw_methods.py rq hakes
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import vqjax
from vqjax.codecs import kmeans, pq, rq
from vqjax.fast_ivf import FastIVF, MiniBatchKMeans
from vqjax.interop import faiss_io

_FOLDER = pathlib.Path(__file__).resolve().parent
_BLUE, _ORANGE, _GREEN, _GRAY = "tab:blue", "tab:orange", "tab:green", "0.6"
_KEY = jax.random.key(0)


def main() -> None:
  pictures = {
    "pq_opq": _draw_pq,
    "rq": _draw_rq,
    "qinco": _draw_qinco,
    "ivf_search": _draw_ivf,
    "hakes": _draw_hakes,
    "rqvae_semantic_ids": _draw_rqvae,
    "fast_ivf": _draw_fast_ivf,
  }
  for name in sys.argv[1:] or pictures:
    figure = pictures[name]()
    path = _FOLDER / "methods" / f"{name}.png"
    figure.savefig(path, dpi=90, metadata={"Software": None})
    sys.stdout.write(f"{path}\n")


def _new(num_columns: int, height: float = 3.4, **settings):
  figure = Figure(figsize=(9, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure, np.atleast_1d(figure.subplots(1, num_columns, **settings))


def _learn(num: int) -> np.ndarray:
  return np.asarray(vqjax.load_dataset("sample_sift").xt[:num], np.float32)


def _plane(num: int) -> np.ndarray:
  """Real vectors in the plane of their first two principal components."""
  x_ND = _learn(num)
  x_ND = x_ND - x_ND.mean(0)
  _, _, axes = np.linalg.svd(x_ND, full_matrices=False)
  x_N2 = x_ND @ axes[:2].T
  return (x_N2 / x_N2.std()).astype(np.float32)


def _bare(axes, title: str, limit: float = 2.6) -> None:
  axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
  axes.set_aspect("equal")
  axes.set_title(title, fontsize=10)


def _dots(axes, x_N2) -> None:
  axes.scatter(*x_N2[:2500].T, s=2, color="0.8", linewidths=0)


def _mse(x_ND, xhat_ND) -> float:
  return float(np.square(np.asarray(x_ND) - np.asarray(xhat_ND)).sum(1).mean())


def _draw_pq() -> Figure:
  figure, panels = _new(2, 4.2)
  x_N2 = _plane(20000) * [1.3, 0.6]
  turn = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
  x_N2 = (x_N2 @ turn).astype(np.float32)  # Numbers that go together.
  rotation = faiss_io.train_opq(x_N2, 2, 3)
  for axes, name, extra in (
    (panels[0], "PQ", {}),
    (panels[1], "OPQ", {"rotation": jnp.asarray(rotation)}),
  ):
    params = pq.fit(
      _KEY, jnp.asarray(x_N2), num_codes=2, codebook_size=8, **extra
    )
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2)
    words = np.asarray(pq.decode(params, jnp.asarray(grid)))
    error = _mse(x_N2, pq.decode(params, pq.encode(params, x_N2)))
    _dots(axes, x_N2)
    axes.scatter(*words.T, s=16, color=_BLUE, label="64 decoded vectors")
    for m, color in enumerate((_ORANGE, _GREEN)):
      line = grid[grid[:, 1 - m] == 3]
      path = np.asarray(pq.decode(params, jnp.asarray(line)))
      axes.plot(*path.T, "-", color=color, lw=1.5)
    _bare(axes, f"{name}: 2 slices, 3 bits each; error {error:.3f}", 3.0)
  return figure


def _draw_rq() -> Figure:
  figure, panels = _new(2, 3.8, width_ratios=[1, 1.25])
  x_N2 = _plane(20000)
  params = rq.fit(_KEY, jnp.asarray(x_N2), num_codes=2, codebook_size=8)
  first_K2, second_K2 = np.asarray(params.codebooks_MKD)
  code = np.asarray(rq.encode(params, jnp.asarray([[1.1, 1.25]])))[0]
  axes, start = panels[0], first_K2[code[0]]
  _dots(axes, x_N2)
  axes.scatter(*first_K2.T, s=30, color=_BLUE, label="codebook 1")
  axes.scatter(
    *(start + second_K2).T, s=14, color=_ORANGE, label="codebook 2, moved there"
  )
  end = start + second_K2[code[1]]
  for tail, tip, color in (
    ((0, 0), start, _BLUE),
    (start, end, _ORANGE),
  ):
    axes.add_patch(
      FancyArrowPatch(tail, tip, arrowstyle="-|>", mutation_scale=12,
                      color=color, shrinkA=0, shrinkB=2, lw=1.6)
    )  # fmt: skip
  axes.plot(1.1, 1.25, "x", color="k", ms=8, label="the vector")
  axes.legend(fontsize=8, loc="lower left", framealpha=0.9)
  _bare(axes, "a vector is a sum of codewords")
  _draw_rq_errors(panels[1])
  return figure


def _draw_rq_errors(axes) -> None:
  """Error after each step, of codecs of 8 x 256 codewords."""
  x_ND = _learn(57000)
  xt_ND, xv_ND = jnp.asarray(x_ND[:55000]), jnp.asarray(x_ND[55000:])
  steps = np.arange(1, 9)
  params = rq.fit(_KEY, xt_ND, num_codes=8)
  for beam_size, color in ((1, _GRAY), (5, _BLUE)):
    codes = rq.encode(params, xv_ND, beam_size=beam_size, block_size=500)
    errors = [_mse(xv_ND, rq.decode(params, codes[:, :m])) for m in steps]
    name = f"RQ, beam {beam_size}"
    axes.plot(steps, np.array(errors) / 1e4, "o-", color=color, label=name)
  rows = []
  for m in (1, 2, 4, 8):
    params = pq.fit(_KEY, xt_ND, num_codes=m)
    rows.append(_mse(xv_ND, pq.decode(params, pq.encode(params, xv_ND))))
  axes.plot(
    (1, 2, 4, 8), np.array(rows) / 1e4, "s--", color=_ORANGE, label="PQ"
  )
  axes.set(xlabel="bytes of code", ylabel="squared error x1e-4", ylim=(0, None))
  axes.set_title("2,000 held-out SIFT vectors", fontsize=10)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(fontsize=9)


def _draw_qinco() -> Figure:
  figure, panels = _new(2, 4.4)
  x_N2 = _plane(20000)
  settings = dict(num_codes=2, seed=0)
  sizes = dict(codebook_size=16)
  residual = vqjax.fit(x_N2, "rq", model=sizes, **settings)
  network = vqjax.fit(
    x_N2,
    "qinco2_xs",
    model=sizes | dict(num_joint_candidates=0, num_candidates=16, beam_size=8),
    encode=dict(num_joint_candidates=0, num_candidates=16, beam_size=16),
    train=dict(num_epochs=15, batch_size=128),
    **settings,
  )
  for axes, codec, name in (
    (panels[0], residual, "RQ: the same second codebook everywhere"),
    (panels[1], network, "QINCo2: a codebook for each first codeword"),
  ):
    first = np.arange(16)
    pairs = np.stack(np.meshgrid(first, first, indexing="ij"), -1)
    words = codec.decode(pairs.reshape(-1, 2)).reshape(16, 16, 2)
    error = _mse(x_N2, codec.decode(codec.encode(x_N2)))
    _dots(axes, x_N2)
    axes.scatter(*words.reshape(-1, 2).T, s=5, color=_GRAY)
    colors = (_BLUE, _ORANGE, _GREEN)
    for k, color in zip(_far_apart(words.mean(1)), colors, strict=True):
      axes.scatter(*words[k].T, s=16, color=color)
    _bare(axes, f"{name}\nerror {error:.4f}")
  return figure


def _far_apart(middles_K2) -> list[int]:
  """The cell at the centre and two outer ones on opposite sides."""
  norms = np.square(middles_K2).sum(1)
  outer = norms.argsort()[-8:]
  first = outer[-1]
  opposite = outer[np.argmin(middles_K2[outer] @ middles_K2[first])]
  return [norms.argmin(), first, opposite]


def _draw_ivf() -> Figure:
  figure, panels = _new(2, 4.0, width_ratios=[1, 1.35])
  x_N2 = _plane(20000)
  centres = np.asarray(kmeans.fit(_KEY, jnp.asarray(x_N2), 40))
  query = np.array([0.62, -0.35])
  axes, side = panels[0], np.linspace(-2.6, 2.6, 500)
  grid = np.stack(np.meshgrid(side, side), -1)
  cell = np.square(grid[..., None, :] - centres).sum(-1).argmin(-1)
  probed = np.square(centres - query).sum(1).argsort()[:3]
  axes.contour(side, side, np.isin(cell, probed), [0.5], colors=[_BLUE])
  edges = (np.diff(cell, axis=0)[:, 1:] != 0) | (np.diff(cell, axis=1)[1:] != 0)
  axes.contour(side[1:], side[1:], edges, [0.5], colors="0.85", linewidths=0.4)
  label = np.square(x_N2[:, None] - centres).sum(-1).argmin(1)
  inside = np.isin(label, probed)
  axes.scatter(*x_N2[~inside][:2500].T, s=2, color="0.75", linewidths=0)
  axes.scatter(*x_N2[inside][:300].T, s=3, color=_BLUE, linewidths=0)
  axes.plot(*query, "*", color=_ORANGE, ms=14, mec="k", mew=0.6)
  _bare(axes, "3 of 40 lists are near the query")
  _draw_stages(panels[1])
  return figure


def _draw_stages(axes) -> None:
  """1-recall@1 stage by stage, from the table of ivf.md."""
  text = (_FOLDER / "ivf.md").read_text(encoding="utf-8")
  table = text.split("| candidates for the network", 1)[1].split("\n\n", 1)[0]
  rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
  found = {row[0]: [c.strip(" |") for c in row[1:]] for row in rows}
  bars = [
    ("scan by the additive decoder", found["none"][0]),
    ("+ pairwise decoder", found["none"][1]),
    ("+ network on the best 10", found["10"][1]),
    ("+ network on the best 50", found["50"][1]),
    ("all vectors decoded", found["all vectors decoded, exact search"][0]),
  ]
  colors = [_GRAY, _ORANGE, _BLUE, _BLUE, "0.3"]
  names = [name for name, _ in bars]
  drawn = axes.barh(names, [float(value) for _, value in bars], color=colors)
  axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, 0.6)
  axes.set_title("1-recall@1 after each stage (ivf.md)", fontsize=10)
  axes.spines[["top", "right"]].set_visible(False)


def _box(axes, x, y, width, text, color="0.93", height=0.8) -> None:
  axes.add_patch(
    FancyBboxPatch((x, y - height / 2), width, height, fc=color, ec="0.3",
                   boxstyle="round,pad=0.03,rounding_size=0.12", lw=0.8)
  )  # fmt: skip
  axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9)


def _arrow(axes, tail, tip, text="", **settings) -> None:
  settings = dict(color="0.3", lw=1.1) | settings
  axes.add_patch(
    FancyArrowPatch(tail, tip, arrowstyle="-|>", mutation_scale=10, **settings)
  )
  if text:
    middle = (np.add(tail, tip) / 2) + [0, 0.16]
    axes.text(*middle, text, ha="center", fontsize=8)


def _canvas(width: float, height: float):
  figure, (axes,) = _new(1, height * 9 / width)
  axes.set(xlim=(0, width), ylim=(0, height))
  axes.set_aspect("equal")
  axes.axis("off")
  return figure, axes


def _draw_hakes() -> Figure:
  figure, axes = _canvas(14, 5.0)
  fixed, learned = "0.92", "#cfe3f5"
  for y, side, color, names, name in (
    (3.9, "data side: fixed", fixed, "A, b|centroids|codebook C", "vector v"),
    (1.4, "query side: learned", learned, "A', b'|centroids'|codebook C'",
     "query x"),
  ):  # fmt: skip
    axes.text(0.1, y + 0.75, side, fontsize=10, weight="bold")
    _box(axes, 0.1, y, 1.7, name, "white")
    for i, (part, what) in enumerate(
      zip(names.split("|"), ("reduce", "list", "code"), strict=True)
    ):
      if y < 2:
        what = ("reduce", "choose lists", "lookup table")[i]
      _box(axes, 2.7 + 2.9 * i, y, 2.1, f"{what}\n{part}", color)
      _arrow(axes, (1.85 + 2.9 * i, y), (2.65 + 2.9 * i, y))
    _arrow(axes, (10.7, y), (11.4, y))
  _box(axes, 11.45, 3.9, 2.3, "stored:\nlist and code", fixed)
  _box(axes, 11.45, 1.4, 2.3, "best k' codes,\nre-ranked exactly", learned)
  _arrow(axes, (12.6, 3.45), (12.6, 1.85), linestyle="--")
  axes.text(
    7,
    0.35,
    "Both sides start equal. Learning moves the lower row "
    "only, so no vector is coded again.",
    ha="center",
    fontsize=9,
  )
  return figure


def _draw_rqvae() -> Figure:
  figure, axes = _canvas(14, 5.4)
  y = 4.4
  _box(axes, 0.1, y, 1.6, "item\nvector x", "white")
  _box(axes, 2.3, y, 1.7, "encoder", "#cfe3f5")
  for i, (word, color) in enumerate(
    (("12", "#fde3c8"), ("7", "#fde3c8"), ("201", "#fde3c8"))
  ):
    _box(axes, 5.0 + 1.9 * i, y, 1.4, f"level {i + 1}\nword {word}", color)
    _arrow(axes, (4.05 + 1.9 * i + 0.4 * (i > 0), y), (4.95 + 1.9 * i, y),
           "z" if i == 0 else "")  # fmt: skip
  _arrow(axes, (1.75, y), (2.25, y))
  _arrow(axes, (10.25, y), (10.75, y))
  _box(axes, 10.8, y, 1.3, "sum\nof words", "#fde3c8")
  _arrow(axes, (12.15, y), (12.55, y))
  _box(axes, 12.6, y, 1.3, "decoder", "#cfe3f5")
  axes.text(7.4, 3.55, "id of the item: <a_12> <b_7> <c_201>", ha="center",
            fontsize=10, weight="bold")  # fmt: skip
  _draw_tree(axes)
  return figure


def _draw_tree(axes) -> None:
  """Two items with one code, and the free codeword that one of them gets."""
  axes.text(0.1, 2.6, "two items with the same code", fontsize=10,
            weight="bold")  # fmt: skip
  axes.text(0.1, 1.6, "The item whose error grows least\ntakes a free last "
            "codeword under\nthe same prefix (resolve=nearest).", fontsize=9,
            va="center")  # fmt: skip
  _box(axes, 5.0, 1.4, 1.2, "12", "#fde3c8", 0.6)
  _box(axes, 7.0, 1.4, 1.2, "7", "#fde3c8", 0.6)
  _arrow(axes, (6.25, 1.4), (6.95, 1.4))
  for at, word, text, color in (
    (2.5, "201", "items A and B", _ORANGE),
    (1.4, "88", "item C", "0.3"),
    (0.4, "140", "free: item B goes here", _BLUE),
  ):
    _box(axes, 9.0, at, 1.2, word, "#fde3c8", 0.6)
    _arrow(axes, (8.25, 1.4), (8.95, at))
    axes.text(10.5, at, text, va="center", fontsize=9, color=color)
  axes.add_patch(
    FancyArrowPatch((13.0, 2.4), (13.3, 0.55), arrowstyle="-|>", lw=1.1,
                    mutation_scale=10, color=_BLUE,
                    connectionstyle="arc3,rad=-0.3")
  )  # fmt: skip


def _draw_fast_ivf() -> Figure:
  figure, panels = _new(2, 3.8, width_ratios=[1.15, 1])
  data = vqjax.load_dataset("sample_text")
  x_ND = np.asarray(data.xt, np.float32)
  index = FastIVF(x_ND.shape[1], nlist=32, nprobe=4, verbose=False)
  index.train(x_ND)
  probes = index.choose_lists(np.asarray(data.xq[:40], np.float32))
  used = np.zeros((40, 32))
  np.put_along_axis(used, probes, 1.0, axis=1)
  axes = panels[0]
  axes.imshow(used, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
  busy = int(used.sum(0).argmax())
  axes.add_patch(
    Rectangle((busy - 0.5, -0.5), 1, 40, fc="none", ec=_ORANGE, lw=2)
  )
  axes.add_patch(Rectangle((-0.5, 11.5), 32, 1, fc="none", ec="0.4", lw=1.2))
  axes.set(xlabel="list", ylabel="query")
  axes.set_title(
    f"{int(used[:, busy].sum())} of 40 queries probe the orange list",
    fontsize=10,
  )
  learner = MiniBatchKMeans(32, batch_size=512, seed=0, verbose=False)
  history = learner.train(x_ND)
  axes = panels[1]
  axes.semilogy(history, color=_BLUE)
  axes.axhline(learner.tol, color=_ORANGE, ls="--")
  axes.text(
    0, learner.tol * 1.2, "tol: training stops", color=_ORANGE, fontsize=9
  )
  axes.set(xlabel="step", ylabel="smoothed share of changed labels")
  axes.set_title("mini-batch k-means, 32 lists", fontsize=10)
  axes.spines[["top", "right"]].set_visible(False)
  return figure


if __name__ == "__main__":
  main()
