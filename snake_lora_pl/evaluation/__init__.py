"""Any policy plays or answers -> figures. Knows the game, not how a policy was trained."""
