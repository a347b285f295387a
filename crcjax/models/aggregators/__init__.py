"""Aggregators, which pool the features of a bag's instances to one embedding and class logits."""
