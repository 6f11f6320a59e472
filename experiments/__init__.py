"""One script a published table, the parity check and the benchmark."""
