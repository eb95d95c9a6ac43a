"""`python -m training.evaluate`: a report of dictionaries, see `python -m training.evaluate --help`."""

from .commands import evaluate

if __name__ == "__main__":
    evaluate()
