"""What is written where files may not grow: one sentence, nothing left."""

import json
import os
import subprocess
import sys

import pytest

_CODE = """
import json, resource, signal, sys
import faiss, numpy as np
from vqjax.data import files, formats
from vqjax.interop import faiss_io
from vqjax.storage import tensors

x_ND = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
index = faiss.IndexFlatL2(64)
index.add(x_ND)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))

def vectors(path):
  formats.write_vectors(path, (x_ND[i : i + 500] for i in range(0, 4000, 500)))

def safetensors(path):
  tensors.save(
    path, {"x": x_ND}, {}, overwrite=False, info={}, format="f", version=1)

def npz(path):
  with files.atomic_output(path) as temporary:
    np.savez(temporary, x=x_ND)

def index_file(path):
  meta = {"format": "vqjax test"}
  with faiss_io.write_index(index, path, description=meta):
    pass

said = {}
for name, write in (
  ("a.npy", vectors), ("a.fvecs", vectors), ("a.fbin", vectors),
  ("a.h5", vectors), ("a.safetensors", safetensors), ("a.npz", npz),
  ("a.faiss", index_file),
  ("a.json", lambda path: files.write_json(path, {"a": ["x" * 100] * 4000})),
):
  try:
    write(sys.argv[1] + "/" + name)
    said[name] = "written"
  except OSError as error:
    said[name] = str(error)
print(json.dumps(said), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_full_disks(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", _CODE, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr  # HDF5 crashes at the end if it may.
  said = json.loads(done.stdout)
  assert len(said) == 8
  for name, text in said.items():
    assert f"The disk is full: could not write {tmp_path}/{name}," in text
  assert os.listdir(tmp_path) == []
