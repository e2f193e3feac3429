"""Prepared data sets: shards of crayon rows and instructions, written once and streamed."""
