"""The audit trail: a hash-chained log with signed checkpoints, its verification, and the commands that write to it."""
