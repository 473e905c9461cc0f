"""What benchmarks/cpu_peers and benchmarks/cpu_vs_peft share: runs of qshard, the peers' process, turns, ratios, tables.

Nothing here but `server`, `peer_ops`, `peer_model` and `peer_quantize` imports torch: those run in the peers' environment,
as a process of their own that `client` talks to.
"""
