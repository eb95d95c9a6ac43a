"""From prompts to trajectories: which pictures to make, how they are collected, and where they are kept."""
