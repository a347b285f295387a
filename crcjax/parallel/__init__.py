"""Mesh, sharding and processes: how a run spreads over devices and hosts."""
