"""From a cohort and a tile store to sharded batches on the devices."""
