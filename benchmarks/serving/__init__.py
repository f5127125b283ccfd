"""The parts of benchmarks/serve: accounting of CPU and memory, servers, load, cases, report."""
