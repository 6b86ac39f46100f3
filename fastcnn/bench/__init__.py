"""From the result files of the benchmarks to tables, charts and one page: ``fastcnn bench report``."""
