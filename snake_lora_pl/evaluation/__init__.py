"""Play evaluation: policies, the game loop, statistics and metrics; independent of how a policy was trained."""
