"""Benchmarks of speed, memory and operations. docs/benchmarks.md defines the results.

Names of results: `*_pass`, `block`, `pixel_frame`, `prompt` and `first_frame` are seconds, `fps_*` are pixel frames per
second, `peak_memory` is in bytes, `flops` and `host_syncs` are counts. `share_of_peak` is the fraction of the speed of
large matrix products on the same machine.
"""
