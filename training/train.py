"""`python -m training.train`: train the dictionaries of a recipe, see `python -m training.train --help`."""

from .commands import train

if __name__ == "__main__":
    train()
