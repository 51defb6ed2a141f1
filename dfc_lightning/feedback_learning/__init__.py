"""How the feedback weights are learned."""
