import torch

from training.experiments.fade import markdown, places


def test_places_are_along_the_way():
    way = torch.tensor([0.0, 0.25, 0.5, 1.0])
    first, goal = torch.rand(2, 3), torch.rand(2, 3)
    colours = torch.stack([first + place * (goal - first) for place in way])
    torch.testing.assert_close(places(colours), way.expand(2, -1))
    across = torch.stack([torch.zeros(1, 3), torch.tensor([[0.5, 9.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])])
    assert places(across).tolist() == [[0.0, 0.5, 1.0]]  # what is beside the way does not count


def test_a_line_for_each_factor_with_and_without():
    rows = [
        {
            "label": "red",
            "factor": "colour",
            "fades": fades,
            "jumps": jumps,
            "places": {"0.25": 0.2, "0.5": 0.5, "0.75": 1},
        }
        for fades, jumps in ((True, [0.2, 0.4, 0.6]), (False, [0.9, 1.0, 0.8]))
    ]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| 1 colour | yes | 0.20 | 0.50 | 1.00 | 0.40 | 0.67 |"
    assert lines[3] == "| 1 colour | no | 0.20 | 0.50 | 1.00 | 0.90 | 0.00 |"
