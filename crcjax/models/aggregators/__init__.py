"""Bag aggregators: instance features to one slide embedding and class logits."""
