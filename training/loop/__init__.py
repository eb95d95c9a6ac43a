"""What is fitted and optimised: linear dynamics, one dictionary's step, the loop with its checkpoints and its log."""
