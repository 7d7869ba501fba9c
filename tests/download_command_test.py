"""`vqjax download`: names to files, from a stand-in of the servers."""

import gzip
import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from experiments import download
from experiments.lib import downloading
from tests import commands, file_server
from vqjax.data import datasets, downloads, fetching, formats, transfer

IRISA = "/ftp.irisa.fr/local/texmex/corpus"


def _bytes(suffix, x_ND, folder) -> bytes:
  path = folder / f"made{suffix}"
  formats.write_vectors(path, x_ND, overwrite=True)
  return path.read_bytes()


@pytest.fixture(name="server")
def _server(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(transfer, "_sleep", lambda seconds: None)
  caplog.set_level("INFO", "absl")
  x_ND = np.random.default_rng(0).integers(0, 256, (50, 128))
  vectors = _bytes(".bvecs", x_ND, tmp_path)
  ids = _bytes(".ivecs", np.zeros((5, 100), np.int32), tmp_path)
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w:gz") as archive:
    for name in ("gnd/idx_1M.ivecs", "gnd/idx_10M.ivecs"):
      info = tarfile.TarInfo(name)
      info.size = len(ids)
      archive.addfile(info, io.BytesIO(ids))
  with file_server.running(file_server.FileServer()) as server:
    server.files |= {
      "/datasets/bigann/bigann_learn_10M10k.bvecs": vectors,
      "/datasets/bigann/bigann1M.bvecs": vectors[: 40 * 132],
      "/datasets/bigann/gnd/idx_1M.ivecs": ids,
      f"{IRISA}/bigann_query.bvecs.gz": gzip.compress(vectors[: 5 * 132]),
      f"{IRISA}/bigann_gnd.tar.gz": packed.getvalue(),
      "/qinco2-models/qinco2_L-bigann1M-8x8.pt": b"PK no zip",
    }
    for part in ("learn", "base"):
      server.files[f"{IRISA}/bigann_{part}.bvecs.gz"] = gzip.compress(vectors)
    yield server


@pytest.fixture(name="run")
def _run(server, tmp_path):
  root = tmp_path / "data"
  return lambda names, **values: download.run(
    names=names, base_url=server.url, data_root=root, **values
  )


def test_a_data_set_is_where_training_looks(run, server, tmp_path, caplog):
  result = run("bigann1M", small=True)
  root = tmp_path / "data"
  dataset = datasets.get_dataset("bigann1M", root)
  shapes = [datasets.open_split(dataset, s).shape for s in datasets.SPLITS]
  assert shapes == [(50, 128), (40, 128), (5, 128), (5, 100)]
  assert len(result["files"]) == 4
  command = f"vqjax train --config=qinco2_s:bigann1M --config.data.root={root}"
  assert command in caplog.text
  assert "BIGANN has terms of its own" in caplog.text
  assert "bigann_base.bvecs has 40 x 128 numbers, and its name" in caplog.text
  server.asked.clear()
  assert run("bigann1M", small=True) == result
  assert server.asked == []  # All is there.
  assert "bigann_base.bvecs is here already." in caplog.text


def test_the_whole_serves_the_million(run, server, tmp_path, monkeypatch):
  monkeypatch.setattr(fetching.files, "check_folder", lambda *_, **__: None)
  monkeypatch.setattr(transfer.files, "check_space", lambda *_: None)
  run("bigann1B")
  folder = tmp_path / "data/bigann"
  assert (folder / "gnd/idx_10M.ivecs").is_file()
  assert (folder / "bigann_base.bvecs").stat().st_size == 50 * 132
  server.asked.clear()
  run("bigann1M")
  assert server.asked == []
  # Not the other way: a million is no billion.
  for path in folder.glob("*base*"):
    path.unlink()
  run("bigann1M")
  with pytest.raises(FileExistsError, match="bigann1M.bvecs, not from ftp"):
    run("bigann1B")


def test_room_is_looked_for_before_anything_comes(run, server, tmp_path):
  with pytest.raises(OSError, match="will take about .* MB, but .* MB free"):
    run("bigann1B")
  assert server.asked == []
  with pytest.raises(FileNotFoundError, match="answers 404"):
    run("bigann1M,contriever1M")
  assert server.asked == []


def test_a_checkpoint_with_its_licence_and_next_command(run, tmp_path, caplog):
  path = tmp_path / "data/models/qinco2_L-bigann1M-8x8.pt"
  assert run("qinco2_l-bigann1m-8x8.pt")["files"] == [str(path)]
  assert "CC-BY-NC 4.0" in caplog.text
  assert f"vqjax download bigann1M --data_root={tmp_path}/data\n" in caplog.text
  assert f"vqjax evaluate --codec={path} --data=" in caplog.text
  assert "is no checkpoint of torch.save" in caplog.text


def test_files_of_others_are_left_alone(run, tmp_path):
  path = tmp_path / "data/models/qinco2_L-bigann1M-8x8.pt"
  path.parent.mkdir(parents=True)
  path.write_bytes(b"PK no zop")  # As many bytes.
  run("qinco2_L-bigann1M-8x8")
  assert path.read_bytes() == b"PK no zop"
  path.write_bytes(b"PK")
  with pytest.raises(FileExistsError, match="has 2 bytes instead of 9"):
    run("qinco2_L-bigann1M-8x8")
  run("qinco2_L-bigann1M-8x8", overwrite=True)
  assert path.read_bytes() == b"PK no zip"
  path.write_bytes(b"PK no zop")
  run("qinco2_L-bigann1M-8x8")
  with pytest.raises(ValueError, match="has other content"):
    run("qinco2_L-bigann1M-8x8", verify=True)


def test_the_table_has_all_that_was_released():
  assert len(downloads.ALL) == 70
  urls = {f.url for each in downloads.ALL.values() for f in each.files}
  for url in (
    "/qinco2-models/qinco1-FB_ssnpp1M-16x8.pt",
    "/qinco2-models/IVF-qinco2_M-deep1B-32x8.pt",
    "/qinco2-models/ivf_centroids_bigann1B_1048576.npy",
    "/models/deep_IVF65k_16x8_L4.pt",
    "/ivf/bigann_centroids_1M.npy",
    "/ivf/bigann10M_IVF65k_16x8_L2.faissindex",
    "/ivf/deep1B_IVF1M_32x8_L4.faissindex",
    "/datasets/FB_ssnpp/training_set10010k.npy",
    "https://storage.yandexcloud.net/yandex-research/ann-datasets/DEEP/"
    "base.1B.fbin",
  ):
    assert url in urls
  (base,) = (f for f in downloads.get("bigann1B").files if "base" in f.path)
  order = downloads.order(base, "data")
  assert order.url == order.source
  assert (order.pack, order.unpacked_bytes) == ("gz", 132_000_000_000)


def test_every_name_has_next_commands_with_flags_that_exist(tmp_path):
  for each in downloads.ALL.values():
    for command in downloading.next_commands(each, tmp_path):
      name, *flags = command.split()[1:]
      known = (commands.ROOT / f"experiments/{name}.py").read_text()
      for name in ("cli", "engine"):
        known += (commands.ROOT / f"experiments/lib/{name}.py").read_text()
      for flag in flags:
        if flag.startswith("--") and not flag.startswith("--config"):
          assert f'"{flag[2:].partition("=")[0]}"' in known


def test_names_are_listed_and_misspelt_ones_get_a_suggestion(run, tmp_path):
  text = downloading.overview(tmp_path)
  assert all(f"  {name} " in text for name in downloads.ALL)
  with pytest.raises(
    ValueError, match="'bigan1M' to.*: did you mean 'bigann1M'"
  ):
    run("bigan1M")
  with pytest.raises(ValueError, match="begin with one of http.*'bigann'"):
    download.run(names="bigann1M", base_url="bigann")
  with pytest.raises(ValueError, match="Name what to download"):
    download.run()


def test_names_are_words_of_the_command_line(server, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "vqjax", "download", "qinco2_L-bigann1M-8x8"),
      *("--small", f"--data_root={tmp_path}", f"--base_url={server.url}"),
    ],
    cwd=commands.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "models/qinco2_L-bigann1M-8x8.pt").is_file()
  assert done.stdout == ""
