"""Side-by-side benchmarks: our loop, ledger and methods against bare loops, limits and peers."""
