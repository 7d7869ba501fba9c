"""vqjax in benchmarks that others run; see README.md."""
