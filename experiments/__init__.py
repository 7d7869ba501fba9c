from vqjax import cpu

cpu.prepare_libraries()  # Here, since the commands import faiss.
