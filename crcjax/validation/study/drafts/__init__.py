"""Drafts for journals and regulators: filled from results.json, plan and model card, with every other item left open by name."""
