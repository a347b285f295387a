"""Flax modules of the MIL model: tile encoders, aggregators and heads. They read no files."""
