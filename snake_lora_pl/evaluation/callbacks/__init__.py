"""Lightning callbacks that evaluate a model during training and prediction."""
