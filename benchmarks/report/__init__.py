"""From the result files of the benchmarks to tables, charts and one page: ``python -m benchmarks.report``."""
