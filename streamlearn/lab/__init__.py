"""Labelled data sets as streams: what is labelled, when the label comes, and how the world drifts. All of it seeded."""
