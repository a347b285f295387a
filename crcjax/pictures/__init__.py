"""Pictures for pathologists, from predictions: overlays for viewers, contact sheets and case reports."""
