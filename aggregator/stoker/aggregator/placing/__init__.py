"""Where requests go: filters with reasons, scores, and the search for the best place. All pure."""
