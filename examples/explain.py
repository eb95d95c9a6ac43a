"""Why is it red? What a word does to a picture, feature by feature, and how these features lead to one another.

python examples/explain.py
"""

from common import arguments, load, save

from diffusers_rtsae.analysis.explain import explain
from diffusers_rtsae.analysis.graph import feature_graph
from diffusers_rtsae.analysis.plots import plot_graph, plot_ledger

a = arguments(__doc__)
pipe = load(a)
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}

ledger = explain(pipe, "a large red star on the left, striped, on a white background", "red", **call)
print(ledger)
ledger.save(a.out / "explain.json")
save(plot_ledger(ledger), a.out / "explain.png")

graph = feature_graph(pipe, ledger, **call)
print(graph)
save(plot_graph(graph), a.out / "explain_graph.png")
