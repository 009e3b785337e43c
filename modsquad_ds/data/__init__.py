"""Data: real dataset layouts (sources) -> tar shards with an index (convert, shards) -> per-task streams -> batches."""
